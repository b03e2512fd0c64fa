"""A state machine without I/O that follows one log: it returns the log's entries in order, once, for any feed.

Its inputs are messages of the feed, ticks, and pages of the log. Its outputs are entries, requests to read the log, the
request for the feed, and the decision to poll without it. The machine never waits, and does not use Redis or asyncio.

From the feed, a follower accepts only the next entry: of the same attempt, and with the next number. At a gap, another
attempt or the seal, and after silence, it reads the log after its last entry.
"""

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...contract.entries import AnyEntry, Queued
from ...contract.ids import SEAL, EntryId

KEPT_BYTES = 32 * 1024
"""The most bytes of messages that a follower keeps until they are drained. Beyond this limit the follower drops all of
them and reads the log instead."""

_FIRST_LIMIT, _LIVE_LIMIT = 1, 10
"""Ticks of silence after which a follower reads the log: before the feed's first message, and after it."""

_LONG_SILENCE = 9
"""Ticks of silence after which a missing log is an error."""

_MAX_MISSES = 2
"""A follower stops using the feed after this many silences in a row in which the log had entries that the feed had not
delivered."""


class FollowState(enum.Enum):
    """The states of a follower."""

    BEHIND = "behind"
    """The log has, or may have, entries after the follower's last one, and must be read."""
    READING = "reading"
    """The log is being read; messages wait until the page has arrived."""
    REREADING = "rereading"
    """The log is being read, and must be read again afterwards."""
    LISTENING = "listening"
    """The follower has all entries so far, and the feed delivers the next ones."""
    AT_HOLE = "at hole"
    """Entries are missing, which a later entry may make void: the log must be read again after a pause."""
    POLLING = "polling"
    """The feed is not used: the log must be read with a read that waits for the next entry."""
    ENDED = "ended"
    """The seal has been read."""


class FollowInput(enum.Enum):
    """The inputs of a follower."""

    GAP = enum.auto()
    """A message has an entry that is not the next one."""
    LOOK_UP = enum.auto()
    """The feed may have omitted entries: it began, broke off, was silent, or delivered more than is kept."""
    READ = enum.auto()
    """The driver begins to read the log."""
    PAGE_TO_END = enum.auto()
    """A page reaches the end of the log."""
    PAGE_FULL = enum.auto()
    """A page is full: there may be more entries."""
    PAGE_TO_HOLE = enum.auto()
    """A page ends where entries are missing."""
    PAGE_TO_SEAL = enum.auto()
    """A page ends with the seal."""
    READ_FAILED = enum.auto()
    """A read failed, or was cancelled."""
    FALL_BACK = enum.auto()
    """The feed is not used."""
    RETURN = enum.auto()
    """The feed is used again."""


_S, _I = FollowState, FollowInput

TRANSITIONS: Mapping[tuple[FollowState, FollowInput], FollowState] = {
    (_S.LISTENING, _I.GAP): _S.BEHIND,
    (_S.LISTENING, _I.LOOK_UP): _S.BEHIND,
    (_S.LISTENING, _I.FALL_BACK): _S.POLLING,
    (_S.BEHIND, _I.READ): _S.READING,
    (_S.BEHIND, _I.FALL_BACK): _S.POLLING,
    (_S.AT_HOLE, _I.READ): _S.READING,
    (_S.POLLING, _I.READ): _S.READING,
    (_S.POLLING, _I.RETURN): _S.BEHIND,
    (_S.READING, _I.LOOK_UP): _S.REREADING,
    (_S.READING, _I.PAGE_TO_END): _S.LISTENING,
    (_S.READING, _I.PAGE_FULL): _S.BEHIND,
    (_S.READING, _I.PAGE_TO_HOLE): _S.AT_HOLE,
    (_S.READING, _I.PAGE_TO_SEAL): _S.ENDED,
    (_S.READING, _I.READ_FAILED): _S.BEHIND,
    (_S.REREADING, _I.PAGE_TO_END): _S.BEHIND,
    (_S.REREADING, _I.PAGE_FULL): _S.BEHIND,
    (_S.REREADING, _I.PAGE_TO_HOLE): _S.AT_HOLE,
    (_S.REREADING, _I.PAGE_TO_SEAL): _S.ENDED,
    (_S.REREADING, _I.READ_FAILED): _S.BEHIND,
}
"""The next state. An input that is not listed for a state changes nothing there."""

