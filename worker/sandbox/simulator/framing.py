"""The bytes of a server-sent event, as vLLM or another server sends it. No I/O."""

import msgspec

from .requests import Shape

__all__ = ["DONE", "comment", "frame"]

DONE = b"[DONE]"


def frame(payload: bytes, shapes: frozenset[Shape], *, first: bool = False) -> bytes:
    """One event; `first` is true for the first of a stream."""
    end = _line_end(shapes)
    field = b"data:" if "no_space" in shapes else b"data: "
    if "multiline" in shapes and payload != DONE:
        payload = msgspec.json.format(payload, indent=1)
    event = b"".join(field + line + end for line in payload.split(b"\n")) + end
    if "comments" in shapes:
        event = comment(shapes) + event
    return b"\xef\xbb\xbf" + event if first and "bom" in shapes else event


def comment(shapes: frozenset[Shape]) -> bytes:
    """A keep-alive comment."""
    return b": keep-alive" + 2 * _line_end(shapes)


def _line_end(shapes: frozenset[Shape]) -> bytes:
    if "crlf" in shapes:
        return b"\r\n"
    return b"\r" if "cr" in shapes else b"\n"
