"""The state of one vLLM server: its models, its load and its circuit. No I/O; the clock is injected."""

import time
from collections.abc import Callable, Iterable, Sequence

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
from .limit import ConcurrencyLimit
from .pace import ServerPace
from .recent import Recent

MISSING = 60.0
"""Seconds for which a server's error that it does not have a model is remembered."""
REFUSES_ALL_AFTER = 25.0
"""Seconds for which a server must refuse every request to be reported: longer than most bursts of other clients."""
SILENT_AFTER = 5.0
"""Seconds without any event after which a server with open answers is reported as silent: longer than most prefills."""
SILENT_BEFORE_ANSWERS = 6.5
"""The same, while the server has not begun any of its answers. `worker status` then names it within 10 s."""
SILENT_TO_PROBES_AFTER = 6.5
"""The same, for a server without requests that does not answer a probe.

Twice the time that the last probes took is added, since some servers always answer late.
"""
_FIRST_PROBE = 10.0
"""Seconds that the first probe may take: the time that a busy server needs is not known yet."""
MOST_REQUESTS = 10_000
"""The limit of a server's limit, if the pool states none."""


class Reservation:
    """The context in which a request is in flight at a server: a class, since a generator takes 400 bytes a stream."""

    __slots__ = ("_on_room", "_server")

    def __init__(self, server: "Server", on_room: Callable[["Server"], None]) -> None:
        self._server = server
        self._on_room = on_room

    def __enter__(self) -> None:
        self._server.in_flight += 1

    def __exit__(self, *_: object) -> None:
        self._server.in_flight -= 1
        self._server.note_activity()
        self._on_room(self._server)


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
        refuses_list: whether the server refuses the worker's keys (401) for its list, and has never sent its list. Only
            a request shows whether it refuses them for answers too.
        answered_model: the model of the last request that the server began to answer; empty before that.
        limit: how many requests this worker may have in flight at the server.
        refuses_all: the error with which the server has refused every request for a while, as a full server; or None.
            Jobs wait for a full server, so a proxy that refuses everything would fail no job for a day.
        unanswered: when each request without a first event was sent, by the clock; the oldest first.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[["Server", CircuitState, CircuitState, str], None] = lambda *_: None,
        on_room: Callable[["Server"], None] = lambda _: None,
        on_models: Callable[[], None] = lambda: None,
        pace: ServerPace | None = None,
        most: int = MOST_REQUESTS,
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
        self.refuses_list = False
        self.answered_model = ""
        self.limit = ConcurrencyLimit(clock, most=most)
        self.refuses_all: UpstreamError | None = None
        self.unanswered: dict[ServerRequest, float] = {}
        self._refused_since: float | None = None
        """When the server first refused a request as a full server, since its last answer."""
        self.in_flight = 0
        """How many requests of this worker have reserved the server."""
        self._clock = clock
        self._active_at = clock()
        """When an answer last began or ended."""
        self._responded_at = clock()
        """When the server last answered a probe or a request."""
        self._probed_at: float | None = None
        """When the first probe was sent since then; None if none was."""
        self._probes_took: tuple[float, ...] = ()
        """How long the last two probes took: those of the health and of the models."""
        self._on_room = on_room
        self._on_models = on_models
        self._deniers: dict[str, set[Caller]] = {}
        """For each listed model, the jobs to which the server replied that it does not have the model."""

    def reserve(self) -> "Reservation":
        """Count a request of this worker as in flight at the server, within the context of the result.

        Enter the context in the step of the event loop in which the server is chosen. `requests` grows only once the
        request is sent: if the choice relied on it, all jobs that arrive together would choose the same server.
        """
        return Reservation(self, self._on_room)

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
    def room(self) -> int:
        """How many more requests the server can get now. While its circuit is half open, that is one trial."""
        if self.circuit.state is CircuitState.CLOSED:
            return self.limit.room(self.in_flight)
        return int(self.circuit.has_room and self.limit.opens_in() is None)

    def has_room_for(self, caller: Caller) -> bool:
        """Whether a request of a job can be sent now, if the circuit admits the job.

        A pause after a refusal holds for all jobs, and so does the limit for a job that the server has refused. A job
        that has failed at the server leaves one place free: otherwise jobs that fail again and again take all places.
        """
        may_exceed_limit = caller.may_exceed_limit and self.circuit not in caller.turned_away_by
        if may_exceed_limit or self.circuit.state is CircuitState.HALF_OPEN:
            return self.limit.opens_in() is None
        has_failed = self.circuit in caller.failed_at and self.limit.value >= 2
        return self.limit.room(self.in_flight) > has_failed

    def silences(self) -> tuple[list[float], list[float]]:
        """How long the requests are silent, in seconds, before and after their first token. Any thread may call it."""
        before, after = list[float](), list[float]()
        for watchdog in self.requests.copy():
            (after if watchdog.has_answer else before).append(watchdog.silence())
        return before, after

    def note_activity(self) -> None:
        """Note that an answer has begun or ended."""
        self._active_at = self._clock()

    def note_probe(self) -> None:
        """Record that a probe is sent."""
        if self._probed_at is None:
            self._probed_at = self._clock()

    def note_response(self) -> None:
        """Record that the server has answered a probe, or a request to the end."""
        self._responded_at = self._clock()
        if self._probed_at is not None:
            self._probes_took = (*self._probes_took[-1:], self._responded_at - self._probed_at)
            self._probed_at = None

    @property
    def awaits_response(self) -> bool:
        """Whether a probe was sent since the server last answered anything."""
        return self._probed_at is not None

    def is_idle(self, seconds: float) -> bool:
        """Whether the server has no requests, and has answered nothing for this many seconds."""
        return not self.in_flight and not self.requests and self._clock() - self._responded_at >= seconds

    def probe_silence(self) -> float:
        """For how many seconds the server has answered nothing; 0 unless probes show that it may be frozen.

        That takes longer than the server usually needs for a probe, and is not asked of a server that is away. Any
        thread may call it.
        """
        silence = self._clock() - self._responded_at
        limit = SILENT_TO_PROBES_AFTER + 2 * max(self._probes_took, default=_FIRST_PROBE)
        return silence if self.awaits_response and not self.is_away and silence > limit else 0.0

    @property
    def is_silent(self) -> bool:
        """Whether the server has answered no probe, or sent no event of any request, for a while: it may be frozen."""
        if self.probe_silence():
            return True
        before, after = self.silences()
        if not before and not after:
            return False
        shortest = min(min(after) if after else max(before), self._clock() - self._active_at)
        return shortest > (SILENT_AFTER if after else SILENT_BEFORE_ANSWERS)

    def serves(self, model: str) -> bool:
        """Whether a request for this model may go to the server, as far as is known; the empty name is any model."""
        if not model or model in self.models:
            return model not in self.missing_models
        return model in self.unlisted_models or (not self.models and model not in self.missing_models)

    def record_models(self, names: Iterable[str]) -> None:
        """Record the list of models that the server has sent."""
        former, self.models = self.models, frozenset(names)
        self._deniers.clear()
        for name in self.models:
            self.missing_models.drop(name)
        if self.models != former:
            self._on_models()

    def on_first_event(self, sent: ServerRequest, model: object) -> None:
        """Record the first event of the stream of a request."""
        self.unanswered.pop(sent, None)
        self.note_activity()
        self.note_response()
        self._refused_since = self.refuses_all = None
        room = self.room
        self.limit.on_first_event(self._clock() - sent.sent_at, self.in_flight)
        self.circuit.on_first_event(sent)
        if self.room > room:
            self._on_room(self)
        if isinstance(model, str):
            self.record_answer(model)

    def record_answer(self, model: str) -> None:
        """Record that the server has begun to answer a request for this model."""
        self._deniers.pop(model, None)
        self.answered_model = model
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
        self._on_models()

    def record_failure(self, request: ServerRequest, error: UpstreamError, *, refuses_key: bool = False) -> None:
        """Record that a request failed. With `refuses_key`, the server refuses all of the worker's keys.

        One such request opens the circuit: a server that refuses at once has the fewest requests in flight, and would
        get nearly all of them. Any other 401 or 403 may concern only the request, and counts like other faults.
        """
        self.fix = error.fix
        if error.is_draining:
            self.circuit.on_drain(request)
            return
        if error.is_busy:
            if not self.circuit.is_draining:
                self.limit.on_refused(max(1, self.in_flight), error.retry_after)
            request.caller.turned_away_by[self.circuit] = error
            self._note_refusal(error)
            # A gateway without a server behind it answers 503 too.
            self.circuit.on_busy(request, is_suspect=error.status != 429)
            return
        if counts_against_server(error):
            self.circuit.on_failure(request, error.code, at_once=isinstance(error, NoConnection) or refuses_key)
        if isinstance(error, ConnectionRefused):
            for watchdog in self.requests:
                watchdog.tighten()

    def _note_refusal(self, error: UpstreamError) -> None:
        if any(watchdog.has_answer for watchdog in self.requests):
            return
        if self._refused_since is None:
            self._refused_since = self._clock()
        elif self._clock() >= self._refused_since + REFUSES_ALL_AFTER:
            self.refuses_all = error


