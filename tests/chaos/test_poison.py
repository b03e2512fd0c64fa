"""Jobs that no worker can do: one that kills each, one whose log is unreadable, one that runs into a fault of ours."""

import asyncio
import json
from pathlib import Path

import pytest
from conftest import StartProcess, StartSimulator, StartWorker, stream
from redis.asyncio import Redis
from waits import eventually

from worker import Answer, Client, Failed
from worker.broker.consumers import HANDED_OVER, HANDED_OVER_IDLE
from worker.broker.ownership import LogOwnership
from worker.contract.entries import parse
from worker.contract.ids import SEAL
from worker.sandbox.simulator.server import Options, Scenario, Simulator

INNOCENT = 20
WORKER = Path(__file__).parent / "poisoned_worker.py"
STORY = [{"role": "user", "content": "Tell me a story"}]


async def nothing_pending(redis: Redis) -> bool:
    groups = await redis.xinfo_groups("chat:jobs")
    newest = (await redis.xinfo_stream("chat:jobs"))["last-generated-id"]
    return bool(groups) and all(not group["pending"] and group["last-delivered-id"] == newest for group in groups)


async def lifecycle_of(redis: Redis, request_id: str) -> list[bytes]:
    lines = [fields for _, fields in await stream(redis, "chat:lifecycle")]
    return [line[b"type"] for line in lines if line[b"id"] == request_id.encode()]


@pytest.mark.parametrize(
    ("kind", "more", "deliveries", "deaths"),
    [
        ("poison", {}, 3, 3),
        ("unreadable", {}, 3, 3 + 2),  # the first two owners read it before they began the log
        # An answer that begins again each time, and dies at about the same place: the first time counts as progress.
        ("midway", {"n": 2, "max_tokens": 30}, 5, 1 + 5),
    ],
)
async def test_a_job_that_kills_its_worker_each_time_is_buried_alone(
    kind: str,
    more: dict[str, object],
    deliveries: int,
    deaths: int,
    client: Client,
    redis: Redis,
    start_simulator: StartSimulator,
    start_process: StartProcess,
) -> None:
    """One read delivers all jobs, so each death takes innocent ones along until the poison job runs alone."""
    simulator = await start_simulator(Options(scenario=Scenario(rate=50 if kind == "midway" else 0, first_token=0.1)))
    request: dict[str, object] = {"model": "reciter", "messages": STORY, "max_tokens": 5} | more
    # Of the answer that dies midway, nine deltas come. On a busy machine twice as many could come in one batch before
    # the worker dies, and that would count as progress.
    scenario = {"fault": "stall", "after": 9} if kind == "midway" else {}
    poison = await client.enqueue(request | {"user": kind, "simulate": scenario})
    innocent = [await client.enqueue(request) for _ in range(INNOCENT)]

    settings = {"program": [str(WORKER)], "lease": 1, "slots": 4 * INNOCENT, "max_deliveries": deliveries}
    buried = asyncio.create_task(client.result(poison))
    died = 0
    while True:
        last = start_process(simulator, **settings)
        death = asyncio.create_task(asyncio.to_thread(last.wait))
        await asyncio.wait({death, buried}, return_when=asyncio.FIRST_COMPLETED)
        if buried.done():
            break
        assert death.result() == 1
        died += 1
        assert died < 20, "the job kills one worker after the other"
    answer = buried.result()
    answers = await asyncio.gather(*map(client.result, innocent))
    await eventually(lambda: nothing_pending(redis))

    assert died == deaths
    end = answer.end
    assert isinstance(end, Failed)
    assert end.code == "buried"
    assert f"{deliveries} times without progress" in end.message
    assert [answer.outcome for answer in answers] == ["done"] * INNOCENT
    ((_, letter),) = await stream(redis, "chat:dead")
    assert json.loads(letter[b"fields"])["id"] == poison
    assert letter[b"reason"].decode() == end.message
    assert (await lifecycle_of(redis, poison))[-1] == b"finished"
    assert last.poll() is None, "the worker that buried it lives"
    last.terminate()
    await death


async def begun(client: Client, redis: Redis, *entries: dict[str, str]) -> str:
    """A job whose worker wrote so much and vanished; its lease has run out."""
    await redis.xgroup_create("chat:jobs", "workers", id="0", mkstream=True)
    request_id = await client.enqueue({"model": "reciter", "messages": STORY})
    await redis.xreadgroup("workers", "gone", {"chat:jobs": ">"})
    ((job, _),) = await stream(redis, "chat:jobs")
    started = {"type": "started", "queue": "default", "job": job.decode(), "owner": "gone", "delivery": "1"}
    for n, fields in enumerate([started, *entries]):
        where = str(SEAL) if fields["type"] in {"error", "done"} else f"1-{n}"
        await redis.xadd(f"chat:tokens:{{{request_id}}}", fields, id=where)  # type: ignore[arg-type]  # invariant
    await redis.xclaim("chat:jobs", "workers", HANDED_OVER, 0, [job], idle=HANDED_OVER_IDLE, justid=True)
    return request_id


async def answer_of(redis: Redis, request_id: str) -> Answer:
    """The log's last entry; the other entries may be unreadable."""
    return Answer([parse(*(await stream(redis, f"chat:tokens:{{{request_id}}}"))[-1])])


