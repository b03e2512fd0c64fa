"""The messages of a request's feed, and for how long a publisher may skip the feed.

A message is JSON, `[[id, {field: value}], …]`: entries that Redis has accepted, in the order of the log. A message may
be lost or late; the log is the truth.
"""

from typing import Literal

import msgspec

from .entries import AnyEntry, BadEntry, Delta, parse
from .ids import EntryId

MAX_SILENCE = 0.25
"""Seconds for which a publisher may skip a channel once Redis has reported that it has no subscribers."""


class _FeedDelta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A delta without the rarer fields. Nearly every message consists of these."""

    type: Literal["delta"]
    content: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    token_ids: str = "[]"  # noqa: S105 - not a secret: tokens of a model


_read_plain = msgspec.json.Decoder(list[tuple[str, _FeedDelta]]).decode
_read_any = msgspec.json.Decoder(list[tuple[str, dict[str, str]]]).decode
_read_ids = msgspec.json.Decoder(list[int]).decode


def read_message(payload: bytes) -> list[AnyEntry]:
    """Read the entries of a message as `parse` does. Plain deltas take a third of the time that `parse` takes.

    Raises:
        BadEntry: when the message or one of its entries cannot be read.
    """
    try:
        try:
            plain = _read_plain(payload)
        except msgspec.ValidationError:
            return [parse(entry_id, fields) for entry_id, fields in _read_any(payload)]
        entries: list[AnyEntry] = []
        for entry_id, delta in plain:
            entries.append(  # a comprehension is a call of its own in Python 3.11
                Delta(
                    id=EntryId.parse(entry_id),
                    content=delta.content,
                    reasoning=delta.reasoning,
                    finish_reason=delta.finish_reason,
                    token_ids=_read_ids(delta.token_ids),
                )
            )
    except (ValueError, msgspec.MsgspecError) as error:
        raise BadEntry(f"a message of the feed cannot be read: {error}") from error
    return entries
