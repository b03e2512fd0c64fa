"""The service on a Redis cluster, with real servers that fail over."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
import topology
from acl import PASSWORD, acl
from conftest import StartProcess, StartSimulator, StartWorker, stream
from lifecycle_records import KEY, LOSSES, MIB, write_records
from redis.asyncio import Redis
from redis.exceptions import RedisError
from steered_clock import SteeredClock
from topology import MEDDLING, chat_request, expected, settled, whole
from waits import eventually
from written_log import let_deadline_pass

from worker import Answer, Claimed, Client, Conflict, Delta, Entry, State, Status
from worker.broker.job_queue import JobQueue
from worker.broker.lifecycle_group import LifecycleGroup
from worker.broker.lifecycle_retention import LifecycleTrimmer
from worker.contract.ids import SEAL
from worker.contract.keys import GROUP, Keys
from worker.ops.checks import check
from worker.ops.running import RunningRequests
from worker.redisio.clients import blocking_client, command_client
from worker.redisio.cluster import ClusterClient, server_of, slot_of
from worker.redisio.errors import is_transient
from worker.redisio.pipelined import NodeConnections, Outcome, pack
from worker.sandbox.simulator.server import Options, Scenario, Simulator

MAY_STAY = (b"chat:jobs", b"chat:lifecycle", b"chat:workers", b"chat:queues")


@pytest.fixture(scope="module")
def nodes(redis_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[topology.Node]]:
    """Three masters."""
    with topology.cluster(redis_binary, tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


def has_shards(node: topology.Node) -> bool:
    return not node.client.info("server")["redis_version"].startswith("6.")


@pytest.fixture
def cluster_url(nodes: list[topology.Node]) -> Iterator[str]:
    """The cluster, empty; fails a test that leaves a key without an expiry, the lasting ones aside."""
    for node in nodes:
        node.client.flushall()
    yield url_of(nodes)
    keys = [(node, key) for node in nodes for key in node.client.scan_iter(count=10_000)]
    lasting = [key for node, key in keys if node.client.ttl(key) == -1 and not key.startswith(MAY_STAY)]
    assert not lasting, f"keys without expiry: {lasting}"


def url_of(nodes: list[topology.Node]) -> str:
    return f"redis+cluster://127.0.0.1:1,127.0.0.1:{nodes[-1].port}"


@pytest.fixture
async def redis(cluster_url: str) -> AsyncIterator[Redis]:
    async with command_client(cluster_url) as client:
        yield client


@pytest.fixture
async def client(cluster_url: str) -> AsyncIterator[Client]:
    async with Client(cluster_url, patience=20) as client:
        yield client


async def test_logs_of_every_master_are_written_and_followed(
    cluster_url: str, client: Client, redis: Redis, nodes: list[topology.Node], start_worker: StartWorker,
    start_simulator: StartSimulator,
) -> None:  # fmt: skip
    await start_worker(await start_simulator(), redis_url=cluster_url)
    questions = [f"question {number}" for number in range(30)]
    ids = [await client.enqueue(chat_request(question)) for question in questions]
    for request_id, question in zip(ids, questions, strict=True):
        whole([entry async for entry in client.follow(request_id)], question)
    await settled(redis)
    assert all(any(node.client.scan_iter("chat:tokens:*")) for node in nodes), "each master has some"
    assert await client.status(ids[0]) == Status(State.ENDED, "done")
    lifecycle = [fields[b"type"] for _, fields in await stream(redis, "chat:lifecycle")]
    assert (lifecycle.count(b"started"), lifecycle.count(b"finished")) == (30, 30)


async def test_the_running_requests_of_every_master_are_listed(
    cluster_url: str, client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=20, tokens=10_000))), redis_url=cluster_url)
    ids = {await client.enqueue(chat_request(f"question {number}"), id=f"running-{number}") for number in range(6)}
    running = RunningRequests(redis, Keys())

    async def all_grow() -> bool:
        found = (await running.read(["default"])).requests
        return {request.request_id for request in found if request.tokens} == ids

    await eventually(all_grow)
    await running.aclose()
    for request_id in ids:
        await client.cancel(request_id)
    await settled(redis)


async def test_consumers_of_dead_workers_are_removed_at_every_master(redis: Redis) -> None:
    queues = [f"q{number}" for number in range(8)]
    jobs = JobQueue(redis, redis, Keys(), "me", 1)
    for queue in queues:
        await jobs.ensure_group(queue)
        await redis.xgroup_createconsumer(Keys().jobs(queue), GROUP, "stale")
        await jobs.remove_stale_consumers(queue, [], 0)
        assert await redis.xinfo_consumers(Keys().jobs(queue), GROUP) == []
    assert len({(await server_of(redis, Keys().jobs(queue))).connection_pool for queue in queues}) == 3


async def test_a_group_reads_the_lifecycle_and_what_it_lost_is_counted(redis: Redis, cluster_url: str) -> None:
    blocking = blocking_client(cluster_url, 1)
    group = LifecycleGroup(blocking, Keys(), "log", "consumer")
    assert not await group.read(0.01), "it creates the group"
    await write_records(redis, 10_000)
    await LifecycleTrimmer(redis, Keys(), length=1, max_bytes=MIB // 4).trim()
    kept = await redis.xlen(KEY)
    records = await group.read(1)
    assert group.lost == 10_000 - kept > 0
    await group.acknowledge(records)
    await group.losses_reported()
    await group.leave()
    await blocking.aclose()
    assert await redis.hget(LOSSES, "log") == b"0"


@pytest.fixture
def users(nodes: list[topology.Node]) -> Iterator[None]:
    """Creates users of deploy/redis/users.acl at every master, with the additional rights that a cluster needs."""
    for node in nodes:
        sharded = ["+spublish", "+ssubscribe", "+sunsubscribe"] if has_shards(node) else []
        node.execute("ACL", "SETUSER", *acl("worker"), "+cluster|slots", "+command|info", *sharded[:1])
        node.execute("ACL", "SETUSER", *acl("client"), "+cluster|slots", *sharded)
        node.execute("ACL", "LOG", "RESET")
    yield
    for node in nodes:
        node.execute("ACL", "DELUSER", "worker", "client")


@pytest.mark.usefixtures("users")
async def test_the_documented_rights_suffice_in_a_cluster(
    cluster_url: str, nodes: list[topology.Node], start_worker: StartWorker, simulator: Simulator
) -> None:
    urls = {role: cluster_url.replace("://", f"://{role}:{PASSWORD}@") for role in ("worker", "client")}
    await start_worker(simulator, redis_url=urls["worker"])
    async with Client(urls["client"]) as client:
        for number in range(12):
            answer = await client.result(await client.enqueue(chat_request(f"question {number}")))
            assert answer.text == expected(f"question {number}")
        await client.cancel("never")
    assert [str(entry["object"]) for node in nodes for entry in node.client.acl_log()] == []
    found = [it async for it in check({"redis_url": urls["worker"], "vllm_urls": simulator.url})]
    of_redis = [it for it in found if it.subject.startswith("Redis")]
    assert [it.message for it in of_redis if it.level != "ok" and "append-only" not in it.message] == []


async def test_connection_options_in_the_url_change_nothing_in_a_cluster(
    cluster_url: str, start_worker: StartWorker, simulator: Simulator
) -> None:
    await start_worker(simulator, redis_url=cluster_url + MEDDLING)
    async with Client(cluster_url + MEDDLING) as client:
        ids = await asyncio.gather(*(client.enqueue(chat_request(f"question {number}")) for number in range(20)))
        answers = await asyncio.gather(*map(client.result, ids))
    assert [answer.text for answer in answers] == [expected(f"question {number}") for number in range(20)]


async def test_the_feed_is_sharded_from_redis_7_on_and_at_every_master_before(
    cluster_url: str, client: Client, nodes: list[topology.Node], start_worker: StartWorker, simulator: Simulator
) -> None:
    await start_worker(simulator, redis_url=cluster_url)
    ids = [[name for name in map(str, range(100)) if node.owns(slot_of(name))] for node in nodes]
    for former, _, *_ in ids:  # by the end of a job the worker knows whether the master of its log has shards
        await client.result(await client.enqueue(chat_request("Who are you?"), id=former))
    for node, (_, request_id, *_) in zip(nodes, ids, strict=True):
        channel = f"chat:feed:{{{request_id}}}"
        with node.client.pubsub() as feed:  # type: ignore[no-untyped-call]
            if has_shards(node):
                feed.ssubscribe(channel)
            else:
                feed.subscribe(channel)
            assert feed.get_message(timeout=60)
            await client.result(await client.enqueue(chat_request("Who are you?"), id=request_id))
            received = json.loads(cast("dict[str, bytes]", feed.get_message(timeout=60))["data"])
            assert received[0][1]["type"] == "started"


async def test_followers_subscribe_to_the_slot_from_redis_7_on_and_read_before(
    cluster_url: str, client: Client, nodes: list[topology.Node], start_worker: StartWorker,
    start_simulator: StartSimulator,
) -> None:  # fmt: skip
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=50))), redis_url=cluster_url)
    node = nodes[0]
    node.client.config_resetstat()
    request_id = next(name for name in (f"feed-{number}" for number in range(100)) if node.owns(slot_of(name)))
    channel = f"chat:feed:{{{request_id}}}"

    async def has_feed() -> bool:
        if has_shards(node):
            return bool(node.execute("PUBSUB SHARDNUMSUB", channel) == [(channel.encode(), 1)])
        return "cmdstat_xread" in node.client.info("commandstats")

    entries = []
    async for entry in client.generate(chat_request("Who are you?"), id=request_id):
        entries.append(entry)
        if len(entries) == 3:
            await eventually(has_feed)
    whole(entries, "Who are you?")
    assert ("cmdstat_xread" in node.client.info("commandstats")) != has_shards(node)


@pytest.fixture
def without_command_info(nodes: list[topology.Node], cluster_url: str) -> Iterator[str]:
    """The URL of a user who may not run COMMAND INFO, so that Redis looks older than 7 to that user."""
    for node in nodes:
        node.execute("ACL", "SETUSER", "older", "on", ">pw", "~*", "&*", "+@all", "-command")
    yield cluster_url.replace("://", "://older:pw@")
    for node in nodes:
        node.execute("ACL", "DELUSER", "older")


async def test_a_publisher_that_takes_the_cluster_for_an_older_one_can_be_followed(
    without_command_info: str, client: Client, start_worker: StartWorker, start_simulator: StartSimulator,
) -> None:  # fmt: skip
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=100))), redis_url=without_command_info)
    whole([entry async for entry in client.generate(chat_request("Who are you?"))], "Who are you?")


async def test_a_job_that_nobody_started_before_its_deadline_is_ended_in_a_cluster(
    client: Client, redis: Redis
) -> None:
    followed, queried = [await client.enqueue(chat_request("Who are you?"), timeout=0.1) for _ in range(2)]
    for request_id in (followed, queried):
        await let_deadline_pass(redis, request_id)
    assert [entry.type async for entry in client.follow(followed)] == ["queued", "error"]

    async def is_over() -> bool:
        return await client.status(queried) == Status(State.ENDED, "error")

    await eventually(is_over)
    assert not await client.is_served()


async def test_cancel_ends_a_stream_in_a_cluster(
    cluster_url: str, client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(rate=20)))
    await start_worker(simulator, redis_url=cluster_url, lease=5)
    request_id = await client.enqueue(chat_request("Tell me a story"))
    async for entry in client.follow(request_id):
        if isinstance(entry, Delta) and entry.id.n == 3:
            assert (await client.cancel(request_id)).state is State.RUNNING
    assert (await client.result(request_id)).outcome == "cancelled"
    await settled(redis)


async def test_repeating_a_call_adds_the_job_that_it_did_not_add(
    cluster_url: str, client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Died(Exception):
        pass

    async def die(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr("worker.client.enqueuing.Enqueuer.add_to_queue", die)
        with pytest.raises(Died):
            await client.enqueue(chat_request("Who are you?"), id="once", timeout=60)
    assert await client.status("once") == Status(State.QUEUED)
    assert await redis.xlen("chat:jobs") == 0
    with pytest.raises(Conflict):
        await client.enqueue(chat_request("Another question"), id="once")

    for _ in range(3):  # each call may or may not have added the job
        await client.enqueue(chat_request("Who are you?"), id="once", timeout=60)
    ((_, queued),) = await stream(redis, "chat:tokens:{once}")
    assert {job[b"deadline"] for _, job in await stream(redis, "chat:jobs")} == {queued[b"deadline"]}
    await start_worker(simulator, redis_url=cluster_url)
    whole([entry async for entry in client.follow("once")], "Who are you?")
    await settled(redis)
    assert len(simulator.served) == 1, "the others were acknowledged without running"
    length = await redis.xlen("chat:jobs")
    await client.enqueue(chat_request("Who are you?"), id="once")
    assert await redis.xlen("chat:jobs") == length


async def test_the_job_of_a_dead_worker_goes_to_another_in_a_cluster(
    cluster_url: str, client: Client, redis: Redis, start_process: StartProcess, start_simulator: StartSimulator
) -> None:
    clock = SteeredClock(halt_after=15)
    simulator = await start_simulator(clock=clock)
    first = start_process(simulator, redis_url=cluster_url, lease=1)
    entries = []
    async for entry in client.generate(chat_request("Tell me a story")):
        entries.append(entry)
        if isinstance(entry, Delta) and entry.id == (1, 10):
            first.kill()
            first.wait()
            clock.release()
            start_process(simulator, redis_url=cluster_url, lease=1)
    whole(entries, "Tell me a story")
    assert "resumed" in [entry.type for entry in entries]
    await settled(redis)


async def test_a_stream_continues_while_its_slot_moves(
    cluster_url: str, client: Client, redis: Redis, nodes: list[topology.Node], start_worker: StartWorker,
    start_simulator: StartSimulator,
) -> None:  # fmt: skip
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=150))), redis_url=cluster_url, lease=10)
    slot = slot_of("chat:tokens:{moving}")
    entries = []
    async for entry in client.generate(chat_request("Tell me a story"), id="moving"):
        entries.append(entry)
        if isinstance(entry, Delta) and entry.id == (1, 10):
            await asyncio.to_thread(topology.move_slot, nodes, slot)
    whole(entries, "Tell me a story")
    assert [entry.reason for entry in entries if isinstance(entry, Claimed)] == [], "nothing was lost"
    await settled(redis)


async def test_a_stream_outlives_every_connection_to_the_cluster(
    cluster_url: str, client: Client, redis: Redis, nodes: list[topology.Node], start_worker: StartWorker,
    start_simulator: StartSimulator,
) -> None:  # fmt: skip
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=150))), redis_url=cluster_url, lease=10)
    entries = []
    async for entry in client.generate(chat_request("Who are you?")):
        entries.append(entry)
        if isinstance(entry, Delta) and entry.id.n in (5, 10, 15):
            for node in nodes:
                node.client.client_kill_filter(_type="normal", skipme=True)
    whole(entries, "Who are you?")
    assert Answer(entries).attempt == 1, "nothing was lost"
    await settled(redis)


@pytest.fixture
async def master(redis: Redis, nodes: list[topology.Node]) -> Redis:
    """The client that the publisher uses for the first master."""
    assert isinstance(redis, ClusterClient)
    at_port = {it.connection_pool.connection_kwargs["port"]: it for it in await redis.masters()}
    found = at_port[nodes[0].port]
    assert isinstance(found, Redis)
    return found


async def test_replies_come_in_the_order_of_the_commands_whatever_their_slots(
    master: Redis, nodes: list[topology.Node]
) -> None:
    keys = [key for key in (f"{{{number}}}" for number in range(60)) if nodes[0].owns(slot_of(key))]
    commands = [
        (key, pack(b"SET", key.encode(), value) + pack(b"GET", key.encode()), 2)
        for value in (b"a", b"b")
        for key in keys
    ]
    connections = NodeConnections(master, by_slot=True)
    await connections.connect()
    executed: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    connections.execute(commands, executed.set_result)
    expected = [reply for value in (b"a", b"b") for _ in keys for reply in (b"OK", value)]
    assert await executed == await connections.query(commands) == expected
    await connections.close()
    for key in keys:
        await master.delete(key)


async def test_a_transaction_over_several_slots_is_all_or_nothing_in_each(
    redis: Redis, master: Redis, nodes: list[topology.Node]
) -> None:
    """One of the slots is being moved to another master, which refuses a MULTI of new keys."""
    owned = [number for number in range(60) if nodes[0].owns(slot_of(f"{{{number}}}"))]
    keys = [f"chat:tokens:{{{number}}}" for number in owned]
    for key in keys[1:]:
        await redis.xadd(key, {"a": "b"}, id="1-0")
    commands = [
        (key, b"".join([pack(b"XADD", key.encode(), f"1-{n}".encode(), b"a", b"b") for n in added]), len(added))
        for added in ((1,), (2, 3)) for key in keys
    ]  # fmt: skip
    connections = NodeConnections(master, by_slot=True)
    await connections.connect()
    moving = slot_of(keys[0])
    nodes[0].execute("CLUSTER SETSLOT", moving, "MIGRATING", nodes[1].execute("CLUSTER MYID"))
    try:
        executed: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        connections.execute(commands, executed.set_result)
        refusal = await executed
    finally:
        nodes[0].execute("CLUSTER SETSLOT", moving, "STABLE")
    assert isinstance(refusal, RedisError)
    assert is_transient(refusal)
    assert await asyncio.gather(*(redis.xlen(key) for key in keys)) == [0] + [4] * (len(keys) - 1)
    await connections.close()
    for key in keys:
        await redis.delete(key)


async def test_a_paused_master_holds_up_no_stream_of_another(
    cluster_url: str, client: Client, redis: Redis, nodes: list[topology.Node], start_worker: StartWorker,
    start_simulator: StartSimulator,
) -> None:  # fmt: skip
    """The paused master holds token logs, but neither the job stream nor the lifecycle."""
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=40))), redis_url=cluster_url, lease=20)
    lasting = [slot_of("chat:jobs"), slot_of("chat:lifecycle")]
    stands = next(node for node in nodes if not any(map(node.owns, lasting)))
    runs = next(node for node in nodes if node is not stands)
    ids = {
        node.port: next(name for name in map(str, range(1000)) if node.owns(slot_of(name))) for node in (stands, runs)
    }
    for request_id in ids.values():
        await client.enqueue(chat_request("Who are you?"), id=request_id)

    async def both_run() -> bool:
        return all([await redis.xlen(f"chat:tokens:{{{name}}}") > 4 for name in ids.values()])

    async def the_other_is_whole() -> bool:
        return (await stream(redis, f"chat:tokens:{{{ids[runs.port]}}}"))[-1][0] == str(SEAL).encode()

    await eventually(both_run)
    stands.process.send_signal(signal.SIGSTOP)
    try:
        await eventually(the_other_is_whole)
    finally:
        stands.process.send_signal(signal.SIGCONT)
    for request_id in ids.values():
        whole([entry async for entry in client.follow(request_id)], "Who are you?")
    await settled(redis)


@pytest.mark.parametrize("leaves", [False, True], ids=["the worker stays", "the worker leaves"])
async def test_a_paused_master_of_the_lifecycle_holds_up_neither_answers_nor_slots(
    cluster_url: str, redis: Redis, nodes: list[topology.Node], start_worker: StartWorker, simulator: Simulator,
    *, leaves: bool,
) -> None:  # fmt: skip
    """No job waits for its records, neither before its request to vLLM nor in its slot at the end."""
    stands = next(node for node in nodes if node.owns(slot_of("chat:lifecycle")))
    assert not stands.owns(slot_of("chat:jobs"))
    names = [name for name in map(str, range(100)) if not stands.owns(slot_of(name))][:6]
    first = await start_worker(simulator, redis_url=cluster_url, lease=20, slots=2, drain_timeout=0)

    async def ended() -> bool:
        ends = [await redis.xrevrange(f"chat:tokens:{{{name}}}", count=1) for name in names]
        return all(end and end[0][0] == str(SEAL).encode() for end in ends)

    async def handed_over() -> bool:
        jobs = await redis.xpending_range("chat:jobs", "workers", "-", "+", 10)
        return len(jobs) == len(names) and all(int(str(job["time_since_delivered"])) >= 20_000 for job in jobs)

    async def has_begun() -> bool:
        return bool(await redis.exists("chat:workers"))

    await eventually(has_begun)
    stands.process.send_signal(signal.SIGSTOP)
    try:
        for name in names:
            await redis.xadd("chat:jobs", {"id": name, "request": json.dumps(chat_request("Who are you?"))})
        await eventually(ended)
        assert (await redis.xpending("chat:jobs", "workers"))["pending"] == len(names), (
            "no job is acknowledged without its record"
        )
        if leaves:
            first.stop()
            await eventually(handed_over)
    finally:
        stands.process.send_signal(signal.SIGCONT)
    if leaves:
        await start_worker(simulator, redis_url=cluster_url, lease=20)
    await settled(redis)
    records = {
        (fields[b"id"].decode(), fields[b"type"].decode()) for _, fields in await stream(redis, "chat:lifecycle")
    }
    assert records == {(name, kind) for name in names for kind in ("started", "finished")}


async def test_a_paused_master_of_the_dead_letters_holds_up_no_answer(
    cluster_url: str, redis: Redis, nodes: list[topology.Node], start_worker: StartWorker, simulator: Simulator
) -> None:
    stands = next(node for node in nodes if node.owns(slot_of("chat:dead")))
    assert not stands.owns(slot_of("chat:jobs"))
    name = next(name for name in map(str, range(100)) if not stands.owns(slot_of(name)))
    await start_worker(simulator, redis_url=cluster_url, lease=20, slots=2)

    async def ended() -> bool:
        end = await redis.xrevrange(f"chat:tokens:{{{name}}}", count=1)
        return bool(end and end[0][0] == str(SEAL).encode())

    async def has_begun() -> bool:
        return bool(await redis.exists("chat:workers"))

    await eventually(has_begun)
    stands.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(4):
            await redis.xadd("chat:jobs", {"id": "no/id", "request": "{}"})
        await redis.xadd("chat:jobs", {"id": name, "request": json.dumps(chat_request("Who are you?"))})
        await eventually(ended)
    finally:
        stands.process.send_signal(signal.SIGCONT)
    await settled(redis)
    assert len(await stream(redis, "chat:dead")) == 4
    await redis.delete("chat:dead")


async def test_replies_of_several_masters_come_in_the_order_of_the_commands(redis: Redis) -> None:
    names = [f"k{number}" for number in range(100)]
    pipe = redis.pipeline(transaction=False)
    for name in names:
        pipe.set(name, name, ex=60)
        pipe.pexpire(name, 60_000)
    assert await pipe.execute() == [True, True] * 100
    pipe = redis.pipeline(transaction=False)
    for name in names:
        pipe.get(name)
        pipe.xrevrange("no-" + name, count=1)
    assert (await pipe.execute())[::2] == [name.encode() for name in names]
    # More at once than there are connections: commands wait for one.
    assert await asyncio.gather(*map(redis.get, names * 5)) == [name.encode() for name in names] * 5


async def test_each_master_is_checked_and_a_url_of_another_kind_is_reported(
    cluster_url: str, nodes: list[topology.Node], redis_url: str, simulator: Simulator
) -> None:
    async def found(url: str) -> list[tuple[str, str]]:
        findings = [finding async for finding in check({"redis_url": url, "vllm_urls": simulator.url})]
        return [(it.level, it.message) for it in findings if it.subject.startswith("Redis") and it.level != "warning"]

    assert [level for level, _ in await found(cluster_url)] == ["ok"] * 3
    assert await found(f"redis://127.0.0.1:{nodes[0].port}") == [("error", "it runs in cluster mode")]
    ((level, text),) = await found(redis_url.replace("redis://", "redis+cluster://"))
    assert level == "error"
    assert "cluster support disabled" in text


async def test_streams_continue_when_a_master_of_the_cluster_is_killed(
    redis_binary: Path, tmp_path: Path, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    with topology.cluster(redis_binary, tmp_path, replicas=True) as nodes:
        url = url_of(nodes)
        await start_worker(await start_simulator(Options(scenario=Scenario(rate=100))), redis_url=url, lease=10)
        questions = [f"Tell me a story about {number}" for number in range(12)]
        slot = slot_of(questions[0].replace(" ", "-"))
        victim, heir = next(
            (master, heir) for master, heir in zip(nodes[:3], nodes[3:], strict=True) if master.owns(slot)
        )
        async with Client(url, patience=20) as client:

            async def generate(question: str) -> Sequence[Entry]:
                entries = []
                request_id = await client.enqueue(chat_request(question), id=question.replace(" ", "-"))
                async for entry in client.follow(request_id):
                    entries.append(entry)
                    if question == questions[0] and isinstance(entry, Delta) and entry.id == (1, 10):
                        topology.fail_over_in_cluster(victim, heir)
                return entries

            for question, entries in zip(questions, await asyncio.gather(*map(generate, questions)), strict=True):
                whole(entries, question)
