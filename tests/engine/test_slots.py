"""Slots: how many a reader is granted, who comes first, that no reader waits for ever, and closing."""

import asyncio

import pytest

from worker.engine.slots import Slots


async def waiting(*readers: asyncio.Task[int]) -> None:
    """Let the readers come to where they wait."""
    await asyncio.sleep(0)
    assert not any(reader.done() for reader in readers)


def reader(slots: Slots, rank: int = 0) -> asyncio.Task[int]:
    return asyncio.create_task(slots.reserve(rank))


async def test_a_reader_is_granted_half_of_what_is_free_and_leaves_the_rest_to_others() -> None:
    slots = Slots(8)
    assert [await slots.reserve(rank) for rank in (0, 1, 0, 1)] == [4, 2, 1, 1]


async def test_one_read_brings_few_jobs_however_many_slots_are_free() -> None:
    slots = Slots(1000)
    assert [await slots.reserve(0) for _ in range(3)] == [16, 16, 16]


async def test_a_read_that_took_too_long_is_followed_by_one_of_half_the_jobs() -> None:
    slots = Slots(1000)
    granted = []
    for too_slow in (True, True, True, True, True, False, False, False, False, False):
        slots.adapt(too_slow=too_slow)
        granted.append(await slots.reserve(0))
    assert granted == [8, 4, 2, 1, 1, 2, 4, 8, 16, 16]


async def test_no_more_slots_are_granted_than_there_are() -> None:
    slots = Slots(5)
    assert sum([await slots.reserve(0) for _ in range(4)]) == 5
    await waiting(task := reader(slots))
    slots.release(1)
    assert await task == 1
    await waiting(task := reader(slots))
    slots.close()
    assert await task == 0


async def test_a_slot_that_is_given_back_is_granted_but_wakes_nobody_who_waits_for_a_change() -> None:
    slots = Slots(1)
    assert slots.reserve_now(1) == 1
    await waiting(task := reader(slots))
    slots.give_back(1)
    assert await task == 1
    assert not slots.freed.is_set()
    slots.release(1)
    assert slots.freed.is_set()


async def test_the_more_important_queue_comes_first() -> None:
    slots = Slots(1)
    assert await slots.reserve(0) == 1
    tasks = [reader(slots, rank) for rank in (2, 1, 0)]
    await waiting(*tasks)
    for place in (2, 1):
        slots.release(1)
        assert await tasks[place] == 1
        await waiting(*tasks[:place])
    slots.release(1)
    assert await tasks[0] == 1


async def test_every_queue_has_its_share() -> None:
    """Readers of all queues wait all the time: by rank alone only the first would get slots."""
    slots = Slots(1)
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
    assert [grants.count(rank) for rank in range(3)] == [70, 5, 5]
    slots.close()
    await asyncio.gather(*tasks.values())


async def test_several_slots_given_back_at_once_go_to_several_readers() -> None:
    slots = Slots(1)
    assert await slots.reserve(0) == 1
    tasks = [reader(slots, rank) for rank in (0, 1)]
    await waiting(*tasks)
    slots.release(4)
    assert [await task for task in tasks] == [2, 1]
    assert await slots.reserve(0) == 1


async def test_a_cancelled_reader_is_granted_nothing() -> None:
    slots = Slots(1)
    assert await slots.reserve(0) == 1
    gone, stays = reader(slots, 0), reader(slots, 1)
    await waiting(gone, stays)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    slots.release(1)
    assert await stays == 1
    slots.release(1)
    assert await slots.reserve(0) == 1


async def test_closing_ends_every_wait() -> None:
    slots = Slots(2)
    assert await slots.reserve(0) == 1
    assert await slots.reserve(0) == 1
    tasks = [reader(slots, rank) for rank in (0, 1)]
    await waiting(*tasks)
    slots.close()
    assert [await task for task in tasks] == [0, 0]
    slots.release(2)
    assert await slots.reserve(0) == 0


async def test_parked_jobs_get_slots_that_are_lent_to_a_reader_and_come_before_it() -> None:
    slots = Slots(4)
    lent = await slots.reserve(0)
    slots.lend(lent)
    assert slots.reserve_now(16) == 4
    assert slots.reserve_now(16) == 0
    assert slots.take_back(lent) == 0
    slots.release(lent)
    assert slots.reserve_now(16) == 0
    slots.release(4)
    assert slots.reserve_now(3) == 3


async def test_a_reader_keeps_the_lent_slots_that_nobody_took() -> None:
    slots = Slots(8)
    lent = await slots.reserve(0)
    slots.lend(lent)
    assert slots.reserve_now(5) == 5
    assert slots.take_back(lent) == 3
    slots.release(1)


async def test_who_waits_for_slots_may_get_those_that_are_lent_later() -> None:
    slots = Slots(1)
    assert await slots.reserve(0) == 1
    waiting_for_any = asyncio.create_task(slots.reserve(0.5, may_borrow=True))
    other = reader(slots, 1)
    await waiting(waiting_for_any, other)
    slots.lend(1)
    assert await waiting_for_any == 1
    await waiting(other)
    assert slots.take_back(1) == 0
    slots.release(1)
    await waiting(other)
    slots.release(1)
    assert await other == 1


async def test_a_lent_slot_goes_to_nobody_after_the_close() -> None:
    slots = Slots(2)
    slots.lend(await slots.reserve(0))
    slots.close()
    assert slots.reserve_now(16) == 0
    assert await slots.reserve(0.5, may_borrow=True) == 0
