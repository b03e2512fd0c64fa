"""Responses whose framing is repaired before they are parsed, as bytes."""

import httptools
import pytest

from worker.vllm.http.framing import FramingRepair, parser_for

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
LENGTH = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n"

MENDED: list[tuple[bytes, bytes]] = [
    (HEAD + b"5\r\nhello\r\n1e\r\n" + b"x" * 30 + b"\r\n0\r\n\r\n", b"hello" + b"x" * 30),
    (HEAD + b"5\nhello\n1e\n" + b"x" * 30 + b"\n0\n\n", b"hello" + b"x" * 30),
    (HEAD + b" 5\r\nhello\r\n  3 \r\nabc\r\n   0\r\n\r\n", b"helloabc"),
    (HEAD + b"\t5;a=b\r\nhello\r\n0\r\nx-after: y\r\n\r\n", b"hello"),
    (HEAD + b"5\n\nello\n3\n\r\n\r\n0\n\n", b"\nello\r\n\r"),
    (HEAD + b" 5\r\nhello 3\r\nabc\r\n0\r\n\r\n", b"helloabc"),
    (HEAD.replace(b"\r", b"") + b" 5\nhello\n0\n\n", b"hello"),
    (LENGTH + b"content-length: 5\r\n\r\nhello", b"hello"),
    (LENGTH + b"Content-Length:  5\r\nx: y\r\nCONTENT-LENGTH: 5\r\n\r\nhello", b"hello"),
    (LENGTH.replace(b"5", b"5, 5") + b"\r\nhello", b"hello"),
    (b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH + b"content-length: 5\r\n\r\nhello", b"hello"),
]


class Reader:
    """The callbacks of a parser."""

    def __init__(self) -> None:
        self.body = b""
        self.status = 0
        self.is_over = False
        self.parser = parser_for(self)

    def on_body(self, piece: bytes) -> None:
        self.body += piece

    def on_message_complete(self) -> None:
        self.is_over = self.parser.get_status_code() == 200


@pytest.mark.parametrize(("answer", "body"), MENDED)
def test_a_repaired_response_is_read_however_its_bytes_are_cut(answer: bytes, body: bytes) -> None:
    pieces = [[answer], [bytes([byte]) for byte in answer], *([answer[:at], answer[at:]] for at in range(len(answer)))]
    for cut in pieces:
        mended, reader = FramingRepair(), Reader()
        for piece in cut:
            reader.parser.feed_data(mended.feed(piece))
        assert (reader.body, reader.is_over) == (body, True), cut


@pytest.mark.parametrize(
    "answer",
    [
        LENGTH + b"content-length: 6\r\n\r\nhello",
        LENGTH.replace(b"5", b"5, 6") + b"\r\nhello",
        HEAD + b"-5\r\nhello\r\n0\r\n\r\n",
        HEAD + b"five\r\nhello\r\n0\r\n\r\n",
        HEAD + b"\r\n5\r\nhello\r\n0\r\n\r\n",
        HEAD + b"x" * 10_000,
    ],
)
def test_a_response_that_cannot_be_repaired_is_refused(answer: bytes) -> None:
    mended, reader = FramingRepair(), Reader()
    with pytest.raises(httptools.HttpParserError):
        reader.parser.feed_data(mended.feed(answer))
