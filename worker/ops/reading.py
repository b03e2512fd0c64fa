"""Reads the workers, the gateways and the queues of an installation, for `worker check` and `worker status`."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..broker.control import NO_CONTROL, Control
from ..broker.gateway_registry import GatewayRegistry
from ..broker.worker_registry import WorkerRegistry
from ..contract.keys import Keys
from ..contract.records import QueueCounts, WorkerRecord
from ..engine.intake import NO_VLLM, VLLM_FULL
from ..redisio.cluster import server_of
from ..redisio.errors import is_permission_denied, redacted_message
from .fleet import is_silent
from .gateways import gateway_states
from .queues import find_queues, read_queues, used_queues
from .survey_types import GatewayState, QueueState


@dataclass(slots=True)
class Reading:
    """The workers, the gateways and the queues at one time.

    `now` is in seconds by Redis's clock. `records` are those of all workers; None if the user may not read them.
    `alive` are the records of workers that are not silent. `connected` has, for those with an old record, whether their
    connection to Redis is open, as far as that is known. `is_renewable` is whether Redis lets workers renew records.
    `searched` are the queues that a search of all keys has found; None if the user may not search. `unread` are the
    parts that the user may not read.
    """

    now: float
    is_renewable: bool
    records: dict[str, WorkerRecord] | None = None
    alive: dict[str, WorkerRecord] = field(default_factory=dict)
    connected: dict[str, bool] = field(default_factory=dict)
    gateways: tuple[GatewayState, ...] = ()
    queues: list[QueueState] = field(default_factory=list)
    searched: set[str] | None = None
    unread: list[str] = field(default_factory=list)

    @contextmanager
    def noted_if_denied(self, what: str) -> Iterator[None]:
        """Add `what` to the unread parts if Redis denies it, or if data of another type is stored there."""
        try:
            yield
        except ResponseError as error:
            if not (is_permission_denied(error) or redacted_message(error).startswith("WRONGTYPE")):
                raise
            self.unread.append(what)

    @property
    def full_queues(self) -> set[str]:
        """The queues of which no live worker takes jobs, since all vLLM servers are full."""
        return self._queues_refused_for(VLLM_FULL)

    @property
    def queues_without_vllm(self) -> set[str]:
        """The queues of which no live worker takes jobs, since it can reach no vLLM server."""
        return self._queues_refused_for(NO_VLLM)

    def _queues_refused_for(self, reason: str) -> set[str]:
        taken = {queue for record in self.alive.values() if record.paused != reason for queue in record.queues}
        return {queue for record in self.alive.values() for queue in record.queues} - taken


def _without_present(record: WorkerRecord) -> WorkerRecord:
    """A record that could not be renewed, without what may have changed since."""
    counts = {queue: QueueCounts(failed=each.failed) for queue, each in record.by_queue.items()}
    return msgspec.structs.replace(record, paused="", servers=(), models_away=(), by_queue=counts)


async def read_installation(
    redis: Redis,
    keys: Keys,
    lease: float,
    own: Collection[str] = (),
    *,
    searched: set[str] | None = None,
    renewable_for: float | None,
) -> Reading:
    """Read the workers, the gateways and the queues: first those of `own`, then all others.

    `lease` is that of workers whose record has none, in seconds. `renewable_for` is that of `storage.renewable_for`:
    while workers cannot renew their records, only a closed connection shows that one is silent. All keys are searched
    for queues, unless `searched` is the result of an earlier search.

    Raises:
        RedisError: when Redis does not answer.
    """
    seconds, microseconds = await redis.time()
    reading = Reading(seconds + microseconds / 1e6, is_renewable=bool(renewable_for))
    with reading.noted_if_denied("workers"):
        reading.records = await WorkerRegistry(redis, keys).records()
    records = reading.records or {}
    for name, record in sorted(records.items()):
        is_late = partial(is_silent, record, reading.now, lease, renewable_for=renewable_for or 0.0)
        is_old = renewable_for == 0 or is_late(is_connected=False)
        if record.presence and is_old:
            with reading.noted_if_denied("connections of workers (+pubsub|numsub)"):
                channel = keys.presence(name)
                ((_, subscribers),) = await (await server_of(redis, channel)).pubsub_numsub(channel)
                reading.connected[name] = bool(subscribers)
        is_connected = reading.connected.get(name)
        if reading.is_renewable and not is_late(is_connected=is_connected):
            reading.alive[name] = record
        elif not reading.is_renewable and is_connected is not False:
            reading.alive[name] = _without_present(record)
    with reading.noted_if_denied("gateways"):
        gateways = await GatewayRegistry(redis, keys).records()
        reading.gateways = gateway_states(gateways, reading.now, renewable_for=renewable_for)
    used = set[str]()
    with reading.noted_if_denied("names of used queues"):
        used = await used_queues(redis, keys)
    reading.searched = await find_queues(redis, keys) if searched is None else searched
    if reading.searched is None:
        reading.unread.append("queues that nobody has used through a client (+scan)")
    control = NO_CONTROL
    with reading.noted_if_denied("pauses"):
        control = await Control(redis, keys, lambda: int(reading.now * 1000)).read()
    alive = None if "workers" in reading.unread else reading.alive.values()
    served = {queue for record in reading.alive.values() for queue in record.queues}
    others = sorted({*(reading.searched or ()), *used, *served, *control.pauses} - set(own))
    now = int(reading.now * 1000)
    reading.queues, denied = await read_queues(redis, keys, [*own, *others], alive, control.pauses, now)
    reading.unread += [f"queue {name}" for name in denied]
    return reading
