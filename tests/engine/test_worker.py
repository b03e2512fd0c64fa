"""One worker from end to end: a job in the job stream becomes the request's log, whole and in order."""

import asyncio
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import StartSimulator, StartWorker, metric, stream
from redis.asyncio import Redis
from waits import eventually

from worker import Answer, Client, Conflict, Delta, Done, Failed, Opened, Queued, Started, State
from worker.broker.worker_registry import WorkerRegistry
from worker.contract.entries import parse
from worker.contract.ids import SEAL
from worker.engine.application import Worker
from worker.engine.pace import Pace
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest
from worker.settings import load_settings
from worker.vllm.servers.pace import ServerPace

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts"
STORY = [{"role": "user", "content": "Tell me a story"}]


def chat_request(content: str = "Who are you?", **more: object) -> dict[str, object]:
    return {"model": "reciter", "messages": [{"role": "user", "content": content}], **more}


async def read(redis: Redis, request_id: str) -> Answer:
    """The log as it stands, read without the client."""
    return Answer(parse(*entry) for entry in await stream(redis, f"chat:tokens:{{{request_id}}}"))


async def settled(redis: Redis) -> None:
    """Wait until every job is acknowledged."""

    async def nothing_pending() -> bool:
        groups = await redis.xinfo_groups("chat:jobs")
        return all(not group["pending"] for group in groups)

    await eventually(nothing_pending)


@pytest.mark.usefixtures("worker")
async def test_a_job_becomes_a_log_with_every_delta_in_order(client: Client) -> None:
    request_id = await client.enqueue(chat_request())
    entries = [entry async for entry in client.follow(request_id)]

    assert [type(entry) for entry in entries[:3]] == [Queued, Started, Opened]
    assert [entry.id.n for entry in entries[1:-1]] == list(range(len(entries) - 2))
    assert all(isinstance(entry, Delta) and entry.id.attempt == 1 for entry in entries[3:-1])
    end = entries[-1]
    assert isinstance(end, Done)
    assert end.id == SEAL
    assert (end.attempt, end.finish_reason, end.model) == (1, "stop", "reciter")
    assert end.usage["completion_tokens"] == sum(len(e.token_ids) for e in entries if isinstance(e, Delta))
    assert Answer(entries).text == answer_to(chat_request()["messages"])


@pytest.mark.usefixtures("worker")
async def test_a_bare_xadd_is_enough_for_a_job(redis: Redis) -> None:
    await redis.xadd("chat:jobs", {"id": "bare-1", "request": json.dumps(chat_request("你是谁?"))})

    async def ended() -> bool:
        return (await read(redis, "bare-1")).outcome == "done"

    await eventually(ended)
    assert (await read(redis, "bare-1")).text == answer_to(chat_request("你是谁?")["messages"])
    await settled(redis)


async def test_followers_read_independently_and_a_late_one_gets_the_whole_log(
    start_worker: StartWorker, start_simulator: StartSimulator, client: Client
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=200))))
    request_id = await client.enqueue(chat_request("Tell me a story"))
    first = [entry async for entry in client.follow(request_id)]
    late = [entry async for entry in client.follow(request_id)]
    both = await asyncio.gather(client.result(request_id), client.result(request_id))
    assert first == late
    assert [answer.text for answer in both] == [answer_to(STORY)] * 2


@pytest.mark.usefixtures("worker")
async def test_a_follower_that_comes_back_continues_after_its_last_id(client: Client) -> None:
    request_id = await client.enqueue(chat_request())
    entries = [entry async for entry in client.follow(request_id)]
    for place in (0, 3, len(entries) - 2, len(entries) - 1):
        rest = [entry async for entry in client.follow(request_id, after=entries[place].id)]
        assert rest == entries[place + 1 :]


