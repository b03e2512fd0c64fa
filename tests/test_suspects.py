"""How failures are counted from a log, and how suspects wait for one another."""

import asyncio

import pytest

from worker.broker.jobs import Delivery
from worker.contract.entries import TAKEOVER, Claimed, Delta, Entry, Opened, Restarted, Started
from worker.contract.ids import EntryId
from worker.suspects import Turns, failures, is_suspect


def log(*steps: int | str | Entry) -> list[Entry]:
    """A log of one job: a number is a delivery that came to a claim, `delta` and `retry` what an owner wrote."""
    entries: list[Entry] = []
    attempt = n = 0
    for step in steps:
        attempt, n = (attempt, n + 1) if step == "delta" else (attempt + 1, 0)
        where = EntryId(attempt, n)
        match step:
            case Entry():
                entries.append(step)
            case "delta":
                entries += [Opened(id=where), Delta(id=where, content="x")]
            case "retry":
                entries += [Claimed(id=where, queue="default", job="5-0", reason="gap_timeout"), Restarted(id=where)]
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
        ([], 7, 0),  # nobody came to a claim: only replies were lost
        (log(1), 2, 1),
        (log(1, 2, 3, 4), 5, 4),
        (log(1, 1, 1, 1, 1, 1), 1, 0),  # handed over at each deploy
        (log(1, 2, 2, 2), 3, 2),  # a death, two deploys, a death
        (log(1), 9, 1),  # one death; the replies of all other XAUTOCLAIMs were lost
        (log(1, 4), 7, 2),
        (log(1, 2, 3, "delta"), 4, 0),  # whoever died last had got somewhere
        (log(1, 2, "delta", 3), 4, 1),
        (log(1, "retry", "retry", "retry"), 2, 1),  # its owner's own tries are no deliveries
        (log(1, "retry", "retry"), 1, 0),
        (log(3), 1, 0),  # the group was made again, and counts from the start
        (log(3, 1), 2, 1),
        ([ANOTHER, *log(1)], 1, 0),  # a job of the same request, whose deliveries are not this one's
        ([*log(1, 2, 3), ANOTHER], 4, 0),
        ([Opened(id=EntryId(4, 1)), *log(1, 2, 3)[1:]], 4, 2),  # only the end of a log was read
    ],
)
def test_failures_are_owners_lost_in_a_row_without_a_delta(history: list[Entry], count: int, expected: int) -> None:
    assert failures(history, Delivery("default", "5-0", {}, again=True, count=count)) == expected


@pytest.mark.parametrize(
    ("failed", "most", "alone"),
    [(0, 5, False), (1, 5, False), (2, 5, True), (4, 5, True), (5, 5, False), (1, 2, True), (0, 1, False)],
)
def test_a_suspect_is_a_job_that_failed_twice_and_is_not_buried_yet(*, failed: int, most: int, alone: bool) -> None:
    assert is_suspect(failed, most) is alone


async def test_turns_are_taken_one_after_another() -> None:
    turns, stop = Turns(60), asyncio.get_running_loop().create_future()
    first = await turns.wait(stop, 60)
    assert first
    second = asyncio.create_task(turns.wait(stop, 60))
    done, _ = await asyncio.wait({second}, timeout=0.01)
    assert not done
    first.end()
    first.end()  # of the former turn: it does not end the next one
    assert await second
    third = asyncio.create_task(turns.wait(stop, 60))
    done, _ = await asyncio.wait({third}, timeout=0.01)
    assert not done
    third.cancel()


async def test_whoever_is_to_stop_does_not_wait_on_and_holds_up_nobody() -> None:
    turns, stop, never = Turns(60), *(asyncio.get_running_loop().create_future() for _ in range(2))
    first = await turns.wait(never, 60)
    assert first
    second, third = asyncio.create_task(turns.wait(stop, 60)), asyncio.create_task(turns.wait(never, 60))
    await asyncio.sleep(0)
    stop.set_result(None)
    assert await second is None
    first.end()
    assert await third