@pytest.mark.parametrize(
    "bad",
    [
        {"type": "delta", "content": "a", "token_ids": "1 2 3"},
        {"type": "claimed", "job": "none"},
    ],
)
async def test_a_log_that_cannot_be_read_is_sealed_and_its_job_buried(
    bad: dict[str, str], client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    request_id = await begun(client, redis, bad)
    await start_worker(simulator)
    await eventually(lambda: nothing_pending(redis))
    end = (await answer_of(redis, request_id)).end
    assert isinstance(end, Failed)
    assert end.code == "buried"
    assert "cannot be read" in end.message
    assert "1-1" in end.message
    ((_, letter),) = await stream(redis, "chat:dead")
    assert letter[b"reason"].decode() == end.message
    assert await lifecycle_of(redis, request_id) == [b"finished"]
    assert not simulator.served


async def test_a_job_that_meets_an_error_of_the_worker_at_each_take_over_is_ended(
    client: Client,
    redis: Redis,
    start_worker: StartWorker,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(LogOwnership, "acquire", fault)
    request_id = await begun(client, redis)
    await start_worker(simulator, lease=0.5, max_deliveries=2)
    await eventually(lambda: nothing_pending(redis))
    end = (await answer_of(redis, request_id)).end
    assert isinstance(end, Failed)
    assert end.code == "buried"
    assert "ZeroDivisionError" in end.message
    assert len(await stream(redis, "chat:dead")) == 1


@pytest.mark.parametrize("there", [False, True])
async def test_a_worker_that_finds_a_job_sealed_as_buried_writes_its_dead_letter(
    *, there: bool, client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    """As after a crash between the seal and the letter, or between the letter and the acknowledgement."""
    request_id = await begun(client, redis, {"type": "error", "code": "buried", "message": "why"})
    ((job, _),) = await stream(redis, "chat:jobs")
    if there:
        await redis.xadd("chat:dead", {"queue": "default", "job": job, "reason": "why", "fields": "{}"})
    duplicate = {"id": request_id, "request": json.dumps({"messages": STORY})}
    await redis.xadd("chat:jobs", duplicate)  # type: ignore[arg-type]  # invariant
    await start_worker(simulator)
    await eventually(lambda: nothing_pending(redis))
    ((_, letter),) = await stream(redis, "chat:dead")
    assert (letter[b"job"], letter[b"reason"]) == (job, b"why"), "of the job that was buried, not of its duplicate"


async def test_deploys_bury_no_job(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(fault="hang", times=4)))
    request_id = await client.enqueue({"model": "reciter", "messages": STORY})
    for number in range(1, 5):
        # With leases of a minute only a hand-over lets the next worker continue.
        service = await start_worker(simulator, lease=60, drain_timeout=0, max_deliveries=2, first_token_timeout=600)

        async def sent(number: int = number) -> bool:
            return len(simulator.served) == number

        await eventually(sent)
        service.stop()
    await start_worker(simulator, lease=60, max_deliveries=2)
    answer = await client.result(request_id)
    assert (answer.outcome, answer.attempt) == ("done", 5)
    claims = [fields for entry, fields in await stream(redis, f"chat:tokens:{{{request_id}}}") if entry.endswith(b"-0")]
    assert [claim[b"delivery"] for claim in claims] == [b"1"] * 5


async def suspected(redis: Redis, *ids: str) -> None:
    """Two workers have had these jobs, one after the other, and are gone without a delta."""
    await redis.xreadgroup("workers", "gone", {"chat:jobs": ">"})
    for request_id, (job, _) in zip(ids, await stream(redis, "chat:jobs"), strict=True):
        for attempt, kind in ((1, "started"), (2, "claimed")):
            claim = {"type": kind, "queue": "default", "job": job, "delivery": attempt, "reason": "takeover"}
            await redis.xadd(f"chat:tokens:{{{request_id}}}", claim, id=f"{attempt}-0")  # type: ignore[arg-type]  # invariant
        await redis.xclaim(
            "chat:jobs", "workers", HANDED_OVER, 0, [job], idle=HANDED_OVER_IDLE, retrycount=2, justid=True
        )


async def test_a_suspect_that_waits_for_its_turn_is_handed_over_like_the_rest(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator, simulator: Simulator
) -> None:
    ids = [await client.enqueue({"model": "reciter", "messages": STORY}) for _ in range(2)]
    await suspected(redis, *ids)
    hanging = await start_simulator(Options(scenario=Scenario(fault="hang")))
    service = await start_worker(hanging, lease=60, drain_timeout=0, first_token_timeout=600)

    async def one_runs() -> bool:
        taken = await redis.xpending_range("chat:jobs", "workers", "-", "+", 9)
        return len(hanging.served) == 1 and all(line["consumer"] != HANDED_OVER.encode() for line in taken)

    await eventually(one_runs)
    service.stop()
    await start_worker(simulator, lease=60)
    answers = [await client.result(request_id) for request_id in ids]
    assert [answer.outcome for answer in answers] == ["done", "done"]
    assert sorted(answer.attempt for answer in answers) == [3, 4], "one of them never came to a claim in between"
    assert len(hanging.served) == 1


async def test_a_suspect_ends_at_its_deadline_while_it_waits_for_its_turn(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    hanging = await start_simulator(Options(scenario=Scenario(fault="hang")))
    first = await client.enqueue({"model": "reciter", "messages": STORY})
    second = await client.enqueue({"model": "reciter", "messages": STORY}, timeout=1)
    await suspected(redis, first, second)
    await start_worker(hanging, first_token_timeout=600, drain_timeout=0)
    end = (await client.result(second)).end
    assert isinstance(end, Failed)
    assert end.code == "deadline"
    await client.cancel(first)
    await eventually(lambda: nothing_pending(redis))


async def test_a_suspect_that_waits_for_its_server_holds_up_no_other_for_ever(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    async with Simulator(Options(model="away")) as away:
        pass
    first = await client.enqueue({"model": "away", "messages": STORY})
    second = await client.enqueue({"model": "reciter", "messages": STORY})
    await suspected(redis, first, second)
    await start_worker(away, simulator, first_token_timeout=0.5, drain_timeout=0)
    assert (await client.result(second)).outcome == "done"
