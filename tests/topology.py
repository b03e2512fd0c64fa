"""Redis as a cluster and under Sentinel: real servers on ports of 127.0.0.1, which end with the test."""

import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from waits import eventually

from worker import Answer, Entry
from worker.contract.ids import SEAL
from worker.sandbox.simulator.requests import answer_to

MEDDLING = "?max_connections=1&protocol=3&decode_responses=yes&socket_timeout=0.001&timeout=0.001&retry_on_timeout=yes"
"""Options in the URL of Redis that would break the worker if they had an effect."""

_SLOTS = 16384
_START = 500.0
"""Seconds until a test that hangs fails. A sentinel that was not run for 2 s does nothing for 30 s (its TILT mode)."""
_QUICK = ("--repl-diskless-sync-delay", "0")


@dataclass
class Node:
    """A running server. `client` sends each command to it directly, and only once."""

    port: int
    process: "subprocess.Popen[bytes]"
    client: Redis = field(repr=False)

    def execute(self, *command: object) -> Any:  # noqa: ANN401 - the reply depends on the command
        """Send a command that redis-py has no method for."""
        return self.client.execute_command(*command)  # type: ignore[no-untyped-call]

    def owns(self, slot: int) -> bool:
        """Whether this master of a cluster holds a slot."""
        slots = self.execute("CLUSTER SLOTS")
        return any(first <= slot <= last and master[1] == self.port for first, last, master, *_ in slots)

    def kill(self) -> None:
        """End the server by SIGKILL."""
        self.process.kill()
        self.process.wait()


@contextmanager
def node(binary: Path, folder: Path, *options: str) -> Iterator[Node]:
    """One server on a free port, with a folder of its own below `folder`."""
    port = _port()
    folder = folder / str(port)
    folder.mkdir()
    with _started(binary, *options, "--save", "", port=port, folder=folder) as it:
        yield it


