"""Slots: how many a reader is granted, who comes first, that nobody waits for ever, and the end."""

import asyncio

import pytest

from worker.slots import Slots


async def waiting(*readers: asyncio.Task[int]) -> None:
    """Let the readers come to where they wait."""
    await asyncio.sleep(0)
    assert not any(reader.done() for reader in readers)


def reader(slots: Slots, rank: int = 0) -> asyncio.Task[int]:
    return asyncio.create_task(slots.reserve(rank))


async def test_a_single_queue_is_granted_all_that_is_free() -> None:
    slots = Slots(8, queues=1)
    assert await slots.reserve(0) == 8
    slots.release(3)
    assert await slots.reserve(0) == 3


async def test_several_queues_leave_half_to_the_others() -> None:
    slots = Slots(8, queues=2)
    assert [await slots.reserve(0), await slots.reserve(1), await slots.reserve(0), await slots.reserve(1)] == [
        4,
        2,
        1,
        1,
    ]


async def test_no_more_is_granted_than_there_is() -> None:
    slots = Slots(5, queues=3)
    granted = 0
    while count := slots.try_reserve():
        granted += count
    assert granted == 5
    await waiting(task := reader(slots))
    slots.release(1)
    assert await task == 1
    assert slots.try_reserve() == 0


async def test_a_reader_waits_until_a_slot_is_given_back() -> None:
    slots = Slots(1, queues=1)
    assert await slots.reserve(0) == 1
    await waiting(task := reader(slots))
    slots.release(1)
    assert await task == 1


async def test_the_more_important_queue_comes_first() -> None:
    slots = Slots(1, queues=3)
    assert await slots.reserve(0) == 1
    tasks = [reader(slots, rank) for rank in (2, 1, 0)]
    await waiting(*tasks)
    for place in (2, 1):
        slots.release(1)
        assert await tasks[place] == 1
        await waiting(*tasks[:place])
    slots.release(1)
    assert await tasks[0] == 1


async def test_the_least_important_queue_has_its_share() -> None:
    """Every queue always waits, so that rank alone would leave the last ones nothing."""
    slots = Slots(1, queues=3)
    assert await slots.reserve(0) == 1
    tasks = {rank: reader(slots, rank) for rank in range(3)}
    grants = []
    for _ in range(80):
        await waiting(*tasks.values())
        slots.release(1)
        await asyncio.sleep(0)
        rank = next(rank for rank, task in tasks.items() if task.done())
        grants.append(rank)
        tasks[rank] = reader(slots, rank)
    assert grants.count(2) == 10
    assert grants.count(0) == 70
    assert all(2 in grants[start : start + 8] for start in range(0, 80, 8))
    slots.close()
    await asyncio.gather(*tasks.values())


async def test_several_slots_given_back_at_once_go_to_several_readers() -> None:
    slots = Slots(4, queues=2)
    while slots.try_reserve():
        pass
    tasks = [reader(slots, rank) for rank in (0, 1)]
    await waiting(*tasks)
    slots.release(4)
    assert [await task for task in tasks] == [2, 1]
    assert slots.try_reserve() == 1


async def test_who_does_not_wait_comes_after_those_who_do() -> None:
    slots = Slots(1, queues=1)
    assert slots.try_reserve() == 1
    assert slots.try_reserve() == 0
    await waiting(task := reader(slots))
    slots.release(1)
    assert slots.try_reserve() == 0
    assert await task == 1


async def test_a_reader_that_went_away_is_granted_nothing() -> None:
    slots = Slots(1, queues=2)
    assert await slots.reserve(0) == 1
    gone, stays = reader(slots, 0), reader(slots, 1)
    await waiting(gone, stays)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    slots.release(1)
    assert await stays == 1
    slots.release(1)
    assert slots.try_reserve() == 1


async def test_closing_sends_everybody_home() -> None:
    slots = Slots(2, queues=2)
    assert await slots.reserve(0) == 1
    assert await slots.reserve(0) == 1
    tasks = [reader(slots, rank) for rank in (0, 1)]
    await waiting(*tasks)
    slots.close()
    assert [await task for task in tasks] == [0, 0]
    slots.release(2)
    assert await slots.reserve(0) == 0
    assert slots.try_reserve() == 0
