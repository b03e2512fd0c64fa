"""The monitor of the event loop, with a clock that the test moves."""

import asyncio

import pytest
from waits import eventually

from worker.telemetry.loop_monitor import LoopMonitor


class Clock:
    """A clock of whole control."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def ticked(monitor: LoopMonitor, clock: Clock) -> None:
    """Wait for the next tick."""

    async def has_ticked() -> bool:
        return monitor.last_tick == clock.now

    await eventually(has_ticked)


async def test_a_late_tick_is_shown_for_a_while(clock: Clock) -> None:
    monitor = LoopMonitor(clock)
    monitor.start()
    clock.now += 1.25
    await ticked(monitor, clock)
    assert (monitor.delay(), monitor.is_stuck()) == (1, False)
    clock.now += 14
    await ticked(monitor, clock)
    clock.now += 0.25
    await ticked(monitor, clock)
    assert monitor.delay() == 13.75
    for _ in range(2):
        clock.now += 15
        await ticked(monitor, clock)
        clock.now += 0.25
        await ticked(monitor, clock)
    assert monitor.delay() == 14.75
    monitor.stop()


async def test_a_loop_without_ticks_is_stuck_and_its_age_is_its_delay(clock: Clock) -> None:
    monitor = LoopMonitor(clock)
    monitor.start()
    clock.now += 2
    assert not monitor.is_stuck()
    clock.now += 5
    assert (monitor.is_stuck(), monitor.age(), monitor.delay()) == (True, 7, 7)
    monitor.stop()
    assert not monitor.is_stuck()


async def test_a_loop_that_ticks_in_time_has_no_delay(clock: Clock) -> None:
    monitor = LoopMonitor(clock)
    assert not monitor.is_stuck(), "before its start"
    monitor.start()
    for _ in range(2):
        clock.now += 0.25
        await ticked(monitor, clock)
    assert monitor.delay() == 0
    monitor.stop()
    await asyncio.sleep(0)
