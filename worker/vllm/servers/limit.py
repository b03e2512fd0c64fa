"""The limit of this worker's requests in flight at one server, learnt from what the server does. No I/O.

**Growth.** Only a limit that is used grows. The first event of a request that was sent after the last growth shows that
the server has room: the limit grows by a quarter (the slow start of TCP, with less overshoot). A server that lets
requests wait sends no first event, and so stops the growth. First events may take seconds, so a reading of /metrics
without a waiting request counts too: it adds a half, or at a large server as much again. A decrease makes the steps
small (additive increase; Chiu and Jain 1989). Each request that the server accepts makes them larger, until the limit
grows by a quarter again.

**Decrease.** Each kind of server has its own signal:

- It refuses requests (429, 503). The limit falls to 0.85 of the requests that the server holds for this worker. For two
  times of generation, other workers can take the places that this frees. Then the limit returns quickly to the number
  that the server held. About 20 accepted requests, or nine times of generation of a larger limit, then pay for the next
  step, which may be refused.
- Its /metrics shows waiting requests, of all clients. Every worker sees the same figure, and gives up the same part of
  its requests, so that one waiting request remains for each eight running ones. In between, every worker adds the same
  number. Equal increase and proportional decrease lead to equal shares (Chiu and Jain).
- It lets requests wait, and its /metrics cannot be read. If the least wait for a first event among eight requests is
  long, requests wait at the server (CoDel; Nichols and Jacobson 2012). One long prompt does not count. "Long" is twice
  the least wait that the server has shown (compare TCP Vegas) plus a quarter of the time of generation. The wait, as a
  part of that time, is the ratio of waiting to running requests (Little's law). If waits are as long after a decrease,
  they come from long prompts or from other clients, and count less and less.

Below 1, the limit is a duty cycle, with pauses between requests. A limit that is not used stays as it is.

**More workers than places.** A server that refuses may have no place for some of its workers. After a refusal of its
only request, a worker pauses for a time that grows with each refusal, up to that of 32 answers or 60 s. If /metrics can
be read, the worker senses a free place there first, as a station senses the carrier (CSMA). A worker with a single
place offers it to the others after every 48 answers. If it then finds the place taken, it pauses as long as the others.
So shares become equal over some hundred answers of each worker. Shorter turns would leave the server idle for a larger
part of its time, because nobody knows of a free place until a pause ends.

Gradient and Vegas alone (Netflix's concurrency-limits) take long prompts for a queue.
"""

import random
from collections.abc import Callable
from math import inf

_FIRST = 2.0
"""The limit before anything is known."""
_RAMP = 0.25
"""Growth for each generation of requests while nothing pushes back."""
_STEP = 1 / 64
"""Growth right after a decrease, for each generation of requests (see `_is_additive`) or for each accepted request."""
_FASTER = 0.4
"""The part by which each generation of requests makes additive growth faster."""
_KEEP = 0.85
"""The part of its requests that the worker keeps after a refusal."""
_RETURN = 0.2
"""Growth for each accepted request up to the number of requests that the server held when it refused one."""
_TARGET = 1 / 8
"""Waiting requests for each running one that /metrics may show."""
_LEAST = 0.25
_LEAST_SHARE = 1 / 32
"""The least limit, and its least part of the server's running requests: those that wait may be of other clients."""
_CALM = 4
"""Readings of /metrics in sequence without a waiting request, after which the limit grows as fast as at first."""
_SMALL = 16.0
"""From here on, a reading of /metrics doubles the limit, until a request has waited. A small server may refuse some."""
_LOAD_LASTS = 5.0
"""Seconds for which a reading of /metrics replaces the waits for first events."""
_QUIET = 10.0
"""Seconds without a request, after which a limit that long answers use up grows by one."""
_LONGEST_PAUSE = 60.0
_DOUBLINGS = 5
"""How often the pause after the refusal of the only request doubles, once the time of generation is known."""
_PLACE_SENSED = 1 / 8
"""The part of that pause after which a reading of /metrics with a free place ends it: the sense may be wrong."""
_LONGEST_SENSING = 300.0
"""Seconds after a refusal for which readings of /metrics without a free place prolong the pause."""
_SENSING_LASTS = 5.0
"""Seconds by which such a reading prolongs it: readings are at most a second or two apart."""
_TURN = 48
"""Answers in sequence, after which a worker offers its only place to others."""
_OFFER = 2.0
"""Times of generation for which a worker leaves a place to others."""
_PAUSE_AFTER = 4
"""Pauses of the duty cycle add up to this many times of generation before one is made: fewer, longer pauses."""


