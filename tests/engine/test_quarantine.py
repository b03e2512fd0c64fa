"""Poison jobs: how failures are counted from a log, and how jobs in quarantine wait for one another."""

import asyncio

import pytest

from worker.broker.job_queue import Delivery
from worker.broker.log_writer import AppendBatch, LogWriter
from worker.contract.entries import TAKEOVER, Claimed, Delta, Entry, Restarted, Resumed, Started
from worker.contract.ids import EntryId
from worker.engine.poison import Quarantine, count_failures, may_be_poison, needs_quarantine, progress_goal


def log(*steps: int | str) -> list[Entry]:
    """A log of one job: a number is a delivery that came to a claim, the rest what an owner wrote.

    `d` is a delta, `-` begins the answer again, `+` goes on with it, `retry` claims a next attempt and begins again.
    """
    entries: list[Entry] = []
    attempt = n = 0
    for step in steps:
        begins = isinstance(step, int) or step == "retry"
        attempt, n = (attempt + 1, 0) if begins else (attempt, n + 1)
        where = EntryId(attempt, n)
        match step:
            case "d":
                entries.append(Delta(id=where, content="x"))
            case "-":
                entries.append(Restarted(id=where))
            case "+":
                entries.append(Resumed(id=where, after=str(where)))
            case "resumed after the first":
                entries.append(Resumed(id=where, after="1-1"))
            case "retry":
                n += 1
                entries += [
                    Claimed(id=where, queue="default", job="5-0", reason="gap_timeout"),
                    Restarted(id=EntryId(attempt, n)),
                ]
            case int() if attempt == 1:
                entries.append(Started(id=where, queue="default", job="5-0", delivery=step))
            case int():
                entries.append(Claimed(id=where, queue="default", job="5-0", delivery=step, reason=TAKEOVER))
    return entries


ANOTHER = Claimed(id=EntryId(1, 0), queue="default", job="4-0", delivery=9, reason=TAKEOVER)


@pytest.mark.parametrize(
    ("history", "count", "expected"),
    [
        ([], 1, 0),
        ([], 7, 0),  # no worker claimed the log: only replies were lost
        (log(1), 2, 1),
        (log(1, 2, 3, 4), 5, 4),
        (log(1, 1, 1, 1, 1, 1), 1, 0),  # handed over at each deploy
        (log(1, 2, 2, 2), 3, 2),  # a death, two deploys, a death
        (log(1), 9, 1),  # one death; the replies of all other XAUTOCLAIMs were lost
        (log(1, 4), 7, 2),
        (log(1, 2, 3, "d"), 4, 0),  # the owner that died last had made progress
        (log(1, 2, "d", 3), 4, 1),
        (log(1, "retry", "retry", "retry"), 2, 1),  # an attempt for the owner's own retry is no delivery
        (log(1, "retry", "retry"), 1, 0),
        (log(3), 1, 0),  # the consumer group was created again, and counts from the start
        (log(3, 1), 2, 1),
        ([ANOTHER, *log(1)], 1, 0),  # a job of the same request, whose deliveries are not this one's
        ([*log(1, 2, 3), ANOTHER], 4, 0),
        (log(1, *"dd", 2, *"-dd", 3, *"-dd"), 4, 2),  # begins again each time, and dies at the same place
        (log(1, *"dd", 2, *"-ddd", 3, *"-dddd"), 4, 2),  # about the same
        (log(1, *"dd", 2, *"-dd", 3, *"-ddddd"), 4, 0),
        (log(1, *"dd", 2, *"-d", 3, *"-dd", 4), 5, 3),
        (log(1, *"dd", 2, *"+d", 3), 4, 1),  # a resumed answer makes progress with each delta
        (log(1, *"dd", 2, "resumed after the first", "d", 3), 4, 2),  # except for tokens without text
        (log(1, *"dd", "retry", *"dd", 2), 3, 1),  # the owner's own retries begin again too
    ],
)
def test_failures_are_owners_lost_in_a_row_without_progress(history: list[Entry], count: int, expected: int) -> None:
    assert count_failures(history, Delivery("default", "5-0", {}, redelivered=True, count=count)) == expected


