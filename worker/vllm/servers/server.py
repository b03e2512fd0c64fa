"""What is known of each vLLM server: its models, its load and its circuit. No I/O, and the clock is handed in."""

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
from ..stream.chat_stream import StreamWatchdog
from .circuit import FAILURES, Caller, Circuit, CircuitState, ServerRequest
from .recent import Recent

MISSING = 60.0
"""Seconds that the answer holds that there is no such model."""
BUSY = 1.0
"""Seconds that a server is passed over after a 429 without Retry-After."""


class Server:
    """One server.

    Attributes:
        url: its base, without `/v1`.
        requests: those that it has, each by the watchdog over it.
        unsupported_fields: the fields that it does not understand.
        models: the names that it lists; empty while they are not known, and for a server that does not list them.
        unlisted: names that it has answered to all the same, for as long as it does.
        lacking: names that it did not know lately.
        listed_at: when it was last asked for them, by the clock.
        fix: what to do about its last error, where that is known.
        accepted_key: the one that it took last; empty while it has taken none.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[["Server", CircuitState, CircuitState, str], None] = lambda *_: None,
    ) -> None:
        self.url = url
        self._users = 0
        self.requests: set[StreamWatchdog] = set()
        self.unsupported_fields: set[str] = set()
        self.models: frozenset[str] = frozenset()
        self.unlisted: Recent[bool] = Recent(clock, float("inf"))
        self.lacking: Recent[bool] = Recent(clock, MISSING)
        self.listed_at = float("-inf")
        self._deniers: dict[str, set[Caller]] = {}
        self.fix = ""
        self.accepted_key = ""
        self.circuit = Circuit(clock, lambda *change: on_change(self, *change))
        self._clock = clock
        self._busy_until = 0.0

    @contextmanager
    def reserve(self) -> Iterator[None]:
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
    def is_known(self) -> bool:
        """Whether a probe or a request has shown yet whether the server is there."""
        return self.circuit.state is not CircuitState.UNKNOWN

    @property
    def is_away(self) -> bool:
        """Whether the server gets no requests for now."""
        return self.circuit.state is CircuitState.OPEN

    @property
    def is_up(self) -> bool:
        """Whether the server is known to take requests, if only one at a time."""
        return self.is_known and not self.is_away

    @property
    def refuses_key(self) -> bool:
        """Whether it is away because it does not take the worker's key."""
        return self.is_away and self.circuit.reason == UNAUTHORIZED

    @property
    def is_busy(self) -> bool:
        """Whether it asked to be left alone for now."""
        return self._clock() < self._busy_until

    def serves(self, model: str) -> bool:
        """Whether a request for this model may go there, as far as is known; the empty name is any model."""
        if not model or model in self.models:
            return model not in self.lacking
        return model in self.unlisted or (not self.models and model not in self.lacking)

    def record_models(self, names: Iterable[str]) -> None:
        """It says what it serves."""
        self.models = frozenset(names)
        self._deniers.clear()
        for name in self.models:
            self.lacking.drop(name)

    def record_answer(self, model: str) -> None:
        """It has begun to answer a request for this model."""
        self._deniers.pop(model, None)
        if model and self.models and model not in self.models:
            self.unlisted.put(model, True)

    def record_missing(self, model: str, caller: Caller) -> None:
        """It answered a job that it does not know a model: it is asked for its list again.

        Where it lists the model, that may be about this one job, such as an image that is not found. Then only the new
        list takes the model away, or `FAILURES` jobs with the same answer and no other answer between them.
        """
        self.listed_at = float("-inf")
        self.unlisted.drop(model)
        if model in self.models:
            deniers = self._deniers.setdefault(model, set())
            deniers.add(caller)
            if len(deniers) < FAILURES:
                return
        self.lacking.put(model, True)

    def record_failure(self, run: ServerRequest, error: UpstreamError, *, refuses_key: bool = False) -> None:
        """A request failed: what that says about the server; `refuses_key` where it takes no key of ours for anything.

        Then one request is enough: it answers at once, and with the fewest in flight it would get nearly all of them.
        Otherwise a 401 or 403 may be about what is asked, and counts as other faults do.
        """
        self.fix = error.fix
        if error.status == 429 or error.retry_after is not None:
            self._busy_until = self._clock() + (BUSY if error.retry_after is None else error.retry_after)
        if may_be_its_fault(error):
            self.circuit.on_failure(run, error.code, at_once=isinstance(error, NoConnection) or refuses_key)
        if isinstance(error, ConnectionRefused):
            for watchdog in self.requests:
                watchdog.tighten()


def may_be_its_fault(error: UpstreamError) -> bool:
    """Whether an error counts against the server: a refusal of the request (4xx) does not, nor does being busy.

    That the server is set up wrongly does, such as a redirect.
    """
    if error.elsewhere:
        return error.code != MODEL_NOT_FOUND and error.status not in TOO_LARGE_STATUS
    return error.code == UNAUTHORIZED or (error.retryable and not 400 <= error.status < 500)


def best_of(endpoints: Sequence[Server], caller: Caller, other_than: Server | None = None) -> Server:
    """The one of these servers to send a request of a job to.

    Those that let it through go before those that do so only where no other does, and these before the rest; then
    those that are not busy, then those at which the job has not failed, then others than the last, and then the one
    with the fewest requests in flight.
    """

    def rank(endpoint: Server) -> tuple[object, ...]:
        circuit = endpoint.circuit
        return (
            not circuit.admits(caller),
            not circuit.admits(caller, pressed=True),
            endpoint.is_away,
            endpoint.is_busy,
            circuit in caller.failed_at,
            endpoint is other_than,
            endpoint.in_flight,
        )

    return min(endpoints, key=rank)
