"""The limit of requests in flight at one server, with a clock of the test."""

import pytest

from worker.vllm.servers.limit import ConcurrencyLimit


class ManualClock:
    """Monotonic seconds that pass only when the test adds some."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def test_the_first_request_has_room_at_once(clock: ManualClock) -> None:
    limit = ConcurrencyLimit(clock)
    assert limit.room(0) >= 1
    assert limit.opens_in() is None


def test_a_refusal_leaves_less_than_the_server_holds(clock: ManualClock) -> None:
    limit = ConcurrencyLimit(clock)
    limit.on_refused(4, None)
    assert limit.room(3) == 0
    assert limit.opens_in() is None


def test_a_refusal_of_the_only_request_is_followed_by_a_pause(clock: ManualClock) -> None:
    limit = ConcurrencyLimit(clock)
    limit.on_refused(1, None)
    assert limit.value < 1
    assert limit.room(0) == 0
    pause = limit.opens_in()
    assert pause is not None
    clock.now += pause
    assert limit.room(0) == 1
    assert limit.opens_in() is None


def test_retry_after_is_a_pause(clock: ManualClock) -> None:
    limit = ConcurrencyLimit(clock)
    limit.on_refused(4, 7.0)
    assert limit.opens_in() == 7.0
    assert limit.room(0) == 0