_LISTENING, _READING = FollowState.LISTENING, FollowState.READING
"""Constants for the path of every message, because looking up a member of an enum is slow in Python 3.11."""


class FeedState(enum.Enum):
    """The states of the subscription to a request's feed, which all of its followers share."""

    ABSENT = "absent"
    """There is no subscription, or Redis has refused it."""
    PENDING = "pending"
    """Redis has not confirmed the subscription yet, or the connection was lost."""
    UNNOTICED = "unnoticed"
    """Redis has confirmed the subscription, but publishers may still skip the channel."""
    QUIET = "quiet"
    """Every new entry is published, as far as is known; no message has come."""
    LIVE = "live"
    """Messages have come."""

    @property
    def is_noticed(self) -> bool:
        """Whether publishers have noticed the subscription, and so publish every new entry, as far as is known."""
        return self is FeedState.QUIET or self is FeedState.LIVE


class FeedInput(enum.Enum):
    """The inputs of a subscription."""

    SUBSCRIBE = enum.auto()
    CONFIRMED = enum.auto()
    MESSAGE = enum.auto()
    TIME_PASSED = enum.auto()
    """Enough time has passed for publishers to notice the subscriber."""
    INTERRUPTED = enum.auto()
    REFUSED = enum.auto()


_F, _G = FeedState, FeedInput

FEED_TRANSITIONS: Mapping[tuple[FeedState, FeedInput], FeedState] = {
    (_F.ABSENT, _G.SUBSCRIBE): _F.PENDING,
    (_F.ABSENT, _G.CONFIRMED): _F.UNNOTICED,
    (_F.PENDING, _G.CONFIRMED): _F.UNNOTICED,
    (_F.PENDING, _G.REFUSED): _F.ABSENT,
    (_F.UNNOTICED, _G.MESSAGE): _F.LIVE,
    (_F.UNNOTICED, _G.TIME_PASSED): _F.QUIET,
    (_F.QUIET, _G.MESSAGE): _F.LIVE,
    **{(state, _G.INTERRUPTED): _F.PENDING for state in (_F.UNNOTICED, _F.QUIET, _F.LIVE)},
    **{(state, _G.REFUSED): _F.ABSENT for state in (_F.UNNOTICED, _F.QUIET, _F.LIVE)},
}
"""The next state. An input that is not listed for a state changes nothing there."""


@dataclass(frozen=True, slots=True)
class Page:
    """The next entries of a log."""

    entries: Iterable[AnyEntry]
    """The entries, which are parsed by the iteration. It raises `Unreadable` at an entry that cannot be read."""
    last: EntryId
    """The id of the last entry."""
    is_full: bool
    """Whether there may be more entries already."""
    queued: Queued | None = None
    """The entry `queued`, if the log has no other entry so far."""
    is_at_hole: bool = False
    """Whether entries are missing after `last`, which a later entry may make void since the log has no seal."""


@dataclass(frozen=True, slots=True)
class Read:
    """A request to read the log."""

    after: EntryId
    waits: bool = False
    """Whether to wait for the next entry."""
    must_exist: bool = False
    """Whether it is an error if the log does not exist."""
    is_first: bool = False
    """Whether it is not yet confirmed that the log, and the entry `after` in it, exist."""
    is_at_hole: bool = False
    """Whether entries are known to be missing after `after`."""


