"""The parser of HTTP/1.1 responses, and the repair of responses whose framing the parser refuses. No I/O."""

import re
from typing import Any

import httptools

_TLS_ALERT = b"\x15\x03"
_LENIENCIES = {
    "lenient_chunked_length": True,  # Content-Length together with chunked, which overrides it (RFC 9112, 6.3)
    "lenient_optional_cr_before_lf": True,  # lines that end in LF alone
    "lenient_spaces_after_chunk_size": True,
}
"""Leniency for simple servers and proxies. It is dangerous only if other parties read the same connection."""
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_LONGEST_LINE = 4096
"""Bytes of a line of a chunked body, other than its data."""
_SIZE = re.compile(rb"[0-9a-fA-F]{1,15}")


def parser_for(protocol: Any) -> httptools.HttpResponseParser:  # noqa: ANN401 - any of the callbacks may be missing
    """A parser that calls back the protocol's `on_…` methods."""
    parser = httptools.HttpResponseParser(protocol)
    parser.set_dangerous_leniencies(**_LENIENCIES)
    return parser


def why_not_http(error: Exception, data: bytes) -> str:
    """The error text for a response that the parser refused."""
    if data.startswith(_TLS_ALERT):
        return "the server speaks TLS: its URL begins with https://"
    raised = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
    return f"no HTTP/1.1: {raised or error}"


def is_repairable(error: Exception, start: bytes) -> bool:
    """Whether `FramingRepair` may make a response readable that the parser refused."""
    return not isinstance(error, httptools.HttpParserCallbackError) and start.startswith(b"HTTP/1.")


class FramingRepair:
    """Rewrites a response from its first byte so that httptools 0.9 (llhttp) reads it: bytes in, bytes out.

    A Content-Length that is repeated with the same number is written once (RFC 9110, 8.6). In a chunked body, lines may
    end in LF alone, and a size may have blanks around it.
    """

    def __init__(self) -> None:
        self._held = b""
        self._rewrite = self._head
        self._left = 0

    def feed(self, data: bytes) -> bytes:
        """Add a piece of the response; returns as much as can be rewritten so far."""
        out: list[bytes] = []
        data = self._held + data
        while data:
            before = len(data), self._rewrite
            data = self._rewrite(data, out)
            if (len(data), self._rewrite) == before:  # the step needs more data
                break
        self._held = data
        return b"".join(out)

    def _head(self, data: bytes, out: list[bytes]) -> bytes:
        if (end := _END_OF_HEAD.search(data)) is None:
            return data
        lines: list[bytes] = []
        lengths: set[bytes] = set()
        for line in data[: end.start()].replace(b"\r\n", b"\n").split(b"\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                numbers = {number.strip() for number in value.split(b",")}
                if numbers == lengths:
                    continue
                lengths = numbers
                line = b"content-length: " + b", ".join(sorted(numbers))  # noqa: PLW2901 - the rewritten line
            lines.append(line)
        out.append(b"\r\n".join(lines) + b"\r\n\r\n")
        is_interim = lines[0].partition(b" ")[2].startswith(b"1")
        is_chunked = any(re.fullmatch(rb"(?i)transfer-encoding:(.*,)?\s*chunked\s*", line) for line in lines)
        if not is_interim:
            self._rewrite = self._size if is_chunked else self._rest
        return data[end.end() :]

    def _size(self, data: bytes, out: list[bytes]) -> bytes:
        line, mark, rest = data.partition(b"\n")
        if not mark and len(line) <= _LONGEST_LINE:
            return data
        line = line.strip()
        size = line.partition(b";")[0].strip()
        self._left = int(size, 16) if mark and _SIZE.fullmatch(size) else 0
        out.append((b"%x" % self._left if self._left else line) + b"\r\n")
        self._rewrite = self._data if self._left else self._trailer  # after the last size, or an invalid one
        return rest

    def _data(self, data: bytes, out: list[bytes]) -> bytes:
        piece, rest = data[: self._left], data[self._left :]
        out.append(piece)
        self._left -= len(piece)
        if not self._left:
            self._rewrite = self._after_data
        return rest

    def _after_data(self, data: bytes, out: list[bytes]) -> bytes:
        line, mark, rest = data.partition(b"\n")
        if not mark and line in {b"", b"\r"}:
            return data
        out.append(b"\r\n")
        self._rewrite = self._size
        return rest if line in {b"", b"\r"} else data

    def _trailer(self, data: bytes, out: list[bytes]) -> bytes:
        line, mark, rest = data.partition(b"\n")
        if not mark:
            return data
        out.append(line.rstrip(b"\r") + b"\r\n")
        return rest

    def _rest(self, data: bytes, out: list[bytes]) -> bytes:
        out.append(data)
        return b""
