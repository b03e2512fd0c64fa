"""The jobs of the soak: requests, the outcomes they may have, and the answers they must have. Pure data, no I/O."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import msgspec

from worker.contract.entries import JSON, Object
from worker.sandbox.simulator.record import digest
from worker.sandbox.simulator.replies import Reply
from worker.sandbox.simulator.requests import Options, parse_chat_request

__all__ = ["Expected", "Plan", "plan"]

DONE = frozenset({"done"})


class Expected(NamedTuple):
    """One choice of the complete answer."""

    content: str
    reasoning: str
    arguments: str
    token_ids: list[int]
    logprobs: list[Any]
    finish_reason: str
    stop_reason: object


class Plan(msgspec.Struct, kw_only=True):
    """One request, with everything that the checker compares its log with."""

    id: str
    kind: str
    request: Object
    raw: bytes | None = None
    """The job's `request` where it is not JSON."""
    outcomes: frozenset[str] = DONE
    codes: frozenset[str] = frozenset()
    """The error codes that the request may end with. If there are any, it must fail."""
    copies: int = 1
    """How often the job is added."""
    by_client: bool = False
    """Whether our client adds the job, and not a bare XADD."""
    cancel_after: float | None = None
    """Seconds until the request is cancelled."""
    cancel_raw: bool = False
    """Whether a bare XADD cancels the request, and not our client."""
    choices: list[Expected] = []
    prompt_tokens: int = 0
    digest: str = ""
    """The digest of the prompt, by which the simulators' records name the request."""

    @property
    def buried(self) -> bool:
        """Whether the job is invalid, so that it ends among the dead letters."""
        return self.codes == _INVALID


_INVALID = frozenset({"invalid_job"})
_TOOLS: JSON = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


def _plain(dice: random.Random) -> Object:
    return {"question": f"Tell me of {dice.random()}", "simulate": {"tokens": dice.randint(1, 60)}}


def _faulty(fault: str) -> Callable[[random.Random], Object]:
    def request_of(dice: random.Random) -> Object:
        scenario: Object = {"fault": fault, "times": 1, "after": dice.randint(0, 12), "tokens": dice.randint(3, 40)}
        if fault == "429":
            scenario["retry_after"] = 0.1
        return {"question": f"Tell me of {dice.random()}", "simulate": scenario}

    return request_of


def _refused_resume(dice: random.Random) -> Object:
    drawn = _faulty("cut")(dice)
    return {**drawn, "simulate": {**cast("Object", drawn["simulate"]), "then": "prefill"}}


_KINDS: dict[str, tuple[int, Callable[[random.Random], Object]]] = {
    "plain": (30, _plain),
    "known": (4, lambda _: {"question": "Who are you?"}),
    "chinese": (5, lambda _: {"question": "你是谁?"}),
    "emoji": (5, lambda _: {"question": "Send emoji"}),
    "code": (3, lambda _: {"question": "Write code"}),
    "story": (2, lambda _: {"question": "Tell me a story"}),
    "reasoning": (5, lambda _: {"question": "Think first"}),
    "tool": (4, lambda _: {"question": "Weather in Paris", "tools": _TOOLS}),
    "two": (4, lambda dice: {"question": f"Twice {dice.random()}", "n": 2, "temperature": 1}),
    "stop": (4, lambda dice: {"question": "Tell me a story", "stop": [dice.choice(["spring", "by autumn", "zzz"])]}),
    "logprobs": (4, lambda dice: {**_plain(dice), "logprobs": True, "top_logprobs": 2}),
    "length": (4, lambda dice: {"question": "Tell me a story", "max_tokens": dice.randint(1, 50)}),
    "least": (3, lambda dice: {"question": "Who are you?", "min_tokens": dice.randint(1, 60)}),
    "duplicate": (4, _plain),
    "cancelled": (6, lambda dice: {"question": f"Long {dice.random()}", "simulate": {"tokens": 150, "rate": 50}}),
    "prefill": (1, _refused_resume),
    "bad model": (1, lambda _: {"question": "Who are you?", "model": "nope"}),
    "bad field": (1, lambda _: {"question": "Who are you?", "temperature": 9}),
    "bad late": (1, lambda _: {"question": "Who are you?", "logprobs": True, "top_logprobs": 99}),
    "no JSON": (1, lambda _: {"question": "Who are you?"}),
    "forbidden": (1, lambda _: {"question": "Who are you?", "kv_transfer_params": {"prompt_token_ids": [1]}}),
    **{
        fault: (1, _faulty(fault))
        for fault in (
            "refuse", "429", "503", "500", "hang", "stall", "freeze", "cut", "reset", "malformed", "error_under_200",
            "abort", "no_done",
        )
    },
}  # fmt: skip
_CODES = {
    "bad model": frozenset({"model_not_found"}),
    "bad field": frozenset({"invalid_request"}),
    "bad late": frozenset({"invalid_request"}),
    "no JSON": _INVALID,
    "forbidden": _INVALID,
}


def plan(dice: random.Random, number: int, prefix: str) -> Plan:
    """Draw the next job."""
    weights = [weight for weight, _ in _KINDS.values()]
    (kind,) = dice.choices(list(_KINDS), weights)
    request_id = f"{prefix}-{number}"
    drawn = dict(_KINDS[kind][1](dice))
    # The id in the prompt makes every prompt unique, on every route.
    messages: list[Object] = [
        {"role": "system", "content": f"You answer {request_id}."},
        {"role": "user", "content": drawn.pop("question")},
    ]
    request: Object = {"model": "reciter", "temperature": 0, "messages": messages, **drawn}  # type: ignore[dict-item]
    made = Plan(id=request_id, kind=kind, request=request, by_client=dice.random() < 0.5)
    if kind in _CODES:
        made.codes, made.outcomes, made.by_client = _CODES[kind], frozenset({"error"}), False
    if kind == "no JSON":
        made.raw = b'{"messages": \xff['
    if kind == "duplicate":
        made.copies, made.by_client = dice.randint(2, 3), False
    if kind == "cancelled":
        made.cancel_after, made.cancel_raw = dice.expovariate(1.0), dice.random() < 0.5
        made.outcomes = frozenset({"done", "cancelled"})
    if not made.buried:
        _expect(made)
    return made


def _expect(made: Plan) -> None:
    """Add the answer that the simulator gives to this request when nothing goes wrong."""
    sound: dict[str, object] = {"model": "reciter", "temperature": 0, "top_logprobs": 0, "return_token_ids": True}
    body = {**made.request, **({name: sound[name] for name in sound} if made.codes else {"return_token_ids": True})}
    request, scenario = parse_chat_request(body, Options())
    reply = Reply(request, scenario, Options())
    made.prompt_tokens, made.digest = len(reply.question), digest(reply.question)
    if made.codes:
        return
    choices: Any = reply.complete()["choices"]
    made.choices = [
        Expected(
            content=choice["message"]["content"] or "",
            reasoning=choice["message"]["reasoning"] or "",
            arguments="".join(call["function"]["arguments"] for call in choice["message"].get("tool_calls", ())),
            token_ids=choice["token_ids"],
            logprobs=(choice["logprobs"] or {}).get("content") or [],
            finish_reason=choice["finish_reason"],
            stop_reason=choice["stop_reason"],
        )
        for choice in choices
    ]
