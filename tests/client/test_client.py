"""Both clients: enqueueing once, states, following through faults, cancelling."""

import asyncio
import json

import pytest
from conftest import StartWorker, stream
from redis.asyncio import Redis
from waits import eventually

from worker import (
    Client,
    Conflict,
    Delta,
    Expired,
    InvalidJob,
    Lifecycle,
    Queued,
    State,
    Status,
    SyncClient,
    Unavailable,
    UnknownRequest,
)
from worker.client.new_job import JobOptions
from worker.contract.entries import parse
from worker.contract.ids import SEAL, EntryId
from worker.engine.application import Worker
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator

ASK: dict[str, object] = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}]}
TEXT = answer_to([{"role": "user", "content": "Who are you?"}])


async def test_the_same_request_with_the_same_id_is_enqueued_once(client: Client, redis: Redis) -> None:
    again = {"messages": ASK["messages"], "model": "reciter"}
    assert await client.enqueue(ASK, id="mine") == await client.enqueue(again, id="mine") == "mine"
    assert await redis.xlen("chat:jobs") == 1


async def test_a_log_begins_with_the_place_and_the_time_of_its_job(client: Client, redis: Redis) -> None:
    request_id = await client.enqueue(ASK, queue="batch")
    ((job, _),) = await stream(redis, "chat:jobs:batch")
    ((_, fields),) = await stream(redis, f"chat:tokens:{{{request_id}}}")
    queued = parse("0-1", fields)
    assert isinstance(queued, Queued)
    assert queued.queue == "batch"
    assert 0 <= EntryId.parse(job).attempt - queued.time < 30_000


@pytest.mark.parametrize(
    ("content", "options"),
    [("half an emoji: \ud83d", {}), ("Hi", {"tenant": "\ud83d"}), ("Hi", {"fallbacks": ["\ud83d"]})],
)
async def test_a_job_with_text_that_is_not_unicode_is_refused(
    content: str, options: JobOptions, client: Client, redis: Redis
) -> None:
    with pytest.raises(InvalidJob, match="text that is not Unicode"):
        await client.enqueue({"messages": [{"role": "user", "content": content}]}, **options)
    assert not await redis.exists("chat:jobs")


async def test_concurrent_calls_with_one_id_add_one_job(client: Client, redis: Redis) -> None:
    await asyncio.gather(*(client.enqueue(ASK, id="mine") for _ in range(20)))
    assert await redis.xlen("chat:jobs") == 1


async def test_another_request_with_the_same_id_is_refused(client: Client, redis: Redis) -> None:
    await client.enqueue(ASK, id="mine")
    with pytest.raises(Conflict, match="mine belongs to another request"):
        await client.enqueue(ASK | {"temperature": 1}, id="mine")
    with pytest.raises(Conflict):
        await client.enqueue(ASK, id="mine", fallbacks=["other"])
    assert await redis.xlen("chat:jobs") == 1


async def enqueue_by_hand(redis: Redis, request_id: str) -> None:
    """Enqueue as the examples for other languages do: without the digest."""
    pipe = redis.pipeline()
    pipe.xadd(f"chat:tokens:{{{request_id}}}", {"type": "queued", "v": 1}, id="0-1")
    pipe.expire(f"chat:tokens:{{{request_id}}}", 90_000)
    pipe.xadd("chat:jobs", {"id": request_id, "request": json.dumps(ASK)})
    await pipe.execute()


