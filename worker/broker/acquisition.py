"""What comes of taking the log of a job: who owns it, and which attempt and which job that is."""

from dataclasses import dataclass
from typing import TypeAlias

from ..contract.entries import Claimed, Entry, Started
from ..contract.ids import LAST_ATTEMPT
from .job_queue import Delivery
from .log_writer import LogExhausted, LogWriter


@dataclass(frozen=True, slots=True)
class Acquired:
    """The log is ours to write. `history` is what earlier attempts wrote; empty at the first.

    `unreadable` says why the history cannot be read; it is empty then. `fault` says why an answer cannot go on from it.
    """

    log: LogWriter
    history: list[Entry]
    unreadable: str = ""
    fault: str = ""


@dataclass(frozen=True, slots=True)
class AlreadyEnded:
    """The request has ended: the log has its terminal entry, or only the tombstone is left."""


@dataclass(frozen=True, slots=True)
class DuplicateJob:
    """Another job of the same request id is at work."""


@dataclass(frozen=True, slots=True)
class IdReused:
    """The log was begun for another request under the same id: nothing of it is this job's."""


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """Another worker holds the job by now: nothing is to be done, not even an acknowledgement."""


Taken: TypeAlias = Acquired | AlreadyEnded | DuplicateJob | IdReused | LeaseLost


def attempt_after(attempt: int) -> int:
    """The number of the next attempt.

    Raises:
        LogExhausted: when there is none; Redis would refuse its id each time.
    """
    if attempt >= LAST_ATTEMPT:
        raise LogExhausted(f"no attempt can follow attempt {attempt} of its log")
    return attempt + 1


def job_of(what: Started | Claimed | Delivery) -> tuple[str, str]:
    """What names a job: its queue and the id of its entry there."""
    return what.queue, what.id if isinstance(what, Delivery) else what.job