class FeedSilence:
    """How long a follower has waited without an entry, and how often the feed has omitted entries in that time.

    `tick_weight` is how much a tick counts towards silence.
    """

    def __init__(self, place: EntryId, tick_weight: float) -> None:
        self._tick_weight = tick_weight
        self._place = place
        """The id of the follower's last entry, at the last tick."""
        self._ticks = 0.0
        """The ticks of silence so far."""
        self._next_read = float(_FIRST_LIMIT)
        """The ticks of silence at which the follower reads the log."""
        self._is_feed_in_doubt = False
        """Whether the log is read after a silence of a noticed feed, which then has omitted the entries of the page."""
        self._misses, self._missed_until = 0, place
        """In how many silences in a row the feed has omitted entries, and the last id of the last page."""

    @property
    def is_long(self) -> bool:
        """Whether the silence is so long that a missing log is an error."""
        return self._ticks >= _LONG_SILENCE

    @property
    def is_feed_unreliable(self) -> bool:
        """Whether the feed has omitted entries in so many silences that the follower must stop using it."""
        return self._misses >= _MAX_MISSES

    def on_tick(self, place: EntryId, *, waits: bool, feed: FeedState) -> bool:
        """Count a tick, at which the last entry is `place`. Returns whether the log must be read now."""
        if not waits or place != self._place:
            self._place, self._ticks = place, 0.0
            self._next_read = float(_LIVE_LIMIT if feed is FeedState.LIVE else _FIRST_LIMIT)
            return False
        self._ticks += self._tick_weight
        if self._ticks < self._next_read:
            return False
        self._next_read += min(2 * self._next_read, _LIVE_LIMIT)
        self._is_feed_in_doubt = feed.is_noticed
        return True

    def on_page(self, before: EntryId, last: EntryId | None) -> None:
        """Handle a read of the log after `before`: it has entries up to `last`, or none."""
        if last is not None:
            if self._is_feed_in_doubt:
                self._misses = self._misses + 1 if self._missed_until == before else 1
            self._missed_until = last
        self._is_feed_in_doubt = False


