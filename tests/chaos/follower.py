"""Somebody who reads the log of a request, and holds it against what the contract promises."""

from dataclasses import dataclass, field
from typing import TypeAlias

from fleet import tokens_of

from worker.contract.answer import Answer
from worker.contract.entries import Cancelled, Claimed, Done, Entry, Queued, Started, parse
from worker.contract.ids import SEAL, EntryId

Raw: TypeAlias = list[tuple[bytes, dict[bytes, bytes]]]


@dataclass(eq=False)
class Follower:
    """Somebody who reads the log of a request, and what they hold against it."""

    id: str
    length: int
    answer: Answer = field(default_factory=Answer)
    seen: Raw = field(default_factory=list)
    ever: dict[bytes, dict[bytes, bytes]] = field(default_factory=dict)
    was_cancelled: bool = False
    lost_its_log: bool = False

    @property
    def text(self) -> str:
        """What the model answers."""
        return "".join(tokens_of(self.id, self.length))

    def read(self, raw: Raw) -> None:
        """Read the log: what was there stays, and what is new follows from it."""
        assert raw[: len(self.seen)] == self.seen, "what was written has changed"
        last = EntryId.parse(self.seen[-1][0]) if self.seen else None
        for entry_id, fields in raw[len(self.seen) :]:
            assert self.ever.setdefault(entry_id, fields) == fields, f"{entry_id!r} came twice"
            entry = parse(entry_id, fields)
            if last is None or entry.id > last:  # what a failover lost is read once
                self.take(entry)
        self.seen = raw
        self.check_whole([parse(*entry) for entry in raw])

    def take(self, entry: Entry) -> None:
        """Take the next entry."""
        self.answer.add(entry)
        assert self.text.startswith(self.answer.text), f"{self.answer.text!r} is no beginning of {self.text!r}"
        if isinstance(entry, Done):
            assert self.answer.text == self.text, f"done with {self.answer.text!r} in place of {self.text!r}"

    def check_whole(self, entries: list[Entry]) -> None:
        """The rules for the log as a whole, as one sees it who reads it from the start."""
        before: EntryId | None = None
        for entry in entries:
            assert entry.id in _may_follow(before), f"{entry.id} after {before}"
            first_of_attempt = {EntryId(0, 1): Queued, EntryId(1, 0): Started}.get(entry.id, Claimed)
            assert isinstance(entry, first_of_attempt) == (entry.id.n == 0 or entry.id == (0, 1)), entry
            before = entry.id if entry.id != SEAL else before
        answer = Answer(entries)
        assert self.text.startswith(answer.text), f"{answer.text!r} is no beginning of {self.text!r}"
        if answer.end is not None:
            assert isinstance(answer.end, Done | Cancelled), answer.end
            assert self.was_cancelled or isinstance(answer.end, Done)
        if isinstance(answer.end, Done):
            assert answer.text == self.text
            assert before
            assert answer.end.attempt == before.attempt, "sealed by a former owner"


def _may_follow(before: EntryId | None) -> tuple[EntryId, ...]:
    if before is None:
        return EntryId(0, 1), EntryId(1, 0), SEAL
    return EntryId(before.attempt, before.n + 1), EntryId(before.attempt + 1, 0), SEAL
