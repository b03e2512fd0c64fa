"""The possible results of acquiring a log, and the decisions that lead to them, without I/O."""

from dataclasses import dataclass
from typing import TypeAlias

from ..contract.entries import BadEntry, Claimed, Entry, Started, parse
from ..contract.history import fault_in
from ..contract.ids import BEFORE_ALL, LAST_ATTEMPT, EntryId
from .job_queue import Delivery
from .log_pages import RawEntry
from .log_writer import LogExhausted, LogWriter


@dataclass(frozen=True, slots=True)
class Acquired:
    """The process owns the log and may write to it. `history` holds the entries of earlier attempts.

    `unreadable` is why the history cannot be read; the history is then empty. `fault` is why an answer cannot continue
    from the history. Both are empty if there is no such problem. `is_start_recorded` is whether the lifecycle has the
    record of the start.
    """

    log: LogWriter
    history: list[Entry]
    unreadable: str = ""
    fault: str = ""
    is_start_recorded: bool = False


@dataclass(frozen=True, slots=True)
class AlreadyEnded:
    """The request has ended: the log has its terminal entry, or only the tombstone is left."""


@dataclass(frozen=True, slots=True)
class DuplicateJob:
    """Another job with the same request id is not done yet."""


@dataclass(frozen=True, slots=True)
class IdReused:
    """The log belongs to another request with the same id: no entry in it is this job's."""


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """Another worker holds the job now: this process neither runs nor acknowledges it."""


AcquireResult: TypeAlias = Acquired | AlreadyEnded | DuplicateJob | IdReused | LeaseLost


def attempt_number_after(attempt: int) -> int:
    """The number of the next attempt.

    Raises:
        LogExhausted: when there is no next number: Redis would refuse its id each time.
    """
    if attempt >= LAST_ATTEMPT:
        raise LogExhausted(f"no attempt can follow attempt {attempt} of its log")
    return attempt + 1


def job_of(source: Started | Claimed | Delivery) -> tuple[str, str]:
    """The identity of a job: its queue and the id of its entry there."""
    return source.queue, source.id if isinstance(source, Delivery) else source.job


def was_written_by(entry: Entry | None, owner: str, delivery: Delivery, count: int) -> bool:
    """Whether the process with nonce `owner` began an attempt with this entry, for the job of a delivery.

    `count` is the delivery's, or 0 if the process began the attempt without a delivery.
    """
    return (
        isinstance(entry, Started | Claimed)
        and (entry.owner, entry.delivery, *job_of(entry)) == (owner, count, *job_of(delivery))
    )  # fmt: skip


def acquired(
    log: LogWriter, raw: list[RawEntry], greatest: EntryId | None = None, *, is_start_recorded: bool = False
) -> Acquired:
    """The result for an acquired log with these entries.

    `greatest` is the greatest id that the log ever had before this attempt, if that is known.
    """
    try:
        entries = [parse(*entry) for entry in raw]
    except BadEntry as error:
        log.entries_before = sum(EntryId.parse(entry_id).attempt < log.attempt for entry_id, _ in raw)
        return Acquired(log, [], f"the log cannot be read: {error}", is_start_recorded=is_start_recorded)
    history: list[Entry] = [entry for entry in entries if entry.id.attempt < log.attempt]
    log.entries_before = len(history)
    last = history[-1].id if history else BEFORE_ALL
    if greatest is not None and last < greatest:
        return Acquired(log, history, fault=f"entries are missing after {last}")
    return Acquired(log, history, fault=fault_in(history), is_start_recorded=is_start_recorded)