class FollowMachine:
    """One follower of one log, from the entry after `after`.

    `tick_weight` is how much a tick counts towards silence. Followers with different weights do not all read at once.
    """

    def __init__(
        self,
        after: EntryId,
        *,
        tick_weight: float = 1.0,
        first_pause: float = 0.02,
        longest_pause: float = 0.5,
    ) -> None:
        self.state = FollowState.BEHIND
        self.ready: list[AnyEntry] = []
        """Entries of the feed: of one attempt, without a gap, and after those of `page`."""
        self.page: Iterable[AnyEntry] = ()
        """Entries of the log that were not drained yet."""
        self.kept_bytes = 0
        """The bytes of messages whose entries were not drained yet."""
        self.pause = 0.0
        """Seconds to wait before the next read, at a hole."""
        self.queued: Queued | None = None
        """The entry `queued`, if the log has no other entry so far."""
        self.wants_feed = False
        """Whether the feed is useful, because the end of the log was reached."""
        self.polls = False
        """Whether the log is polled, without the feed."""
        self._attempt, self._n = after
        """The id of the last entry that the machine has received."""
        self._held: list[tuple[Sequence[AnyEntry], int]] = []
        """Messages that came while the log was being read, and their bytes."""
        self._is_confirmed = False
        """Whether it is confirmed that the log has the entry `after`."""
        self._must_exist = False
        self._first_pause, self._longest_pause = first_pause, longest_pause
        self._silence = FeedSilence(after, tick_weight)

    @property
    def end(self) -> EntryId:
        """The id of the last entry that was received, including entries that were not drained yet."""
        return EntryId(self._attempt, self._n)

    def drain(self) -> Iterable[AnyEntry]:
        """Return the next entries: a page of the log first, then entries of the feed."""
        if self.page:
            page, self.page = self.page, ()
            return page
        ready, self.ready, self.kept_bytes = self.ready, [], 0
        return ready

    def on_message(self, entries: Sequence[AnyEntry], size: int) -> None:
        """Handle entries of the feed, from a message of `size` bytes."""
        state = self.state
        if state is _LISTENING:
            ready = self.ready
            for entry in entries:
                attempt, n = entry.id
                if n == self._n + 1 and attempt == self._attempt:
                    self._n = n
                    ready.append(entry)
                elif (attempt, n) > (self._attempt, self._n):
                    self._move(FollowInput.GAP)
                    break
        elif state is _READING:
            self._held.append((entries, size))
        else:
            return
        self.kept_bytes = kept = self.kept_bytes + size
        if kept > KEPT_BYTES and kept > size:
            self._n -= len(self.ready)
            self.ready, self._held, self.kept_bytes = [], [], 0
            self._move(FollowInput.LOOK_UP)

    def look_up(self, *, must_exist: bool = False) -> None:
        """Request a read of the log, since the feed may have omitted entries. With `must_exist` the log must exist."""
        self._must_exist |= must_exist
        self._move(FollowInput.LOOK_UP)

    def on_tick(self, *, waits: bool, feed: FeedState) -> bool:
        """Count a tick. Returns whether the log must be read now. `waits` is whether the follower waits for entries."""
        is_due = self._silence.on_tick(self.end, waits=waits, feed=feed)
        if is_due:
            self.look_up(must_exist=self._silence.is_long)
        return is_due

    def next_read(self) -> Read | None:
        """Return the read that is due. The caller must then call `on_page` or `on_read_failed`.

        None if entries must be drained first, or if the feed delivers the next ones.
        """
        state = self.state
        if self.page or self.ready or (state, FollowInput.READ) not in TRANSITIONS:
            return None
        is_at_hole = state is FollowState.AT_HOLE
        read = Read(
            self.end,
            waits=state is FollowState.POLLING,
            must_exist=self._must_exist or is_at_hole,
            is_first=not self._is_confirmed,
            is_at_hole=is_at_hole,
        )
        self._must_exist, self.kept_bytes = False, 0
        self._move(FollowInput.READ)
        return read

    def on_page(self, page: Page | None) -> None:
        """Handle the result of a read: a page of entries, or None if there are none."""
        before, held, self._held, self.kept_bytes = self.end, self._held, [], 0
        self._silence.on_page(before, page.last if page is not None else None)
        outcome = FollowInput.PAGE_TO_END
        if page is not None:
            self.page, self.queued = page.entries, page.queued
            self._attempt, self._n = page.last
            if page.is_at_hole:
                outcome = FollowInput.PAGE_TO_HOLE
            elif page.last == SEAL:
                outcome = FollowInput.PAGE_TO_SEAL
            elif page.is_full:
                outcome = FollowInput.PAGE_FULL
        is_at_hole = outcome is FollowInput.PAGE_TO_HOLE
        self.pause = min(2 * self.pause or self._first_pause, self._longest_pause) if is_at_hole else 0.0
        self._is_confirmed |= not is_at_hole or self.end != before
        self._move(outcome)
        if self.state is FollowState.ENDED:
            return
        # In the attempt with the seal's number, the next id may be the seal's, and a message cannot end a log.
        if self._silence.is_feed_unreliable or self._attempt == SEAL.attempt:
            self.fall_back()
        elif self.polls:
            self._poll()
        self.wants_feed |= outcome is FollowInput.PAGE_TO_END
        for entries, size in held if self.state is FollowState.LISTENING else ():
            self.on_message(entries, size)

    def on_read_failed(self) -> None:
        """Handle a read that failed or was cancelled."""
        self._held, self.kept_bytes = [], 0
        self._move(FollowInput.READ_FAILED)
        self._poll()

    def fall_back(self) -> None:
        """Stop using the feed, and poll the log."""
        self.polls = True
        self._poll()

    def return_to_feed(self) -> None:
        """Use the feed again after `fall_back`. The log must be read once more."""
        self.polls = False
        self._move(FollowInput.RETURN)

    def _poll(self) -> None:
        if self.polls and self._is_confirmed:
            self._move(FollowInput.FALL_BACK)

    def _move(self, event: FollowInput) -> None:
        self.state = TRANSITIONS.get((self.state, event), self.state)