class ConcurrencyLimit:
    """How many requests one worker may have in flight at one server. Every method takes constant time.

    Args:
        clock: monotonic seconds.
        most: the upper bound, which is the worker's number of slots.
        jitter: returns a factor for a pause. Workers that were refused together must not return together.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        most: int = 64,
        jitter: Callable[[], float] = lambda: random.uniform(0.75, 1.25),  # noqa: S311 - jitter
    ) -> None:
        self.value = min(_FIRST, float(most))
        """The limit, above 0. Below 1 it is the fraction of time with a request in flight."""
        self._clock = clock
        self._jitter = jitter
        self._most = float(most)
        self._step = _RAMP
        self._proven = inf
        """How many requests the server held when it refused another; infinite if refusals do not show its capacity."""
        self._grown_at = self._decreased_at = -inf
        self._paused_until = -inf
        self._owed = 0.0
        """When the pause of the duty cycle ends, and the seconds of the next one so far."""
        self._refused_until = -inf
        """When the pause that the server has asked for ends."""
        self._alone_until = self._senses_at = self._refused_alone_at = -inf
        """When the pause after a refusal of the only request ends, from when on a free place ends it, and its start."""
        self._offered_until = -inf
        """Until then the limit leaves the places that a decrease has freed to others."""
        self._turn = 0
        """Answers since the worker last offered its only place to others."""
        self._answered_at = -inf
        """When the last first event came."""
        self._cautious_until = -inf
        """Until then the limit does not grow beyond `_proven`, since a refusal with Retry-After costs time."""
        self._refused_alone = 0
        """Refusals of the only request in flight, less the requests that were accepted since."""
        self._loaded_at = -inf
        self._has_queue = False
        """Whether /metrics has shown that the server lets requests wait before it refuses any."""
        self._is_full = False
        self._calm = 0
        self._shown = 0
        self._full_at = 1
        """The requests at the server that /metrics showed last, and the most that it has shown since a refusal."""
        self._wait = 0.0
        self._work = 1.0
        """Mean seconds until a first event, and from there to the end."""
        self._knows_work = False
        self._queue = _StandingQueue()

    def room(self, in_flight: int) -> int:
        """How many more requests may be sent now; 0 in a pause."""
        return 0 if self.opens_in() is not None else max(0, max(1, self._whole) - in_flight)

    def opens_in(self) -> float | None:
        """Seconds until the pause ends, or None if there is none."""
        left = max(self._paused_until, self._refused_until, self._alone_until) - self._clock()
        return left if left > 0 else None

    def on_first_event(self, waited: float, in_flight: int) -> None:
        """An answer has begun, `waited` seconds after its request was sent."""
        now = self._clock()
        sent_at = now - waited
        self._answered_at = now
        self._refused_alone = max(0, self._refused_alone - 1)
        self._wait += (waited - self._wait) / 8
        is_loaded = now - self._loaded_at < _LOAD_LASTS
        if is_loaded:
            is_delayed = self._is_full
        else:
            is_delayed = self._queue.is_long(waited, self._work)
            keep = self._queue.observe(waited, self._work, is_new=sent_at >= self._decreased_at)
            if keep < 1:
                self._decrease(self.value * keep)
        if is_delayed or in_flight < self._whole:
            return
        if self._step >= _RAMP:
            if sent_at >= max(self._grown_at, self._decreased_at):
                self._grow(max(2.0, self.value * _RAMP))
        elif self.value < self._proven < inf:
            if now >= self._offered_until:
                self._grow(min(_RETURN, self._proven - self.value))
        elif now >= self._cautious_until and not (is_loaded and self._has_queue):
            self._grow(self._step)
            self._step *= 1 + (_FASTER / max(4.0, self.value) if self._is_additive(self.value) else 1 / self.value)

    def on_refused(self, in_flight: int, retry_after: float | None) -> None:
        """The server is full and has refused a request, which `in_flight` counts; no `on_end` follows."""
        held = max(0, in_flight - 1)
        self._has_queue &= self._is_full
        if not self._has_queue:
            self._proven = max(1.0, held)
        # At a server that shows no queue, a worker with one place or none makes the pauses below, and no duty cycle.
        self._decrease(held * _KEEP, least=_LEAST if self._has_queue else 1.0)
        now = self._clock()
        self._full_at = max(1, self._shown)
        if retry_after is not None:
            self._refused_until = max(self._refused_until, now + retry_after)
        if held:
            if self._knows_work:
                self._offered_until = now + min(_LONGEST_PAUSE, _OFFER * self._work)
            self._cautious_until = now + 10 * (retry_after or 0.0)
        else:
            first = self._work if retry_after is None else min(self._work, max(retry_after, self._work / 8))
            doublings = min(self._refused_alone, _DOUBLINGS if self._knows_work else 10)
            pause = min(_LONGEST_PAUSE, first * 2.0**doublings) * self._jitter()
            self._alone_until = max(self._alone_until, now + pause)
            self._senses_at = now + pause * _PLACE_SENSED
            self._refused_alone_at = now
            self._refused_alone += 1

    def on_end(self, held: float) -> None:
        """A request that was not refused has ended, `held` seconds after it was sent."""
        self._knows_work = True
        self._work = max(0.01, self._work + (held - self._wait - self._work) / 8)
        if self.value < 1:
            self._owed += self._work * (1 / self.value - 1)
            if self._owed > _PAUSE_AFTER * self._work:
                self._paused_until = self._clock() + min(_LONGEST_PAUSE, self._owed)
                self._owed = 0.0
        elif self.value < 2 and self._proven <= 1:
            self._turn += 1
            if self._turn >= _TURN:
                self._offer_only_place()

    def on_load(self, running: int, waiting: int, in_flight: int) -> None:
        """The server's /metrics shows these running and waiting requests, of all clients."""
        self._loaded_at = self._clock()
        target = max(1.0, running * _TARGET)
        self._is_full = waiting > target / 2
        self._calm = 0 if waiting else self._calm + 1
        self._has_queue |= waiting > 0
        self._sense_place(running + waiting)
        if not waiting:
            self._paused_until = -inf
        is_used, is_draining = in_flight >= self._whole, in_flight > self.value
        if is_used and self._has_queue and not (is_draining and waiting > target):
            self._grow(running / 64)
        if waiting > target:
            self._proven = inf
            # While the excess of an earlier decrease is still in flight, the figures count that excess again.
            used = in_flight if is_draining else self.value if is_used else min(self.value, in_flight + 1)
            share = (running + target) / (running + waiting)
            self._decrease(used * share, least=max(_LEAST, running * _LEAST_SHARE))
        elif is_used and self._has_queue and self._calm >= _CALM:
            self._step = _RAMP
        if is_used and not waiting and self._step >= _RAMP:
            is_careful = self._has_queue or self.value < _SMALL
            self._grow(max(2.0, self.value / 2 if is_careful else self.value))

    def on_quiet(self, in_flight: int) -> None:
        """The load is not known, and the answers to all requests in flight have begun.

        Nothing waits at the server, as far as is known. Answers may take hours, and without one more request the limit
        would stay where some slow first events have put it.
        """
        quiet_since = max(self._answered_at, self._grown_at, self._decreased_at, self._loaded_at)
        if in_flight >= self._whole and self._proven == inf and self._clock() - quiet_since >= _QUIET:
            self._grow(max(0.0, in_flight - self.value) + 1)

    def _is_additive(self, value: float) -> bool:
        """Whether steps after a decrease are the same in each generation, whatever the limit: shares converge faster.

        Where a request too many only waits, a large limit takes larger steps: its share matters less than its goodput.
        """
        return value < _SMALL / 2 or self._proven < inf

    def _offer_only_place(self) -> None:
        self._turn = 0
        self._refused_alone = _DOUBLINGS  # if the place is taken, the worker pauses as long as the others
        now = self._clock()
        self._alone_until = self._senses_at = now + min(_LONGEST_PAUSE, _OFFER * self._work)
        self._refused_alone_at = -inf

    def _sense_place(self, shown: int) -> None:
        """End the pause of a worker without a place if the server has shown more requests; else prolong the pause."""
        now = self._clock()
        self._shown = shown
        self._full_at = max(self._full_at, shown)
        if now >= self._alone_until:
            return
        if shown >= self._full_at:
            until = min(now + _SENSING_LASTS, self._refused_alone_at + _LONGEST_SENSING)
            self._alone_until = max(self._alone_until, until)
        elif now >= self._senses_at:
            self._alone_until = -inf

    @property
    def _whole(self) -> int:
        return int(self.value + 0.01)  # 4.999 is 5

    def _grow(self, by: float) -> None:
        self.value = min(self._most, self.value + by)
        self._grown_at = self._clock()

    def _decrease(self, value: float, least: float = _LEAST) -> None:
        self._step = _STEP / max(1.0, value) if self._is_additive(value) else _STEP
        if max(value, least) < self.value:
            self.value = max(value, least)
            self._decreased_at = self._clock()