def counts_against_server(error: UpstreamError) -> bool:
    """Whether an error counts against the server.

    A refusal of the request (4xx) does not count, nor does a busy server. A misconfiguration, such as a redirect, does.
    """
    if error.is_busy:
        return False
    if error.elsewhere:
        return error.code != MODEL_NOT_FOUND and error.status not in TOO_LARGE_STATUS
    return error.code == UNAUTHORIZED or (error.retryable and not 400 <= error.status < 500)


def candidates(servers: Sequence[Server], caller: Caller) -> list[Server]:
    """The servers that may get a job's request now or, if they are full, as soon as one has room.

    Preferred are servers that admit the job to those that admit it as a last resort, and then servers at which the job
    has not failed. A job that has failed at one server thus waits for another that is full: a server that fails at once
    always has room.
    """
    admitting = [server for server in servers if server.circuit.admits(caller)] or [
        server for server in servers if server.circuit.admits(caller, last_resort=True)
    ]
    return [server for server in admitting if server.circuit not in caller.failed_at] or admitting


def best_server(servers: Sequence[Server], caller: Caller, other_than: Server | None = None) -> Server:
    """The best server for a job's request.

    Preferred are, in this order: `candidates`, servers that are not away, servers with room, servers at which the job
    has not failed, servers other than `other_than`, and servers with the fewest requests in flight.
    """

    def rank(server: Server) -> tuple[object, ...]:
        return (
            server.is_away,
            not server.has_room_for(caller),
            server.circuit in caller.failed_at,
            server is other_than,
            server.in_flight,
        )

    return min(candidates(servers, caller) or servers, key=rank)


def reason_to_fall_back(model: str, servers: Sequence[Server], caller: Caller) -> UpstreamError:
    """The error of a job that gives up a model, because none of the model's servers may answer it."""
    if servers and all(server.refuses_key for server in servers):
        return UpstreamError(UNAUTHORIZED, f"every server of `{model}` refuses the keys", retryable=True)
    for server in servers:
        if server.circuit in caller.turned_away_by:
            return caller.turned_away_by[server.circuit]
    return UpstreamError("upstream_unreachable", f"every server of `{model}` is away", retryable=True)
