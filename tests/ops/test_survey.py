"""What `worker status` shows, of any Redis and for any user, and how it prints that."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from conftest import stream
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError
from topology import cluster
from waits import has_run_for

from worker import Client
from worker.broker.consumers import WAITING
from worker.broker.gateway_registry import GatewayRegistry
from worker.cli.main import main
from worker.cli.status_view import lines_of
from worker.contract.entries import to_json
from worker.contract.keys import Keys
from worker.contract.records import ControlEntry, GatewayRecord, QueueCounts, ServerRecord, WorkerRecord
from worker.engine.poison import WITHOUT_PROGRESS
from worker.ops.findings import Fault, Finding
from worker.ops.reading import read_installation
from worker.ops.survey import Surveyor
from worker.ops.survey_types import (
    DeadLetterState,
    GatewayState,
    QueueState,
    RedisState,
    ServerState,
    Survey,
    WorkerState,
)
from worker.redisio.clients import command_client
from worker.sandbox.embedded_redis import free_port, start_redis

REQUEST = {"messages": [{"role": "user", "content": "Hi"}]}


@asynccontextmanager
async def surveyor(url: str) -> AsyncIterator[Surveyor]:
    redis = command_client(url, timeout=30)
    yield Surveyor(redis, Keys(), url, lease=15)
    await redis.aclose()


async def survey(url: str) -> Survey:
    async with surveyor(url) as it:
        return await it.survey()


def names(found: Survey) -> list[Fault]:
    return [fault.fault for fault in found.faults]


@pytest.fixture
async def write(redis: Redis) -> AsyncIterator["Write"]:
    """Writes the record of a worker that is alive."""
    yield Write(redis)
    await redis.delete("chat:workers", "chat:control", "chat:queues", "chat:dead", "chat:jobs", "chat:jobs:other")


class Write:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def __call__(self, name: str, *, age: float = 0, **values: object) -> None:
        seconds, _ = await self._redis.time()
        given = {"beat": int((seconds - age) * 1000), "started": 1, "slots": 8, "running": 0, "finished": 0}
        record = {"name": name, "lease": 15.0, "queues": ["default"]} | given | values
        await self._redis.hset("chat:workers", name, to_json(record))


async def test_of_an_empty_redis_there_is_no_fault(redis_url: str) -> None:
    found = await survey(redis_url)
    assert (found.faults, found.queues, found.workers, found.unread) == ((), (), (), ())
    assert found.dead_letters == DeadLetterState()
    assert not found.has_error


async def test_a_redis_that_gives_no_answer_is_the_only_fault(redis: Redis, redis_url: str) -> None:
    await redis.acl_setuser("guarded", enabled=True, passwords="+right", keys=["*"], categories=["+@all"])
    await redis.acl_log_reset()
    nowhere = f"redis://:hidden-pw@127.0.0.1:{free_port()}"
    for url, name in ((nowhere, "redis_away"), (redis_url.replace("//", "//guarded:hidden-pw@"), "redis_login")):
        found = await survey(url)
        assert names(found) == [name]
        assert found.faults[0].fix
        assert "hidden-pw" not in str(found)
        assert found.has_error
    assert names(await survey(redis_url)) == ["redis_login"], "a refused login of somebody else is a fault for a while"
    await redis.acl_log_reset()
    await redis.acl_deluser("guarded")


async def test_what_the_user_may_not_read_is_named_and_the_rest_is_shown(
    redis: Redis, redis_url: str, write: Write
) -> None:
    await write("a")
    await redis.acl_setuser(
        "blind", enabled=True, nopass=True, keys=["*"], channels=["*"], categories=["+@all"],
        commands=["-info", "-acl", "-scan", "-hgetall", "-eval", "-evalsha"],
    )  # fmt: skip
    found = await survey(redis_url.replace("//", "//blind:x@"))
    await redis.acl_deluser("blind")
    assert found.faults == ()
    assert found.unread == (
        "memory of Redis (+info)", "refused logins (+acl|log)", "workers",
        "queues that nobody has used through a client (+scan)", "pauses", "dead letters",
    )  # fmt: skip


async def test_records_of_other_versions_are_shown_as_far_as_they_go(
    redis: Redis, redis_url: str, write: Write
) -> None:
    seconds, _ = await redis.time()
    early = {"name": "early", "beat": seconds * 1000, "started": 1, "slots": 8, "running": 1, "finished": 0}
    await redis.hset("chat:workers", "early", to_json(early))
    await redis.hset("chat:workers", "garbled", "{")
    await write("late", by_queue=7, silence="long", other=1)
    found = await survey(redis_url)
    assert [(worker.name, worker.state) for worker in found.workers] == [("early", "working"), ("late", "working")]
    assert found.faults == ()


async def test_queues_have_the_rates_of_their_workers_and_the_age_of_their_oldest_job(
    redis: Redis, redis_url: str, client: Client, write: Write
) -> None:
    counts = {"default": {"finished_per_s": 1.5, "failed": 2}}
    await write("a", by_queue=counts)
    await write("b", by_queue=counts)
    await client.enqueue(REQUEST)
    await client.enqueue(REQUEST, queue="other")
    await redis.xreadgroup("workers", f"{WAITING}-:big", {"chat:jobs": ">"})
    default, other = (await survey(redis_url)).queues
    assert (default.done_per_s, default.failed, default.workers, default.parked) == (3.0, 4, 2, {"big": 1})
    assert default.oldest is not None
    assert (other.waiting, other.workers) == (1, 0)


async def test_a_pause_and_a_job_that_may_be_poison_are_faults(
    redis: Redis, redis_url: str, client: Client, write: Write
) -> None:
    await write("a")
    request_id = await client.enqueue(REQUEST)
    await redis.xreadgroup("workers", "gone", {"chat:jobs": ">"})
    ((job, _),) = await stream(redis, "chat:jobs")
    await redis.xclaim("chat:jobs", "workers", "a", 0, [job], retrycount=2, justid=True)
    assert names(await survey(redis_url)) == [], "two deliveries may be the death of any worker"
    await redis.xclaim("chat:jobs", "workers", "a", 0, [job], retrycount=3, justid=True)
    await redis.hset("chat:control", "pause:default", to_json(ControlEntry(by="me@here", why="a test", since=1)))
    found = await survey(redis_url)
    assert names(found) == ["queue_paused", "poison_job"]
    pause, poison = found.faults
    assert "me@here (a test)" in pause.message
    assert request_id in poison.message
    assert "Hi" not in to_json(found.as_dict())
    await redis.delete("chat:control")
    await redis.xack("chat:jobs", "workers", job)
    reason = f"the job was delivered 5 times {WITHOUT_PROGRESS}"
    await redis.xadd("chat:dead", {"reason": reason, "queue": "default", "job": "1-0", "fields": "secret"})
    found = await survey(redis_url)
    assert names(found) == ["poison_job"]
    assert found.dead_letters.count == 1


@pytest.mark.parametrize(
    ("reasons", "requests", "state", "fault"),
    [
        (("silent", "silent"), (1, 1), "silent", "vllm_silent"),
        (("silent", ""), (1, 1), "up", ""),
        (("silent", ""), (1, 0), "silent", "vllm_silent"),
        (("silent", ""), (0, 1), "up", ""),
        (("silent", "silent"), (0, 0), "silent", "vllm_silent"),
        (("silent", ""), (0, 0), "up", ""),
        (("refuses_all", ""), (1, 1), "full", "vllm_full"),
    ],
)
async def test_a_server_is_silent_if_it_is_so_for_every_worker_that_uses_it_or_else_for_all(
    reasons: tuple[str, str], requests: tuple[int, int], state: str, fault: str, redis_url: str, write: Write
) -> None:
    for name, reason, count in zip("ab", reasons, requests, strict=True):
        server = ServerRecord(url="http://gpu:8000", state="up", reason=reason, requests=count)
        await write(name, servers=[json.loads(to_json(server))])
    found = await survey(redis_url)
    assert [server.state for server in found.servers] == [state]
    assert [name for name in names(found) if name] == [fault][: bool(fault)]


async def test_it_is_an_error_that_no_worker_has_a_server_of_a_model(redis_url: str, write: Write) -> None:
    gpu, other = ({"url": f"http://{host}:8000", "state": "up"} for host in ("gpu", "other"))
    away = gpu | {"state": "away", "reason": "upstream_unreachable"}
    await write("one", models=["a", "b"], models_away=["a"], servers=[away, other])
    await write("two", models=["a", "b"], servers=[gpu, other])
    assert not (await survey(redis_url)).has_error, "another worker reaches it"
    await write("two", models=["a", "b"], models_away=["a"], servers=[away, other])
    found = await survey(redis_url)
    assert [(fault.level, fault.fault) for fault in found.faults] == [("error", "vllm_away"), ("warning", "vllm_away")]
    assert found.faults[0].message.endswith("its jobs wait: a")
    assert found.has_error


@pytest.mark.parametrize(("reason", "fault"), [("unauthorized", "vllm_login"), ("health_503", "vllm_away")])
async def test_it_is_an_error_that_all_servers_are_away(reason: str, fault: str, redis_url: str, write: Write) -> None:
    """Also of workers whose servers have never listed a model."""
    for name in ("one", "two"):
        await write(name, paused="no_vllm", servers=[{"url": "http://gpu:8000", "state": "away", "reason": reason}])
    found = await survey(redis_url)
    assert (found.faults[0].level, found.faults[0].fault, found.has_error) == ("error", fault, True)
    assert "no job can run" in found.faults[0].message


@pytest.mark.parametrize(
    ("values", "parked", "fault"),
    [
        ({"running": 8}, False, ""),  # all slots are in use
        ({"paused": "vllm_full"}, False, "vllm_full"),
        ({}, True, "vllm_full"),
        ({"paused": "no_vllm"}, True, "vllm_away"),
        ({"draining": True}, False, "queue_unserved"),
    ],
)
async def test_jobs_that_wait_long_are_a_fault_of_full_servers_and_not_of_full_slots(
    values: dict[str, Any], redis: Redis, redis_url: str, write: Write, *, parked: bool, fault: str
) -> None:
    lasting = {"queue_unserved", "vllm_away"}
    await write("a", **values)
    seconds, _ = await redis.time()
    await redis.xgroup_create("chat:jobs", "workers", id="0", mkstream=True)
    await redis.xadd("chat:jobs", {"id": "x"}, id=f"{(seconds - 1) * 1000}-0")
    assert names(await survey(redis_url)) == [name for name in [fault] if name in lasting], "not so long"
    await redis.delete("chat:jobs")
    await redis.xgroup_create("chat:jobs", "workers", id="0", mkstream=True)
    await redis.xadd("chat:jobs", {"id": "x"}, id=f"{(seconds - 20) * 1000}-0")
    if parked:
        await redis.xreadgroup("workers", f"{WAITING}-:big", {"chat:jobs": ">"})
    assert names(await survey(redis_url)) == [fault] * bool(fault)


async def test_texts_that_others_have_chosen_do_not_control_the_terminal(redis: Redis, redis_url: str) -> None:
    await redis.acl_log_reset()
    async with Redis.from_url(redis_url.replace("//", "//%1b%5b2J:x@"), protocol=2) as intruder:
        with pytest.raises(AuthenticationError):
            await intruder.ping()
    lines = lines_of(await survey(redis_url))
    await redis.acl_log_reset()
    assert "`�[2J`" in " ".join(lines)
    assert not any("\x1b[2J" in line for line in lines)


async def test_a_silent_worker_is_dead_or_blocked_by_its_connection(redis: Redis, redis_url: str, write: Write) -> None:
    await has_run_for(redis, 5)
    await write("dead", age=3, presence=True, lease=4.0)
    await write("blocked", age=5, presence=True, lease=4.0, silence=5.0, tokens_per_s=9.0)
    await write("late", age=0, presence=True, lease=60.0)
    await write("early", age=5, lease=4.0)
    async with redis.pubsub() as channels:
        await channels.subscribe(Keys().presence("blocked"), Keys().presence("late"))
        while (await channels.get_message(timeout=1) or {}).get("data") != 2:
            pass
        found = await survey(redis_url)
    assert {fault.subject: fault.fault for fault in found.faults} == {
        "worker dead": "worker_dead", "worker blocked": "worker_blocked", "worker early": "worker_silent"
    }  # fmt: skip
    blocked = next(worker for worker in found.workers if worker.name == "blocked")
    assert (blocked.tokens_per_s, blocked.silence >= 10) == (0, True), "its last record is not its state"


async def test_no_worker_is_silent_for_longer_than_redis_could_receive_its_record(redis: Redis, write: Write) -> None:
    await write("dead", age=1000, presence=True)
    await write("early", age=1000)
    for seconds, alive in ((1000.0, set[str]()), (5.0, {"early"}), (1.0, {"dead", "early"}), (None, {"dead", "early"})):
        reading = await read_installation(redis, Keys(), 15, renewable_for=seconds)
        assert set(reading.alive) == alive, seconds
    reading = await read_installation(redis, Keys(), 15, renewable_for=0)
    assert (set(reading.alive), reading.connected) == ({"early"}, {"dead": False})


async def test_of_a_redis_that_has_just_started_no_worker_is_silent() -> None:
    with start_redis() as server:
        async with Redis.from_url(server.url, protocol=2) as redis:
            await Write(redis)("a", age=100_000, lease=6000.0)
            await redis.xadd("chat:jobs", {"id": "x"})
            found = await survey(server.url)
            assert (found.faults, [queue.workers for queue in found.queues]) == ((), [1])


async def test_a_full_redis_is_the_first_fault_and_its_workers_are_known_by_their_connections() -> None:
    with start_redis() as server:
        async with Redis.from_url(server.url, protocol=2) as redis, redis.pubsub() as channels:
            write = Write(redis)
            await write("up", age=1000, presence=True, paused="no_vllm", tokens_per_s=7.0)
            await write("gone", age=1000, presence=True)
            await write("early", age=1000)
            await redis.xadd("chat:jobs", {"id": "x"})
            await channels.subscribe(Keys().presence("up"))
            while (await channels.get_message(timeout=1) or {}).get("data") != 1:
                pass
            await redis.config_set("maxmemory", 1)
            found = await survey(server.url)
            assert names(found) == ["redis_full", "worker_dead"]
            assert [queue.workers for queue in found.queues] == [2]
            assert any(line.startswith("Redis ") and line.endswith("  full") for line in lines_of(found))
            assert {worker.name: (worker.state, worker.reason, worker.tokens_per_s) for worker in found.workers} == {
                "early": ("unknown", "", 0), "gone": ("silent", "", 0), "up": ("connected", "", 0)
            }  # fmt: skip
            await redis.config_set("maxmemory", 0)
            await redis.replicaof("127.0.0.1", "1")
            found = await survey(server.url)
            assert names(found) == ["redis_refuses"], "its workers are connected to the master"
            assert {worker.state for worker in found.workers} == {"unknown"}


async def test_a_cluster_is_surveyed(redis_binary: Path, tmp_path: Path) -> None:
    with cluster(redis_binary, tmp_path) as nodes:
        url = f"redis+cluster://127.0.0.1:{nodes[0].port}"
        async with Client(url) as client:
            await client.enqueue(REQUEST)
        redis = command_client(url, timeout=30)
        await GatewayRegistry(redis, Keys()).write(GatewayRecord(host="web", pid=7))
        await redis.aclose()
        found = await survey(url)
    assert names(found) == ["no_worker"]
    assert [(gateway.name, gateway.state) for gateway in found.gateways] == [("web:7", "serving")]
    assert [queue.waiting for queue in found.queues] == [1]
    assert len(found.redis) == len(nodes)


def test_every_line_fits_80_columns_and_those_of_a_narrower_terminal() -> None:
    long = "a-name-of-a-pod-that-somebody-has-chosen-and-that-does-not-fit-7c9f-x2b4q"
    fault = Finding(
        "error", f"worker {long}", "it has been silent for 9 s " * 9, "do something about it " * 9, "worker_dead", 1
    )
    found = Survey(
        time=1_700_000_000_000,
        faults=(fault,),
        queues=(QueueState(name=long, waiting=123456, oldest=9e6, running=1000, workers=3,
                           done_per_s=1234.5, failed=10000),),
        workers=(
            WorkerState(name=long, state="paused", reason="redis_refuses", queues=("one", "other", long), slots=1000,
                        running=1000, tokens_per_s=123456, silence=100, version="10.20.30rc4"),
        ),
        gateways=(GatewayState(name=f"{long}:12345", state="draining", address=f"{long}:8080", streams=123456),),
        servers=(ServerState(url=f"http://{long}:8000", state="up", requests=10000, limit=10000),),
        redis=(RedisState(name=f"Redis redis://{long}:6379", used=10**10, limit=10**11, full_in=1e5),),
        dead_letters=DeadLetterState(count=1000, newest=5, reason="why " * 40),
        unread=("workers", "dead letters", "pauses", "queue a", "memory of Redis (+info)"),
    )  # fmt: skip
    lines = [click.unstyle(line) for line in lines_of(found)]
    assert max(map(len, lines)) <= 80
    for width in (40, 10):  # a watched picture is redrawn, so no line may wrap
        assert max(len(click.unstyle(line)) for line in lines_of(found, width)) <= width
    (worker,) = [line for line in lines if line.startswith("a-name") and "redis_refuses" in line]
    assert "7c9f-x2b4q"[-5:] in worker.split()[0]


async def status(url: str, *options: str) -> Result:
    runner = CliRunner(env={"REDIS_URL": url})
    return await asyncio.to_thread(runner.invoke, main, ["status", *options])


async def test_the_exit_status_is_1_if_a_fault_is_an_error(
    redis: Redis, redis_url: str, client: Client, write: Write
) -> None:
    assert (await status(redis_url)).exit_code == 0
    await client.enqueue(REQUEST)
    alone = await status(redis_url, "--json")
    assert alone.exit_code == 1
    printed = json.loads(alone.output)
    assert [(fault["fault"], fault["level"]) for fault in printed["faults"]] == [("no_worker", "error")]
    assert set(printed) == set(Survey.__struct_fields__)
    await write("a")
    served = await status(redis_url)
    assert served.exit_code == 0
    assert served.output.startswith("no fault is known")
    await client.enqueue(REQUEST, queue="other")
    await redis.hset("chat:control", "pause:other", to_json(ControlEntry(by="me@here", since=1)))
    unserved = await status(redis_url, "--json")
    assert unserved.exit_code == 1
    found = json.loads(unserved.output)["faults"]
    assert [(fault["fault"], fault["level"]) for fault in found] == [
        ("queue_unserved", "error"), ("queue_paused", "warning")
    ]  # fmt: skip
    await write("b", queues=["other"])
    paused = await status(redis_url)
    assert paused.exit_code == 0
    assert paused.output.startswith("warning queue other: it is paused by me@here")
    away = await status(f"redis://127.0.0.1:{free_port()}")
    assert away.exit_code == 1
    assert "start Redis there" in away.output


def test_counts_of_a_queue_are_part_of_a_record() -> None:
    record = WorkerRecord(
        name="a", beat=1, started=1, slots=1, running=0, finished=0,
        by_queue={"default": QueueCounts(finished_per_s=1.0, failed=2)},
    )  # fmt: skip
    assert WorkerRecord.read(to_json(record).encode()) == record
