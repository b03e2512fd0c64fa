"""The circuit breaker of one vLLM server, driven by results of requests and probes. No I/O; the clock is injected."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import UpstreamError
from .pace import ServerPace

FAILURES = 5
"""How many jobs must fail at a server, without a success between them, to open its circuit."""
_DRAINS = 3
"""How many requests in sequence must meet a draining server, to open the circuit of a load balancer."""
DRAINING = "draining"
"""The reason of the circuit of a server that is shutting down and still ends its open streams."""


class CircuitState(enum.Enum):
    """The states of a circuit."""

    UNKNOWN = "unknown"
    """The server has not been probed yet."""
    CLOSED = "closed"
    """The server gets requests."""
    OPEN = "open"
    """The server is away: it is probed, and gets no requests."""
    HALF_OPEN = "half_open"
    """The server has answered a probe: one request at a time tests whether it works."""


@dataclass(slots=True, eq=False)
class Caller:
    """The sender of requests: a job, with its history at each circuit.

    Attributes:
        is_job: false for the worker itself, which sends trial requests of its own.
        failed_at: the circuits of the servers at which a request of the job failed, perhaps by the job's own fault. The
            job's later failures there do not count.
        refused_at: the circuits of the servers that will never answer the job, each with its last error. The job sends
            no more requests there.
        turned_away_by: the circuits of the servers that were full when the job came, each with its last error.
        may_exceed_limit: whether the job may be sent to a server that has as many requests as its limit allows: its
            answer was interrupted, and a reader waits for the rest.
        traceparent: the header of W3C trace context for the job's requests; empty for none.
    """

    is_job: bool = True
    failed_at: "set[Circuit]" = field(default_factory=set)
    refused_at: "dict[Circuit, Exception]" = field(default_factory=dict)
    turned_away_by: "dict[Circuit, UpstreamError]" = field(default_factory=dict)
    may_exceed_limit: bool = False
    traceparent: str = ""


@dataclass(slots=True, eq=False)
class ServerRequest:
    """One request at a server.

    Attributes:
        epoch: how often the circuit had opened before the request was sent.
        sent_at: when it was sent, by the circuit's clock.
    """

    caller: Caller
    epoch: int
    sent_at: float
    has_first_event: bool = False
    """Whether the server has sent a data event that counts: see `on_first_event`."""


class _Pause:
    """A pause between tries. Each is twice as long as the one before, within the limits of the pace."""

    __slots__ = ("_began", "_length", "_next_length", "_pace")

    def __init__(self, pace: ServerPace, first: float = 0.0) -> None:
        self._pace = pace
        self._began = float("-inf")
        self._length = 0.0
        self._next_length = first

    def begin(self, now: float) -> None:
        self._began = now
        self._length = self._next_length
        self._next_length = min(max(2 * self._length, self._pace.first_pause), self._pace.longest_pause)

    def is_over(self, now: float) -> bool:
        return now >= self._began + min(self._length, self._pace.longest_pause)


class Circuit:
    """Decides whether a server gets requests.

    Failures are counted by jobs, since a bad job may fail at every server. The circuit opens when `FAILURES` different
    jobs have failed with no success between them. Any answer that begins clears the failures of requests that failed
    before their answer. Only a complete answer clears the failures of interrupted answers.

    A half-open circuit admits one request at a time, and only from jobs that have not failed here. After each failed
    trial, jobs that other servers can answer wait longer. A job that no other server can answer is admitted at once,
    because the earlier trials may have failed by their own fault. A job that has failed here waits for the trial of
    another job, or for a trial request of the worker.

    The first data event of a job's trial closes the circuit, since the end of its answer may be minutes away. The
    worker's own trial is short, and must complete. After a job's trial the server is on probation, since it may begin
    answers and never end them: until one answer is complete, a single interrupted answer opens the circuit again. A
    trial without any event, as in a long queue at vLLM, blocks other requests for `ServerPace.trial` seconds.

    A late probe shows only that the server accepts connections. A server that is unknown or away then gets one trial
    request. If that trial fails, the server is away again. A good probe after a late one counts as a good first probe.

    The end of a request that was sent before the circuit opened does not count: streams that a dying vLLM left frozen
    end long after the server is back.

    A server that is shutting down (`DRAINING`) ends its open streams and refuses new requests, while its `/health` is
    good (vLLM 0.32.0 with `--shutdown-timeout`). Its probes are therefore requests of the worker's own. The first one
    that is answered closes the circuit: the URL is a load balancer, and only one server behind it was draining. From
    then on, several requests in sequence must meet a draining server there. Once the connection is refused, the server
    is away like any other.

    Args:
        clock: monotonic seconds.
        on_change: called with the former state, the new state and the reason.
        pace: the lengths of pauses and trials.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        on_change: Callable[[CircuitState, CircuitState, str], None],
        pace: ServerPace | None = None,
    ) -> None:
        self.state = CircuitState.UNKNOWN
        self.reason = ""
        """Why the circuit is open."""
        self._clock = clock
        self._on_change = on_change
        self._pace = pace or ServerPace()
        self._unanswered: set[Caller] = set()
        """Jobs whose requests failed before their answer began, since the last answer that began."""
        self._broken: set[Caller] = set()
        """Jobs whose answers broke off, since the last complete answer."""
        self._is_suspect = False
        """Whether a request failed since the last probe."""
        self._late_from: CircuitState | None = None
        """The state before a late probe; None when the last probe was not late."""
        self._on_probation = False
        self._is_balancer = False
        """Whether the URL is that of a load balancer, as a drain has shown."""
        self._drains = 0
        """Requests that have met a draining server since the last answer that began."""
        self._epoch = 0
        self._reserved_until = 0.0
        self._reset_pauses()

    def _reset_pauses(self) -> None:
        self._probe_pause, self._trial_pause = _Pause(self._pace), _Pause(self._pace)
        self._own_trial_pause = _Pause(self._pace, self._pace.first_pause)
        self._drain_pause = _Pause(self._pace, self._pace.first_drain_pause)

    @property
    def is_draining(self) -> bool:
        """Whether the server is shutting down."""
        return self.state is CircuitState.OPEN and self.reason == DRAINING

    @property
    def wants_drain_trial(self) -> bool:
        """Whether the worker should send a request of its own to see whether the server is still draining."""
        return self.is_draining and self._drain_pause.is_over(self._clock())

    @property
    def has_room(self) -> bool:
        """Whether a half-open circuit can have a trial now."""
        return self.state is CircuitState.HALF_OPEN and self._has_no_trial

    def admits(self, caller: Caller, *, last_resort: bool = False) -> bool:
        """Whether a job may send a request now. With `last_resort`, no other server can answer the job."""
        if self in caller.refused_at:
            return False
        if self.state is not CircuitState.HALF_OPEN:
            return self.state is CircuitState.CLOSED
        is_due = last_resort or self._trial_pause.is_over(self._clock())
        return self not in caller.failed_at and self._has_no_trial and is_due

    def wants_trial(self, caller: Caller) -> bool:
        """Whether the worker should send a trial request, for a job that waits because it has failed here."""
        is_due = self._has_no_trial and self._own_trial_pause.is_over(self._clock())
        waits = self in caller.failed_at and self not in caller.refused_at
        return self.state is CircuitState.HALF_OPEN and waits and is_due

    @property
    def _has_no_trial(self) -> bool:
        return self._clock() >= self._reserved_until

    @property
    def wants_probe(self) -> bool:
        """Whether the server should be probed: a request failed, or the server is away or unknown."""
        if self.state is CircuitState.OPEN:
            return not self.is_draining and self._probe_pause.is_over(self._clock())
        return self.state is CircuitState.UNKNOWN or self._is_suspect or self._late_from is not None

    def on_probe(self, trouble: str) -> None:
        """Record the result of a probe: empty if the server answered, else the reason why the server is away."""
        if self.is_draining:  # the probe was sent before
            return
        self._is_suspect = False
        late_from, self._late_from = self._late_from, None
        if self.state is CircuitState.OPEN:
            if not trouble:
                self._reserved_until = 0.0
                self._become(CircuitState.HALF_OPEN)
        elif trouble:
            self._open(trouble)
        elif CircuitState.UNKNOWN in (self.state, late_from):
            self._become(CircuitState.CLOSED)
        elif late_from is not None:
            self._reserved_until -= self._pace.late_trial - self._pace.trial

    def on_late_probe(self) -> None:
        """Record that the server did not answer a probe in time."""
        if self.is_draining:
            return
        self._is_suspect = False
        if self.state in {CircuitState.UNKNOWN, CircuitState.OPEN}:
            self._reserved_until = 0.0
            former = self.state
            self._become(CircuitState.HALF_OPEN)
            self._late_from = former

    def reserve_trial(self) -> None:
        """Block other requests while the next request is the trial of a half-open circuit."""
        self._reserved_until = self._clock() + (self._pace.trial if self._late_from is None else self._pace.late_trial)

    def request_of(self, caller: Caller) -> ServerRequest:
        """A request of a job that is sent now, for the `on_…` methods."""
        return ServerRequest(caller, self._epoch, self._clock())

    def begin(self, caller: Caller) -> ServerRequest:
        """Reserve the trial for a request of a job; returns that request."""
        self.reserve_trial()
        return self.request_of(caller)

    def on_first_event(self, request: ServerRequest) -> None:
        """Record the first data event of a request.

        If the request was sent before the circuit opened, the event counts only if a probe was answered since then:
        otherwise the server may only be ending its old answers.
        """
        if request.epoch != self._epoch and self.state is not CircuitState.HALF_OPEN:
            return
        request.has_first_event = True
        self._drains = 0
        self._unanswered.clear()
        if self.state is not CircuitState.CLOSED and request.caller.is_job:
            self._on_probation = self.state is not CircuitState.UNKNOWN
            self._become(CircuitState.CLOSED)

    def on_success(self, request: ServerRequest) -> None:
        """Record that the answer to a request is complete."""
        if request.epoch == self._epoch:
            self._forget_failures()
            self._reset_pauses()
            self._is_balancer |= self.is_draining and not request.caller.is_job
            if self.state is CircuitState.HALF_OPEN or (self.is_draining and not request.caller.is_job):
                self._become(CircuitState.CLOSED)

    def on_failure(self, request: ServerRequest, reason: str, *, at_once: bool = False) -> None:
        """Record that a request failed. With `at_once` the fault is certainly the server's, and the circuit opens."""
        caller, is_new = request.caller, self not in request.caller.failed_at
        if not at_once:
            caller.failed_at.add(self)
        if at_once and self.is_draining:
            self.reason = reason  # the end of the drain, which is no change of state
            return
        if self.is_draining and not caller.is_job:
            self._drain_pause.begin(self._clock())
        if request.epoch != self._epoch or self.state is CircuitState.OPEN:
            return
        if at_once:
            self._probe_pause.begin(self._clock())
            self._open(reason)
            return
        self._is_suspect = True
        if self.state is CircuitState.HALF_OPEN and self._late_from is not None:
            self._open(reason)
            return
        if self.state is CircuitState.HALF_OPEN:
            self._trial_pause.begin(self._clock())
            if not caller.is_job:
                self._own_trial_pause.begin(self._clock())
            return
        (self._broken if request.has_first_event else self._unanswered).add(caller)
        breaks_again = self._on_probation and request.has_first_event and is_new
        if breaks_again or len(self._broken | self._unanswered) >= FAILURES:
            self._open(reason)

    def on_drain(self, request: ServerRequest) -> None:
        """Record that the server refused a request because it is shutting down."""
        if self.is_draining:
            if not request.caller.is_job:
                self._drain_pause.begin(self._clock())
        elif request.epoch == self._epoch and self.state is not CircuitState.OPEN:
            self._drains += 1
            if self._is_balancer and self._drains < _DRAINS:
                return
            self._drains = 0
            self._drain_pause.begin(self._clock())
            self._open(DRAINING)

    def on_busy(self, request: ServerRequest, *, is_suspect: bool) -> None:
        """Record that the server refused a request because it is full. That closes a half-open circuit.

        The limit of the server then decides who may send a request; a half-open circuit would admit one after another.
        If the answer `is_suspect`, the next probe decides whether the server is away.
        """
        if self.is_draining:
            if not request.caller.is_job:
                self._drain_pause.begin(self._clock())
            return
        if self.state is CircuitState.HALF_OPEN and request.epoch == self._epoch:
            self._become(CircuitState.CLOSED)
        self._is_suspect |= is_suspect and self.state in {CircuitState.CLOSED, CircuitState.HALF_OPEN}

    def on_end(self, request: ServerRequest) -> None:
        """Record that a request has ended with any result, so that another request may be the trial."""
        if request.epoch == self._epoch:
            self._reserved_until = 0.0

    def _open(self, reason: str) -> None:
        self._epoch += 1
        self._forget_failures()
        self._trial_pause.begin(self._clock())
        self._become(CircuitState.OPEN, reason)

    def _forget_failures(self) -> None:
        self._unanswered.clear()
        self._broken.clear()
        self._is_suspect = self._on_probation = False

    def _become(self, state: CircuitState, reason: str = "") -> None:
        former, self.state, self.reason, self._late_from = self.state, state, reason, None
        self._on_change(former, state, reason)
