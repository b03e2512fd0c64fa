"""What `worker check` finds about the running workers and about queues that nobody serves."""

from collections.abc import AsyncIterator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import StartSimulator, StartWorker
from prometheus_client.samples import Sample
from redis.asyncio import Redis
from waits import eventually, has_run_for

from worker import Client
from worker.broker.consumers import HANDED_OVER, WAITING
from worker.broker.worker_registry import WorkerRegistry
from worker.contract.entries import to_json
from worker.contract.keys import Keys
from worker.contract.records import REFUSES_ALL, ServerRecord, WorkerRecord
from worker.engine.application import Worker
from worker.ops.checks import check
from worker.ops.findings import Finding, listed
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.server import Simulator

Record = Callable[..., Coroutine[Any, Any, None]]


@pytest.fixture
async def record(redis: Redis) -> AsyncIterator[Record]:
    """Writes the record of a worker that is alive."""

    async def write(name: str, **values: Any) -> None:  # noqa: ANN401 - any field of a record
        now = (await redis.time())[0] * 1000
        given = {"beat": now, "started": now, "slots": 8, "running": 0, "finished": 0} | values
        await redis.hset("chat:workers", name, to_json(WorkerRecord(name=name, **given)))

    yield write
    await redis.delete("chat:workers")


Find = Callable[..., Coroutine[Any, Any, list[Finding]]]


@pytest.fixture
def find(redis_url: str, simulator: Simulator) -> Find:
    """The findings about subjects that begin with a word."""

    async def found(subject: str, **settings: object) -> list[Finding]:
        options: dict[str, object] = {"redis_url": redis_url, "vllm_urls": simulator.url, "lease": 15} | settings
        return [finding async for finding in check(options) if finding.subject.startswith(subject)]

    return found


async def test_a_server_that_refuses_everything_is_a_warning(record: Record, find: Find) -> None:
    server = ServerRecord(url="http://gpu:8000", state="up", reason=REFUSES_ALL)
    await record("a", lease=15, servers=(server,), paused="vllm_full")
    warning = (await find("workers at vLLM"))[-1]
    assert (warning.level, warning.subject) == ("warning", "workers at vLLM http://gpu:8000")
    assert warning.message.startswith("it has refused every request of a for half a minute")


async def test_unequal_leases_are_a_warning(record: Record, find: Find) -> None:
    await record("a", lease=15)
    await record("b", lease=15)
    await record("early")
    assert [finding.level for finding in await find("workers")] == ["ok"]
    await record("c", lease=30)
    _, leases = await find("workers")
    assert leases.level == "warning"
    assert leases.message == "their leases differ (15 s: a, b; 30 s: c)"
    assert "WORKER_LEASE" in leases.fix


async def test_a_lease_other_than_that_of_the_workers_is_a_warning(record: Record, find: Find) -> None:
    await record("a", lease=60)
    _, lease = await find("workers")
    assert (lease.level, lease.message) == ("warning", "their lease is 60 s, and WORKER_LEASE is 15 s here")
    assert lease.fix.startswith("set WORKER_LEASE to 60")


async def test_a_worker_is_silent_after_half_of_its_own_lease(record: Record, find: Find, redis: Redis) -> None:
    await has_run_for(redis, 3)
    now = (await redis.time())[0] * 1000
    await record("long", lease=60, beat=now - 20_000)
    await record("short", lease=2, beat=now - 10_000)
    assert [finding.subject for finding in await find("worker ")] == ["worker short"]


async def test_versions_that_differ_are_listed(record: Record, find: Find) -> None:
    for number in range(5):
        await record(f"w{number}", version="1.0", lease=15)
    await record("new", version="1.1", lease=15)
    _, versions = await find("workers")
    assert versions.level == "ok"
    assert versions.message == "their versions differ, as during a deploy (1.0: w0, w1, w2 and 2 more; 1.1: new)"


async def test_a_server_that_is_away_for_some_workers_only_is_a_warning(record: Record, find: Find) -> None:
    up = ServerRecord(url="http://gpu:8000", state="up", requests=3, limit=4.4)
    away = ServerRecord(url="http://gpu:8000", state="away", reason="upstream_unreachable")
    await record("a", lease=15, servers=(up, ServerRecord(url="http://own:8000", state="up")))
    await record("b", lease=15, servers=(up,))
    await record("c", lease=15, servers=(away,))
    gpu, partly, own = await find("workers at vLLM")
    assert gpu.message == "requests of theirs: 6; their limits, learnt from the server: 9"
    assert partly.level == "warning"
    assert partly.message == "it is up for a, b, and away for others (upstream_unreachable: c)"
    assert own.message == "requests of theirs: 0; not in VLLM_URLS of b, c"
    assert {gpu.level, own.level} == {"ok"}


