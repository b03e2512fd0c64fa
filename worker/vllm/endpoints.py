"""What is known of each vLLM server: its models, its load and its circuit. No I/O, and the clock is handed in."""

import enum
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from worker.vllm.errors import UNAUTHORIZED, NoConnection, Refused, UpstreamError
from worker.vllm.stream import Watchdog

FAILURES = 5
"""Failures in a row that open a circuit."""
TRIAL = 10.0
"""Seconds that a trial keeps others away while nothing is known of it."""
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 30.0
"""Seconds that a circuit stays open at least, from the second time on. The first time it is for the probe to say."""
BUSY = 1.0
"""Seconds that a server is passed over after a 429 without Retry-After."""


class State(enum.Enum):
    """Of a circuit."""

    UNKNOWN = "unknown"
    """Not asked yet."""
    CLOSED = "closed"
    """Requests go there."""
    OPEN = "open"
    """Away: it is probed, and gets no requests."""
    HALF_OPEN = "half_open"
    """Its probe was answered: one request at a time tries whether it works."""


class Circuit:
    """Whether a server gets requests, told from how the last ones went.

    The first data event of a trial closes the circuit, since the end of the answer may be minutes away. A vLLM that
    begins answers and never ends them is not believed for long all the same: until one stream has come whole, a
    single failure opens the circuit again, each time for longer. A trial of which nothing is heard, as in a long queue
    at vLLM, keeps its place for `TRIAL` seconds, then another may try.

    How a request went that was sent before the circuit opened says nothing about the server since: streams that a
    dying vLLM left frozen end long after it is back.

    Args:
        clock: monotonic seconds.
        on_change: called with the former state, the new one and the reason.
    """

    def __init__(self, clock: Callable[[], float], on_change: Callable[[State, State, str], None]) -> None:
        self.state = State.UNKNOWN
        self.reason = ""
        """Why it is open."""
        self._clock = clock
        self._on_change = on_change
        self._failures = 0
        self._opened = 0
        self._next_pause = 0.0
        self._paused_until = 0.0
        self._held_until = 0.0

    @property
    def admits(self) -> bool:
        """Whether a request may go there now."""
        return self.state is State.CLOSED or (self.state is State.HALF_OPEN and self._clock() >= self._held_until)

    @property
    def wants_probe(self) -> bool:
        """Whether the server is to be asked if it is there."""
        return self.state is State.UNKNOWN or (self.state is State.OPEN and self._clock() >= self._paused_until)

    def probed(self, trouble: str) -> None:
        """A probe was answered; or not, and `trouble` says why."""
        if self.state is State.UNKNOWN:
            self._become(State.OPEN if trouble else State.CLOSED, trouble)
        elif self.state is State.OPEN and not trouble:
            self._held_until = 0.0
            self._become(State.HALF_OPEN)

    def hold(self) -> None:
        """A request is about to go there: while the circuit is half open, it is the trial."""
        self._held_until = self._clock() + TRIAL

    @property
    def run(self) -> int:
        """What a request that begins now tells its fate with."""
        return self._opened

    def begin(self) -> int:
        """A request goes there; gives what to tell its fate with."""
        self.hold()
        return self._opened

    def began(self, run: int) -> None:
        """The first data event of a request came."""
        if run == self._opened and self.state is not State.CLOSED:
            self._failures = 0 if self.state is State.UNKNOWN else FAILURES - 1
            self._become(State.CLOSED)

    def succeeded(self, run: int) -> None:
        """The stream of a request came whole."""
        if run == self._opened:
            self._failures, self._next_pause = 0, 0.0

    def failed(self, run: int, reason: str, *, at_once: bool = False) -> None:
        """A request failed by a fault of the server; `at_once` when another one need not be tried."""
        if run != self._opened or self.state is State.OPEN:
            return
        self._failures += 1
        if at_once or self.state is State.HALF_OPEN or self._failures >= FAILURES:
            self._opened += 1
            self._paused_until = self._clock() + self._next_pause
            self._next_pause = min(max(2 * self._next_pause, FIRST_PAUSE), LONGEST_PAUSE)
            self._become(State.OPEN, reason)

    def left(self, run: int) -> None:
        """A request is over, whatever came of it: a trial that said nothing gives its place up."""
        if run == self._opened:
            self._held_until = 0.0

    def _become(self, state: State, reason: str = "") -> None:
        former, self.state, self.reason = self.state, state, reason
        self._on_change(former, state, reason)


