"""The unknown fields of chunks, such as a fingerprint. They are published in `extra`. No I/O."""

import msgspec
from msgspec import Raw

from ...contract.entries import Fields, Object
from .shapes import PRIVATE, RawObject, has_value

_decode = msgspec.json.decode
_encode = msgspec.json.encode

_KNOWN = frozenset({"id", "object", "created", "model", "choices", "usage", "prompt_token_ids", *PRIVATE})
_OF_EVERY_CHUNK = frozenset({"system_fingerprint", "service_tier"})
"""Unknown fields that every chunk may have, and that indicate no error."""


class ExtraFields:
    """Unknown fields of the chunks of one answer: each is published once, and again when its value changes.

    Attributes:
        unpublished: the fields that the next entry publishes.
    """

    __slots__ = ("_latest", "unpublished")

    def __init__(self) -> None:
        self._latest: dict[str, bytes] = {}
        self.unpublished: RawObject = {}

    def __contains__(self, name: str) -> bool:
        return name in self._latest

    def value_of(self, name: str) -> bytes | None:
        """The latest value of a field, as JSON."""
        return self._latest.get(name)

    def add(self, name: str, raw: Raw) -> None:
        """Publish a field, unless its value is empty or the same as before."""
        value = bytes(raw)
        if has_value(raw) and self._latest.get(name) != value:
            self._latest[name] = value
            self.unpublished[name] = raw

    def add_unknown(self, chunk: RawObject) -> None:
        """Publish all unknown fields of a chunk."""
        if not chunk.keys() <= _KNOWN:
            for name in chunk.keys() - _KNOWN:
                self.add(name, chunk[name])

    def publish(self, of_choice: RawObject | None = None) -> Fields:
        """The field `extra` of an entry: the fields of the choice, with the unpublished fields under `chunk`.

        Without a choice, the unpublished fields are directly in `extra`.
        """
        shown, self.unpublished = self.unpublished, {}
        if of_choice is not None:
            shown = of_choice | {"chunk": Raw(_encode(shown))} if shown else of_choice
        return {"extra": _encode(shown).decode()} if shown else {}

    def unpublished_values(self) -> Object:
        """The unpublished fields, decoded."""
        return _decode(_encode(self.unpublished), type=dict)

    def unusual(self) -> str:
        """The fields that not every chunk has, as JSON; empty if there are none."""
        unusual = {name: Raw(raw) for name, raw in self._latest.items() if name not in _OF_EVERY_CHUNK}
        return _encode(unusual).decode() if unusual else ""