async def test_the_loopback_address_is_another_server_on_each_host(record: Record, find: Find) -> None:
    for name, state in (("a", "up"), ("b", "away")):
        server = ServerRecord(url="http://127.0.0.1:8000", state=state)
        await record(name, lease=15, host=f"host-{name}", servers=(server,))
    found = await find("workers at vLLM")
    assert [(finding.subject.rpartition(" ")[2], finding.fault) for finding in found] == [
        ("host-a", ""), ("host-b", ""), ("host-b", "vllm_away")
    ]  # fmt: skip


async def test_a_server_in_a_record_may_have_any_text_as_its_url(record: Record, find: Find) -> None:
    await record("a", lease=15, servers=(ServerRecord(url="http://[::", state="away", reason="\x1b[2J"),))
    assert [each.level for each in await find("workers at vLLM http://[::")] == ["ok", "warning"]


async def test_a_worker_that_starts_is_no_warning_unless_it_takes_long(
    record: Record, find: Find, redis: Redis
) -> None:
    servers = (ServerRecord(url="http://gpu:8000", state="starting"),)
    await record("new", lease=15, starting=True, servers=servers)
    (starting,) = await find("worker ")
    assert starting == Finding("ok", "worker new", "it is starting: it has not probed its vLLM servers yet")
    now = (await redis.time())[0] * 1000
    await record("new", lease=15, starting=True, servers=servers, started=now - 90_000)
    (slow,) = await find("worker ")
    assert (slow.level, slow.message) == (
        "warning", "it takes no jobs yet: it waits for an answer of http://gpu:8000"
    )  # fmt: skip


@pytest.mark.parametrize("reason", ["vllm_full", "redis_login", "redis_refuses", "redis_away", "redis_full", "no_vllm"])
async def test_every_reason_for_a_pause_has_a_fix(reason: str, record: Record, find: Find) -> None:
    await record("a", lease=15, paused=reason)
    (paused,) = await find("worker ")
    assert paused.message.endswith(reason)
    assert paused.fix
    assert paused.fix != "see its log"


async def test_a_worker_without_a_vllm_has_the_reason_of_each_server(record: Record, find: Find) -> None:
    refused, away = (
        ServerRecord(url=f"http://{name}:8000", state="away", reason=reason)
        for name, reason in (("a", "unauthorized"), ("b", "upstream_unreachable"))
    )
    await record("one", lease=15, paused="no_vllm", servers=(refused, away))
    await record("two", lease=15, paused="no_vllm", servers=(away,))
    one, two = await find("worker ")
    assert one.message.endswith("no_vllm (http://a:8000: unauthorized, http://b:8000: upstream_unreachable)")
    assert "VLLM_API_KEY" in one.fix
    assert two.fix.startswith("start a vLLM server")
    (outage,) = await find("vLLM servers")
    assert outage.level == "warning", "a worker with other servers can work"


async def test_a_queue_with_jobs_that_nobody_serves_is_found(
    record: Record, find: Find, client: Client, redis: Redis
) -> None:
    await record("a", lease=15, queues=("default",))
    request = {"messages": [{"role": "user", "content": "Hi"}]}
    await client.enqueue(request)
    await client.enqueue(request, queue="batch")
    await redis.xadd("chat:jobs:not a name", {"id": "x"})
    await redis.xadd("chat:jobsite", {"id": "x"})
    await redis.set("chat:jobs:text", "x", ex=60)
    found = {finding.subject: finding for finding in await find("queue")}
    assert set(found) == {"queue default", "queue batch", "queue 'not a name'"}
    assert found["queue default"].level == "ok"
    batch = found["queue batch"]
    assert (batch.level, batch.message) == ("warning", "no worker serves it; jobs that wait: 1; with a worker: 0")
    assert "WORKER_QUEUES" in batch.fix
    assert found["queue 'not a name'"].level == "warning"
    await record("b", lease=15, queues=("batch",))
    assert {finding.subject: finding.level for finding in await find("queue")}["queue batch"] == "ok"
    await redis.delete("chat:jobs:not a name", "chat:jobsite")