async def test_a_log_without_a_digest_is_followed_and_its_job_is_run(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    """A client in any language may leave the digest out. `enqueue` finds it in `started`."""
    await enqueue_by_hand(redis, "mine")
    assert (await client.status("mine")).state is State.QUEUED
    entry = await anext(client.follow("mine"))
    assert (entry.type, entry.id) == ("queued", (0, 1))
    with pytest.raises(Conflict, match="omitted the digest"):
        await client.enqueue(ASK, id="mine")
    await start_worker(simulator)
    assert (await client.result("mine")).text == TEXT
    assert await client.enqueue(ASK, id="mine") == "mine"
    with pytest.raises(Conflict, match="another request"):
        await client.enqueue(ASK | {"temperature": 1}, id="mine")
    assert await redis.xlen("chat:jobs") <= 1


async def test_an_id_whose_log_was_emptied_gets_no_second_job(client: Client, redis: Redis) -> None:
    await enqueue_by_hand(redis, "mine")
    await redis.xdel("chat:tokens:{mine}", "0-1")
    with pytest.raises(Conflict, match="its entries were deleted"):
        await client.enqueue(ASK, id="mine")
    assert await redis.xlen("chat:jobs") == 1


@pytest.mark.usefixtures("worker")
async def test_an_id_cannot_be_used_again_after_its_log_has_expired(client: Client, redis: Redis) -> None:
    request_id = await client.enqueue(ASK)
    await client.result(request_id)
    await gone(redis, request_id)
    assert await client.enqueue(ASK, id=request_id) == request_id
    with pytest.raises(Conflict):
        await client.enqueue(ASK | {"temperature": 1}, id=request_id)


async def gone(redis: Redis, request_id: str) -> None:
    """Wait for the tombstone, and let the log expire now, not after an hour."""

    async def tombstone() -> object:
        return await redis.get(f"chat:ended:{{{request_id}}}")

    await eventually(tombstone)
    await redis.delete(f"chat:tokens:{{{request_id}}}")


async def test_status_tells_the_states_apart(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    assert await client.status("nobody") == Status(State.UNKNOWN)
    request_id = await client.enqueue(ASK | {"simulate": {"rate": 30}})
    assert await client.status(request_id) == Status(State.QUEUED)
    await start_worker(simulator)
    async for entry in client.follow(request_id):
        if isinstance(entry, Delta):
            assert await client.status(request_id) == Status(State.RUNNING)
            break
    await client.result(request_id)
    assert await client.status(request_id) == Status(State.ENDED, "done")
    await gone(redis, request_id)
    assert await client.status(request_id) == Status(State.EXPIRED, "done")


async def test_following_an_unknown_and_an_expired_request_raises_different_errors(
    client: Client, redis: Redis
) -> None:
    with pytest.raises(UnknownRequest, match="the request nobody is unknown"):
        await client.result("nobody")
    await redis.set("chat:ended:{old}", '{"outcome":"error","time":5}', ex=60)
    with pytest.raises(Expired, match=r"ended \(error\)") as caught:
        await client.result("old")
    assert (caught.value.outcome, caught.value.time) == ("error", 5)


async def test_a_follower_of_a_queued_request_waits_for_its_entries(
    client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    request_id = await client.enqueue(ASK)
    following = asyncio.create_task(client.result(request_id))
    done, _ = await asyncio.wait({following}, timeout=0.05)
    assert not done
    await start_worker(simulator)
    assert (await following).text == TEXT


@pytest.mark.usefixtures("worker")
async def test_a_follower_survives_a_lost_connection(client: Client, redis: Redis) -> None:
    request_id = await client.enqueue(ASK | {"simulate": {"rate": 60}})
    text = ""
    async for entry in client.follow(request_id):
        if isinstance(entry, Delta):
            text += entry.content
            if entry.id.n in (5, 10, 15):
                await redis.client_kill_filter(_type="normal", skipme=True)
    assert text == TEXT


@pytest.mark.usefixtures("worker")
async def test_generate_enqueues_and_follows(client: Client) -> None:
    entries = [entry async for entry in client.generate(ASK, id="both")]
    assert "".join(entry.content for entry in entries if isinstance(entry, Delta)) == TEXT
    assert await client.status("both") == Status(State.ENDED, "done")


@pytest.mark.usefixtures("worker")
async def test_submit_returns_the_id_before_the_first_entry(client: Client) -> None:
    handle = await client.submit(ASK)
    assert (await client.status(handle.id)).state in {State.QUEUED, State.RUNNING, State.ENDED}
    entries = [entry async for entry in handle.entries()]
    assert "".join(entry.content for entry in entries if isinstance(entry, Delta)) == TEXT
    assert [entry async for entry in handle.entries(after=entries[2].id)] == entries[3:]
    assert (await handle.result()).text == TEXT
    assert await handle.cancel() == Status(State.ENDED, "done")
    assert repr(handle) == f"RequestHandle(id={handle.id!r})"


async def test_a_submitted_request_can_be_cancelled_before_a_worker_takes_it(client: Client) -> None:
    handle = await client.submit(ASK, id="mine")
    assert handle.id == "mine"
    assert await handle.cancel() == Status(State.QUEUED)
    assert (await handle.result()).outcome == "cancelled"


@pytest.mark.usefixtures("worker")
async def test_the_lifecycle_of_all_requests_is_followed(client: Client) -> None:
    lines: list[Lifecycle] = []
    request_ids = [await client.enqueue(ASK, tenant="t"), await client.enqueue(ASK)]
    async for line in client.lifecycle():
        lines.append(line)
        if len(lines) == 2:
            request_ids.append(await client.enqueue(ASK))
        if len(lines) == 6:
            break
    seen = {(line.type, line.id) for line in lines}
    assert seen == {(kind, request_id) for kind in ("started", "finished") for request_id in request_ids}
    (finished,) = [line for line in lines if line.type == "finished" and line.tenant]
    assert (finished.id, finished.outcome, finished.model, finished.attempt) == (request_ids[0], "done", "reciter", 1)
    assert finished.usage["completion_tokens"] > 0
    assert finished.time > 1_700_000_000_000
    async for line in client.lifecycle(after=lines[3].line):
        assert line == lines[4]
        break
    async for line in client.lifecycle(after=lines[0].line.split("-")[0]):  # a time
        assert line in lines
        break


async def test_an_unreadable_line_of_the_lifecycle_stops_no_reader(client: Client, redis: Redis) -> None:
    await redis.xadd(
        "chat:lifecycle", {"type": b"\xff", "attempt": "x", "time": "9" * 40, "usage": "[", "timings": "5"}
    )
    async for line in client.lifecycle():
        assert (line.type, line.attempt, line.time, line.usage, line.timings) == ("\ufffd", 0, 0, {}, {})
        break


async def test_closing_the_client_ends_a_reader_of_the_lifecycle(redis_url: str) -> None:
    client = Client(redis_url)

    async def follow() -> None:
        async for _ in client.lifecycle():
            pass

    following = asyncio.create_task(follow())
    await asyncio.wait({following}, timeout=0.05)
    await client.aclose()
    with pytest.raises(Unavailable, match="the client is closed"):
        await following


async def test_cancelling_a_queued_request_writes_seal_expiry_and_tombstone(client: Client, redis: Redis) -> None:
    request_id = await client.enqueue(ASK)
    assert await client.cancel(request_id) == Status(State.QUEUED)
    assert (await client.result(request_id)).outcome == "cancelled"
    assert await client.cancel(request_id) == Status(State.ENDED, "cancelled")
    assert 0 < await redis.ttl(f"chat:tokens:{{{request_id}}}") <= 3600
    assert await client.enqueue(ASK, id=request_id) == request_id


async def test_cancelling_an_unknown_id_keeps_its_job_from_running(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    assert await client.cancel("coming") == Status(State.UNKNOWN)
    await redis.xadd("chat:jobs", {"id": "coming", "request": json.dumps(ASK)})
    await start_worker(simulator)

    async def acknowledged() -> bool:
        lines = [fields[b"type"] for _, fields in await stream(redis, "chat:lifecycle")]
        return b"finished" in lines

    await eventually(acknowledged)
    assert not simulator.served


@pytest.mark.parametrize(
    ("request_", "message"),
    [({}, "no messages"), ({"messages": []}, "no messages"), (ASK | {"n": 0}, "whole number from 1")],
)
async def test_an_invalid_request_is_refused_before_anything_is_sent(
    request_: dict[str, object], message: str, client: Client, redis: Redis
) -> None:
    with pytest.raises(InvalidJob, match=message):
        await client.enqueue(request_)
    with pytest.raises(InvalidJob, match="cannot be used"):
        await client.enqueue(ASK, id="no/slash")
    assert await redis.dbsize() == 0


async def test_a_redis_that_does_not_answer_raises_unavailable() -> None:
    async with Client(f"redis://127.0.0.1:{free_port()}", patience=0.1) as client:
        with pytest.raises(Unavailable, match="Redis does not answer"):
            await client.enqueue(ASK)


async def test_three_hundred_followers_get_the_same_entries(client: Client, worker: Worker) -> None:
    assert worker is not None
    request_id = await client.enqueue(ASK | {"simulate": {"rate": 100}})
    answers = await asyncio.gather(*(client.result(request_id) for _ in range(300)))
    assert {answer.text for answer in answers} == {TEXT}


async def test_the_blocking_client_does_the_same(
    redis_url: str, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    def in_a_thread() -> None:
        with SyncClient(redis_url) as client:
            request_id = client.enqueue(ASK, id="sync")
            assert client.status(request_id) == Status(State.QUEUED)
            loop.call_soon_threadsafe(waiting.set)
            entries = list(client.follow(request_id))
            assert entries[-1].id == SEAL
            assert client.result(request_id).text == TEXT
            assert list(client.follow(request_id, after=entries[3].id)) == entries[4:]
            assert "".join(e.content for e in client.generate(ASK) if isinstance(e, Delta)) == TEXT
            stopped = next(iter(client.follow(request_id)))
            assert stopped == entries[0], "a follower may stop early"
            assert client.cancel(request_id) == Status(State.ENDED, "done")
            handle = client.submit(ASK, id="handled")
            assert [entry.id for entry in handle.entries()][-1] == SEAL
            assert (handle.id, handle.result().text) == ("handled", TEXT)
            assert handle.cancel() == Status(State.ENDED, "done")
            assert next(iter(client.lifecycle())).id == "sync"
            with pytest.raises(UnknownRequest):
                client.result("nobody")

    waiting = asyncio.Event()
    loop = asyncio.get_running_loop()
    work = asyncio.create_task(asyncio.to_thread(in_a_thread))
    await asyncio.wait({work, asyncio.create_task(waiting.wait())}, return_when=asyncio.FIRST_COMPLETED)
    await start_worker(simulator)
    await work

    async def settled() -> bool:
        return all(not group["pending"] for group in await redis.xinfo_groups("chat:jobs"))

    await eventually(settled)
