"""A JSON value of any size as a response: it is encoded piece by piece, as the client reads it."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice

from ..contract.entries import to_json
from .outlets import ABORT, Receive, Scope, Send
from .responses import json_response
from .stream_response import response_start

_PIECE = 64 * 1024
"""Characters of a text that are encoded at once, and bytes that are sent at once."""

_SHORT_LIST = 64
"""Elements up to which each element of a list is encoded for itself."""


class LargeJson:
    """An ASGI response with a JSON value.

    Args:
        write_timeout: seconds after which a client that takes nothing loses its connection.
        on_end: called once the response has ended, in any way.
    """

    def __init__(
        self, value: object, headers: Mapping[str, str], *, write_timeout: float, on_end: Callable[[], object]
    ) -> None:
        self._value = value
        self._headers = dict(headers)
        self._write_timeout = write_timeout
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            pieces = json_pieces(self._value)
            first = next(pieces)
            if len(first) < _PIECE:  # it is the only one
                await json_response(self._value, headers=self._headers)(scope, receive, send)
                return
            start = {"Content-Type": "application/json", "Cache-Control": "no-store"}
            await send(response_start(start | self._headers))
            await send_pieces(chain([first], pieces), scope, send, self._write_timeout)
        finally:
            self._on_end()


def json_pieces(value: object) -> Iterator[bytes]:
    """Yield the compact JSON of a value in pieces of about 64 KiB. No step takes long, however large a text is."""
    buffer = bytearray()
    for part in _parts(value):
        buffer += part.encode()
        if len(buffer) >= _PIECE:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


async def send_pieces(pieces: Iterator[bytes], scope: Scope, send: Send, write_timeout: float) -> bool:
    """Send the rest of a body. A client that takes nothing for `write_timeout` seconds loses its connection.

    Returns whether everything was sent.
    """
    try:
        for piece in pieces:
            async with asyncio.timeout(write_timeout):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)  # a client that reads fast leaves others their turn
        async with asyncio.timeout(write_timeout):  # the server waits here until the client has read the rest
            await send({"type": "http.response.body", "body": b"", "more_body": True})
    except TimeoutError:
        abort = scope.get(ABORT)
        if abort is not None:
            abort()
        return False
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    return True


def _parts(value: object) -> Iterator[str]:
    if isinstance(value, str) and len(value) > _PIECE:
        yield '"'
        for at in range(0, len(value), _PIECE):
            yield to_json(value[at : at + _PIECE])[1:-1]
        yield '"'
    elif isinstance(value, Mapping):
        for n, (name, member) in enumerate(value.items()):
            yield f"{',' if n else '{'}{to_json(name)}:"
            yield from _parts(member)
        yield "}" if value else "{}"
    elif isinstance(value, list) and len(value) > _SHORT_LIST:
        elements = iter(value)
        before = "["
        while some := list(islice(elements, _SHORT_LIST)):
            yield before + to_json(some)[1:-1]
            before = ","
        yield "]"
    elif isinstance(value, list):
        for n, element in enumerate(value):
            yield "," if n else "["
            yield from _parts(element)
        yield "]" if value else "[]"
    else:
        yield to_json(value)
