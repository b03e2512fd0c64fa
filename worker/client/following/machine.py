"""Following one log, as a machine without I/O: whatever the feed delivers, the log's entries come out in order, once.

Messages of the feed, ticks, and pages of the log go in. Out come entries, requests to read the log, the wish for the
feed, and the decision to do without it. Nothing here waits, and nothing knows of Redis or asyncio.

From the feed, a follower takes only the entry that comes next: of the same attempt, and with the next number. At a gap,
another attempt or the seal, and after silence, it reads the log from its place on.
"""

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...contract.entries import AnyEntry, Queued
from ...contract.ids import SEAL, EntryId

KEPT_BYTES = 32 * 1024
"""The most bytes of messages that a follower keeps until they are drained. Beyond this limit the follower drops all of
them and reads the log instead."""

_FIRST_LIMIT, _SILENCE_LIMIT = 1, 10
"""Ticks of silence after which a follower reads the log: before the feed's first message, and after it."""

_MAX_MISSES = 2
"""A follower gives the feed up after this many silences in a row in which the log had entries that the feed had not
delivered."""


class FollowState(enum.Enum):
    """What a follower does next."""

    BEHIND = "behind"
    """The log has entries after the follower's place, or may have some: it is to be read."""
    READING = "reading"
    """The log is being read; messages wait until the page is there."""
    REREADING = "rereading"
    """The log is being read, and is to be read again after that."""
    LISTENING = "listening"
    """The follower has all entries so far, and the feed delivers the next ones."""
    AT_HOLE = "at hole"
    """Entries are missing, which a later entry may call void: the log is to be read again after a pause."""
    POLLING = "polling"
    """The feed is given up: the log is to be read with a read that waits for the next entry."""
    ENDED = "ended"
    """The seal has been read."""


class FollowInput(enum.Enum):
    """What happens to a follower."""

    GAP = enum.auto()
    """A message has an entry that is not the next one."""
    LOOK_UP = enum.auto()
    """The feed may have left something out: it began, broke off, was silent, or delivered more than is kept."""
    READ = enum.auto()
    """The driver begins to read the log."""
    PAGE_TO_END = enum.auto()
    """A page reaches the end of the log."""
    PAGE_FULL = enum.auto()
    """A page is full: there may be more."""
    PAGE_TO_HOLE = enum.auto()
    """A page ends where entries are missing."""
    PAGE_TO_SEAL = enum.auto()
    """A page ends with the seal."""
    READ_FAILED = enum.auto()
    """A reading failed, or was cancelled."""
    FALL_BACK = enum.auto()
    """The feed is given up."""


_S, _I = FollowState, FollowInput

