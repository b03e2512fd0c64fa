"""A cancel ends vLLM's work in every phase of a job: a hint ends it at once, maintenance ends it without a hint."""

import asyncio
import json
from typing import Any

import pytest
from conftest import StartSimulator, StartWorker, stream
from proxy import Proxy
from redis.asyncio import Redis
from waits import eventually

from worker import Answer, Client, Delta, IncompleteLog, Refused, State
from worker.broker.client_seals import USAGE_TRIES, cancel
from worker.broker.log_pages import PageSize, read_raw_entries
from worker.contract.entries import parse
from worker.contract.ids import SEAL
from worker.contract.keys import Keys
from worker.engine.application import Worker
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest

SEALING = rb"^EVALSHA .* type cancelled"

NEVER = 60
"""A lease of a minute: maintenance verifies no log within a test, so only a hint can be the cause."""


def chat_request(content: str = "Tell me a story") -> dict[str, object]:
    return {"model": "reciter", "messages": [{"role": "user", "content": content}]}


async def listening(redis: Redis) -> None:
    """Wait until a worker has subscribed to the hints."""

    async def subscribed() -> bool:
        return [count for _, count in await redis.pubsub_numsub("chat:cancel")] == [1]

    await eventually(subscribed)


async def settled(redis: Redis) -> dict[bytes, bytes]:
    """Wait until nothing is pending. Returns the last line of the lifecycle."""

    async def nothing_pending() -> bool:
        groups = await redis.xinfo_groups("chat:jobs")
        return bool(groups) and all(not group["pending"] and group["consumers"] for group in groups)

    await eventually(nothing_pending)
    return (await stream(redis, "chat:lifecycle"))[-1][1]


async def has_requests(server: Simulator, times: int = 1) -> None:
    async def enough() -> bool:
        return len(server.served) == times

    await eventually(enough)


async def closed_early(server: Simulator) -> None:
    async def closed() -> bool:
        return [served.closed_early for served in server.served] == [True]

    await eventually(closed)


async def begun(client: Client, request_id: str, deltas: int = 0) -> None:
    """Wait until a request runs and so many of its deltas are there."""
    async for entry in client.follow(request_id):
        deltas -= isinstance(entry, Delta)
        if entry.id.attempt and deltas <= 0:
            return


async def read(redis: Redis, request_id: str) -> Answer:
    return Answer(parse(*entry) for entry in await stream(redis, f"chat:tokens:{{{request_id}}}"))


async def worker_before(start_worker: StartWorker, redis: Redis, *servers: Simulator, **more: object) -> Worker:
    """A worker that listens for hints, and that ends no job by itself within a test."""
    given: dict[str, object] = {"lease": NEVER, "first_token_timeout": 600, "gap_timeout": 600}
    worker = await start_worker(*servers, **(given | more))
    await listening(redis)
    return worker


