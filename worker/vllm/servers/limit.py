"""The limit of requests that this worker has in flight at one server, learnt from the server. No I/O, injected clock.

Three signals reduce the limit:

- A refusal (429, 503). The limit becomes nine tenths of what the server holds of this worker's requests
  (multiplicative decrease; Chiu and Jain 1989: with additive increase, clients converge to fair shares).
- `vllm:num_requests_waiting` above a small target. The excess over the target is shared in proportion: every worker
  keeps the fraction of its requests that brings the sum of all to the target. This needs no knowledge of the others.
- Where /metrics cannot be read: a long wait for the first event. By Little's law the mean wait, divided by the mean
  time of generation, is the ratio of waiting to running requests.

Only the first event of a request that was sent after the last change may raise the limit, and only while the limit is
used. So an idle worker's limit neither grows nor decays, and a server that lets requests wait in silence stops the
growth by itself. At first the limit grows by a quarter for each such generation of requests. After a decrease it
returns at once to the level that the server has proven to accept, and then earns each step beyond it by accepted
requests. The steps become larger while nothing pushes back, until the growth is as fast as at first.

Below 1, the limit is a duty cycle: pauses follow requests.
"""

from collections.abc import Callable

_FIRST = 4.0
"""The limit before anything is known."""
_RAMP = 0.25
"""Growth for each generation of requests while nothing pushes back."""
_STEP = 1 / 64
"""Growth for each accepted request beyond the proven level, right after a decrease."""
_KEEP = 0.9
"""What a refusal leaves of the requests that the server holds."""
_LEAST_REFUSED = 1 / 64
_LEAST_WAITING = 1 / 4
"""The least limit because of refusals, and because of waiting requests, which may all be those of other clients."""
_LOAD_LASTS = 5.0
"""Seconds for which the figures of /metrics replace the waits for first events."""
_LONGEST_PAUSE = 60.0


class ConcurrencyLimit:
    """How many requests one worker may have in flight at one server.

    Args:
        clock: monotonic seconds.
        most: the upper bound, which is the worker's number of slots.
    """

    def __init__(self, clock: Callable[[], float], *, most: int = 64) -> None:
        self.value = min(_FIRST, float(most))
        """The limit, above 0. Below 1 it is the fraction of time with a request in flight."""
        self._clock = clock
        self._most = float(most)
        self._proven = 0.0
        """The requests that the server held when it last refused one more."""
        self._step = _RAMP
        self._changed_at = float("-inf")
        self._paused_until = float("-inf")
        self._loaded_at = float("-inf")
        self._waiting = 0
        self._held = 1.0
        """Mean seconds for which a request is in flight."""
        self._wait = 0.0
        self._base: float | None = None

    def room(self, in_flight: int) -> int:
        """How many more requests may be sent now; 0 in a pause."""
        if self._clock() < self._paused_until:
            return 0
        return max(0, int(max(1.0, self.value)) - in_flight)

    def opens_in(self) -> float | None:
        """Seconds until a pause ends, or None if there is no pause."""
        left = self._paused_until - self._clock()
        return left if left > 0 else None

    def on_first_event(self, waited: float, in_flight: int) -> None:
        """An answer has begun, `waited` seconds after its request was sent."""
        now = self._clock()
        if self._base is None or waited < self._base:
            self._base = waited
        is_new = now - waited >= self._changed_at
        if in_flight < int(self.value) or self._waiting > 0 or waited > 2 * self._base + 0.2:
            return
        if self._step >= _RAMP:
            if is_new:
                self._set(self.value + max(1.0, self.value * _RAMP))
        elif self.value < self._proven:
            self._set(self.value + _RAMP)
        else:
            self._set(self.value + self._step)
            self._step *= 1 + 1 / max(8.0, self.value)

    def on_refused(self, in_flight: int, retry_after: float | None) -> None:
        """The server has refused a request because it is full; `in_flight` counts that request."""
        held = in_flight - 1
        if held >= 1:
            self._proven = held
            self._decrease(held * _KEEP)
        else:
            self._decrease(max(_LEAST_REFUSED, min(1.0, self.value) / 2))
            self._pause(self._held * (1 / self.value - 1))
        if retry_after is not None:
            self._pause(retry_after)

    def on_end(self, held: float) -> None:
        """A request has ended, `held` seconds after it was sent."""
        self._held += (held - self._held) / 8
        if self.value < 1:
            self._pause(held * (1 / self.value - 1))

    def on_load(self, running: int, waiting: int, in_flight: int) -> None:
        """The server's /metrics has these running and waiting requests, of all clients."""
        self._loaded_at = self._clock()
        self._waiting = waiting
        target = max(1.0, running / 8)
        if waiting > target:
            share = (running + target) / (running + waiting)
            self._decrease(max(_LEAST_WAITING, in_flight * share))

    def on_unanswered(self, oldest_wait: float, count: int, in_flight: int) -> None:
        """`count` requests wait for their first event, the oldest for `oldest_wait` seconds; /metrics is unreadable."""

    def _set(self, value: float) -> None:
        self.value = min(self._most, value)
        self._changed_at = self._clock()

    def _decrease(self, value: float) -> None:
        if value < self.value:
            self._set(value)
            self._step = _STEP

    def _pause(self, seconds: float) -> None:
        self._paused_until = max(self._paused_until, self._clock() + min(seconds, _LONGEST_PAUSE))