@contextmanager
def _started(*command: object, port: int, folder: Path) -> Iterator[Node]:
    with (
        subprocess.Popen(
            [*map(str, command), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process,
        Redis(host="127.0.0.1", port=port, protocol=2, retry=Retry(NoBackoff(), 0)) as client,
    ):
        try:
            until(client.ping)
            yield Node(port, process, client)
        finally:
            process.kill()


@contextmanager
def cluster(binary: Path, folder: Path, *, replicas: bool = False) -> Iterator[list[Node]]:
    """Three masters with a third of the slots each; with `replicas` a replica of each as well, after the masters."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "10000", *_QUICK)
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(binary, folder, *options)) for _ in range(6 if replicas else 3)]
        masters = nodes[:3]
        for epoch, (master, first) in enumerate(zip(masters, range(0, _SLOTS, _SLOTS // 3 + 1), strict=True), 1):
            master.execute("CLUSTER SET-CONFIG-EPOCH", epoch)
            master.execute("CLUSTER ADDSLOTS", *range(first, min(first + _SLOTS // 3 + 1, _SLOTS)))
        for other in nodes[1:]:
            other.execute("CLUSTER MEET", "127.0.0.1", nodes[0].port)
        until(lambda: all(_knows(it) == len(nodes) for it in nodes))
        for master, replica in zip(masters, nodes[3:], strict=False):
            name = master.execute("CLUSTER MYID")
            until(lambda replica=replica, name=name: replica.execute("CLUSTER REPLICATE", name))  # type: ignore[misc]
        until(lambda: all(_info(it, "cluster_state") == "ok" for it in nodes))
        until(lambda: all(map(is_replicated, masters[: len(nodes) - 3])))
        yield nodes


def catch_up(master: Node, replica: Node) -> None:
    """Wait until the replica has everything that the master has now. On a busy machine it may be far behind."""
    there = master.client.info("replication")["master_repl_offset"]
    until(lambda: replica.client.info("replication")["slave_repl_offset"] >= there)


def is_replicated(master: Node) -> bool:
    """Whether a replica gets what is written to a master.

    A link that is up does not show it: after a diskless transfer a master sends nothing until the first ACK of its
    replica, which comes within a second (Redis 6.2 and 7.0).
    """
    master.client.publish("replicated", "")
    return bool(master.execute("WAIT", 1, 100) >= 1)


def fail_over(master: Node, watcher: Node) -> None:
    """Kill the master and order the sentinel to promote its replica, which saves the wait until it notices."""
    master.kill()
    until(lambda: watcher.execute("SENTINEL FAILOVER", "mymaster"))


def fail_over_in_cluster(master: Node, replica: Node) -> None:
    """Kill a master of a cluster. Its replica takes the slots without the votes of the others."""
    master.kill()
    replica.execute("CLUSTER FAILOVER", "TAKEOVER")


def fail_over_to_an_older_copy(master: Node, copy: Node, watcher: Node) -> None:
    """Kill the master, and make the sentinel name a server that had stopped replicating before."""
    master.kill()
    watcher.execute("SENTINEL REMOVE", "mymaster")
    watcher.execute("SENTINEL MONITOR", "mymaster", "127.0.0.1", copy.port, 1)


def move_slot(nodes: list[Node], slot: int) -> None:
    """Move a slot with its keys from its master to another, as a resharding does."""
    source = next(it for it in nodes if it.owns(slot))
    target = next(it for it in nodes if it is not source)
    target.execute("CLUSTER SETSLOT", slot, "IMPORTING", source.execute("CLUSTER MYID"))
    source.execute("CLUSTER SETSLOT", slot, "MIGRATING", target.execute("CLUSTER MYID"))
    for key in source.execute("CLUSTER GETKEYSINSLOT", slot, 1000):
        source.execute("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
    for it in (target, source):
        it.execute("CLUSTER SETSLOT", slot, "NODE", target.execute("CLUSTER MYID"))


@contextmanager
def sentinel(binary: Path, folder: Path) -> Iterator[tuple[Node, Node, Node]]:
    """A master, its replica and one sentinel that calls the master `mymaster`."""
    with ExitStack() as stack:
        master = stack.enter_context(node(binary, folder, *_QUICK))
        replica = stack.enter_context(node(binary, folder, *_QUICK, "--replicaof", "127.0.0.1", str(master.port)))
        until(lambda: is_replicated(master))
        conf = folder / "sentinel.conf"
        conf.write_text(
            f"sentinel monitor mymaster 127.0.0.1 {master.port} 1\n"
            f"sentinel down-after-milliseconds mymaster 10000\n"
            f"sentinel failover-timeout mymaster 5000\n"
        )
        # The configuration file comes first on the command line.
        watcher = stack.enter_context(_started(binary, conf, "--sentinel", port=_port(), folder=folder))
        until(lambda: watcher.execute("SENTINEL REPLICAS", "mymaster"))
        yield master, replica, watcher


def chat_request(content: str) -> dict[str, object]:
    return {"model": "reciter", "messages": [{"role": "user", "content": content}]}


def expected(content: str) -> str:
    return answer_to([{"role": "user", "content": content}])


def whole(entries: Sequence[Entry], content: str) -> None:
    """One end, the right text, and ids without a gap within each attempt."""
    assert [entry.id for entry in entries].count(SEAL) == 1
    assert Answer(entries).text == expected(content)
    for attempt in {entry.id.attempt for entry in entries if 0 < entry.id.attempt < SEAL.attempt}:
        numbers = [entry.id.n for entry in entries if entry.id.attempt == attempt]
        assert numbers == list(range(len(numbers)))


async def settled(redis: AsyncRedis) -> None:
    """Wait until every job is acknowledged."""

    async def nothing_pending() -> bool:
        return all(not group["pending"] and not group.get("lag") for group in await redis.xinfo_groups("chat:jobs"))

    await eventually(nothing_pending)


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds. An error of Redis counts as not yet."""
    end = time.monotonic() + _START
    while True:
        try:
            if condition():
                return
        except RedisError:
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.02)


def _port() -> int:
    """A free port whose cluster bus port (10,000 above) is free too, both below those that `free_port` returns."""
    while True:
        port = random.randint(2_000, 9_900)  # noqa: S311 - no secret
        with socket.socket() as own, socket.socket() as bus:
            try:
                own.bind(("127.0.0.1", port))
                bus.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port


def _info(it: Node, name: str) -> str:
    lines = it.execute("CLUSTER INFO")
    return str(lines[name]) if isinstance(lines, dict) else ""


def _knows(it: Node) -> int:
    return int(_info(it, "cluster_known_nodes"))
