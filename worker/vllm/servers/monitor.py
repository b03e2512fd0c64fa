"""Watches the vLLM servers in the background: probes, lists of models, load, and trials of draining servers."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from .api import VllmApi
from .load import LoadReader
from .pace import ServerPace
from .probes import Probes
from .server import Server


class ServerMonitor:
    """The background tasks of a pool of servers.

    Args:
        api: sends the requests.
        servers: the servers of the pool.
        probes: sends probes, and records their results.
        pace: how often the servers are watched.
        send_trial: sends a trial request of the worker's own for a model.
        on_room: called when a server may have more room.
        changed: returns an event that is set at the next change of a circuit.
    """

    def __init__(
        self,
        api: VllmApi,
        servers: Sequence[Server],
        probes: Probes,
        pace: ServerPace,
        *,
        send_trial: Callable[[Server, str], Awaitable[None]],
        on_room: Callable[[Server], None],
        changed: Callable[[], asyncio.Event],
    ) -> None:
        self._api = api
        self._servers = servers
        self._probes = probes
        self._pace = pace
        self._send_trial = send_trial
        self._on_room = on_room
        self._changed = changed

    async def run(self) -> None:
        """Watch all servers until cancelled."""
        async with asyncio.TaskGroup() as group:
            for server in self._servers:
                group.create_task(self._watch_health(server))
                group.create_task(self._watch_models(server))
                group.create_task(self._watch_load(server))

    async def _watch_health(self, server: Server) -> None:
        key_is_tried = False
        while True:
            changed = self._changed()
            pause = self._pace.first_drain_pause if server.circuit.is_draining else self._pace.probe_every
            if server.circuit.wants_drain_trial:
                await self._send_trial(server, server.answered_model or min(server.models, default=""))
            elif server.circuit.wants_probe:
                await self._probes.probe(server)
            elif not server.is_away and any(watchdog.is_silent() for watchdog in server.requests):
                await self._probes.probe_silent(server)
            elif not server.is_away and server.is_idle(self._pace.idle_every / 2):
                await self._probes.probe_idle(server)
                if server.refuses_list and not key_is_tried:
                    key_is_tried = True
                    await self._send_trial(server, "")
                pause = self._pace.idle_every
            await wait_set(changed, _jittered(pause))

    async def _watch_models(self, server: Server) -> None:
        while True:
            changed = self._changed()
            if server.is_up and time.monotonic() - server.listed_at > self._pace.list_every:
                await self._probes.fetch_models(server)
            await wait_set(changed, _jittered(self._pace.probe_every))

    async def _watch_load(self, server: Server) -> None:
        reader = LoadReader(self._api, server, self._pace)
        while True:
            await asyncio.sleep(_jittered(self._pace.load_every))
            is_used = server.in_flight or server.limit.opens_in() is not None
            if is_used and not server.is_away:
                await reader.read()
                self._on_room(server)


async def wait_set(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event for at most this number of seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
