"""The end of an ordinary job is one script, and whatever comes in its way leads to one outcome."""

from collections.abc import AsyncIterator

import pytest
from checks import begun_by_a_dead_worker, chat_request, log_of, promise_kept
from conftest import StartWorker, metric, stream
from proxy import Proxy
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.engine.application import Worker
from worker.sandbox.simulator.server import Simulator

END = rb"^EVALSHA .* type done .* type finished "
SEAL = rb"^EVALSHA (?!.* type finished ).* type done "


async def types(redis: Redis, request_id: str) -> list[str]:
    return [entry.type for entry in await log_of(redis, request_id)]


async def lifecycle(redis: Redis) -> list[tuple[bytes, bytes]]:
    return [(fields[b"type"], fields[b"id"]) for _, fields in await stream(redis, "chat:lifecycle")]


async def pending(redis: Redis) -> int:
    return int((await redis.xpending("chat:jobs", "workers"))["pending"])


@pytest.fixture
async def limited(redis: Redis, redis_url: str) -> AsyncIterator[str]:
    """The Redis, for a user whose rights a test takes away."""
    await redis.acl_setuser("limited", enabled=True, passwords="+pw", keys=["*"], channels=["*"], categories=["+@all"])
    yield redis_url.replace("//", "//limited:pw@")
    await redis.acl_deluser("limited")


async def test_an_ordinary_job_sends_two_scripts_and_its_entries(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator
) -> None:
    """Each command of the steps one by one would be held, and so would the job."""
    steps = (rb"^XACK", rb"^XADD chat:lifecycle", rb"^SET chat:ended", rb"^EXPIRE chat:tokens")
    orders = [redis_proxy.hold(command) for command in steps]
    worker = await start_worker(simulator, redis_url=redis_proxy.redis_url)
    ids = []
    for number in range(2):
        ids.append(await client.enqueue(chat_request()))
        await promise_kept(redis, ids[-1])
        if not number:  # Redis knows the scripts now
            await redis.config_resetstat()
    assert not [order.command for order in orders if order.met.is_set()]
    commands = await redis.info("commandstats")
    assert commands["cmdstat_evalsha"]["calls"] == 3, "the client's, to add the job, and two"
    assert await lifecycle(redis) == [(kind, one.encode()) for one in ids for kind in (b"started", b"finished")]
    await eventually(lambda: counted(worker, 2))


async def counted(worker: Worker, finished: int) -> bool:
    return metric(worker, "jobs_finished_total", outcome="done", code="") == finished


async def test_a_cancel_before_the_last_step_is_the_outcome(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator
) -> None:
    end = redis_proxy.hold(END)
    await start_worker(simulator, redis_url=redis_proxy.redis_url)
    request_id = await client.enqueue(chat_request())
    await end.met.wait()
    await client.cancel(request_id)
    end.release()
    ended = await promise_kept(redis, request_id, outcome="cancelled")
    assert ended.attempts == 1


@pytest.mark.parametrize("trimmed", [False, True])
async def test_a_take_over_before_the_last_step_keeps_the_job(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator, *, trimmed: bool
) -> None:
    """The former owner neither seals nor acknowledges, nor does it write to the lifecycle."""
    end = redis_proxy.hold(END)
    worker = await start_worker(simulator, redis_url=redis_proxy.redis_url)
    request_id = await client.enqueue(chat_request())
    await end.met.wait()
    claimed = {"type": "claimed", "queue": "default", "worker": "other", "owner": "other", "time": "1"}
    key = f"chat:tokens:{{{request_id}}}"
    await redis.xadd(key, claimed, id="2-0")  # type: ignore[arg-type]  # dict is invariant
    if trimmed:  # the log has as many entries as its former owner wrote
        await redis.xtrim(key, maxlen=await redis.xlen(key) - 1, approximate=False)
    end.release()

    async def is_left() -> bool:
        return metric(worker, "jobs_running") == 0

    await eventually(is_left)
    assert (await types(redis, request_id))[-1] == "claimed"
    assert await pending(redis) == 1
    assert await lifecycle(redis) == [(b"started", request_id.encode())]
    assert not await redis.exists(f"chat:ended:{{{request_id}}}")


async def test_a_log_that_lost_an_entry_before_the_last_step_is_not_sealed_as_complete(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator
) -> None:
    end = redis_proxy.hold(END)
    await start_worker(simulator, redis_url=redis_proxy.redis_url)
    request_id = await client.enqueue(chat_request())
    await end.met.wait()
    await redis.xdel(f"chat:tokens:{{{request_id}}}", "1-3")
    end.release()
    assert (await client.result(request_id)).outcome == "done"
    assert "restarted" in await types(redis, request_id)