class Endpoint:
    """One server.

    Attributes:
        url: its base, without `/v1`.
        requests: those that it has, each by the watchdog over it.
        without: the fields that it does not understand.
        models: the names that it serves; empty while they are not known, and for a server that does not list them.
        listed: when it was last asked for them, by the clock.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[["Endpoint", State, State, str], None] = lambda *_: None,
    ) -> None:
        self.url = url
        self._users = 0
        self.requests: set[Watchdog] = set()
        self.without: set[str] = set()
        self.models: frozenset[str] = frozenset()
        self.listed = float("-inf")
        self.circuit = Circuit(clock, lambda *change: on_change(self, *change))
        self._clock = clock
        self._busy_until = 0.0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it a request of this worker is for this server: enter at once, lest all that come together choose it.

        The requests that it has are known later only, once each has been made and perhaps asked for its tokens.
        """
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1

    @property
    def in_flight(self) -> int:
        """How many requests of this worker are for it."""
        return self._users

    @property
    def away(self) -> bool | None:
        """Whether it gets no requests for now; None until that is known."""
        return None if self.circuit.state is State.UNKNOWN else self.circuit.state is State.OPEN

    @property
    def refuses_key(self) -> bool:
        """Whether it is away because it does not take the worker's key."""
        return self.away is True and self.circuit.reason == UNAUTHORIZED

    @property
    def is_busy(self) -> bool:
        """Whether it asked to be left alone for now."""
        return self._clock() < self._busy_until

    def serves(self, model: str) -> bool:
        """Whether a request for this model may go there, as far as is known; the empty name is any model."""
        return not model or not self.models or model in self.models

    def takes(self, model: str) -> bool:
        """Whether a request for this model may go there now."""
        return self.serves(model) and self.circuit.admits

    def failed(self, run: int, error: UpstreamError) -> None:
        """A request failed: what that says about the server.

        A refusal (4xx) is no fault of it, nor is being busy. All its requests have the same key, so one 401 is enough:
        it answers at once, and with the fewest in flight it would get nearly all of them. A 403 may be about what is
        asked, so it counts as other faults do.
        """
        if error.status == 429 or error.retry_after is not None:
            self._busy_until = self._clock() + (BUSY if error.retry_after is None else error.retry_after)
        if error.code == "model_not_found":
            self.listed = float("-inf")  # it is not what it said: ask again
        if error.code == UNAUTHORIZED or (error.retryable and not 400 <= error.status < 500):
            self.circuit.failed(run, error.code, at_once=isinstance(error, NoConnection) or error.status == 401)
        if isinstance(error, Refused):
            for watchdog in self.requests:
                watchdog.hurry()


def best_of(endpoints: Sequence[Endpoint], model: str, other_than: Endpoint | None = None) -> Endpoint:
    """The server to send a request to.

    Those that let it through go before those that do not, then those that are not busy, then others than the last,
    and then the one with the fewest requests in flight.

    Raises:
        UpstreamError: `model_not_found`, when none serves the model.
    """

    def rank(endpoint: Endpoint) -> tuple[object, ...]:
        circuit = endpoint.circuit
        return (
            not circuit.admits,
            endpoint.away is True,
            endpoint.is_busy,
            endpoint is other_than,
            endpoint.in_flight,
        )

    serving = [endpoint for endpoint in endpoints if endpoint.serves(model)]
    if not serving:
        raise nobody_serves(model, endpoints)
    return min(serving, key=rank)


def nobody_serves(model: str, endpoints: Iterable[Endpoint]) -> UpstreamError:
    """Every server lists its models, and this is none of them."""
    served = ", ".join(sorted({name for endpoint in endpoints for name in endpoint.models}))
    return UpstreamError(
        "model_not_found", f"The model `{model}` does not exist. Served are: {served}.", status=404, retryable=False
    )
