"""A cluster that fails around one step of a job: full memory, a lost connection, a master that is killed.

Each fault comes just before Redis gets the step's command, or after it has executed the command, whose reply is then
lost. The worker runs in the test's own process: a proxy before a master would come between the master and its replica.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import pytest
import topology
from checks import begun_by_a_dead_worker
from conftest import StartSimulator, StartWorker, stream
from redis.exceptions import OutOfMemoryError, RedisError
from topology import chat_request, settled, whole
from waits import eventually

from worker import Answer, Client
from worker.broker import log_scripts
from worker.redisio.clients import command_client
from worker.redisio.cluster import slot_of
from worker.redisio.pipelined import Callback, Outcome, PipelinedConnection, connection_lost_error
from worker.sandbox.simulator.server import Options, Scenario

QUESTION = "Who are you?"
ACQUIRE = rb"EVALSHA.*\r\ntype\r\n\$7\r\nstarted\r\n"
CLAIM = rb"\r\n2-0\r\n\$4\r\ntype\r\n\$7\r\nclaimed\r\n"
APPEND = rb"MULTI\r\n.*XADD.*\r\ndelta\r\n"
SEAL = rb"EVALSHA.*\r\ntype\r\n\$4\r\ndone\r\n"
SETTLE = rb"EVALSHA.*\r\nchat:ended:[^\r]*\r\n\$\d+\r\n\d+\r\n\$\d+\r\n\{"
STEPS = {"acquire": ACQUIRE, "claim": CLAIM, "append": APPEND, "seal": SEAL, "settle": SETTLE}

Act: TypeAlias = Callable[[PipelinedConnection], Awaitable[None]]


class Fault:
    """Acts on the first commands that match, before they are sent or after the replies have come.

    In the second case the replies are lost. `outcomes` are the replies to what was sent after an act.
    """

    def __init__(self, patch: pytest.MonkeyPatch, command: bytes, act: Act, *, executed: bool, times: int = 1) -> None:
        self.left = times
        self.outcomes: list[Outcome] = []
        self._tasks: set[asyncio.Task[None]] = set()
        pattern, send = re.compile(command, re.DOTALL), PipelinedConnection.send

        async def act_first(connection: PipelinedConnection, packed: bytes, count: int, callback: Callback) -> None:
            def note(outcome: Outcome) -> None:
                self.outcomes.append(outcome)
                callback(outcome)

            await act(connection)
            send(connection, packed, count, note)

        async def lose(connection: PipelinedConnection, callback: Callback) -> None:
            await act(connection)
            connection.abort()
            callback(connection_lost_error())

        def faulty(connection: PipelinedConnection, packed: bytes, count: int, callback: Callback) -> None:
            if not self.left or not pattern.search(packed):
                send(connection, packed, count, callback)
                return
            self.left -= 1
            if executed:
                send(connection, packed, count, lambda _: self._start(lose(connection, callback)))
            else:
                self._start(act_first(connection, packed, count, callback))

        patch.setattr(PipelinedConnection, "send", faulty)

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@pytest.fixture(scope="module")
def masters(redis_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[topology.Node]]:
    with topology.cluster(redis_binary, tmp_path_factory.mktemp("cluster")) as nodes:
        load_scripts(nodes)
        yield nodes


def load_scripts(masters: list[topology.Node]) -> None:
    """Let masters know the scripts: the first call of one that a master does not know is refused."""
    for node in masters:
        for script in (log_scripts.BEGIN, log_scripts.CLAIM, log_scripts.SEAL_LOG, log_scripts.FINALIZE):
            node.client.script_load(script.source)


def url_of(nodes: list[topology.Node]) -> str:
    return f"redis+cluster://127.0.0.1:{nodes[-1].port}"


def request_at(node: topology.Node) -> str:
    """A request id whose log is at a master."""
    return next(name for name in (f"r{number}" for number in range(1000)) if node.owns(slot_of(name)))


@pytest.fixture
def url(masters: list[topology.Node]) -> str:
    """The cluster of three masters, empty."""
    for node in masters:
        node.client.flushall()
    return url_of(masters)


async def begin(step: str, url: str, client: Client, request_id: str) -> None:
    """Add a job; for a claim, another worker has begun it and died."""
    await client.enqueue(chat_request(QUESTION), id=request_id)
    if step == "claim":
        async with command_client(url) as redis:
            await begun_by_a_dead_worker(redis, request_id, {"type": "delta", "content": "I"})


async def promise_kept(url: str, client: Client, request_id: str) -> Answer:
    """Check the log, the tombstone, the lifecycle and the queue of a request that has ended or will end."""
    entries = [entry async for entry in client.follow(request_id)]
    whole(entries, QUESTION)
    async with command_client(url) as redis:

        async def has_log() -> bool:
            with suppress(RedisError):  # the other masters learn of a new one a moment later
                return bool(await redis.ttl(f"chat:tokens:{{{request_id}}}") > 0)
            return False

        await eventually(has_log)
        await settled(redis)
        assert await redis.ttl(f"chat:ended:{{{request_id}}}") > 0
        records = [(fields[b"id"].decode(), fields[b"type"]) for _, fields in await stream(redis, "chat:lifecycle")]
    assert (request_id, b"finished") in records
    return Answer(entries)


async def abort(connection: PipelinedConnection) -> None:
    connection.abort()


@pytest.mark.parametrize("executed", [True, False], ids=["reply lost", "not sent"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_is_cut_off_twice_in_a_cluster_changes_no_result(
    step: str, url: str, start_worker: StartWorker, start_simulator: StartSimulator,
    monkeypatch: pytest.MonkeyPatch, *, executed: bool,
) -> None:  # fmt: skip
    simulator = await start_simulator(Options(scenario=Scenario(rate=200)))
    async with Client(url, patience=20) as client:
        await begin(step, url, client, "r")
        fault = Fault(monkeypatch, STEPS[step], abort, executed=executed, times=2)
        await start_worker(simulator, redis_url=url, lease=10)
        answer = await promise_kept(url, client, "r")
    if step == "claim":  # an own claim whose reply was lost is fenced by the next one
        assert answer.attempt <= 3
    else:
        assert fault.left <= (step == "append"), "a busy machine may append everything at once"
        assert answer.attempt == 1
    assert len(simulator.served) == 1


@pytest.mark.parametrize("step", STEPS)
async def test_a_master_whose_memory_is_full_at_a_step_delays_only_that_step(
    step: str, masters: list[topology.Node], url: str, start_worker: StartWorker, start_simulator: StartSimulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The error of the script, or of the MULTI, shows that memory is full. Redis has executed nothing of it."""
    node = masters[0]
    request_id = request_at(node)
    simulator = await start_simulator(Options(scenario=Scenario(rate=200)))

    async def fill(_: PipelinedConnection) -> None:
        node.client.config_set("maxmemory", 1)

    async with Client(url, patience=20) as client:
        await begin(step, url, client, request_id)
        fault = Fault(monkeypatch, STEPS[step], fill, executed=False)

        async def is_refused() -> bool:
            return bool(fault.outcomes)

        try:
            await start_worker(simulator, redis_url=url, lease=10)
            await eventually(is_refused)
            ids = [entry_id for entry_id, _ in node.client.xrange(f"chat:tokens:{{{request_id}}}") or ()]
            tombstones = node.client.exists(f"chat:ended:{{{request_id}}}")
        finally:
            node.client.config_set("maxmemory", 0)
        answer = await promise_kept(url, client, request_id)
    (outcome,) = fault.outcomes
    assert any(isinstance(reply, OutOfMemoryError) for reply in (outcome if isinstance(outcome, list) else [outcome]))
    last = {"acquire": b"0-1", "claim": b"1-1"}.get(step)
    assert last is None or ids[-1] == last
    assert tombstones == (step == "settle")
    assert answer.attempt == (2 if step == "claim" else 1)
    assert len(simulator.served) == 1


