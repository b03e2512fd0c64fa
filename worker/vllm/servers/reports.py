"""Reports to telemetry when a vLLM server is away, back, or refuses everything.

A server that is draining is not reported again and again.
"""

import time
from contextvars import copy_context

import structlog

from ...telemetry.events import Failing, Recovered, Telemetry, VllmAway, VllmBack
from ..errors import UNAUTHORIZED, without_user
from .circuit import DRAINING, CircuitState
from .server import Server

_FIXES = {UNAUTHORIZED: "set VLLM_API_KEY to the key that the server was started with"}
"""How to fix a server that is away, by the reason, if the server's error has no fix."""

_REFUSES_ALL = "vllm_refuses_all"
_WHY_REFUSED = (
    "other clients fill the server, or a proxy in front of it has no server: compare vLLM's own metrics, add servers, "
    "or see the proxy's log. Jobs wait meanwhile"
)

_DRAIN_EVERY = 60.0
"""Seconds between two reports that a server is draining: behind a load balancer, some requests meet another one."""


class CircuitReports:
    """Emits `VllmAway` and `VllmBack`, and `Failing` while a server refuses everything."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._away = set[Server]()
        """The servers that were reported as away."""
        self._drained_at: dict[Server, float] = {}
        self._refusing = set[Server]()
        """The servers that were reported to refuse everything."""

    def on_request_end(self, server: Server) -> None:
        """Report that a server refuses everything, or that it does so no more."""
        if (refusal := server.refuses_all) is not None:
            self._refusing.add(server)
            error = f"{without_user(server.url)} refuses every request: {refusal.code}, HTTP status {refusal.status}"
            self._telemetry.emit(Failing(_REFUSES_ALL, error, _WHY_REFUSED))
        elif server in self._refusing:
            self._refusing.discard(server)
            self._telemetry.emit(Recovered(_REFUSES_ALL))

    def on_change(self, server: Server, state: CircuitState, reason: str) -> None:
        """Emit the change of a circuit, in a context of its own, since the change does not belong to one job."""
        copy_context().run(self._emit, server, state, reason)

    def _emit(self, server: Server, state: CircuitState, reason: str) -> None:
        structlog.contextvars.unbind_contextvars("request_id")
        if state is not CircuitState.OPEN:
            if server in self._away:
                self._away.discard(server)
                self._telemetry.emit(VllmBack(endpoint=without_user(server.url)))
            return
        now = time.monotonic()
        if reason == DRAINING:
            if now < self._drained_at.get(server, float("-inf")) + _DRAIN_EVERY:
                return
            self._drained_at[server] = now
        self._away.add(server)
        self._telemetry.emit(
            VllmAway(endpoint=without_user(server.url), reason=reason, fix=server.fix or _FIXES.get(reason, ""))
        )
