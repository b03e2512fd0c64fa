"""A reader of a request's log that checks it against the guarantees of the contract."""

from dataclasses import dataclass, field
from typing import TypeAlias

from fleet import tokens_of

from worker.contract.answer import Answer
from worker.contract.entries import Cancelled, Claimed, Done, Entry, Queued, Started, parse
from worker.contract.ids import SEAL, EntryId

Raw: TypeAlias = list[tuple[bytes, dict[bytes, bytes]]]


@dataclass(eq=False)
class FleetFollower:
    """A reader of one log: what it has seen, and what it knows of the request."""

    id: str
    length: int
    answer: Answer = field(default_factory=Answer)
    seen: Raw = field(default_factory=list)
    ever: dict[bytes, dict[bytes, bytes]] = field(default_factory=dict)
    was_cancelled: bool = False
    lost_its_log: bool = False

    @property
    def text(self) -> str:
        """The text of the model's whole answer."""
        return "".join(tokens_of(self.id, self.length))

    def read(self, raw: Raw) -> None:
        """Read the log: earlier entries must be unchanged, and new ones must continue them."""
        assert raw[: len(self.seen)] == self.seen, "earlier entries have changed"
        last = EntryId.parse(self.seen[-1][0]) if self.seen else None
        for entry_id, fields in raw[len(self.seen) :]:
            assert self.ever.setdefault(entry_id, fields) == fields, f"{entry_id!r} came twice"
            entry = parse(entry_id, fields)
            if last is None or entry.id > last:  # an entry that a failover lost is read once
                self._add(entry)
        self.seen = raw
        self.check_whole([parse(*entry) for entry in raw])

    def _add(self, entry: Entry) -> None:
        """Add the next entry to the answer."""
        self.answer.add(entry)
        assert self.text.startswith(self.answer.text), f"{self.answer.text!r} is not the start of {self.text!r}"
        if isinstance(entry, Done):
            assert self.answer.text == self.text, f"done with {self.answer.text!r} in place of {self.text!r}"

    def check_whole(self, entries: list[Entry]) -> None:
        """Check the rules for a whole log, as a reader from the start sees it."""
        before: EntryId | None = None
        for entry in entries:
            assert entry.id in _may_follow(before), f"{entry.id} after {before}"
            first_of_attempt = {EntryId(0, 1): Queued, EntryId(1, 0): Started}.get(entry.id, Claimed)
            assert isinstance(entry, first_of_attempt) == (entry.id.n == 0 or entry.id == (0, 1)), entry
            before = entry.id if entry.id != SEAL else before
        answer = Answer(entries)
        assert self.text.startswith(answer.text), f"{answer.text!r} is not the start of {self.text!r}"
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
