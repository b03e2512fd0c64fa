"""Whether a vLLM server gets requests, decided from how the last ones went. No I/O, and the clock is handed in."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

FAILURES = 5
"""Jobs whose requests failed, with no success between them, that open a circuit."""
TRIAL, LATE_TRIAL = 10.0, 60.0
"""Seconds that a trial keeps others away while nothing is known of it; also where no probe was answered."""
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 30.0
"""Seconds between trials at least, from the second time on. The first time it is for the probe to say."""


class CircuitState(enum.Enum):
    """Of a circuit."""

    UNKNOWN = "unknown"
    """Not asked yet."""
    CLOSED = "closed"
    """Requests go there."""
    OPEN = "open"
    """Away: it is probed, and gets no requests."""
    HALF_OPEN = "half_open"
    """Its probe was answered: one request at a time tries whether it works."""


@dataclass(slots=True, eq=False)
class Caller:
    """One job, as the servers see it.

    `failed_at` has the servers at which one of its requests failed in a way that may be its own fault: the job is no
    measure of them any more. `refused_at` has the servers that will not answer it, each with its last error: no further
    request of the job goes there. The worker itself, which asks to find out, is no job.
    """

    is_job: bool = True
    failed_at: "set[Circuit]" = field(default_factory=set)
    refused_at: "dict[Circuit, Exception]" = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class ServerRequest:
    """One request at a server: `era` is how often the circuit had opened before it was sent."""

    caller: Caller
    era: int
    begun: bool = False


@dataclass(slots=True)
class _Pause:
    """The times between tries, each longer than the one before."""

    length: float = 0.0
    until: float = 0.0

    def begin(self, now: float) -> None:
        self.until = now + self.length
        self.length = min(max(2 * self.length, FIRST_PAUSE), LONGEST_PAUSE)


class Circuit:
    """Whether a server gets requests.

    One job, or a few, may fail wherever they go, so failures are counted by jobs: the circuit opens when `FAILURES`
    different ones have failed with no success between them. A request without an answer so far is outweighed by any
    other that begins to be answered; one that broke off only by one that comes whole.

    While the circuit is half open, requests go one at a time, and only those of jobs that have not failed here. Jobs
    that can go elsewhere wait longer after every trial that failed; a job that cannot is let through at once, for
    those before it may have failed by their own fault. A job that has failed here waits for the trial of another, or
    for one that the worker makes with a request of its own.

    The first data event of a trial closes the circuit, since the end of the answer may be minutes away; the worker's
    own is short, and must come whole. A vLLM that begins answers and never ends them is not believed for long all the
    same: until one stream has come whole, a single one that breaks off opens the circuit again. A trial of which
    nothing is heard, as in a long queue at vLLM, keeps its place for `TRIAL` seconds, then another may try.

    A probe that is late says only that something takes connections: a server of which nothing is known yet is tried
    with one request, and so is one that is away. Should that trial fail, it is away again. A good probe after a late
    one says as much as the first would have.

    How a request ended that was sent before the circuit opened says nothing about the server since: streams that a
    dying vLLM left frozen end long after it is back.

    Args:
        clock: monotonic seconds.
        on_change: called with the former state, the new one and the reason.
    """

    def __init__(
        self, clock: Callable[[], float], on_change: Callable[[CircuitState, CircuitState, str], None]
    ) -> None:
        self.state = CircuitState.UNKNOWN
        self.reason = ""
        """Why it is open."""
        self._clock = clock
        self._on_change = on_change
        self._unanswered: set[Caller] = set()
        self._broken: set[Caller] = set()
        self._is_suspect = False
        self._late_from: CircuitState | None = None
        """The state before a late probe; None when the last probe was not late."""
        self._on_probation = False
        self._era = 0
        self._held_until = 0.0
        self._before_probes, self._before_trials, self._before_own_trials = _Pause(), _Pause(), _Pause(FIRST_PAUSE)

    def admits(self, caller: Caller, *, pressed: bool = False) -> bool:
        """Whether a request of a job may go there now; `pressed` when it can go nowhere else."""
        if self in caller.refused_at:
            return False
        if self.state is not CircuitState.HALF_OPEN:
            return self.state is CircuitState.CLOSED
        is_due = pressed or self._clock() >= self._before_trials.until
        return self not in caller.failed_at and self._is_free and is_due

    def wants_trial(self, caller: Caller) -> bool:
        """Whether a job that has failed here, and so waits, may have the server tried with another request."""
        is_due = self._is_free and self._clock() >= self._before_own_trials.until
        waits = self in caller.failed_at and self not in caller.refused_at
        return self.state is CircuitState.HALF_OPEN and waits and is_due

    @property
    def _is_free(self) -> bool:
        return self._clock() >= self._held_until

    @property
    def wants_probe(self) -> bool:
        """Whether the server is to be asked if it is there: a request failed, or it is away, or nothing is known."""
        if self.state is CircuitState.OPEN:
            return self._clock() >= self._before_probes.until
        return self.state is CircuitState.UNKNOWN or self._is_suspect or self._late_from is not None

    def on_probe(self, trouble: str) -> None:
        """A probe was answered; or not, and `trouble` says why."""
        self._is_suspect = False
        late_from, self._late_from = self._late_from, None
        if self.state is CircuitState.OPEN:
            if not trouble:
                self._held_until = 0.0
                self._become(CircuitState.HALF_OPEN)
        elif trouble:
            self._open(trouble)
        elif CircuitState.UNKNOWN in (self.state, late_from):
            self._become(CircuitState.CLOSED)
        elif late_from is not None:
            self._held_until -= LATE_TRIAL - TRIAL

    def on_late_probe(self) -> None:
        """A probe was not answered in the time it had."""
        self._is_suspect = False
        if self.state in {CircuitState.UNKNOWN, CircuitState.OPEN}:
            self._held_until = 0.0
            former = self.state
            self._become(CircuitState.HALF_OPEN)
            self._late_from = former

    def reserve_trial(self) -> None:
        """A request is about to go there: while the circuit is half open, it is the trial."""
        self._held_until = self._clock() + (TRIAL if self._late_from is None else LATE_TRIAL)

    def request_of(self, caller: Caller) -> ServerRequest:
        """What a request of a job that begins now tells its fate with."""
        return ServerRequest(caller, self._era)

    def begin(self, caller: Caller) -> ServerRequest:
        """A request of a job goes there; gives what to tell its fate with."""
        self.reserve_trial()
        return self.request_of(caller)

    def on_first_event(self, run: ServerRequest) -> None:
        """The first data event of a request came.

        One that was sent before the circuit opened shows as well that a server works whose probe was answered since;
        without that it may only be ending its answers.
        """
        if run.era != self._era and self.state is not CircuitState.HALF_OPEN:
            return
        run.begun = True
        self._unanswered.clear()
        if self.state is not CircuitState.CLOSED and run.caller.is_job:
            self._on_probation = self.state is not CircuitState.UNKNOWN
            self._become(CircuitState.CLOSED)

    def on_success(self, run: ServerRequest) -> None:
        """The stream of a request came whole."""
        if run.era == self._era:
            self._forget()
            self._before_probes, self._before_trials, self._before_own_trials = _Pause(), _Pause(), _Pause(FIRST_PAUSE)
            if self.state is CircuitState.HALF_OPEN:
                self._become(CircuitState.CLOSED)

    def on_failure(self, run: ServerRequest, reason: str, *, at_once: bool = False) -> None:
        """A request failed, perhaps by a fault of the server; `at_once` when it is one for certain."""
        caller, is_new = run.caller, self not in run.caller.failed_at
        if not at_once:
            caller.failed_at.add(self)
        if run.era != self._era or self.state is CircuitState.OPEN:
            return
        if at_once:
            self._before_probes.begin(self._clock())
            self._open(reason)
            return
        self._is_suspect = True
        if self.state is CircuitState.HALF_OPEN and self._late_from is not None:
            self._open(reason)
            return
        if self.state is CircuitState.HALF_OPEN:
            self._before_trials.begin(self._clock())
            if not caller.is_job:
                self._before_own_trials.begin(self._clock())
            return
        (self._broken if run.begun else self._unanswered).add(caller)
        breaks_again = self._on_probation and run.begun and is_new
        if breaks_again or len(self._broken | self._unanswered) >= FAILURES:
            self._open(reason)

    def on_end(self, run: ServerRequest) -> None:
        """A request is over, whatever came of it: a trial that said nothing gives its place up."""
        if run.era == self._era:
            self._held_until = 0.0

    def _open(self, reason: str) -> None:
        self._era += 1
        self._forget()
        self._before_trials.begin(self._clock())
        self._become(CircuitState.OPEN, reason)

    def _forget(self) -> None:
        self._unanswered.clear()
        self._broken.clear()
        self._is_suspect = self._on_probation = False

    def _become(self, state: CircuitState, reason: str = "") -> None:
        former, self.state, self.reason, self._late_from = self.state, state, reason, None
        self._on_change(former, state, reason)
