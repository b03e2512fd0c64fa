"""Errors that come in place of a chunk, in it, or in one of its choices. No I/O."""

import msgspec

from ..error_bodies import decoded, excerpt, is_error, says_nothing
from ..errors import UpstreamError, from_event, malformed
from .shapes import RawObject

_decode = msgspec.json.decode
_encode = msgspec.json.encode


def error_beside(chunk: RawObject, choices: list[RawObject], deltas: list[RawObject]) -> UpstreamError | None:
    """The error that stands in a chunk, in a choice or in a delta, beside what these say.

    `"error": false` and the like are no error, and are dropped.
    """
    for place in (chunk, *choices, *deltas):
        if "error" in place:
            raw = place.pop("error")
            if not says_nothing(error := _decode(raw)):
                return from_event({**_decode(_encode(place)), "error": error})
    return None


def error_in_place_of(chunk: RawObject) -> UpstreamError | None:
    """The error that a chunk without choices is."""
    return from_event(event) if is_error(event := _decode(_encode(chunk))) else None


def unreadable(data: bytes, why: str) -> UpstreamError:
    """The error for data that is no chunk: perhaps it is an error in a shape of its own."""
    if is_error(value := decoded(data)):
        return from_event(value)
    return malformed(f"the stream holds what is no chunk of a completion ({why}): {excerpt(data[:150])}")