@pytest.mark.usefixtures("worker")
async def test_after_the_end_nothing_is_pending_and_the_job_stream_is_trimmed(redis: Redis, client: Client) -> None:
    ids = [await client.enqueue(chat_request()) for _ in range(10)]
    for request_id in ids:
        await client.result(request_id)
    await settled(redis)

    async def trimmed() -> bool:
        return await redis.xlen("chat:jobs") <= 1

    await eventually(trimmed)


@pytest.mark.usefixtures("worker")
async def test_log_and_tombstone_expire_as_the_job_requests(redis: Redis, client: Client) -> None:
    request_id = await client.enqueue(chat_request(), retention=120)
    await client.result(request_id)
    await settled(redis)
    assert 0 < await redis.ttl(f"chat:tokens:{{{request_id}}}") <= 120
    assert 120 < await redis.ttl(f"chat:ended:{{{request_id}}}") <= 24 * 3600
    stone = json.loads(await redis.get(f"chat:ended:{{{request_id}}}") or b"")
    assert stone["outcome"] == "done"


@pytest.mark.usefixtures("worker")
async def test_the_lifecycle_has_every_request(redis: Redis, client: Client) -> None:
    request_id = await client.enqueue(chat_request(), tenant="acme")
    answer = await client.result(request_id)
    await settled(redis)
    lines = [fields for _, fields in await stream(redis, "chat:lifecycle")]
    assert [line[b"type"] for line in lines] == [b"started", b"finished"]
    assert all(line[b"id"] == request_id.encode() and line[b"tenant"] == b"acme" for line in lines)
    assert lines[1][b"outcome"] == b"done"
    assert json.loads(lines[1][b"usage"]) == answer.usage
    (begun,) = [fields for _, fields in await stream(redis, f"chat:tokens:{{{request_id}}}") if b"worker" in fields]
    assert {line[b"worker"] for line in lines} == {begun[b"worker"]}


async def test_the_feed_carries_the_same_entries(redis: Redis, start_worker: StartWorker, simulator: Simulator) -> None:
    async with redis.pubsub() as feed:
        await feed.subscribe("chat:feed:{fed}")
        await start_worker(simulator)
        await redis.xadd("chat:jobs", {"id": "fed", "request": json.dumps(chat_request())})
        received = []
        async for message in feed.listen():
            if message["type"] == "message":
                received += [parse(entry_id, fields) for entry_id, fields in json.loads(message["data"])]
                if received[-1].id == SEAL:
                    break
    assert received == [parse(*entry) for entry in await stream(redis, "chat:tokens:{fed}")]
    await settled(redis)


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"request": "{"}, "invalid_job", "not JSON"),
        ({"request": b"\xff\xfe"}, "invalid_job", "not JSON"),
        ({"request": "{}"}, "invalid_job", "no messages"),
        ({"request": "[]"}, "invalid_job", "not a JSON object"),
        ({}, "invalid_job", "no request"),
        ({"request": json.dumps(chat_request()), "v": "2"}, "invalid_job", "version 1"),
        ({"request": json.dumps(chat_request()), "deadline": "soon"}, "invalid_job", "Unix milliseconds"),
        ({"request": json.dumps(chat_request("x" * 3000))}, "job_too_large", "WORKER_MAX_REQUEST_BYTES"),
        ({"request": json.dumps(chat_request() | {"kv_transfer_params": {}})}, "invalid_job", "only the worker"),
    ],
)
async def test_a_job_that_does_not_validate_ends_in_an_error_and_a_dead_letter(
    fields: dict[str, str | bytes],
    code: str,
    message: str,
    redis: Redis,
    start_worker: StartWorker,
    simulator: Simulator,
) -> None:
    await start_worker(simulator, max_request_bytes=2048)
    await redis.xadd("chat:jobs", {"id": "bad", **fields})  # type: ignore[dict-item]  # dict is invariant
    await redis.xadd("chat:jobs", {"id": "good", "request": json.dumps(chat_request())})

    async def ended() -> bool:
        return bool((await read(redis, "good")).outcome and (await read(redis, "bad")).outcome)

    await eventually(ended)
    end = (await read(redis, "bad")).end
    assert isinstance(end, Failed)
    assert end.code == code
    assert message in end.message
    await settled(redis)
    ((_, letter),) = await stream(redis, "chat:dead")
    assert letter[b"reason"].decode() == end.message
    assert json.loads(letter[b"fields"])["id"] == "bad"
    assert (await read(redis, "good")).outcome == "done"


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("fields", [{}, {"id": ""}, {"id": "no/slash"}, {"id": "x" * 129}, {"id": b"\xff"}])
async def test_a_job_without_a_usable_id_goes_to_the_dead_letters(fields: dict[str, str | bytes], redis: Redis) -> None:
    job = await redis.xadd("chat:jobs", {**fields, "request": json.dumps(chat_request())})  # type: ignore[dict-item]

    async def buried() -> bool:
        return bool(await redis.xlen("chat:dead"))

    await eventually(buried)
    ((_, letter),) = await stream(redis, "chat:dead")
    assert b"id" in letter[b"reason"]
    assert (letter[b"queue"], letter[b"job"]) == (b"default", job)
    await settled(redis)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (chat_request() | {"model": "nope"}, "model_not_found", "`nope` does not exist"),
        (chat_request("word " * 30_000), "context_length_exceeded", "maximum context length"),
        (chat_request(temperature=-3), "invalid_request", "temperature"),
        (chat_request(logprobs=True, top_logprobs=500), "invalid_request", "logprobs"),
    ],
)
async def test_a_refusal_of_vllm_is_an_error_with_its_message(
    request_: dict[str, object], code: str, message: str, client: Client, redis: Redis, simulator: Simulator
) -> None:
    answer = await client.result(await client.enqueue(request_))
    assert isinstance(answer.end, Failed)
    assert answer.end.code == code
    assert message in answer.end.message
    assert len(simulator.served) <= 1, "an error that is the job's fault is not tried again"
    await settled(redis)


