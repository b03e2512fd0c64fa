"""Redis as a cluster and under Sentinel, of real servers on ports of 127.0.0.1, gone when they are no longer needed."""

import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

_SLOTS = 16384
_START = 20.0
_QUICK = ("--repl-diskless-sync-delay", "0")


@dataclass
class Node:
    """A server that was started. `client` asks it directly, once."""

    port: int
    process: "subprocess.Popen[bytes]"
    client: Redis = field(repr=False)

    def ask(self, *command: object) -> Any:  # noqa: ANN401 - whatever the command answers
        """Send a command that redis-py has no method for."""
        return self.client.execute_command(*command)  # type: ignore[no-untyped-call]

    def owns(self, slot: int) -> bool:
        """Whether this master of a cluster holds a slot."""
        told = self.ask("CLUSTER SLOTS")
        return any(first <= slot <= last and master[1] == self.port for first, last, master, *_ in told)

    def kill(self) -> None:
        """As kill -9 does."""
        self.process.kill()
        self.process.wait()


@contextmanager
def node(binary: Path, folder: Path, *options: str) -> Iterator[Node]:
    """One server on a free port; its folder is made."""
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
            master.ask("CLUSTER SET-CONFIG-EPOCH", epoch)
            master.ask("CLUSTER ADDSLOTS", *range(first, min(first + _SLOTS // 3 + 1, _SLOTS)))
        for other in nodes[1:]:
            other.ask("CLUSTER MEET", "127.0.0.1", nodes[0].port)
        until(lambda: all(_knows(it) == len(nodes) for it in nodes))
        for master, replica in zip(masters, nodes[3:], strict=False):
            name = master.ask("CLUSTER MYID")
            until(lambda replica=replica, name=name: replica.ask("CLUSTER REPLICATE", name))  # type: ignore[misc]
        until(lambda: all(_info(it, "cluster_state") == "ok" for it in nodes))
        until(lambda: all(it.client.info("replication")["master_link_status"] == "up" for it in nodes[3:]))
        yield nodes


def catch_up(master: Node, replica: Node) -> None:
    """Wait until the replica has all that the master has by now: on a busy machine it may be far behind."""
    there = master.client.info("replication")["master_repl_offset"]
    until(lambda: replica.client.info("replication")["slave_repl_offset"] >= there)


def fail_over(master: Node, watcher: Node) -> None:
    """Kill the master and let the sentinel promote its replica; the sentinel is told, so that nobody waits for it."""
    master.kill()
    until(lambda: watcher.ask("SENTINEL FAILOVER", "mymaster"))


def fail_over_in_cluster(master: Node, replica: Node) -> None:
    """Kill a master of a cluster; its replica takes the slots without waiting for the others to see that."""
    master.kill()
    replica.ask("CLUSTER FAILOVER", "TAKEOVER")


def fail_over_to_an_older_copy(master: Node, copy: Node, watcher: Node) -> None:
    """Kill the master, and let the sentinel name a server that had stopped being its replica before."""
    master.kill()
    watcher.ask("SENTINEL REMOVE", "mymaster")
    watcher.ask("SENTINEL MONITOR", "mymaster", "127.0.0.1", copy.port, 1)


def move_slot(nodes: list[Node], slot: int) -> None:
    """Move a slot with its keys from the master that holds it to another, as a resharding does."""
    source = next(it for it in nodes if it.owns(slot))
    target = next(it for it in nodes if it is not source)
    target.ask("CLUSTER SETSLOT", slot, "IMPORTING", source.ask("CLUSTER MYID"))
    source.ask("CLUSTER SETSLOT", slot, "MIGRATING", target.ask("CLUSTER MYID"))
    for key in source.ask("CLUSTER GETKEYSINSLOT", slot, 1000):
        source.ask("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
    for it in (target, source):
        it.ask("CLUSTER SETSLOT", slot, "NODE", target.ask("CLUSTER MYID"))


@contextmanager
def sentinel(binary: Path, folder: Path) -> Iterator[tuple[Node, Node, Node]]:
    """A master, its replica and one sentinel that calls the master `mymaster`."""
    with ExitStack() as stack:
        master = stack.enter_context(node(binary, folder, *_QUICK))
        replica = stack.enter_context(node(binary, folder, *_QUICK, "--replicaof", "127.0.0.1", str(master.port)))
        until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        conf = folder / "sentinel.conf"
        conf.write_text(
            f"sentinel monitor mymaster 127.0.0.1 {master.port} 1\n"
            f"sentinel down-after-milliseconds mymaster 10000\n"
            f"sentinel failover-timeout mymaster 5000\n"
        )
        # The configuration file comes first on the command line.
        watcher = stack.enter_context(_started(binary, conf, "--sentinel", port=_port(), folder=folder))
        until(lambda: watcher.ask("SENTINEL REPLICAS", "mymaster"))
        yield master, replica, watcher


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; a server that does not answer yet has not said no."""
    end = time.monotonic() + _START
    while True:
        try:
            if condition():
                return
        except RedisError:
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def _port() -> int:
    """A free port below those that the system gives out, whose cluster bus port (10,000 above) is free too."""
    while True:
        port = random.randint(11_000, 22_000)  # noqa: S311 - no secret
        with socket.socket() as own, socket.socket() as bus:
            try:
                own.bind(("127.0.0.1", port))
                bus.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port


def _info(it: Node, name: str) -> str:
    lines = it.ask("CLUSTER INFO")
    return str(lines[name]) if isinstance(lines, dict) else ""


def _knows(it: Node) -> int:
    return int(_info(it, "cluster_known_nodes"))
