"""The state of one vLLM server: its models, its load and its circuit. No I/O; the clock is injected."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from ..errors import (
    MODEL_NOT_FOUND,
    TOO_LARGE_STATUS,
    UNAUTHORIZED,
    ConnectionRefused,
    NoConnection,
    UpstreamError,
)
from ..stream.watchdog import StreamWatchdog
from .circuit import FAILURES, Caller, Circuit, CircuitState, ServerRequest
from .pace import ServerPace
from .recent import Recent

MISSING = 60.0
"""Seconds for which a server's error that it does not have a model is remembered."""
BUSY = 1.0
"""Seconds for which other servers are preferred after a 429 without Retry-After."""


class Server:
    """One vLLM server of the worker.

    Attributes:
        url: its base URL, without `/v1`.
        requests: the watchdogs of the server's unfinished requests.
        unsupported_fields: the request fields that the server refuses.
        models: the names that the server lists; empty while they are not known, and for a server without a list.
        unlisted_models: names that the server serves but does not list.
        missing_models: names that the server has lately refused as unknown.
        listed_at: when the server's list was last requested, by the clock.
        fix: how to fix the server's last error, if that is known.
        accepted_key: the API key that the server accepted last; empty before that.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[["Server", CircuitState, CircuitState, str], None] = lambda *_: None,
        pace: ServerPace | None = None,
    ) -> None:
        self.url = url
        self.circuit = Circuit(clock, lambda *change: on_change(self, *change), pace)
        self.requests: set[StreamWatchdog] = set()
        self.unsupported_fields: set[str] = set()
        self.models: frozenset[str] = frozenset()
        self.unlisted_models: Recent[bool] = Recent(clock, float("inf"))
        self.missing_models: Recent[bool] = Recent(clock, MISSING)
        self.listed_at = float("-inf")
        self.fix = ""
        self.accepted_key = ""
        self.in_flight = 0
        """How many requests of this worker have reserved the server."""
        self._clock = clock
        self._busy_until = 0.0
        self._deniers: dict[str, set[Caller]] = {}
        """For each listed model, the jobs to which the server replied that it does not have the model."""

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """Count a request of this worker as in flight at the server, within the context.

        Enter the context in the step of the event loop in which the server is chosen. `requests` grows only once the
        request is sent: if the choice relied on it, all jobs that arrive together would choose the same server.
        """
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @property
    def is_known(self) -> bool:
        """Whether a probe or a request has shown whether the server works."""
        return self.circuit.state is not CircuitState.UNKNOWN

    @property
    def is_away(self) -> bool:
        """Whether the server gets no requests for now."""
        return self.circuit.state is CircuitState.OPEN

    @property
    def is_up(self) -> bool:
        """Whether the server is known to accept requests, even if only one at a time."""
        return self.is_known and not self.is_away

    @property
    def refuses_key(self) -> bool:
        """Whether the server is away because it refuses the worker's keys."""
        return self.is_away and self.circuit.reason == UNAUTHORIZED

    @property
    def is_busy(self) -> bool:
        """Whether the server has requested a pause that is not over yet."""
        return self._clock() < self._busy_until

    def silences(self) -> tuple[list[float], list[float]]:
        """How long the requests are silent, in seconds, before and after their first token. Any thread may call it."""
        before, after = list[float](), list[float]()
        for watchdog in self.requests.copy():
            (after if watchdog.has_answer else before).append(watchdog.silence())
        return before, after

    def serves(self, model: str) -> bool:
        """Whether a request for this model may go to the server, as far as is known; the empty name is any model."""
        if not model or model in self.models:
            return model not in self.missing_models
        return model in self.unlisted_models or (not self.models and model not in self.missing_models)

    def record_models(self, names: Iterable[str]) -> None:
        """Record the list of models that the server has sent."""
        self.models = frozenset(names)
        self._deniers.clear()
        for name in self.models:
            self.missing_models.drop(name)

    def record_answer(self, model: str) -> None:
        """Record that the server has begun to answer a request for this model."""
        self._deniers.pop(model, None)
        if model and self.models and model not in self.models:
            self.unlisted_models.put(model, True)

    def record_missing(self, model: str, caller: Caller) -> None:
        """Record that the server did not know the model of a job; the server's list is then fetched again.

        If the server lists the model, the error may concern only this job, such as an image that is not found. The
        model then counts as missing only if the new list lacks it, or if `FAILURES` jobs got the same error with no
        answer between them.
        """
        self.listed_at = float("-inf")
        self.unlisted_models.drop(model)
        if model in self.models:
            deniers = self._deniers.setdefault(model, set())
            deniers.add(caller)
            if len(deniers) < FAILURES:
                return
        self.missing_models.put(model, True)

    def record_failure(self, request: ServerRequest, error: UpstreamError, *, refuses_key: bool = False) -> None:
        """Record that a request failed. With `refuses_key`, the server refuses all of the worker's keys.

        One such request opens the circuit: a server that refuses at once has the fewest requests in flight, and would
        get nearly all of them. Any other 401 or 403 may concern only the request, and counts like other faults.
        """
        self.fix = error.fix
        if error.status == 429 or error.retry_after is not None:
            self._busy_until = self._clock() + (BUSY if error.retry_after is None else error.retry_after)
        if counts_against_server(error):
            self.circuit.on_failure(request, error.code, at_once=isinstance(error, NoConnection) or refuses_key)
        if isinstance(error, ConnectionRefused):
            for watchdog in self.requests:
                watchdog.tighten()


def counts_against_server(error: UpstreamError) -> bool:
    """Whether an error counts against the server.

    A refusal of the request (4xx) does not count, nor does a busy server. A misconfiguration, such as a redirect, does.
    """
    if error.elsewhere:
        return error.code != MODEL_NOT_FOUND and error.status not in TOO_LARGE_STATUS
    return error.code == UNAUTHORIZED or (error.retryable and not 400 <= error.status < 500)


def best_server(servers: Sequence[Server], caller: Caller, other_than: Server | None = None) -> Server:
    """The best server for a job's request.

    Preferred are, in this order: servers that admit the job, servers that admit it as a last resort, servers that are
    not away, servers that are not busy, servers at which the job has not failed, servers other than `other_than`, and
    servers with the fewest requests in flight.
    """

    def rank(server: Server) -> tuple[object, ...]:
        circuit = server.circuit
        return (
            not circuit.admits(caller),
            not circuit.admits(caller, last_resort=True),
            server.is_away,
            server.is_busy,
            circuit in caller.failed_at,
            server is other_than,
            server.in_flight,
        )

    return min(servers, key=rank)
