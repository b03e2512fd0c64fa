"""The control hash: what operators ask of the workers (pause a queue, drain a worker), written and read.

A pub/sub message tells workers at once that the hash has changed. It may be lost: workers also read the hash with each
beat.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.entries import to_json
from ..contract.keys import DRAIN, PAUSE, Keys
from ..contract.records import ControlEntry
from ..redisio.scripts import Script

_REMOVE = Script("""
local removed = 0
for i = 1, #ARGV, 2 do
  if call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then removed = removed + call('HDEL', KEYS[1], ARGV[i]) end
end
return removed
""")
"""Removes fields that still have these values. ARGV: fields and their values. Returns how many it removed."""


@dataclass(frozen=True, slots=True)
class ControlState:
    """The control hash at one time, without entries that have ended by then.

    `pauses` are by the queue's name, `drains` by the worker's. `ended` are the fields that have ended, with their
    values as stored.
    """

    pauses: Mapping[str, ControlEntry]
    drains: Mapping[str, ControlEntry]
    ended: Mapping[bytes, bytes]


NO_CONTROL = ControlState({}, {}, {})


class Control:
    """Reads and writes the control hash. `now` is Redis's time in Unix ms.

    Every method raises RedisError when Redis does not answer or refuses the command, as where the user lacks a right or
    the key has another type.
    """

    def __init__(self, redis: Redis, keys: Keys, now: Callable[[], int]) -> None:
        self._redis = redis
        self._key = keys.control
        self._now = now

    async def read(self) -> ControlState:
        """Read what holds now. A value that cannot be read holds as well: its author and its end are not known.

        Fields of later versions are ignored.
        """
        return parse_control(cast("dict[bytes, bytes]", await self._redis.hgetall(self._key)), self._now())

    async def remove_ended(self, state: ControlState) -> None:
        """Remove the entries that have ended, unless somebody has renewed them since."""
        if state.ended:
            await _REMOVE.run_on(self._redis, [self._key], chain.from_iterable(state.ended.items()))

    async def pause(self, queue: str, *, by: str, why: str = "", seconds: float = 0) -> ControlEntry:
        """Let no worker take jobs of a queue, for some seconds or (0) until `resume`. Replaces an earlier pause."""
        now = self._now()
        entry = ControlEntry(by=by, why=why, since=now, until=now + round(seconds * 1000) if seconds else 0)
        await self._write(PAUSE + queue, entry)
        return entry

    async def resume(self, queue: str) -> ControlEntry | None:
        """End the pause of a queue. Returns the pause that held; None if there was none."""
        pause = (await self.read()).pauses.get(queue)
        await self._remove(PAUSE + queue)
        return pause

    async def drain(self, worker: str, *, by: str, why: str = "") -> ControlEntry:
        """Let a worker do as at SIGTERM. Only the process that has this name now does so."""
        entry = ControlEntry(by=by, why=why, since=self._now())
        await self._write(DRAIN + worker, entry)
        return entry

    async def end_drain(self, worker: str) -> None:
        """Remove the drain of a worker that has left, or that has the name of one that was to drain."""
        await self._remove(DRAIN + worker)

    async def _write(self, field: str, entry: ControlEntry) -> None:
        await self._redis.hset(self._key, field, to_json(entry))
        await self._publish(field)

    async def _remove(self, field: str) -> None:
        if await self._redis.hdel(self._key, field):
            await self._publish(field)

    async def _publish(self, field: str) -> None:
        with suppress(ResponseError):  # without the right to publish, workers learn of it with their next beat
            await self._redis.publish(self._key, field)


def parse_control(raw: Mapping[bytes, bytes], now: int) -> ControlState:
    """What the fields of the control hash say at a time in Unix ms. Fields that are not known are left out."""
    pauses: dict[str, ControlEntry] = {}
    drains: dict[str, ControlEntry] = {}
    ended: dict[bytes, bytes] = {}
    for field, value in raw.items():
        text = field.decode("utf-8", "replace")
        for kind, entries in ((PAUSE, pauses), (DRAIN, drains)):
            if text.startswith(kind):
                entry = ControlEntry.read(value)
                if entry.has_ended(now):
                    ended[field] = value
                else:
                    entries[text.removeprefix(kind)] = entry
    return ControlState(pauses, drains, ended)