async def test_the_seal_and_the_lifecycle_have_the_usage_of_the_whole_log(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await worker_before(start_worker, redis, await start_simulator(Options(scenario=Scenario(fault="stall", after=5))))
    request_id = await client.enqueue(chat_request())
    await begun(client, request_id, deltas=5)
    await client.cancel(request_id)
    line = await settled(redis)
    answer = await read(redis, request_id)
    assert answer.end
    assert answer.end.model == "reciter"
    assert answer.end.usage["completion_tokens"] == sum(len(delta.token_ids) for delta in answer.deltas)
    assert json.loads(line[b"usage"]) == answer.end.usage == answer.usage


@pytest.mark.parametrize("too_late", [1, USAGE_TRIES + 1], ids=["one comes", "they never stop"])
async def test_a_seal_has_the_usage_of_every_entry_before_it_or_no_usage(
    too_late: int, redis: Redis, redis_proxy: Proxy
) -> None:
    key = "chat:tokens:{r}"
    await redis.xadd(key, {"type": "opened", "model": "reciter", "prompt_tokens": "7"}, id="1-1")
    await redis.xadd(key, {"type": "delta", "content": "a", "token_ids": "[1]"}, id="1-2")
    async with Client(redis_proxy.redis_url) as client, asyncio.timeout(60):
        seal = redis_proxy.hold(SEALING)
        cancel = asyncio.create_task(client.cancel("r"))
        for n in range(too_late):
            await seal.met.wait()
            await redis.xadd(key, {"type": "delta", "content": "b", "token_ids": "[2, 3]"}, id=f"1-{3 + n}")
            held, seal = seal, redis_proxy.hold(SEALING)
            held.release()
        seal.release()
        await cancel
    answer = await read(redis, "r")
    assert answer.end
    assert (answer.outcome, answer.end.model) == ("cancelled", "reciter")
    assert answer.end.usage == (answer.usage if too_late == 1 else {})


async def test_an_entry_that_cannot_be_read_does_not_keep_a_request_from_being_cancelled(
    client: Client, redis: Redis
) -> None:
    request_id = await client.enqueue(chat_request())
    await redis.xadd(f"chat:tokens:{{{request_id}}}", {"type": "delta", "token_ids": "?"}, id="1-1")
    await client.cancel(request_id)
    assert (await client.status(request_id)).outcome == "cancelled"


async def test_a_log_above_redis_output_limit_can_be_cancelled(client: Client, redis: Redis) -> None:
    key, limit = "chat:tokens:{long}", "client-output-buffer-limit"
    async with redis.pipeline() as pipe:
        for number in range(300):
            pipe.xadd(key, {"type": "delta", "content": "x" * 4000}, id=f"1-{number}")
        await pipe.execute()
    limits = (await redis.config_get(limit))[limit] or ""
    await redis.config_set(limit, "normal 100000 0 0")
    try:
        await client.cancel("long")
    finally:
        await redis.config_set(limit, limits)
    assert await redis.xlen(key) == 301


@pytest.mark.parametrize("entries", [PageSize().entries - 1, PageSize().entries, PageSize().entries + 1])
async def test_a_log_is_read_to_its_seal_wherever_a_page_ends(entries: int, client: Client, redis: Redis) -> None:
    key = "chat:tokens:{r}"
    pipe = redis.pipeline()
    for n in range(entries - 1):
        pipe.xadd(key, {"type": "started"} if n == 0 else {"type": "delta", "content": "x"}, id=f"1-{n}")
    pipe.xadd(key, {"type": "done"}, id=str(SEAL))
    pipe.expire(key, 60)
    await pipe.execute()
    assert len(await read_raw_entries(redis, key)) == entries
    assert not await cancel(redis, Keys(), "r")
    assert (await client.result("r")).text == "x" * (entries - 2)
    await redis.xdel(key, "1-5")
    with pytest.raises(IncompleteLog):
        await client.result("r")


async def test_a_log_that_is_sealed_just_before_a_cancel_is_left_as_it_is(client: Client, redis: Redis) -> None:
    request_id = await client.enqueue(chat_request())
    key = f"chat:tokens:{{{request_id}}}"
    await client.cancel(request_id)
    before = await stream(redis, key)
    assert not await cancel(redis, Keys(), request_id)
    assert await stream(redis, key) == before


async def test_a_cancel_before_a_worker_takes_the_job(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    request_id = await client.enqueue(chat_request())
    assert (await client.cancel(request_id)).state is State.QUEUED
    await worker_before(start_worker, redis, simulator)
    assert (await settled(redis))[b"outcome"] == b"cancelled"
    assert not simulator.served


async def test_a_cancel_before_the_first_token(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    silent = await start_simulator(Options(scenario=Scenario(fault="hang")))
    await worker_before(start_worker, redis, silent)
    request_id = await client.enqueue(chat_request())
    await has_requests(silent)
    assert (await client.cancel(request_id)).state is State.RUNNING
    await closed_early(silent)
    assert (await settled(redis))[b"outcome"] == b"cancelled"


async def test_a_cancel_mid_stream_while_the_stream_is_silent(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """A stream that still flows would find the seal with its next entry, even without a hint."""
    stalls = await start_simulator(Options(scenario=Scenario(fault="stall", after=5)))
    await worker_before(start_worker, redis, stalls)
    request_id = await client.enqueue(chat_request())
    await begun(client, request_id, deltas=5)
    await client.cancel(request_id)
    await closed_early(stalls)
    finished = await settled(redis)
    assert finished[b"outcome"] == b"cancelled"
    assert json.loads(finished[b"usage"])["completion_tokens"] >= 5, "the usage so far is reported"
    answer = await read(redis, request_id)
    assert answer.text
    assert answer_to(chat_request()["messages"]).startswith(answer.text)


async def test_a_cancel_between_two_tries(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    busy = await start_simulator(Options(scenario=Scenario(fault="503", retry_after=600)))
    await worker_before(start_worker, redis, busy)
    request_id = await client.enqueue(chat_request())

    async def refused() -> bool:
        return [served.ended is not None for served in busy.served] == [True]

    await eventually(refused)
    await client.cancel(request_id)
    assert (await settled(redis))[b"outcome"] == b"cancelled"
    assert len(busy.served) == 1, "there was no second try"


class Silent(Simulator):
    """A server whose first stream breaks off, and which never answers how it would resume."""

    requests = closed = 0

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        if request.path != "/tokenize":
            await super()._handle(request, connection)
            return
        self.requests += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.closed += 1


@pytest.mark.parametrize("ended_by", ["cancel", "deadline"])
async def test_a_cancel_while_a_server_is_asked_how_to_resume(
    client: Client, redis: Redis, start_worker: StartWorker, ended_by: str
) -> None:
    async with Silent(Options(scenario=Scenario(fault="cut", after=8))) as silent:
        await worker_before(start_worker, redis, silent)
        request_id = await client.enqueue(chat_request(), timeout=6 if ended_by == "deadline" else 600)

        async def is_asked() -> bool:
            return silent.requests == 1

        await eventually(is_asked)
        if ended_by == "cancel":
            await client.cancel(request_id)
        finished = await settled(redis)

        async def is_closed() -> bool:
            return silent.closed == 1

        await eventually(is_closed)
    assert finished[b"outcome"] == (b"cancelled" if ended_by == "cancel" else b"error")
    assert json.loads(finished[b"usage"])["completion_tokens"] == 8, "the usage so far is reported"


async def test_a_cancel_while_the_job_waits_for_a_vllm_server_that_is_away(
    client: Client, redis: Redis, start_worker: StartWorker
) -> None:
    leaves = Simulator(Options(scenario=Scenario(rate=50)))
    await leaves.__aenter__()
    worker = await worker_before(start_worker, redis, leaves)
    request_id = await client.enqueue(chat_request())
    await begun(client, request_id, deltas=3)
    await leaves.__aexit__(None, None, None)

    async def away() -> bool:
        return not worker._servers.is_available

    await eventually(away)
    await client.cancel(request_id)
    assert (await settled(redis))[b"outcome"] == b"cancelled"


async def test_a_cancel_after_the_end_is_reported_and_changes_nothing(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    await worker_before(start_worker, redis, simulator)
    request_id = await client.enqueue(chat_request())
    await client.result(request_id)
    before = await stream(redis, f"chat:tokens:{{{request_id}}}")
    cancelled = await client.cancel(request_id)
    assert (cancelled.state, cancelled.outcome) == (State.ENDED, "done")
    assert await stream(redis, f"chat:tokens:{{{request_id}}}") == before


async def test_without_a_hint_maintenance_finds_the_cancel(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    silent = await start_simulator(Options(scenario=Scenario(fault="hang")))
    await worker_before(start_worker, redis, silent, lease=1)
    request_id = await client.enqueue(chat_request())
    await has_requests(silent)
    await redis.xadd(f"chat:tokens:{{{request_id}}}", {"type": "cancelled"}, id=str(SEAL))
    await closed_early(silent)
    assert (await settled(redis))[b"outcome"] == b"cancelled"


async def test_a_subscription_that_is_cut_is_renewed(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    silent = await start_simulator(Options(scenario=Scenario(fault="hang")))
    await worker_before(start_worker, redis, silent)
    request_id = await client.enqueue(chat_request())
    await has_requests(silent)
    # That of cancels, and that of the control hash if it has been made by now.
    assert await redis.client_kill_filter(_type="pubsub") >= 1
    await listening(redis)
    await client.cancel(request_id)
    await closed_early(silent)
    await settled(redis)


async def test_a_cancel_during_a_lost_subscription_is_found_when_it_is_renewed(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    silent = await start_simulator(Options(scenario=Scenario(fault="hang")))
    await worker_before(start_worker, redis, silent)
    request_id = await client.enqueue(chat_request())
    await has_requests(silent)
    pipe = redis.pipeline()
    pipe.client_kill_filter(_type="pubsub")
    pipe.xadd(f"chat:tokens:{{{request_id}}}", {"type": "cancelled"}, id=str(SEAL))
    await pipe.execute()
    await closed_early(silent)
    await settled(redis)


async def test_a_flood_of_hints_makes_a_worker_read_only_the_logs_that_they_name(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    silent = await start_simulator(Options(scenario=Scenario(fault="hang")))
    await worker_before(start_worker, redis, silent)
    ids = [
        await client.enqueue(chat_request(f"question {n}")) for n in range(4)
    ]  # as many as a new server gets at first

    async def reads() -> int:
        return int((await redis.info("commandstats"))["cmdstat_xrevrange"]["calls"])

    await has_requests(silent, times=4)
    before = await reads()
    pipe = redis.pipeline()
    for n in range(1000):
        pipe.publish("chat:cancel", f"somebody-else-{n}")
    pipe.publish("chat:cancel", ids[0])
    await pipe.execute()

    async def looked() -> bool:
        return await reads() > before

    await eventually(looked)
    assert await reads() == before + 1
    for request_id in ids:
        await client.cancel(request_id)
    await settled(redis)


@pytest.mark.parametrize("which", ["expire", "set", "xadd", "evalsha"])
async def test_a_cancel_without_a_permission_writes_all_or_nothing_and_names_the_permission(
    which: str, redis: Redis, redis_url: str, client: Client
) -> None:
    """Once a seal was written without an expiry, and another call did not repair it."""
    request_id = await client.enqueue(chat_request())
    key = f"chat:tokens:{{{request_id}}}"
    await redis.persist(key)
    user: dict[str, Any] = {"enabled": True, "passwords": "+pw", "keys": ["*"], "channels": ["*"]}
    await redis.acl_setuser("narrow", **user, categories=["+@all"], commands=[f"-{which}"])
    try:
        async with Client(redis_url.replace("//", "//narrow:pw@")) as narrow:
            for _ in range(2):
                with pytest.raises(Refused, match=f"'{which}'"):
                    await narrow.cancel(request_id)
            assert (await narrow.status(request_id)).state is State.QUEUED
            assert await redis.xlen(key) == 1
            assert not await redis.exists(f"chat:ended:{{{request_id}}}")
            await redis.acl_setuser("narrow", **user, commands=[f"+{which}"])
            assert (await narrow.cancel(request_id)).state is State.QUEUED
            assert (await narrow.status(request_id)).outcome == "cancelled"
    finally:
        await redis.acl_deluser("narrow")
    assert 0 < await redis.ttl(key) <= 3600
    assert await redis.exists(f"chat:ended:{{{request_id}}}")
