"""How often one request is sent to the servers of one model: the decision after a failed try. No I/O."""

from dataclasses import dataclass, replace
from typing import Self

from ..vllm.errors import UNAUTHORIZED, NoConnection, UpstreamError
from .pace import Pace


@dataclass(frozen=True, slots=True)
class Tries:
    """The tries of one request in a row that made no progress. `limit` of them are made.

    Attributes:
        made: how many tries count.
        next_pause: seconds from the next failure to the try after it, without jitter.
    """

    limit: int
    next_pause: float
    made: int = 0

    def with_one_more(self) -> Self:
        """These tries and the one that is made now."""
        return replace(self, made=self.made + 1)

    @property
    def are_exhausted(self) -> bool:
        """Whether no try is left."""
        return self.made >= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedTry:
    """A failed try, and all that decides how the request continues."""

    error: UpstreamError
    tries: Tries
    """The tries up to this one."""
    another_server_may_answer: bool = False
    """Whether a server of the model has not refused the job."""
    another_model_should_answer: bool = False
    """Whether no server of this model may answer the job, and a server accepts a request for one of its fallbacks."""
    has_room_elsewhere: bool = False
    """Whether a server of the model has room for the request now."""
    was_allowed: bool = False
    """Whether a server has begun to answer with this model."""
    was_failed_trial: bool = False
    """Whether this was the trial request of a half-open circuit, and the circuit counts it as the job's failure."""
    needs_next_attempt: bool = False
    """Whether the attempt has written a `delta`, `resumed` or `restarted`, which another try must not repeat."""
    has_extended_answer: bool = False
    """Whether the attempt has added something visible to an interrupted answer."""
    fails_on_interrupt: bool = False
    """Whether an answer that was interrupted must not continue (WORKER_ON_INTERRUPT is fail)."""


@dataclass(frozen=True, slots=True)
class Raise:
    """No other try: the error of this one ends the work with this model."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Another try after `pause` seconds. `needs_next_attempt` is whether the log must first begin its next attempt."""

    pause: float
    tries: Tries
    needs_next_attempt: bool = False


def after_failure(failed: FailedTry, pace: Pace, *, jitter: float = 1.0) -> Raise | Retry:
    """How a request continues after a failed try. `jitter` is a factor of the pause between the tries.

    Four kinds of tries do not count, beside those at a server that can never answer while another server may:

    - a try that never reached a server. The job waits for a server, as before its first try.
    - a try that a server refused because it is full or shutting down. The job waits for room there, or goes to another
      server that has room. The pause between the tries is then short, because the server's limit states when it has
      room again.
    - a 401 or 403 after a server has begun to answer with this model: the job's request was allowed.
    - a failed trial request of a half-open circuit. Other jobs failed there too, and this job gets no second trial.

    A try that added to the answer is the first of a new row, even if it would not count.
    """
    error, tries = failed.error, failed.tries
    is_unauthorized = error.code == UNAUTHORIZED
    moves_to_another_server = error.elsewhere and failed.another_server_may_answer
    is_forbidden = is_unauthorized and failed.was_allowed
    if failed.has_extended_answer:
        tries = replace(tries, made=1, next_pause=pace.first_retry)
    elif moves_to_another_server or never_reached(error) or is_forbidden or failed.was_failed_trial or error.is_busy:
        tries = replace(tries, made=tries.made - 1)
    if tries.are_exhausted or not (error.retryable or moves_to_another_server):
        return Raise()
    # Otherwise the job waits for a server that accepts the key, or that has room.
    if (is_unauthorized or error.is_busy) and failed.another_model_should_answer:
        return Raise()
    if failed.needs_next_attempt and failed.fails_on_interrupt:
        return Raise()
    if error.is_busy:
        pause = 0.0 if failed.has_room_elsewhere else min(tries.next_pause, pace.longest_wait_here) * jitter
    else:
        pause = min(tries.next_pause, pace.longest_retry) * jitter
    next_pause = min(2 * tries.next_pause, pace.longest_retry)
    return Retry(pause, replace(tries, next_pause=next_pause), failed.needs_next_attempt)


def never_reached(error: UpstreamError) -> bool:
    """Whether the server has seen nothing of the request: the connection or the worker's API key was refused."""
    return isinstance(error, NoConnection) or error.status == 401