@pytest.mark.parametrize("executed", [True, False], ids=["reply lost", "not executed"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_master_that_is_killed_at_a_step_loses_and_doubles_nothing(
    step: str, redis_binary: Path, tmp_path: Path, start_worker: StartWorker, start_simulator: StartSimulator,
    monkeypatch: pytest.MonkeyPatch, *, executed: bool,
) -> None:  # fmt: skip
    """The replica has what the master had. It becomes the master at once."""
    simulator = await start_simulator(Options(scenario=Scenario(rate=200)))
    with topology.cluster(redis_binary, tmp_path, replicas=True) as nodes:
        url, victim, heir = url_of(nodes), nodes[0], nodes[3]
        load_scripts(nodes[:3])
        request_id = request_at(victim)

        def fail_over() -> None:
            topology.catch_up(victim, heir)
            topology.fail_over_in_cluster(victim, heir)

        async def kill(_: PipelinedConnection) -> None:
            await asyncio.to_thread(fail_over)

        async with Client(url, patience=60) as client:
            await begin(step, url, client, request_id)
            fault = Fault(monkeypatch, STEPS[step], kill, executed=executed)
            await start_worker(simulator, redis_url=url, lease=10)
            answer = await promise_kept(url, client, request_id)
            assert not fault.left
            assert answer.attempt <= (3 if step == "claim" else 1)
            assert len(simulator.served) == 1
