"""Following as a machine: data goes in and comes out; there is no Redis, no task and no clock."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from written_log import END, START, delta

from worker.client.following.machine import (
    FEED_TRANSITIONS,
    KEPT_BYTES,
    TRANSITIONS,
    FeedInput,
    FeedState,
    FollowInput,
    FollowMachine,
    FollowState,
    Page,
    Read,
)
from worker.contract.entries import AnyEntry, Cancelled, Claimed, Done, Queued, Restarted
from worker.contract.ids import BEFORE_ALL, QUEUED, SEAL, EntryId

NEXT_ATTEMPT = Claimed(id=EntryId(2, 0))


def read(log: Sequence[AnyEntry], after: EntryId, limit: int = 1000) -> Page | None:
    """The page that a log without holes has after a place."""
    found = [entry for entry in log if entry.id > after][:limit]
    return Page(iter(found), found[-1].id, len(found) == limit) if found else None


def listening(*log: AnyEntry, after: EntryId = BEFORE_ALL) -> FollowMachine:
    """A follower that has taken a log and listens."""
    machine = FollowMachine(after)
    assert machine.next_read() == Read(after, is_first=True)
    machine.on_page(read(log, after))
    assert list(machine.drain()) == list(log)
    assert machine.state is FollowState.LISTENING
    return machine


class AnyOrder(RuleBasedStateMachine):
    """A log that grows, a feed that loses, doubles and shuffles messages, and a follower that may do anything."""

    @initialize(after_start=st.booleans(), weight=st.floats(0.8, 1.2))
    def begin(self, *, after_start: bool, weight: float) -> None:
        self.log: list[AnyEntry] = [Queued(id=QUEUED), START]
        self.taken: list[AnyEntry] = self.log[:] if after_start else []
        self.machine = FollowMachine(START.id if after_start else BEFORE_ALL, tick_weight=weight)
        self.feed = FeedState.ABSENT
        self.messages: list[list[AnyEntry]] = []
        self.is_reading = False

    def on_feed(self, event: FeedInput) -> None:
        self.feed = FEED_TRANSITIONS.get((self.feed, event), self.feed)

    @property
    def is_sealed(self) -> bool:
        return self.log[-1].id == SEAL

    def append(self, *entries: AnyEntry) -> None:
        self.log += entries
        self.messages.append(list(entries))

    @precondition(lambda self: not self.is_sealed)
    @rule(count=st.integers(1, 5))
    def deltas_are_written(self, count: int) -> None:
        attempt, n = self.log[-1].id
        self.append(*(delta(attempt, n + number) for number in range(1, count + 1)))

    @precondition(lambda self: not self.is_sealed)
    @rule()
    def another_attempt_begins(self) -> None:
        attempt = self.log[-1].id.attempt + 1
        self.append(Claimed(id=EntryId(attempt, 0)), Restarted(id=EntryId(attempt, 1)))

    @precondition(lambda self: not self.is_sealed)
    @rule(by_cancel=st.booleans())
    def the_log_is_sealed(self, *, by_cancel: bool) -> None:
        self.append(Cancelled(id=SEAL) if by_cancel else Done(id=SEAL, attempt=1))

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), keeps=st.booleans(), size=st.sampled_from([100, KEPT_BYTES // 2, KEPT_BYTES * 2]))
    def a_message_is_delivered(self, data: st.DataObject, *, keeps: bool, size: int) -> None:
        """In any order; one that is kept is delivered again."""
        number = data.draw(st.integers(0, len(self.messages) - 1))
        message = self.messages[number] if keeps else self.messages.pop(number)
        is_gap = any(entry.id > self.machine.end for entry in message) and (
            min(entry.id for entry in message if entry.id > self.machine.end)
            != EntryId(self.machine.end.attempt, self.machine.end.n + 1)
        )
        was_listening = self.machine.state is FollowState.LISTENING
        self.machine.on_message(message, size)
        if was_listening and is_gap:
            assert self.machine.state is FollowState.BEHIND, "a gap has the log read"

    @precondition(lambda self: self.messages)
    @rule()
    def a_message_is_lost(self) -> None:
        self.messages.pop()

    @rule(waits=st.booleans())
    def a_tick_passes(self, *, waits: bool) -> None:
        self.machine.on_tick(waits=waits and self.machine.state is FollowState.LISTENING, feed=self.feed)

    @rule(event=st.sampled_from(FeedInput))
    def something_happens_to_the_subscription(self, event: FeedInput) -> None:
        self.on_feed(event)
        match event:
            case FeedInput.CONFIRMED | FeedInput.INTERRUPTED:
                self.machine.look_up()
                assert self.machine.state is not FollowState.LISTENING
            case FeedInput.REFUSED:
                self.machine.fall_back()

    @rule()
    def entries_are_taken(self) -> None:
        self.taken += self.machine.drain()

    @precondition(lambda self: not self.is_reading)
    @rule()
    def a_reading_begins(self) -> None:
        self.request = self.machine.next_read()
        if self.request is not None:
            self.is_reading = True
            assert self.request.after == (self.taken[-1].id if self.taken else BEFORE_ALL)

    @precondition(lambda self: self.is_reading)
    @rule(limit=st.integers(1, 4))
    def a_reading_ends(self, limit: int) -> None:
        assert self.request
        self.is_reading = False
        self.machine.on_page(read(self.log, self.request.after, limit))

    @precondition(lambda self: self.is_reading)
    @rule()
    def a_reading_fails(self) -> None:
        self.is_reading = False
        self.machine.on_read_failed()

    @invariant()
    def what_was_taken_is_the_log_so_far(self) -> None:
        assert self.taken == self.log[: len(self.taken)]

    @invariant()
    def little_is_kept(self) -> None:
        assert self.machine.kept_bytes <= 2 * KEPT_BYTES

    def teardown(self) -> None:
        """Whatever has happened: a driver that goes on gets the whole log, without another message."""
        if not self.is_sealed:
            self.log.append(END)
        if self.is_reading:
            assert self.request
            self.machine.on_page(read(self.log, self.request.after))
        for _ in range(100):
            self.taken += self.machine.drain()
            if (request := self.machine.next_read()) is not None:
                self.machine.on_page(read(self.log, request.after, 3))
            elif self.machine.state is FollowState.LISTENING:
                self.machine.on_tick(waits=True, feed=self.feed)
        self.taken += self.machine.drain()
        assert self.machine.state is FollowState.ENDED
        assert self.taken == self.log


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=40)


def test_the_next_entries_of_the_feed_are_ready_at_once_and_the_log_is_not_read() -> None:
    machine = listening(START)
    for n in range(1, 9):
        machine.on_message([delta(1, n)], 100)
        assert list(machine.drain()) == [delta(1, n)]
    assert machine.next_read() is None
    assert machine.end == (1, 8)


@pytest.mark.parametrize(
    "message",
    [[delta(1, 3)], [NEXT_ATTEMPT], [END], [delta(2, 1)], [delta(1, 1), delta(1, 3)], [delta(1, 1), END]],
    ids=["a gap", "another attempt", "the seal", "a later attempt", "an entry and a gap", "an entry and the seal"],
)
def test_at_any_other_entry_the_log_is_read_after_what_is_ready(message: list[AnyEntry]) -> None:
    machine = listening(START)
    machine.on_message(message, 100)
    machine.on_message([delta(1, 2)], 100)  # behind, it relies on no message
    ready = list(machine.drain())
    assert ready == message[:-1]
    assert machine.next_read() == Read([START, *ready][-1].id)


def test_entries_that_are_ready_come_before_the_next_reading() -> None:
    machine = listening(START)
    machine.on_message([delta(1, 1), delta(1, 3)], 100)
    assert machine.next_read() is None
    assert list(machine.drain()) == [delta(1, 1)]
    assert machine.next_read()


@pytest.mark.parametrize("late", [[START], [Queued(id=QUEUED)], [delta(1, 1)], [START, delta(1, 1)]])
def test_entries_that_are_there_already_change_nothing(late: list[AnyEntry]) -> None:
    machine = listening(START, delta(1, 1))
    machine.on_message(late, 100)
    assert not list(machine.drain())
    assert machine.state is FollowState.LISTENING


def test_messages_during_a_reading_come_after_its_page() -> None:
    machine = FollowMachine(BEFORE_ALL)
    machine.next_read()
    machine.on_message([delta(1, 1)], 100)  # it is on the page too
    machine.on_message([delta(1, 2)], 100)
    assert not list(machine.drain())
    machine.on_page(read([START, delta(1, 1)], BEFORE_ALL))
    assert list(machine.drain()) == [START, delta(1, 1)]
    assert list(machine.drain()) == [delta(1, 2)]
    assert machine.state is FollowState.LISTENING


def test_a_doubt_that_comes_up_during_a_reading_has_the_log_read_again() -> None:
    machine = FollowMachine(BEFORE_ALL)
    machine.next_read()
    machine.look_up()
    machine.on_page(read([START], BEFORE_ALL))
    assert list(machine.drain()) == [START]
    assert machine.next_read() == Read(START.id)
    assert machine.wants_feed


def test_a_full_page_has_the_log_read_on_and_the_feed_is_not_wanted_before_its_end() -> None:
    machine = FollowMachine(BEFORE_ALL)
    machine.next_read()
    machine.on_page(read([START, delta(1, 1), delta(1, 2)], BEFORE_ALL, limit=2))
    assert not machine.wants_feed
    assert list(machine.drain()) == [START, delta(1, 1)]
    assert machine.next_read() == Read(EntryId(1, 1))
    machine.on_page(read([delta(1, 2)], EntryId(1, 1), limit=2))
    assert machine.wants_feed


def test_more_than_is_kept_is_dropped_and_read_from_the_log() -> None:
    machine = listening(START)
    machine.on_message([delta(1, 1)], 2 * KEPT_BYTES)  # one message is kept, however large
    assert machine.ready == [delta(1, 1)]
    machine.on_message([delta(1, 2)], 1)
    assert machine.kept_bytes == 0
    assert not list(machine.drain())
    assert machine.next_read() == Read(START.id)


def test_more_than_is_kept_during_a_reading_is_dropped_and_read_again() -> None:
    machine = FollowMachine(BEFORE_ALL)
    machine.next_read()
    for n in (1, 2):
        machine.on_message([delta(1, n)], KEPT_BYTES)
    machine.on_page(read([START], BEFORE_ALL))
    assert [*machine.drain(), *machine.drain()] == [START]
    assert machine.next_read() == Read(START.id)


@pytest.mark.parametrize(("feed", "ticks"), [(FeedState.PENDING, 1), (FeedState.QUIET, 1), (FeedState.LIVE, 10)])
def test_silence_has_the_log_read_sooner_before_the_first_message(feed: FeedState, ticks: int) -> None:
    machine = listening(START)
    assert not machine.on_tick(waits=True, feed=feed)  # the place has changed since the last tick
    assert [machine.on_tick(waits=True, feed=feed) for _ in range(ticks)] == [False] * (ticks - 1) + [True]
    assert machine.next_read() == Read(START.id, must_exist=feed is FeedState.LIVE)


def test_silence_goes_on_until_the_log_has_to_exist() -> None:
    machine = listening(START)
    reads: list[Read] = []
    for _ in range(20):
        machine.on_tick(waits=True, feed=FeedState.QUIET)
        if (request := machine.next_read()) is not None:
            reads.append(request)
            machine.on_page(None)
    assert reads == [Read(START.id, must_exist=must_exist) for must_exist in (False, False, True, True)]


@pytest.mark.parametrize(("weight", "ticks"), [(0.5, 20), (1.0, 10), (2.0, 5)])
def test_followers_with_different_weights_of_a_tick_do_not_read_at_once(weight: float, ticks: int) -> None:
    machine = FollowMachine(START.id, tick_weight=weight)
    machine.next_read()
    machine.on_page(None)
    machine.on_tick(waits=False, feed=FeedState.LIVE)
    assert [machine.on_tick(waits=True, feed=FeedState.LIVE) for _ in range(ticks)] == [False] * (ticks - 1) + [True]


def test_a_follower_that_does_not_wait_is_not_silent() -> None:
    machine = listening(START)
    assert not any(machine.on_tick(waits=False, feed=FeedState.QUIET) for _ in range(100))


@pytest.mark.parametrize(
    ("feed", "polls"), [(FeedState.QUIET, True), (FeedState.LIVE, True), (FeedState.PENDING, False)]
)
def test_a_noticed_feed_that_leaves_something_out_twice_is_given_up(feed: FeedState, *, polls: bool) -> None:
    machine = listening(START)
    log: list[AnyEntry] = [START]
    for n in (1, 2):
        log.append(delta(1, n))
        while not machine.on_tick(waits=True, feed=feed):
            pass
        request = machine.next_read()
        assert request
        machine.on_page(read(log, request.after))
        assert list(machine.drain()) == log[-1:]
    assert machine.polls == polls
    request = machine.next_read()
    assert request == (Read(EntryId(1, 2), waits=True) if polls else None)


def test_a_feed_that_leaves_something_out_now_and_then_is_kept() -> None:
    machine = listening(START)
    log: list[AnyEntry] = [START]
    for n in range(1, 9, 2):
        log.append(delta(1, n))
        while not machine.on_tick(waits=True, feed=FeedState.LIVE):
            pass
        request = machine.next_read()
        assert request
        machine.on_page(read(log, request.after))
        log.append(delta(1, n + 1))
        machine.on_message(log[-1:], 100)  # the feed works between two misses
        assert [*machine.drain(), *machine.drain()] == log[-2:]
    assert not machine.polls


def test_a_feed_that_is_refused_before_the_first_page_is_given_up_after_it() -> None:
    machine = FollowMachine(BEFORE_ALL)
    machine.fall_back()
    assert machine.next_read() == Read(BEFORE_ALL, is_first=True)
    machine.on_page(read([START], BEFORE_ALL))
    assert list(machine.drain()) == [START]
    logs: list[list[AnyEntry]] = [[START, delta(1, 1)], [START, delta(1, 1)], [START, delta(1, 1), END]]
    for log in logs:
        request = machine.next_read()
        assert request
        assert request.waits
        machine.on_page(read(log, request.after))
        list(machine.drain())
    assert machine.state is FollowState.ENDED


def test_a_feed_that_is_refused_during_a_reading_is_given_up_after_it() -> None:
    machine = listening(START)
    machine.look_up()
    machine.next_read()
    machine.fall_back()
    machine.on_message([delta(1, 1)], 100)
    machine.on_page(None)
    assert machine.next_read() == Read(START.id, waits=True)


@pytest.mark.parametrize("failed_at", [1, 2])
def test_a_reading_that_fails_is_due_again(failed_at: int) -> None:
    machine = FollowMachine(BEFORE_ALL) if failed_at == 1 else listening(START)
    if failed_at == 2:
        machine.fall_back()
    request = machine.next_read()
    machine.on_message([delta(1, 1)], 100)
    machine.on_read_failed()
    assert not machine.kept_bytes
    assert machine.next_read() == request


def test_at_a_hole_the_log_is_read_after_growing_pauses_until_it_is_mended() -> None:
    machine = FollowMachine(BEFORE_ALL, first_pause=0.02, longest_pause=0.1)
    request = machine.next_read()
    pauses = []
    pages: list[list[AnyEntry]] = [[START, delta(1, 1)], [], [], []]
    for entries in pages:
        machine.on_page(Page(entries, EntryId(1, 1), is_full=False, is_at_hole=True))
        assert list(machine.drain()) == entries
        pauses.append(machine.pause)
        machine.on_message([delta(1, 2)], 100)  # behind the hole nothing counts
        machine.look_up()
        request = machine.next_read()
        assert request == Read(EntryId(1, 1), must_exist=True, is_at_hole=True)
    assert pauses == [0.02, 0.04, 0.08, 0.1]
    mended: list[AnyEntry] = [NEXT_ATTEMPT, Restarted(id=EntryId(2, 1))]
    machine.on_page(read(mended, EntryId(1, 1)))
    assert list(machine.drain()) == mended
    assert machine.pause == 0
    assert machine.state is FollowState.LISTENING


def test_a_doubt_during_a_reading_that_finds_a_hole_has_the_log_read_again() -> None:
    machine = FollowMachine(BEFORE_ALL)
    machine.next_read()
    machine.look_up()
    machine.on_page(Page([START], START.id, is_full=False, is_at_hole=True))
    assert list(machine.drain()) == [START]
    assert machine.next_read() == Read(START.id, must_exist=True, is_at_hole=True)


def test_a_place_that_the_log_lacks_is_still_to_be_confirmed() -> None:
    machine = FollowMachine(EntryId(1, 5))
    for _ in range(2):
        assert (request := machine.next_read())
        assert request.is_first
        machine.on_page(Page((), EntryId(1, 5), is_full=False, is_at_hole=True))


def test_a_follower_that_polls_goes_on_polling_after_a_hole() -> None:
    """It waited for the feed that it had given up."""
    machine = listening(START)
    machine.fall_back()
    machine.next_read()
    machine.on_page(Page((), START.id, is_full=False, is_at_hole=True))
    assert machine.next_read() == Read(START.id, must_exist=True, is_at_hole=True)
    machine.on_page(read([NEXT_ATTEMPT, Restarted(id=EntryId(2, 1))], START.id))
    list(machine.drain())
    assert machine.next_read() == Read(EntryId(2, 1), waits=True)


def test_in_the_attempt_of_the_seals_number_the_feed_is_given_up() -> None:
    """The seal may be the next id there, and a message of the feed does not end a log."""
    before = delta(SEAL.attempt, SEAL.n - 1)
    machine = FollowMachine(before.id)
    machine.next_read()
    machine.on_page(None)
    assert machine.polls
    request = machine.next_read()
    assert request
    machine.on_page(read([END], request.after))
    assert machine.state is FollowState.ENDED


def test_every_state_but_the_last_has_a_way_out_and_every_state_is_reached() -> None:
    sources = {state for state, _ in TRANSITIONS}
    assert set(FollowState) - sources == {FollowState.ENDED}
    assert {FollowState.BEHIND, *TRANSITIONS.values()} == set(FollowState)
    assert {event for _, event in TRANSITIONS} == set(FollowInput)
    assert {FeedState.ABSENT, *FEED_TRANSITIONS.values()} == set(FeedState)
    assert {event for _, event in FEED_TRANSITIONS} == set(FeedInput)


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], FeedState.ABSENT),
        ([FeedInput.SUBSCRIBE], FeedState.PENDING),
        ([FeedInput.SUBSCRIBE, FeedInput.REFUSED], FeedState.ABSENT),
        ([FeedInput.SUBSCRIBE, FeedInput.CONFIRMED], FeedState.UNNOTICED),
        ([FeedInput.SUBSCRIBE, FeedInput.CONFIRMED, FeedInput.MESSAGE], FeedState.LIVE),
        ([FeedInput.SUBSCRIBE, FeedInput.CONFIRMED, FeedInput.TIME_PASSED], FeedState.QUIET),
        ([FeedInput.SUBSCRIBE, FeedInput.CONFIRMED, FeedInput.TIME_PASSED, FeedInput.MESSAGE], FeedState.LIVE),
    ],
)
def test_a_subscription_goes_from_state_to_state(events: list[FeedInput], state: FeedState) -> None:
    feed = FeedState.ABSENT
    for event in events:
        feed = FEED_TRANSITIONS[feed, event]
    assert feed is state


@pytest.mark.parametrize("is_reading", [False, True])
def test_a_follower_that_returns_to_the_feed_reads_the_log_once_more(*, is_reading: bool) -> None:
    machine = FollowMachine(BEFORE_ALL)
    machine.fall_back()
    request = machine.next_read()
    assert request is not None
    machine.on_page(read([START], request.after))
    assert list(machine.drain()) == [START]
    if is_reading:
        assert machine.next_read() == Read(START.id, waits=True)
    machine.return_to_feed()
    machine.look_up()
    if is_reading:
        machine.on_page(None)
    assert machine.next_read() == Read(START.id)
    machine.on_page(None)
    assert machine.next_read() is None
    machine.on_message([delta(1, 1)], 100)
    assert list(machine.drain()) == [delta(1, 1)]


@pytest.mark.parametrize("state", [FeedState.UNNOTICED, FeedState.QUIET, FeedState.LIVE])
def test_a_confirmed_subscription_may_be_interrupted_and_refused(state: FeedState) -> None:
    assert FEED_TRANSITIONS[state, FeedInput.INTERRUPTED] is FeedState.PENDING
    assert FEED_TRANSITIONS[state, FeedInput.REFUSED] is FeedState.ABSENT


@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_entries_in_disorder_come_out_in_order(seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - no secret
    log: list[AnyEntry] = [START, *(delta(1, n) for n in range(1, 1000)), END]
    messages = [[entry] for entry in log if dice.random() < 0.9]
    for number in range(len(messages) - 1):
        if dice.random() < 0.1:
            messages[number], messages[number + 1] = messages[number + 1], messages[number]
    machine, seen, reads = FollowMachine(BEFORE_ALL), list[AnyEntry](), 0
    for message in messages:
        machine.on_message(message, 100)
        seen += machine.drain()
        if (request := machine.next_read()) is not None:
            reads += 1
            written = log[: log.index(message[-1]) + 1]
            machine.on_page(read(written, request.after))
            seen += machine.drain()
    while machine.state is not FollowState.ENDED:
        machine.look_up()
        seen += machine.drain()
        if (request := machine.next_read()) is not None:
            machine.on_page(read(log, request.after))
            seen += machine.drain()
    assert seen == log
    assert reads < 400
