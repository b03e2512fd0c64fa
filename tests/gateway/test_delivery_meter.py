"""What is counted of the entries that were delivered, and how long a live one has waited in the process."""

import asyncio
from itertools import count

import pytest
from serving import Events
from waits import eventually

from worker.gateway import delivery_meter
from worker.gateway.delivery_meter import DeliveryMeter
from worker.telemetry.stream_events import EntriesDelivered


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def meter(events: Events, monkeypatch: pytest.MonkeyPatch) -> DeliveryMeter:
    """A meter whose clock gains a second each time that it is read."""
    ticks = count(1.0)
    monkeypatch.setattr(delivery_meter, "perf_counter", lambda: next(ticks))
    return DeliveryMeter(events)


def deliver(meter: DeliveryMeter, readers: int = 1) -> None:
    meter.note_arrival()
    meter.add_live(readers, size=10)


def delays(events: Events) -> list[float]:
    return [delay for event in events.seen if isinstance(event, EntriesDelivered) for delay in event.delays]


async def test_an_entry_waits_for_those_that_arrived_with_it(meter: DeliveryMeter, events: Events) -> None:
    for _ in range(3):
        deliver(meter, readers=2)
    meter.report()
    assert events.seen == [EntriesDelivered(6, 60, (1.0, 2.0, 3.0))]


async def test_samples_are_apart_and_each_begins_with_a_step_of_the_loop(meter: DeliveryMeter, events: Events) -> None:
    deliver(meter)
    await asyncio.sleep(0)
    deliver(meter)  # not within the pause
    meter.report()
    assert delays(events) == [1.0]

    async def is_sampled_again() -> bool:
        deliver(meter)
        deliver(meter)
        meter.report()
        return len(delays(events)) > 1

    await eventually(is_sampled_again)
    assert delays(events) == [1.0, 1.0, 2.0]


async def test_a_report_has_what_came_since_the_last_one(meter: DeliveryMeter, events: Events) -> None:
    meter.add(5, 50)
    meter.report()
    meter.report()
    deliver(meter)
    meter.report()
    assert events.seen == [EntriesDelivered(5, 50), EntriesDelivered(1, 10, (1.0,))]
