"""What `worker status` shows, as data: queues, workers, gateways, vLLM servers, Redis, dead letters and faults. No I/O.

The names of the fields are published: `worker status --json` prints them, and deploy/commands.md documents them.
"""

from typing import Literal, TypeAlias

import msgspec

from ..contract.entries import Object
from ..contract.records import ControlEntry
from .findings import Finding

StateOfWorker: TypeAlias = Literal["working", "paused", "starting", "draining", "silent", "connected", "unknown"]
StateOfGateway: TypeAlias = Literal["serving", "draining", "silent", "unknown"]
StateOfServer: TypeAlias = Literal["up", "full", "silent", "partly", "away", "starting"]


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """A running job that may kill its workers: its entry's id, its request id (empty if it has none), its worker.

    `deliveries` is how often it was delivered to a worker.
    """

    job: str
    request: str
    worker: str
    deliveries: int


class QueueState(msgspec.Struct, frozen=True, kw_only=True):
    """A queue.

    `waiting` are the jobs that no worker has. Of these, the ones in `parked` wait for room at a server, by model (the
    empty name is any model). `oldest` is the age of the oldest waiting job in seconds, None if none waits. `running`
    are the jobs with a worker, `handed_over` those that another worker continues in a moment. `workers` is how many
    live workers serve the queue, None if that is not known. `done_per_s` are the jobs that end in a second, `failed`
    those that failed since the live workers started. `pause` is by whom and since when the queue is paused; None
    if it is not. `suspects` are running jobs that may kill their workers. `problem` is why no worker can serve the
    queue.
    """

    name: str
    waiting: int = 0
    oldest: float | None = None
    parked: dict[str, int] = {}
    running: int = 0
    handed_over: int = 0
    workers: int | None = None
    done_per_s: float = 0.0
    failed: int = 0
    pause: ControlEntry | None = None
    suspects: tuple[Suspect, ...] = ()
    problem: str = ""

    @property
    def unfinished(self) -> int:
        """How many jobs are waiting or running."""
        return self.waiting + self.handed_over + self.running


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """A worker, by its record.

    `state` is `working`, `paused` (it takes no jobs, because of `reason`), `starting`, `draining`, or `silent` (its
    record was not renewed for too long). While Redis takes no writes, so that no record can be renewed, it is
    `connected`, `silent` (its connection to Redis is closed), or `unknown`. `paused_queues` are those of `queues` that
    an operator paused. `finished` and `failed` count since the start; `done_per_s` and `tokens_per_s` are rates.
    `silence` is how long its most silent stream has had no event, and `age` the time since its record was renewed, both
    in seconds. A `silent`, `connected` or `unknown` worker has no rates, and its `silence` includes its `age`.
    """

    name: str
    state: StateOfWorker
    reason: str = ""
    queues: tuple[str, ...] = ()
    running: int = 0
    slots: int = 0
    paused_queues: tuple[str, ...] = ()
    finished: int = 0
    failed: int = 0
    done_per_s: float = 0.0
    tokens_per_s: float = 0.0
    silence: float = 0.0
    version: str = ""
    age: float = 0.0
    host: str = ""
    pid: int = 0


class GatewayState(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway process, by its record. `name` is its host and its pid, `address` where it listens; two containers with
    the network of their host may have one name.

    `state` is `serving`, `draining`, `silent` (its record was not renewed for 15 s), or `unknown` while Redis takes no
    writes. `streams` and `connections` are those open at the last renewal, which was `age` seconds ago; `started` is
    Unix ms. The record of a killed gateway stays for 150 s.
    """

    name: str
    state: StateOfGateway
    address: str = ""
    streams: int = 0
    connections: int = 0
    version: str = ""
    age: float = 0.0
    host: str = ""
    pid: int = 0
    started: int = 0


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """A vLLM server, as the live workers see it.

    `state` is `up`, `full` (it refuses requests), `silent`, `partly` (away for some workers), `away` or `starting`.
    `requests` are those of all workers in flight there, `limit` is how many they may have there at present.
    """

    url: str
    state: StateOfServer
    reason: str = ""
    requests: int = 0
    limit: float = 0.0
    workers: int = 0


class RedisState(msgspec.Struct, frozen=True, kw_only=True):
    """A server of Redis; in a cluster a master.

    `used` and `limit` (maxmemory; 0 for none) are bytes, and so is `needed`: what finished requests will take if they
    go on as in the last minutes. It is 0 if too few have finished for a forecast, and None if the user may not read
    that. `full_in` is the time in seconds until the memory is full at this rate; None if the need is below the limit.
    Both are an equal part of the forecast in a cluster, since logs are on all masters.
    """

    name: str
    version: str = ""
    used: int = 0
    limit: int = 0
    needed: int | None = None
    full_in: float | None = None


class DeadLetterState(msgspec.Struct, frozen=True, kw_only=True):
    """The dead letters: how many there are, the age of the newest in seconds (None if there is none), its reason."""

    count: int = 0
    newest: float | None = None
    reason: str = ""


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """One picture of an installation.

    `time` is Unix ms by Redis's clock. `faults` are the findings with the name of a fault, the most severe first:
    advice on the configuration is not among them. `unread` are the parts that the user has no right to read.
    """

    time: int = 0
    faults: tuple[Finding, ...] = ()
    queues: tuple[QueueState, ...] = ()
    workers: tuple[WorkerState, ...] = ()
    gateways: tuple[GatewayState, ...] = ()
    servers: tuple[ServerState, ...] = ()
    redis: tuple[RedisState, ...] = ()
    dead_letters: DeadLetterState = DeadLetterState()
    unread: tuple[str, ...] = ()

    @property
    def has_error(self) -> bool:
        """Whether a fault is an error: Redis takes no jobs, a model has no server, or jobs wait that nobody takes."""
        return any(fault.level == "error" for fault in self.faults)

    def as_dict(self) -> Object:
        """The picture as `--json` prints it."""
        values: Object = msgspec.to_builtins(self)
        return values | {"faults": [fault.as_dict() for fault in self.faults]}
