"""Errors in a stream of chunks: instead of a chunk, in a chunk, or in one of its choices. No I/O."""

import msgspec

from ..error_bodies import decoded, excerpt, is_error, is_no_error
from ..errors import UpstreamError, from_event, malformed
from .shapes import RawObject

_decode = msgspec.json.decode
_encode = msgspec.json.encode


def error_within(chunk: RawObject, choices: list[RawObject], deltas: list[RawObject]) -> UpstreamError | None:
    """The `error` field of a chunk, a choice or a delta, which may have other fields too.

    A field that reports no error, such as `"error": false`, is dropped.
    """
    for place in (chunk, *choices, *deltas):
        if "error" in place:
            raw = place.pop("error")
            if not is_no_error(error := _decode(raw)):
                return from_event({**_decode(_encode(place)), "error": error})
    return None


def error_instead_of(chunk: RawObject) -> UpstreamError | None:
    """The error that a server sent instead of a chunk with choices; None if the chunk is no error."""
    return from_event(event) if is_error(event := _decode(_encode(chunk))) else None


def unreadable(data: bytes, why: str) -> UpstreamError:
    """The error for data that is not a chunk: the server's error, if it can be read, or else a malformed stream."""
    if is_error(value := decoded(data)):
        return from_event(value)
    return malformed(f"the stream contains something other than chunks of a completion ({why}): {excerpt(data[:150])}")