TRANSITIONS: Mapping[tuple[FollowState, FollowInput], FollowState] = {
    (_S.LISTENING, _I.GAP): _S.BEHIND,
    (_S.LISTENING, _I.LOOK_UP): _S.BEHIND,
    (_S.LISTENING, _I.FALL_BACK): _S.POLLING,
    (_S.BEHIND, _I.READ): _S.READING,
    (_S.BEHIND, _I.FALL_BACK): _S.POLLING,
    (_S.AT_HOLE, _I.READ): _S.READING,
    (_S.POLLING, _I.READ): _S.READING,
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
"""For the path of every message: a member of an enum is slow to look up in Python 3.11."""


class FeedState(enum.Enum):
    """How far the subscription to a request's feed is, which all of its followers share."""

    ABSENT = "absent"
    """There is no subscription, or Redis has refused it."""
    PENDING = "pending"
    """Redis has not confirmed the subscription yet, or the connection was lost."""
    SETTLING = "settling"
    """Redis has confirmed it, but publishers may still skip the channel."""
    QUIET = "quiet"
    """Every new entry is published, as far as can be known; no message has come."""
    LIVE = "live"
    """Messages have come."""

    @property
    def is_settled(self) -> bool:
        """Whether every new entry is published, as far as can be known."""
        return self is FeedState.QUIET or self is FeedState.LIVE


class FeedInput(enum.Enum):
    """What happens to a subscription."""

    SUBSCRIBE = enum.auto()
    CONFIRMED = enum.auto()
    MESSAGE = enum.auto()
    TIME_PASSED = enum.auto()
    """Publishers have noticed the subscriber by now."""
    INTERRUPTED = enum.auto()
    REFUSED = enum.auto()


_F, _G = FeedState, FeedInput

FEED_TRANSITIONS: Mapping[tuple[FeedState, FeedInput], FeedState] = {
    (_F.ABSENT, _G.SUBSCRIBE): _F.PENDING,
    (_F.PENDING, _G.CONFIRMED): _F.SETTLING,
    (_F.PENDING, _G.REFUSED): _F.ABSENT,
    (_F.SETTLING, _G.MESSAGE): _F.LIVE,
    (_F.SETTLING, _G.TIME_PASSED): _F.QUIET,
    (_F.QUIET, _G.MESSAGE): _F.LIVE,
    **{(state, _G.INTERRUPTED): _F.PENDING for state in (_F.SETTLING, _F.QUIET, _F.LIVE)},
    **{(state, _G.REFUSED): _F.ABSENT for state in (_F.SETTLING, _F.QUIET, _F.LIVE)},
}
"""The next state. An input that is not listed for a state changes nothing there."""


@dataclass(frozen=True, slots=True)
class Page:
    """What came next in a log."""

    entries: Iterable[AnyEntry]
    """They are parsed while they are iterated over, which raises `Unreadable` where one cannot be."""
    last: EntryId
    """The place after the page."""
    is_full: bool
    """Whether there may be more already."""
    queued: Queued | None = None
    """The entry `queued`, where the log has nothing else so far."""
    is_at_hole: bool = False
    """Whether entries are missing after `last` that a log without a seal may still call void."""


@dataclass(frozen=True, slots=True)
class Read:
    """A request to read the log."""

    after: EntryId
    waits: bool = False
    """Whether to wait for the next entry."""
    must_exist: bool = False
    """Whether it is an error if the log does not exist."""
    is_first: bool = False
    """Whether the log, and the place in it, are still to be confirmed."""
    is_at_hole: bool = False
    """Whether entries after the place are known to be missing."""


class FollowMachine:
    """One follower of one log, from the place after an entry.

    `tick_weight` is how much a tick counts towards silence. Followers that differ in it do not read all at once.
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
        """Seconds to wait before the next read: at a hole."""
        self.queued: Queued | None = None
        """The entry `queued`, where the log has nothing else so far."""
        self.wants_feed = False
        """Whether the feed can be of use: the end of the log was reached."""
        self.polls = False
        """Whether the feed is given up."""
        self._attempt, self._n = after
        """The place after all entries that are here."""
        self._held: list[tuple[Sequence[AnyEntry], int]] = []
        """Messages that came while the log was being read, and their bytes."""
        self._is_confirmed = False
        """Whether the log has the place from which the follower began."""
        self._must_exist = False
        self._first_pause, self._longest_pause = first_pause, longest_pause
        self._place_at_tick = after
        self._tick_weight = tick_weight
        self._silence, self._silence_limit = 0.0, float(_FIRST_LIMIT)
        """The ticks since the last entry, and the number of ticks at which the follower reads the log."""
        self._is_feed_in_doubt = False
        """Whether the log is read after a silence of a settled feed. Entries in the page are then entries it missed."""
        self._misses, self._missed_until = 0, after
        """How many silences in a row the feed has missed entries, and the place after the last page."""

    @property
    def end(self) -> EntryId:
        """The place after all entries that are here, also those that are still to be drained."""
        return EntryId(self._attempt, self._n)

    def drain(self) -> Iterable[AnyEntry]:
        """Return the next entries: a page of the log first, then entries of the feed."""
        if self.page:
            page, self.page = self.page, ()
            return page
        ready, self.ready, self.kept_bytes = self.ready, [], 0
        return ready

    def on_message(self, entries: Sequence[AnyEntry], size: int) -> None:
        """The feed delivered entries that Redis has accepted, in a message of `size` bytes."""
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
        """The feed may have left something out: have the log read. With `must_exist`, a missing log is an error."""
        self._must_exist |= must_exist
        self._move(FollowInput.LOOK_UP)

    def on_tick(self, *, waits: bool, feed: FeedState) -> bool:
        """A tick has passed. Returns whether the log is to be read now, for a follower that `waits` in silence."""
        if not waits or self._place_at_tick != (self._attempt, self._n):
            self._place_at_tick, self._silence = self.end, 0.0
            self._silence_limit = float(_SILENCE_LIMIT if feed is FeedState.LIVE else _FIRST_LIMIT)
            return False
        self._silence += self._tick_weight
        if self._silence < self._silence_limit:
            return False
        self._silence_limit += min(2 * self._silence_limit, _SILENCE_LIMIT)
        self._is_feed_in_doubt = feed.is_settled
        self.look_up(must_exist=self._silence_limit > _SILENCE_LIMIT)
        return True

    def next_read(self) -> Read | None:
        """Return the reading that is due, which `on_page` or `on_read_failed` has to follow.

        None if entries are to be drained first, or the feed delivers the next ones.
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
        """The log has been read: it has this page after the place, or nothing."""
        before, held, self._held, self.kept_bytes = self.end, self._held, [], 0
        in_doubt, self._is_feed_in_doubt = self._is_feed_in_doubt, False
        outcome = FollowInput.PAGE_TO_END
        if page is not None:
            self.page, self.queued = page.entries, page.queued
            self._attempt, self._n = page.last
            if in_doubt:
                self._misses = self._misses + 1 if self._missed_until == before else 1
            self._missed_until = page.last
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
        # In the attempt of the seal's number the seal may be the next id, and a message of the feed ends no log.
        if self._misses >= _MAX_MISSES or self._attempt == SEAL.attempt:
            self.fall_back()
        elif self.polls:
            self._poll()
        self.wants_feed |= outcome is FollowInput.PAGE_TO_END
        for entries, size in held if self.state is FollowState.LISTENING else ():
            self.on_message(entries, size)

    def on_read_failed(self) -> None:
        """The log could not be read."""
        self._held, self.kept_bytes = [], 0
        self._move(FollowInput.READ_FAILED)
        self._poll()

    def fall_back(self) -> None:
        """Give the feed up."""
        self.polls = True
        self._poll()

    def _poll(self) -> None:
        if self.polls and self._is_confirmed:
            self._move(FollowInput.FALL_BACK)

    def _move(self, event: FollowInput) -> None:
        self.state = TRANSITIONS.get((self.state, event), self.state)