async def test_parked_jobs_wait_and_are_counted_by_model(
    record: Record, find: Find, client: Client, redis: Redis
) -> None:
    await record("a", lease=15)
    for _ in range(6):
        await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]})
    for consumer, count in (
        (f"{WAITING}-:big", 1),
        (f"{WAITING}7:big|b", 1),
        (f"{WAITING}-:", 1),
        (HANDED_OVER, 1),
    ):
        await redis.xreadgroup("workers", consumer, {"chat:jobs": ">"}, count=count)
    await redis.xreadgroup("workers", "a", {"chat:jobs": ">"}, count=1)
    (queue,) = await find("queue")
    # Redis 6.2 cannot count jobs that nobody has read, but their number is right while none is trimmed.
    assert queue.message == (
        "jobs that wait: 4, of which parked until a server has room: big 2, any model 1; with a worker: 1; "
        "to be continued by another worker: 1"
    )


async def test_without_the_right_to_scan_only_known_queues_are_checked(
    record: Record, redis: Redis, redis_url: str, simulator: Simulator, client: Client
) -> None:
    await record("a", lease=15, queues=("default", "known"))
    await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]}, queue="used")
    await redis.xadd("chat:jobs:bare", {"id": "x"})
    await redis.acl_setuser(
        "blind", enabled=True, nopass=True, keys=["*"], channels=["*"], categories=["+@all"], commands=["-scan"]
    )
    options: dict[str, object] = {"redis_url": redis_url.replace("//", "//blind:x@"), "vllm_urls": simulator.url}
    found = [finding async for finding in check(options)]
    await redis.acl_deluser("blind")
    queues = [finding for finding in found if finding.subject.startswith("queue")]
    assert [(finding.subject, finding.level) for finding in queues] == [
        ("queue default", "ok"), ("queue used", "warning"), ("queues", "ok")
    ]  # fmt: skip
    assert "+scan" in queues[-1].message
    await redis.delete("chat:jobs:bare")


async def test_the_record_of_a_worker_has_its_state_and_no_secret(
    redis: Redis, simulator: Simulator, start_worker: StartWorker
) -> None:
    url = simulator.url.replace("//", "//user:secret@")
    await start_worker(simulator, vllm_urls=url, lease=2, metrics="127.0.0.1:0")
    registry = WorkerRegistry(redis, Keys())

    async def is_up() -> bool:
        records = (await registry.records()).values()
        return any(server.state == "up" and not one.starting for one in records for server in one.servers)

    await eventually(is_up)
    (written,) = (await registry.records()).values()
    assert (written.lease, written.queues, written.paused, written.starting) == (2.0, ("default",), "", False)
    assert written.host
    assert written.pid
    assert written.metrics == "127.0.0.1:0"
    assert all(server.limit > 0 for server in written.servers)
    assert [server.url for server in written.servers] == [url.replace("user:secret", "***")]
    assert b"secret" not in next(iter((await redis.hgetall("chat:workers")).values()))


def samples(worker: Worker) -> list[Sample]:
    return [sample for family in worker.metrics.registry.collect() for sample in family.samples]


async def test_a_worker_that_has_just_started_is_not_paused(
    redis: Redis, simulator: Simulator, start_worker: StartWorker
) -> None:
    """A lease of a minute: the next heartbeat comes after 20 s, and the record must be right long before."""
    seen: set[tuple[str, bool]] = set()
    registry = WorkerRegistry(redis, Keys())

    async def takes_jobs() -> bool:
        records = (await registry.records()).values()
        seen.update((one.paused, one.starting) for one in records)
        return any(not one.starting for one in records)

    worker = await start_worker(simulator, lease=60)
    await eventually(takes_jobs)
    assert seen <= {("", True), ("", False)}
    assert not [sample for sample in samples(worker) if sample.name == "vllm_relay_claims_paused"]


async def test_the_record_has_a_pause_and_its_end_long_before_the_next_heartbeat(
    redis: Redis, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    port, registry = free_port(), WorkerRegistry(redis, Keys())
    await start_worker(SimpleNamespace(url=f"http://127.0.0.1:{port}"), lease=60)

    async def is_paused(reason: str) -> bool:
        records = (await registry.records()).values()
        return [(one.paused, one.starting) for one in records] == [(reason, False)]

    await eventually(lambda: is_paused("no_vllm"))
    await start_simulator(port=port)
    await eventually(lambda: is_paused(""))


def test_of_many_names_the_first_are_listed() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