def test_an_answer_that_begins_again_makes_progress_once_it_is_twice_as_long_as_ever() -> None:
    assert progress_goal([]) == 0
    assert progress_goal(log(1, *"ddd", 2, *"-dd", 3, *"-d")) == 6
    assert progress_goal(log(1, *"ddd", 2, *"-dd", 3, *"+dd")) == 8
    assert progress_goal(log(1, *"d", 2, *"-dd")) == 4


@pytest.mark.parametrize(
    ("count", "most", "doubtful"),
    [(1, 5, False), (2, 5, False), (3, 5, True), (1, 2, False), (2, 2, True), (2, 1, True)],
)
def test_a_job_may_be_poison_once_its_deliveries_allow_enough_failures(
    *, count: int, most: int, doubtful: bool
) -> None:
    assert may_be_poison(Delivery("default", "5-0", {}, redelivered=True, count=count), most) is doubtful
    assert not may_be_poison(Delivery("default", "5-0", {}, count=count), most), "no other worker had the job before"


@pytest.mark.parametrize(
    ("failed", "most", "alone"),
    [(0, 5, False), (1, 5, False), (2, 5, True), (4, 5, True), (5, 5, False), (1, 2, True), (0, 1, False)],
)
def test_a_job_needs_quarantine_after_two_failures_until_it_is_buried(*, failed: int, most: int, alone: bool) -> None:
    assert needs_quarantine(failed, most) is alone


class Nowhere:
    """A publisher that writes nothing."""

    is_full = False

    def release_bytes(self, size: int) -> None:
        assert size >= 0

    def enqueue(self, run: AppendBatch) -> None:
        pass

    def dequeue(self, log: LogWriter) -> None:
        pass


@pytest.mark.parametrize(
    ("goal", "written", "behind"),
    [
        (0, ["opened", "delta"], 1),
        (3, ["resumed", "delta"], 1),
        (2, ["restarted", "delta", "delta", "delta"], 3),
        (0, ["restarted", "delta"], 1),
    ],
)
async def test_a_turn_ends_once_redis_has_more_of_the_answer_than_before(
    goal: int, written: list[str], behind: int
) -> None:
    log = LogWriter("r", "key", "feed", 2, Nowhere(), deltas_to_exceed=goal)
    for kind in written:
        log.append({"type": kind})
    first, rest = log.pending[:behind], log.pending[behind:]
    assert all(log.accept(entry) for entry in first)
    assert not log.progress.done()
    assert all(log.accept(entry) for entry in rest)
    assert log.progress.done()


async def test_turns_are_taken_one_after_another() -> None:
    turns, stop = Quarantine(60), asyncio.get_running_loop().create_future()
    first = await turns.wait_turn(stop, 60)
    assert first
    second = asyncio.create_task(turns.wait_turn(stop, 60))
    done, _ = await asyncio.wait({second}, timeout=0.01)
    assert not done
    first.end()
    first.end()  # a second end of this turn does not end the next one
    assert await second
    third = asyncio.create_task(turns.wait_turn(stop, 60))
    done, _ = await asyncio.wait({third}, timeout=0.01)
    assert not done
    third.cancel()


async def test_a_job_that_must_stop_ends_its_wait_and_delays_no_other() -> None:
    turns, stop, never = Quarantine(60), *(asyncio.get_running_loop().create_future() for _ in range(2))
    first = await turns.wait_turn(never, 60)
    assert first
    second, third = asyncio.create_task(turns.wait_turn(stop, 60)), asyncio.create_task(turns.wait_turn(never, 60))
    await asyncio.sleep(0)
    stop.set_result(None)
    assert await second is None
    first.end()
    assert await third
