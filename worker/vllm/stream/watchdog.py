"""The time limits on the silence of a vLLM server, and the watchdog that enforces them for one request."""

import asyncio
from dataclasses import dataclass
from time import monotonic
from types import TracebackType

from ..error_bodies import excerpt
from ..errors import UpstreamError, truncated
from ..interrupt import TaskInterrupt

_FROZEN_AFTER = 2.0


@dataclass(frozen=True, slots=True)
class StreamTimeouts:
    """How long a server may be silent, in seconds.

    Attributes:
        connect: until there is a connection.
        first_token: from the request to the first token. A long queue at vLLM is silence after status 200.
        gap: from one data event to the next. Keep-alive comments do not count: a vLLM that shuts down still sends them.
    """

    connect: float = 5.0
    first_token: float = 120.0
    gap: float = 30.0


class StreamWatchdog:
    """Ends the wait for one request when its server is silent for too long.

    Until the answer begins, the first-token limit applies; then the gap limit. An event without a token, such as a
    chunk with only the role, does not begin the answer, but restarts the count of silence: servers send empty events
    while they withhold text that may be a tool call.

    Wait for the server within the context of the watchdog, which raises TimeoutError when a limit is reached.

    Args:
        limits: the two limits.
        frozen_after: the seconds of silence allowed once the server refuses connections.
        since: when the request was sent, by the monotonic clock; now, if it is left out.

    Attributes:
        longest_gap: the longest silence since the answer began, in seconds: between two events, or up to the end.
    """

    __slots__ = (
        "_frozen_after", "_gap_limit_applies", "_limits", "_since", "_tightened_at", "_timer", "_wait", "longest_gap",
    )  # fmt: skip

    def __init__(
        self, limits: StreamTimeouts, *, frozen_after: float = _FROZEN_AFTER, since: float | None = None
    ) -> None:
        self._limits = limits
        self._frozen_after = frozen_after
        self._since = monotonic() if since is None else since
        """When the silence began."""
        self._gap_limit_applies = False
        self._tightened_at: float | None = None
        self.longest_gap = 0.0
        self._wait = TaskInterrupt()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        if self._gap_limit_applies:
            self._since = monotonic()  # the server could not send while the worker did not read
        self._wait.__enter__()
        self._check()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        if self._gap_limit_applies:
            self.longest_gap = max(self.longest_gap, monotonic() - self._since)
        self._wait.__exit__(kind, error, traceback)

    def on_event(self) -> None:
        """Restart the count of silence. It runs for every event, so it sets no timer: a timer checks when it fires."""
        now = monotonic()
        if now - self._since > self.longest_gap and self._gap_limit_applies:
            self.longest_gap = now - self._since
        self._since = now

    def on_answer_start(self) -> None:
        """Apply the gap limit from now on."""
        self._since = monotonic()
        self._gap_limit_applies = True

    def restart(self) -> None:
        """Start again: the request is sent again in another form, and the events so far were no answer."""
        self._since = monotonic()
        self._gap_limit_applies = False

    @property
    def last_event(self) -> float:
        """When the last event came, by the monotonic clock; or when the wait for it began, if that was later."""
        return self._since

    @property
    def has_answer(self) -> bool:
        """Whether the answer has begun, so that the gap limit applies."""
        return self._gap_limit_applies

    def silence(self) -> float:
        """How long the server has been silent, in seconds; 0 while the worker does not wait. Any thread may call it."""
        return max(0.0, monotonic() - self._since) if self._timer is not None else 0.0

    def is_silent(self) -> bool:
        """Whether the silence has lasted for `frozen_after` seconds."""
        return self._timer is not None and monotonic() - self._since > self._frozen_after

    def tighten(self) -> None:
        """Allow only `frozen_after` seconds of silence from now on, because the server refuses connections.

        vLLM 0.32.0 freezes its open streams on SIGTERM, and refuses connections at once.
        """
        if self._tightened_at is None:
            self._tightened_at = monotonic()
        self._recheck()

    def timeout_error(self, skipped: str = "") -> UpstreamError:
        """The error for a server that was silent for too long. It quotes `skipped`, the lines that are no events."""
        quoted = f"; instead of events it sent: {excerpt(skipped)}" if skipped else ""
        if self._tightened_at is not None:
            return truncated(f"vLLM refuses connections, and its open stream is silent{quoted}")
        if self._gap_limit_applies:
            text = f"vLLM sent nothing for {self._limits.gap:g} s mid-stream{quoted}"
            return UpstreamError("gap_timeout", text, retryable=True)
        text = f"vLLM sent no token within {self._limits.first_token:g} s{quoted}"
        return UpstreamError("first_token_timeout", text, retryable=True)

    def _due(self) -> float:
        due = self._since + (self._limits.gap if self._gap_limit_applies else self._limits.first_token)
        if self._tightened_at is None:
            return due
        return min(due, max(self._since, self._tightened_at) + self._frozen_after)

    def _check(self) -> None:
        now, due = monotonic(), self._due()
        if due > now:
            # After the start of the answer, the gap limit ends no sooner: it needs no other timer.
            within = min(due - now, self._limits.gap)
            self._timer = asyncio.get_running_loop().call_later(within, self._check)
        else:
            self._wait.interrupt()

    def _recheck(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._check()
