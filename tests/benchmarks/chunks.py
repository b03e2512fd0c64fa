"""What the load generator sends, encoded beforehand: chunks as vLLM 0.32.0 sends them to who asks for token ids, as our
worker does of its own accord. All bridges get the same bytes.

The texts go round a list of words, so that a reader knows which text the n-th delta of a stream must have.
"""

import json
from functools import cache
from typing import Any

MODEL = "bench"

_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_CREATED = 1795369793
_PROMPT = [3, 478, 202, 425, 481, 586, 34, 2, 202, 3, 68, 309, 474, 87, 202]
_FINGERPRINT = "vllm-0.32.0-f2806c7f"

_TEXT = """\
A stream carries the words of a long answer to all who want to follow it , and each of them may come late , go away and
come back : what was written stays in order , under numbers that tell at once whether some of it is missing . It does
not matter who writes , for the next one takes the pen up where the last one dropped it and nobody can tell from the
text alone that there were two . Readers keep their place by themselves ; they ask for what comes after the entry that
they saw last , and wait if there is nothing yet ."""
WORDS = [" " + word for word in _TEXT.split()]
TOKEN_IDS = [11 + 1181 * number % 127_000 for number in range(len(WORDS))]
"""As wide as those of a vocabulary of 128,000, as many models have."""


class Stream:
    """The encoded parts of one stream: an id of its own, and otherwise what all share."""

    def __init__(self, number: int) -> None:
        self.head = f'data: {{"id":"chatcmpl-{number:016x}",'.encode()

    @property
    def opening(self) -> bytes:
        """The head of the response and the chunk with the role."""
        return _HEAD + self.chunk(_ROLE)

    def token(self, number: int) -> bytes:
        """The HTTP chunk of the n-th token."""
        size, tail = _TOKENS[number % len(_TOKENS)]
        return b"".join((size, self.head, tail))

    @property
    def ending(self) -> bytes:
        """The chunks after the last token, and the end of the response."""
        done = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        return self.chunk(_FINISH) + self.chunk(_USAGE) + done

    def chunk(self, part: tuple[bytes, bytes]) -> bytes:
        """An HTTP chunk with one event."""
        return b"".join((part[0], self.head, part[1]))


def whole_answer(number: int, tokens: int) -> bytes:
    """All of a response with so many tokens."""
    return _whole(tokens).replace(Stream(0).head, Stream(number).head)


@cache
def _whole(tokens: int) -> bytes:
    stream = Stream(0)
    return b"".join([stream.opening, *map(stream.token, range(tokens)), stream.ending])


def _encoded(choices: list[Any], **rest: object) -> tuple[bytes, bytes]:
    """The line with the size of a chunk, and what follows the id in it."""
    chunk = {"object": "chat.completion.chunk", "created": _CREATED, "model": MODEL, "choices": choices, **rest}
    tail = json.dumps(chunk, separators=(",", ":")).encode()[1:] + b"\n\n"
    return f"{len(Stream(0).head) + len(tail):x}\r\n".encode(), tail + b"\r\n"


def _choice(delta: dict[str, str], finish_reason: str | None = None, **rest: object) -> dict[str, object]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason, **rest}


_ROLE = _encoded([_choice({"role": "assistant", "content": ""})], prompt_token_ids=_PROMPT, prompt_text=None)
_TOKENS = [
    _encoded([_choice({"content": word}, token_ids=[token])]) for word, token in zip(WORDS, TOKEN_IDS, strict=True)
]
_FINISH = _encoded([_choice({}, "stop", stop_reason=None, token_ids=[2])])
_USAGE = _encoded(
    [], usage={"prompt_tokens": 15, "total_tokens": 115, "completion_tokens": 100}, system_fingerprint=_FINGERPRINT
)
MODELS = json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 131072}]}).encode()
