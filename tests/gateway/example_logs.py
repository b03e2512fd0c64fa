"""Logs of every kind, for tests of streams."""

from worker.contract.entries import (
    AnyEntry,
    Cancelled,
    Claimed,
    Delta,
    Done,
    Failed,
    Opened,
    Queued,
    Restarted,
    Resumed,
    Started,
    Unknown,
)
from worker.contract.ids import SEAL, EntryId

_USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def _at(attempt: int, n: int) -> EntryId:
    return EntryId(attempt, n)


def _begin() -> list[AnyEntry]:
    return [
        Queued(id=_at(0, 1), digest="d", deadline=1),
        Started(id=_at(1, 0), queue="default", job="1-1", worker="w", owner="o", time=1),
        Opened(id=_at(1, 1), response_id="chatcmpl-1", model="m", created=1, role="assistant", prompt_tokens=3),
    ]


def _end(attempt: int = 1) -> Done:
    return Done(id=SEAL, attempt=attempt, finish_reason="stop", usage=_USAGE, model="m")  # type: ignore[arg-type]


def _delta(attempt: int, n: int, **fields: object) -> Delta:
    return Delta(id=_at(attempt, n), token_ids=[n], **fields)  # type: ignore[arg-type]


def _call(**piece: object) -> dict[str, object]:
    return {"index": 0, "type": "function", **piece}


LOGS: dict[str, list[AnyEntry]] = {
    "text": [
        *_begin(),
        _delta(1, 2, content="Hello"),
        _delta(1, 3, content=" 世界 \u2028\u0085"),
        _delta(1, 4, content='\n\n"quoted"\r\n'),
        _delta(1, 5, content=" 🙂", logprobs={"content": [{"token": "x", "logprob": -0.5}]}),
        _delta(1, 6, finish_reason="stop"),
        _end(),
    ],
    "tools": [
        *_begin(),
        _delta(1, 2, tool_calls=[_call(id="c", function={"name": "f", "arguments": ""})]),
        _delta(1, 3, tool_calls=[_call(function={"arguments": '{"a":'})]),
        _delta(1, 4, tool_calls=[_call(function={"arguments": "1}"})]),
        _delta(1, 5, finish_reason="tool_calls"),
        _end(),
    ],
    "reasoning": [
        *_begin(),
        _delta(1, 2, reasoning="Let me see."),
        _delta(1, 3, reasoning=" Yes."),
        _delta(1, 4, content="Yes."),
        _delta(1, 5, finish_reason="stop", stop_reason="."),
        _end(),
    ],
    "choices": [
        *_begin(),
        _delta(1, 2, content="a", index=0),
        _delta(1, 3, content="b", index=1),
        _delta(1, 4, content="B", index=1, finish_reason="stop"),
        _delta(1, 5, content="A", index=0, finish_reason="length"),
        _end(),
    ],
    "restarted": [
        *_begin(),
        _delta(1, 2, content="void"),
        Claimed(id=_at(2, 0), queue="default", job="1-1", worker="v", owner="p", time=2, reason="takeover"),
        Restarted(id=_at(2, 1)),
        Opened(id=_at(2, 2), response_id="chatcmpl-2", model="m", created=2, role="assistant", prompt_tokens=3),
        _delta(2, 3, content="again"),
        _delta(2, 4, finish_reason="stop"),
        _end(2),
    ],
    "resumed": [
        *_begin(),
        _delta(1, 2, content="one"),
        _delta(1, 3, content=" two"),
        Claimed(id=_at(3, 0), queue="default", job="1-1", worker="v", owner="p", time=2, reason="takeover"),
        Resumed(id=_at(3, 1), after="1-2", cut=0, forgets=["presence_penalty"]),
        Opened(id=_at(3, 2), response_id="chatcmpl-2", model="m", created=2, role="assistant", prompt_tokens=3),
        _delta(3, 3, content=" three"),
        _delta(3, 4, finish_reason="stop"),
        _end(3),
    ],
    "error": [
        *_begin(),
        _delta(1, 2, content="one"),
        Failed(id=SEAL, attempt=1, code="upstream_error", message="the server failed", finish_reason="error"),
    ],
    "cancelled": [*_begin(), _delta(1, 2, content="one"), Cancelled(id=SEAL)],
    "cancelled at once": [Cancelled(id=SEAL)],
    "unknown types": [
        *_begin(),
        Unknown(id=_at(1, 2), name="later", fields={"a": "b"}),
        _delta(1, 3, content="one", extra={"delta": {"refusal": "no"}, "future": [1]}),
        _end(),
    ],
}
"""A log of each kind, by its name."""