@pytest.mark.usefixtures("worker")
async def test_a_deadline_that_has_passed_ends_the_job_without_asking_vllm(redis: Redis, simulator: Simulator) -> None:
    await redis.xadd("chat:jobs", {"id": "late", "request": json.dumps(chat_request()), "deadline": "1000"})

    async def ended() -> bool:
        return bool((await read(redis, "late")).outcome)

    await eventually(ended)
    end = (await read(redis, "late")).end
    assert isinstance(end, Failed)
    assert end.code == "deadline"
    assert not simulator.served
    await settled(redis)


async def test_a_deadline_that_passes_mid_stream_ends_the_answer_and_keeps_its_text(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    slow = await start_simulator(Options(scenario=Scenario(rate=20)))
    worker = await start_worker(slow)

    async def is_up() -> bool:
        return metric(worker, "vllm_up", endpoint=slow.url) == 1

    await eventually(is_up)  # the text must begin before the deadline
    answer = await client.result(await client.enqueue(chat_request("Tell me a story"), timeout=6))
    assert isinstance(answer.end, Failed)
    assert answer.end.code == "deadline"
    assert answer.text
    assert answer_to(STORY).startswith(answer.text)

    async def closed() -> bool:
        return slow.served[0].closed_early

    await eventually(closed)
    await settled(redis)
    finished = (await stream(redis, "chat:lifecycle"))[-1][1]
    assert json.loads(finished[b"usage"]) == answer.usage != {}


async def test_cancelling_stops_vllm_and_seals_the_log(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    slow = await start_simulator(Options(scenario=Scenario(rate=30)))
    await start_worker(slow)
    request_id = await client.enqueue(chat_request("Tell me a story"))
    answer = Answer()
    async for entry in client.follow(request_id):
        answer.add(entry)
        if isinstance(entry, Delta) and entry.id.n == 5:
            assert (await client.cancel(request_id)).state.value == "running"
    assert answer.outcome == "cancelled"
    assert answer_to(STORY).startswith(answer.text)
    await settled(redis)

    async def closed() -> bool:
        return slow.served[0].closed_early

    await eventually(closed)
    finished = (await stream(redis, "chat:lifecycle"))[-1][1]
    assert finished[b"outcome"] == b"cancelled"
    assert json.loads(finished[b"usage"])["completion_tokens"] >= 4, "the usage so far is reported"


async def test_a_job_cancelled_before_it_starts_never_runs(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    request_id = await client.enqueue(chat_request())
    await redis.execute_command(  # type: ignore[no-untyped-call]  # the line of the contract, as it stands
        "XADD", f"chat:tokens:{{{request_id}}}", str(SEAL), "type", "cancelled"
    )
    await start_worker(simulator)
    assert (await client.result(request_id)).outcome == "cancelled"
    await settled(redis)
    assert not simulator.served


@pytest.mark.usefixtures("worker")
async def test_the_same_id_added_twice_by_hand_runs_once(redis: Redis, simulator: Simulator) -> None:
    job = {"id": "twice", "request": json.dumps(chat_request())}
    for _ in range(3):
        await redis.xadd("chat:jobs", job)  # type: ignore[arg-type]  # dict is invariant

    async def ended() -> bool:
        return (await read(redis, "twice")).outcome == "done"

    await eventually(ended)
    await settled(redis)
    assert len(simulator.served) == 1
    assert (await read(redis, "twice")).text == answer_to(chat_request()["messages"])


@pytest.mark.parametrize("style", ["openai", "vllm", "fastapi"])
@pytest.mark.parametrize("field", ["return_token_ids", "stream_options"])
@pytest.mark.parametrize("manner", ["rejects", "ignores"])
async def test_servers_that_do_not_know_our_fields_still_work(
    style: str, field: str, manner: str, client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    if manner == "rejects":
        options = Options(rejects=frozenset({field}), reject_style=style)  # type: ignore[arg-type]  # a Literal
    else:
        options = Options(ignores=frozenset({field}))
    await start_worker(await start_simulator(options))
    answer = await client.result(await client.enqueue(chat_request()))
    assert answer.text == answer_to(chat_request()["messages"])
    assert answer.outcome == "done"


async def test_a_passing_fault_before_the_first_token_leaves_no_trace(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_worker(await start_simulator())
    order = {"fault": "500", "times": 2}
    answer = await client.result(await client.enqueue(chat_request(simulate=order)))
    assert answer.text == answer_to(chat_request()["messages"])
    assert answer.attempt == 1


async def test_a_stream_that_breaks_is_restarted_visibly_where_resuming_is_off(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_worker(await start_simulator(), on_interrupt="restart")
    order = {"fault": "reset", "after": 5, "times": 1}
    request_id = await client.enqueue(chat_request(simulate=order))
    entries = [entry async for entry in client.follow(request_id)]
    kinds = [entry.type for entry in entries]
    assert kinds.count("restarted") == 1
    assert [str(entry.id) for entry in entries if entry.type in ("claimed", "restarted")] == ["2-0", "2-1"]
    assert Answer(entries).text == answer_to(chat_request()["messages"])
    assert Answer(entries).outcome == "done"


@pytest.mark.parametrize("fault", ["429", "503"])
async def test_a_refusal_by_a_full_server_is_no_try(
    fault: str, client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    await start_worker(simulator, tries=1)
    order = {"fault": fault, "retry_after": 0.01, "times": 5}
    answer = await client.result(await client.enqueue(chat_request(simulate=order)))
    assert (answer.outcome, answer.text) == ("done", answer_to(chat_request()["messages"]))
    assert len(simulator.served) == 6


@pytest.mark.parametrize("fault", ["429", "503"])
async def test_a_job_waits_for_a_full_server_until_its_deadline(
    fault: str, client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    await start_worker(simulator, tries=1)
    request_id = await client.enqueue(chat_request(simulate={"fault": fault}), timeout=6)
    answer = await client.result(request_id)
    assert isinstance(answer.end, Failed)
    assert answer.end.code == "deadline"
    assert len(simulator.served) > 1
    await settled(redis)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("500", "upstream_error"),
        ("refuse", "upstream_unreachable"),
        ("html", "not_a_stream"),
        ("cut", "upstream_truncated"),
        ("error_under_200", "upstream_error"),
        ("malformed", "upstream_malformed"),
        ("abort", "upstream_aborted"),
    ],
)
async def test_a_fault_that_stays_becomes_an_error_with_its_code(
    fault: str, code: str, client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    await start_worker(simulator, tries=2)
    order = {"fault": fault, "retry_after": 0.01}  # before any text: an answer with progress would be resumed
    answer = await client.result(await client.enqueue(chat_request(simulate=order)))
    assert isinstance(answer.end, Failed)
    assert answer.end.code == code
    # A request that gets no reply at all over a kept connection is sent again at once.
    assert len(simulator.served) in ({2, 3} if fault == "refuse" else {2})
    await settled(redis)


async def test_every_slot_works_at_once(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    slow = await start_simulator(Options(scenario=Scenario(rate=1, tokens=400)))
    await start_worker(slow, slots=8, first_token_timeout=60)
    ids = [await client.enqueue(chat_request(f"question {n}")) for n in range(8)]

    async def all_wait() -> bool:
        return [served.ended for served in slow.served] == [None] * 8

    await eventually(all_wait)
    for request_id in ids:
        await client.cancel(request_id)


async def test_no_more_jobs_are_taken_than_there_are_slots(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    slow = await start_simulator(Options(scenario=Scenario(first_token=0.3, text="yes")))
    await start_worker(slow, slots=2)
    ids = [await client.enqueue(chat_request(f"question {n}")) for n in range(6)]
    most = 0

    async def all_done() -> bool:
        nonlocal most
        groups = await redis.xinfo_groups("chat:jobs")
        most = max([most, *(int(group["pending"]) for group in groups)])
        return all([(await read(redis, request_id)).outcome == "done" for request_id in ids])

    await eventually(all_done)
    assert most == 2


async def test_jobs_of_several_queues_are_all_served(
    client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    await start_worker(simulator, queues="high,default,low", slots=2)
    ids = [await client.enqueue(chat_request(f"q{n}"), queue=("high", "default", "low")[n % 3]) for n in range(30)]
    answers = await asyncio.gather(*map(client.result, ids))
    assert all(answer.outcome == "done" for answer in answers)


@pytest.mark.usefixtures("worker")
async def test_a_consumer_group_that_vanishes_is_created_again(client: Client, redis: Redis) -> None:
    await client.result(await client.enqueue(chat_request()))
    await settled(redis)
    await redis.flushall()
    answer = await client.result(await client.enqueue(chat_request("after the flood")))
    assert answer.outcome == "done"


@pytest.mark.usefixtures("worker")
async def test_a_bad_duplicate_spoils_nothing_and_is_buried(client: Client, redis: Redis) -> None:
    slow = chat_request(simulate={"rate": 40})
    request_id = await client.enqueue(slow)

    async def begun() -> bool:
        return (await read(redis, request_id)).started is not None

    await eventually(begun)
    await redis.xadd("chat:jobs", {"id": request_id, "request": "{"})
    assert (await client.result(request_id)).text == answer_to(chat_request()["messages"])
    await redis.xadd("chat:jobs", {"id": request_id, "request": "{}"})

    async def buried() -> bool:
        return await redis.xlen("chat:dead") == 2

    await eventually(buried)
    await settled(redis)
    assert (await client.result(request_id)).outcome == "done"


@pytest.mark.usefixtures("worker")
async def test_a_job_whose_log_is_a_key_of_another_type_is_buried(redis: Redis) -> None:
    await redis.set("chat:tokens:{odd}", "not a stream", ex=60)
    await redis.xadd("chat:jobs", {"id": "odd", "request": json.dumps(chat_request())})

    async def buried() -> bool:
        return bool(await redis.xlen("chat:dead"))

    await eventually(buried)
    ((_, letter),) = await stream(redis, "chat:dead")
    assert b"WRONGTYPE" in letter[b"reason"]
    await settled(redis)


async def test_deltas_that_arrive_in_one_read_with_the_error_are_made_void(
    client: Client, start_worker: StartWorker
) -> None:
    """The error must not hide that text was written: the second try would add the whole answer to it."""
    bodies = [(TRANSCRIPTS / f"{name}.body").read_bytes() for name in ("engine_death_mid_stream", "plain")]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"POST /v1/chat/completions"):
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            writer.close()
            return
        length = re.search(rb"content-length: (\d+)", head.lower())
        await reader.readexactly(int(length[1]) if length else 0)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + bodies.pop(0))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await start_worker(SimpleNamespace(url=f"http://127.0.0.1:{port}"))
        request_id = await client.enqueue(chat_request())
        entries = [entry async for entry in client.follow(request_id)]
    assert [entry.type for entry in entries].count("restarted") == 1
    assert Answer(entries).text == answer_to(chat_request()["messages"])


@pytest.mark.usefixtures("worker")
async def test_a_request_whose_first_job_was_lost_with_its_queue_is_taken_over_by_the_next(
    client: Client, redis: Redis
) -> None:
    begun = {"type": "started", "v": "1", "queue": "gone", "job": "1-1", "worker": "w", "owner": "o", "time": "1"}
    await redis.xadd("chat:tokens:{again}", begun, id="1-0")  # type: ignore[arg-type]  # dict is invariant
    await redis.expire("chat:tokens:{again}", 60)
    await redis.xadd("chat:jobs", {"id": "again", "request": json.dumps(chat_request())})
    answer = await client.result("again")
    assert (answer.outcome, answer.attempt) == ("done", 2)
    await settled(redis)
    assert not await redis.exists("chat:dead")


@pytest.mark.usefixtures("worker")
async def test_setting_the_clock_of_the_machine_ends_no_job(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    await client.result(await client.enqueue(chat_request()))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    answer = await client.result(await client.enqueue(chat_request("and now?"), timeout=60))
    assert answer.outcome == "done", answer.error


async def test_jobs_wait_for_a_vllm_that_is_away_and_then_run(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    port = free_port()
    worker = await start_worker(SimpleNamespace(url=f"http://127.0.0.1:{port}"), tries=1)
    ids = [await client.enqueue(chat_request(f"question {n}")) for n in range(5)]

    async def known_to_be_away() -> bool:
        return [endpoint.is_away for endpoint in worker._servers.servers] == [True]

    await eventually(known_to_be_away)
    assert {(await client.status(request_id)).state for request_id in ids} == {State.QUEUED}, "the queue is the buffer"
    await start_simulator(port=port)
    answers = await asyncio.gather(*map(client.result, ids))
    assert {answer.outcome for answer in answers} == {"done"}


async def test_a_stream_whose_vllm_goes_away_is_resumed_when_it_is_back(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    port = free_port()
    simulator = Simulator(Options(scenario=Scenario(rate=50)), port=port)
    await simulator.__aenter__()
    await start_worker(simulator)
    request_id = await client.enqueue(chat_request("Tell me a story"))
    entries = []
    async for entry in client.follow(request_id):
        entries.append(entry)
        if isinstance(entry, Delta) and entry.id == (1, 5):
            await simulator.__aexit__(None, None, None)
        if entry.type == "claimed" and entry.id.attempt == 2:  # the job may be parked meanwhile, and claimed again
            await start_simulator(port=port)
    assert [entry.type for entry in entries if entry.type in ("resumed", "restarted")] == ["resumed"]
    assert Answer(entries).text == answer_to(STORY)


async def test_the_same_request_by_hand_and_by_the_client_is_one(client: Client, redis: Redis, worker: Worker) -> None:
    assert worker is not None
    await redis.xadd("chat:jobs", {"id": "both", "request": json.dumps(chat_request())})
    await eventually(lambda: redis.exists("chat:ended:{both}"))
    assert await client.enqueue(chat_request(), id="both") == "both"
    with pytest.raises(Conflict, match="belongs to another request"):
        await client.enqueue(chat_request("Something else"), id="both")
    await client.cancel("never")
    with pytest.raises(Conflict, match="was cancelled before"):
        await client.enqueue(chat_request(), id="never")


class Falling(Simulator):
    """A server that answers nothing any more once `falls` is set. `asked` is set by the next request."""

    def __init__(self) -> None:
        super().__init__()
        self.falls, self.asked = asyncio.Event(), asyncio.Event()

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        if self.falls.is_set():
            self.asked.set()
            await asyncio.Event().wait()
        await super()._handle(request, connection)


async def test_a_server_that_never_answers_delays_no_renewal(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator, server_pace: ServerPace
) -> None:
    server_pace.probe_every = server_pace.idle_every = 0.1
    server_pace.probe_limit = 600

    async def has_begun() -> bool:
        return bool(simulator.served)

    async def renewals() -> int:
        return int((await redis.info("commandstats")).get("cmdstat_xclaim", {"calls": 0})["calls"])

    async def has_renewed_often() -> bool:
        return await renewals() >= before + 3

    async with Falling() as silent:
        await start_worker(simulator, silent, lease=1, gap_timeout=600)
        request_id = await client.enqueue(chat_request(simulate={"fault": "stall", "after": 3}))
        await eventually(has_begun)
        silent.falls.set()
        await silent.asked.wait()
        before = await renewals()
        await eventually(has_renewed_often)
        await client.cancel(request_id)


async def test_a_worker_with_a_failing_part_ends_and_does_not_hang(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, simulator: Simulator
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(WorkerRegistry, "beat", fail)
    service = Worker(load_settings(redis_url=redis_url, vllm_urls=simulator.url, lease=0.5))
    with pytest.raises(ExceptionGroup, match="TaskGroup") as caught:
        await asyncio.wait_for(service.run(), 60)
    assert caught.group_contains(KeyError)


async def test_a_flushall_while_a_read_waits_is_survived(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    """Redis 7.0 wakes the read at once, 6.2 when its wait ends."""
    await start_worker(simulator, pace=Pace(longest_block=1.0), lease=4)

    async def waits() -> bool:
        return bool((await redis.info("clients"))["blocked_clients"])

    await eventually(waits)
    await redis.flushall()
    assert (await client.result(await client.enqueue(chat_request()))).outcome == "done"


async def test_a_job_that_is_deleted_while_it_runs_comes_to_its_end(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """Redis 7.0 drops the job from the pending list, so its lease cannot be renewed."""
    worker = await start_worker(await start_simulator(Options(scenario=Scenario(rate=40, tokens=120))), lease=1)
    request_id = await client.enqueue(chat_request())
    entries = []
    async for entry in client.follow(request_id):
        entries.append(entry)
        if isinstance(entry, Delta) and entry.id == (1, 3):
            ((job, _),) = await stream(redis, "chat:jobs")
            await redis.xdel("chat:jobs", job)
    assert (Answer(entries).outcome, Answer(entries).attempt) == ("done", 1)
    assert worker.metrics.registry.get_sample_value("vllm_relay_lease_lost_total") == 0
    await settled(redis)


async def test_a_worker_sends_its_first_heartbeat_as_soon_as_it_works(
    redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    worker = await start_worker(simulator, lease=3600)
    await eventually(lambda: redis.hexists("chat:workers", worker._name))