@pytest.mark.parametrize("right", ["xack", "evalsha|eval", "set", "expire"])
async def test_a_job_whose_end_lacks_a_right_waits_for_it(
    right: str, client: Client, redis: Redis, limited: str, redis_proxy: Proxy, start_worker: StartWorker,
    simulator: Simulator,
) -> None:  # fmt: skip
    end = redis_proxy.hold(END)
    await start_worker(simulator, redis_url=redis_proxy.redis_url.replace("//", "//limited:pw@"))
    assert limited
    request_id = await client.enqueue(chat_request())
    await end.met.wait()
    commands = right.split("|")
    await redis.acl_setuser("limited", enabled=True, commands=[f"-{command}" for command in commands])
    end.release()

    async def is_refused() -> bool:
        return any(b"limited" in str(line).encode() for line in await redis.acl_log())

    await eventually(is_refused)
    assert await pending(redis) == 1
    await redis.acl_setuser("limited", enabled=True, commands=[f"+{command}" for command in commands])
    await promise_kept(redis, request_id)


@pytest.mark.parametrize("refused", ["lifecycle", "feed"])
async def test_a_last_step_that_redis_refuses_neither_ends_a_job_early_nor_loses_its_end(
    refused: str, client: Client, redis: Redis, limited: str, redis_proxy: Proxy, start_worker: StartWorker,
    simulator: Simulator,
) -> None:  # fmt: skip
    end, single = redis_proxy.hold(END), redis_proxy.hold(rb"^XACK")
    worker = await start_worker(simulator, redis_url=redis_proxy.redis_url.replace("//", "//limited:pw@"))
    assert limited
    request_id = await client.enqueue(chat_request())
    await end.met.wait()
    if refused == "lifecycle":
        await redis.delete("chat:lifecycle")
        await redis.set("chat:lifecycle", "in the way", ex=60)
    else:
        await redis.acl_setuser("limited", enabled=True, commands=["-publish"])
    end.release()
    await single.met.wait()
    assert await pending(redis) == 1, "the worker acknowledges the job in a step of its own"
    single.release()
    assert (await client.result(request_id)).outcome == "done"

    async def is_over() -> bool:
        return not await pending(redis) and metric(worker, "records_refused_total", record=refused) >= 1

    await eventually(is_over)
    if refused == "feed":
        assert (await lifecycle(redis))[-1] == (b"finished", request_id.encode())


async def test_a_job_that_must_stop_tries_no_single_step_after_its_script_has_failed(
    client: Client, redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator
) -> None:
    """Before a silent Redis, each step would delay the end of the process by a timeout."""
    end = redis_proxy.hold(END)
    worker = await start_worker(simulator, redis_url=redis_proxy.redis_url, drain_timeout=0)
    await client.enqueue(chat_request(simulate={"rate": 1}))
    await client.enqueue(chat_request())
    await end.met.wait()
    worker.stop()

    async def are_running(count: int) -> bool:
        return metric(worker, "jobs_running") == count

    await eventually(lambda: are_running(1))  # the other one has left its answer
    again = redis_proxy.hold(b"type done ")
    await redis_proxy.cut()
    await eventually(lambda: are_running(0))
    assert not again.met.is_set()


async def test_an_end_that_waited_for_redis_has_the_time_at_which_it_was_written(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator
) -> None:
    end = redis_proxy.hold(END)
    await start_worker(simulator, redis_url=redis_proxy.redis_url)
    request_id = await client.enqueue(chat_request())
    await end.met.wait()
    cut_at = await now(redis) + 100

    async def is_later() -> bool:
        return await now(redis) >= cut_at

    await eventually(is_later)
    await redis_proxy.cut()
    await promise_kept(redis, request_id)
    _, finished = (await stream(redis, "chat:lifecycle"))[-1]
    assert finished[b"type"] == b"finished"
    assert int(finished[b"time"]) >= cut_at - 50, "the worker's clock follows that of Redis"


async def now(redis: Redis) -> int:
    """Unix ms by Redis's clock."""
    seconds, microseconds = await redis.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


async def test_a_feed_that_is_refused_ends_no_job_late(
    client: Client, redis: Redis, limited: str, start_worker: StartWorker, simulator: Simulator
) -> None:
    worker = await start_worker(simulator, redis_url=limited)
    await promise_kept(redis, await client.enqueue(chat_request()))
    await redis.acl_setuser("limited", enabled=True, reset_channels=True, channels=["chat:cancel"])
    for _ in range(2):
        await promise_kept(redis, await client.enqueue(chat_request()))
    assert metric(worker, "records_refused_total", record="feed") >= 1


async def test_finished_waits_for_a_started_that_redis_does_not_have_yet(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator
) -> None:
    """The record of a later attempt is written beside the answer."""
    former = await start_worker(simulator)
    await promise_kept(redis, await client.enqueue(chat_request()))  # Redis knows the scripts now
    former.stop()

    async def has_left() -> bool:
        return not await redis.hlen("chat:workers")

    await eventually(has_left)
    await redis.delete("chat:lifecycle")
    request_id = await client.enqueue(chat_request())
    await begun_by_a_dead_worker(redis, request_id, {"type": "delta", "content": "The river"})
    order = redis_proxy.cut_before(rb"^XADD chat:lifecycle \S+ type started", times=8)
    await start_worker(simulator, redis_url=redis_proxy.redis_url)
    await promise_kept(redis, request_id)
    assert order.done.is_set()
    assert await lifecycle(redis) == [(b"started", request_id.encode()), (b"finished", request_id.encode())]