class _StandingQueue:
    """Detects that requests wait at a server, from nothing but their waits for first events."""

    _REQUESTS = 8
    """How many requests are an interval."""

    def __init__(self) -> None:
        self._base = inf
        """The least wait of an interval so far: a wait without a queue."""
        self._count = 0
        self._least = inf
        """The least wait of the present interval."""
        self._before = inf
        """The wait before the last decrease took effect."""

    def is_long(self, waited: float, work: float) -> bool:
        """Whether a wait shows a queue; `work` is the mean time of generation in seconds."""
        return waited > 2 * self._base + work / 4

    def observe(self, waited: float, work: float, *, is_new: bool) -> float:
        """Record a wait. Returns the part of the limit to keep: 1, or down to a half.

        A request is new if it was sent after the last decrease.
        """
        if not is_new:
            self._before = max(self._before, waited)
            return 1.0
        self._least = min(self._least, waited)
        self._count += 1
        if self._count < self._REQUESTS:
            return 1.0
        least, self._least, self._count = self._least, inf, 0
        self._base = min(self._base, least)
        if not self.is_long(least, work):
            self._before = inf
        elif least > 0.9 * self._before:  # the decrease did not help
            self._base += (least - self._base) / 8
        else:
            most = 0.7 if self._before == inf else 0.5  # eight requests of one burst may be a bad sample
            self._before = least
            return max(most, min(1.0, 1.25 / (1 + (least - self._base) / work)))
        return 1.0
