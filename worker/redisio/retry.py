"""Retries of operations on Redis: growing pauses, retries until Redis answers, and reports of failures.

Failures are reported as events (`Failing`, `Recovered`) to a `Telemetry`, if there is one. The receiver of the events
decides how often the same failure is logged.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar

from ..telemetry.events import Failing, Recovered, Telemetry
from .advice import advice_on, advice_on_silence
from .errors import is_transient, redacted_message

_P = ParamSpec("_P")
_T = TypeVar("_T")

_ADVICE_LASTS = 30.0
"""Seconds until a Redis that still does not answer is probed again for a mismatch of TLS."""


def failing(what: str, error: BaseException, advice: str = "") -> Failing:
    """The event that reports an error, with advice on how to fix it: that of `advice_on`, or else `advice`."""
    return Failing(what, redacted_message(error), advice_on(error) or advice)


class Backoff:
    """Pauses between tries, in seconds: they grow from `first` to `most`, with jitter.

    Each failure is reported as `Failing(what)`, and the first success after it as `Recovered`. Without `telemetry`
    nothing is reported.
    """

    def __init__(
        self, what: str = "", telemetry: Telemetry | None = None, *, first: float = 0.05, most: float = 2.0
    ) -> None:
        self._what = what
        self._telemetry = telemetry
        self._first = self._pause = first
        self._most = most
        self._is_failing = False

    async def wait(self, error: BaseException) -> None:
        """Report a failure and pause after it."""
        if self._telemetry:
            self._is_failing = True
            self._telemetry.emit(failing(self._what, error))
        await asyncio.sleep(self._pause * random.uniform(0.5, 1))  # noqa: S311 - jitter, no secret
        self._pause = min(self._pause * 2, self._most)

    def reset(self) -> None:
        """Report the recovery after a failure, and start with short pauses again. Call this after each success."""
        self._pause = self._first
        if self._telemetry and self._is_failing:
            self._is_failing = False
            self._telemetry.emit(Recovered(self._what))


class Outage:
    """An outage of Redis, reported as one by all operations of a process that are retried during it.

    The application creates one and passes it to every `RetryUntilAvailable`. The outage is over when the last operation
    that was retried has succeeded.

    For `quiet_for` seconds after the start of a reported outage, a new outage is not reported. It is reported if it
    lasts longer: with little free memory, or with slow replicas, Redis refuses some commands.
    """

    def __init__(self, telemetry: Telemetry, what: str = "redis_unavailable", *, quiet_for: float = 30.0) -> None:
        self._telemetry = telemetry
        self._what = what
        self._quiet_for = quiet_for
        self._retried = 0
        """Operations that have failed and are being retried now."""
        self._is_reported = False
        self._reported_at = float("-inf")
        """When the last reported outage began, by the monotonic clock in seconds."""

    def begin(self) -> None:
        """Record that an operation failed for the first time and will be retried."""
        self._retried += 1

    def report(self, error: BaseException, advice: str = "") -> None:
        """Report the failure of a try."""
        if not self._is_reported:
            now = time.monotonic()
            if now - self._reported_at <= self._quiet_for:
                return
            self._is_reported, self._reported_at = True, now
        self._telemetry.emit(failing(self._what, error, advice))

    def end(self, *, is_over: bool) -> None:
        """Record that an operation is no longer retried, because it succeeded (`is_over`) or was given up."""
        self._retried -= 1
        if is_over and not self._retried and self._is_reported:
            self._is_reported = False
            self._telemetry.emit(Recovered(self._what))


class RetryUntilAvailable:
    """Retries operations until Redis answers, the time limit is reached, or the caller must stop.

    It is created once with its limits, and called with each operation and its arguments:

        retry = RetryUntilAvailable(stop=stop, outage=outage)
        entries = await retry(ownership.read, request_id)

    An operation must be safe to repeat: it reads before it writes.

    Args:
        stop: once this future is done, no failed operation is retried. It does not interrupt a pause.
        limit: seconds from the call after which a failed operation is not retried.
        waits_for: returns whether an error is retried.
        outage: the receiver of failures; without one nothing is reported.
        url: the URL of Redis. If set, a Redis that does not answer is probed for a mismatch of TLS, which no error
            shows. The report then has the advice.
    """

    def __init__(
        self,
        *,
        stop: "asyncio.Future[Any] | None" = None,
        limit: float | None = None,
        waits_for: Callable[[BaseException], bool] = is_transient,
        outage: Outage | None = None,
        url: str = "",
    ) -> None:
        self._stop = stop
        self._limit = limit
        self._waits_for = waits_for
        self._outage = outage
        self._url = url
        self._advice = ""
        self._probed_at = float("-inf")

    async def __call__(self, operation: Callable[_P, Awaitable[_T]], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call an operation until it succeeds, and return its result.

        Raises:
            Exception: the operation's last error, when it is not retried.
        """
        began = time.monotonic()
        backoff = Backoff()
        is_retried = is_over = False
        try:
            while True:
                try:
                    result = await _cancellable(operation(*args, **kwargs))
                except Exception as error:
                    if not self._may_retry(error, began):
                        raise
                    if self._outage:
                        if not is_retried:
                            is_retried = True
                            self._outage.begin()
                        self._outage.report(error, await self._probe(error))
                    await backoff.wait(error)
                else:
                    is_over = True
                    return result
        finally:
            if self._outage and is_retried:
                self._outage.end(is_over=is_over)

    def _may_retry(self, error: Exception, began: float) -> bool:
        if not self._waits_for(error) or (self._stop is not None and self._stop.done()):
            return False
        return self._limit is None or time.monotonic() - began <= self._limit

    async def _probe(self, error: Exception) -> str:
        """The advice if TLS does not match. It probes at the first failure, and then every half minute."""
        now = time.monotonic()
        if self._url and not advice_on(error) and now - self._probed_at > _ADVICE_LASTS:
            self._probed_at = now
            self._advice = await advice_on_silence(self._url)
        return self._advice


async def _cancellable(operation: Awaitable[_T]) -> _T:
    """Await an operation, and raise CancelledError if the task was cancelled during it.

    redis-py 8.1 sends with `asyncio.wait_for`, which in Python 3.11 loses a cancellation that arrives as the sending
    ends (cpython#86296): up to 10 in 100 on a busy stream. A follower would then continue until the stream ends.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        return await operation
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError
