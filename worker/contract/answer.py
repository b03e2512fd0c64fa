"""A whole answer, assembled from the entries of its log. Nothing else interprets the sequence of entries."""

from collections.abc import Iterable
from typing import Self, cast

import msgspec

from .accumulation import accumulate_value, add_tool_call, join_pieces
from .entries import (
    JSON,
    TEXT_FIELDS,
    Cancelled,
    Claimed,
    Delta,
    Entry,
    Failed,
    Object,
    Opened,
    Restarted,
    Resumed,
    Started,
    Terminal,
    Unknown,
    Usage,
    refusal_of,
    rest_of_message,
)
from .ids import SEAL, EntryId

_IN_PLACE_OF_TEXT = frozenset({"refusal", "function_call", "audio"})


class Choice(msgspec.Struct):
    """One of the `n` answers of a request."""

    index: int = 0
    content: str = ""
    reasoning: str = ""
    tool_calls: list[Object] = msgspec.field(default_factory=list)
    finish_reason: str = ""
    stop_reason: JSON = None
    logprobs: JSON = None
    token_ids: list[int] = msgspec.field(default_factory=list)
    extra: Object = msgspec.field(default_factory=dict)

    @classmethod
    def of(cls, index: int, deltas: Iterable[Delta]) -> Self:
        """Make a choice from all of its deltas. The time is linear: `add` copies the whole text for each delta."""
        choice, content, reasoning = cls(index=index), list[str](), list[str]()
        for delta in deltas:
            content.append(delta.content)
            reasoning.append(delta.reasoning)
            choice._add_fields(delta)
        choice.content, choice.reasoning = "".join(content), "".join(reasoning)
        choice._join()
        return choice

    def add(self, delta: Delta) -> None:
        """Add the next delta of this choice."""
        self.content += delta.content
        self.reasoning += delta.reasoning
        self._add_fields(delta)
        self._join()

    def _add_fields(self, delta: Delta) -> None:
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = self.stop_reason if delta.stop_reason is None else delta.stop_reason
        self.token_ids += delta.token_ids
        self.logprobs = accumulate_value(self.logprobs, delta.logprobs)
        for piece in delta.tool_calls:
            add_tool_call(self.tool_calls, piece)
        for name, value in delta.extra.items():
            self.extra[name] = _accumulate_extra(name, self.extra.get(name), value)

    def _join(self) -> None:
        """Join the text that `_add_fields` has left in pieces."""
        self.logprobs = join_pieces(self.logprobs)
        join_pieces(cast("JSON", self.tool_calls))
        join_pieces(self.extra)

    @property
    def refusal(self) -> str:
        """The text by which the model refuses to answer."""
        return refusal_of(self.extra)

    def message(self) -> Object:
        """The choice as the `message` of a chat completion, with everything else that the deltas held."""
        rest = rest_of_message(self.extra)
        content: JSON = self.content
        if parts := rest.pop("content", None):  # some servers send thoughts in parts and then the answer as text
            text: list[JSON] = [{"type": "text", "text": self.content}] if self.content else []
            content = [*cast("list[JSON]", parts), *text]
        message: Object = {"role": "assistant", "content": content}
        if not message["content"] and (self.tool_calls or not _IN_PLACE_OF_TEXT.isdisjoint(rest)):
            message["content"] = None
        if self.reasoning:
            message["reasoning"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {name: value for name, value in call.items() if name != "index"} for call in self.tool_calls
            ]
        return rest | message


class Answer:
    """The answer so far, from the entries passed to `add`. It is complete once `end` is not None."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.attempt = 0
        self.started: Started | Claimed | None = None
        self.opened: Opened | None = None
        self.end: Terminal | None = None
        self._deltas: list[Delta] = []
        self._just_claimed = False
        for entry in entries:
            self.add(entry)

    def __repr__(self) -> str:
        """The state of the answer in one line that is safe to log: it has the length of the text, not the text."""
        shown = {
            "outcome": self.outcome,
            "finish_reason": self.finish_reason,
            "error": self.end.code if isinstance(self.end, Failed) else "",
            "model": self.model,
            "attempt": self.attempt,
            "characters": len(self.text),
            "usage": dict(self.usage),
        }
        return f"Answer({', '.join(f'{name}={value!r}' for name, value in shown.items() if value)})"

    def add(self, entry: Entry) -> Self:
        """Add the next entry of the log."""
        if isinstance(entry, Opened | Delta) and self._just_claimed:
            # A worker that claims a log with deltas writes `resumed` or `restarted`. This worker found no deltas, so a
            # failover has lost them.
            self._deltas.clear()
        self._just_claimed = isinstance(entry, Claimed)
        match entry:
            case Delta():
                self._deltas.append(entry)
            case Started() | Claimed():
                self.attempt, self.started = entry.id.attempt, entry
            case Opened():
                self.opened = entry
            case Restarted():
                self._deltas.clear()
            case Resumed():
                after = EntryId.parse(entry.after)
                self._deltas = [delta for delta in self._deltas if delta.id <= after]
                if entry.cut and self._deltas:
                    self._deltas[-1] = _without_tail(self._deltas[-1], entry.cut)
            case Terminal():
                self.end = entry
                self.attempt = self.attempt or entry.attempt
            case Unknown() if entry.id == SEAL:
                self.end = Failed(
                    id=SEAL, code="unknown", message=f"the log ended with an entry of type {entry.name!r}"
                )
        return self

    @property
    def deltas(self) -> list[Delta]:
        """The deltas that are valid, oldest first."""
        return list(self._deltas)

    @property
    def begun(self) -> bool:
        """Whether the answer has a valid delta."""
        return bool(self._deltas)

    @property
    def choices(self) -> list[Choice]:
        """The choices in the order of their index. Each access builds them again."""
        deltas: dict[int, list[Delta]] = {}
        for delta in self._deltas:
            deltas.setdefault(delta.index, []).append(delta)
        return [Choice.of(index, deltas[index]) for index in sorted(deltas)]

    @property
    def text(self) -> str:
        """The content of the first choice, as text."""
        return "".join(delta.text for delta in self._deltas if delta.index == 0)

    @property
    def outcome(self) -> str:
        """`done`, `error` or `cancelled`; empty until the request has ended."""
        return self.end.type if self.end else ""

    @property
    def usage(self) -> Usage:
        """The number of tokens used: vLLM's count or, if vLLM did not finish, a count of the tokens in the log."""
        reported = self.end.usage if self.end else Usage()
        # Any client may write a cancel, and may have read only a part of the log.
        if isinstance(self.end, Cancelled):
            return self._counted_usage() or reported
        return reported or self._counted_usage()

    @property
    def model(self) -> str:
        """The model that answered, by its name in vLLM."""
        return (self.end.model if self.end else "") or (self.opened.model if self.opened else "")

    @property
    def finish_reason(self) -> str:
        """The finish reason of the first choice that has one."""
        reasons = {delta.index: delta.finish_reason for delta in self._deltas if delta.finish_reason}
        return reasons[min(reasons)] if reasons else ""

    def finished(self, n: int) -> bool:
        """Whether `n` choices have their finish reason, so that nothing is left to generate."""
        ended: set[int] = set()
        for delta in self._deltas:
            rest = delta.extra.get("delta")
            if (
                delta.content
                or delta.reasoning
                or delta.tool_calls
                or (isinstance(rest, dict) and not TEXT_FIELDS.isdisjoint(rest))
            ):  # fmt: skip - a finish reason that is followed by text was not the end
                ended.discard(delta.index)
            if delta.finish_reason:
                ended.add(delta.index)
        # The check stops at the first choice that has not ended, since a job may request any `n`.
        return all(index in ended for index in range(n))

    @property
    def error(self) -> str:
        """The message and the code of the error; empty without an error."""
        return f"{self.end.message} ({self.end.code})" if isinstance(self.end, Failed) else ""

    def _counted_usage(self) -> Usage:
        completion = sum(len(delta.token_ids) for delta in self._deltas)
        prompt = self.opened.prompt_tokens if self.opened else None
        if not completion or prompt is None:
            return Usage()
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def completion(self) -> Object:
        """The answer as an OpenAI chat completion that was not streamed."""
        opened = self.opened
        choices: list[JSON] = []
        for choice in self.choices:
            shown: Object = {
                "index": choice.index,
                "message": choice.message(),
                "finish_reason": choice.finish_reason or None,
                "stop_reason": choice.stop_reason,
                "logprobs": choice.logprobs,
            }
            if choice.token_ids:
                shown["token_ids"] = list(choice.token_ids)
            choices.append(shown)
        return {
            "id": opened.response_id if opened else "",
            "object": "chat.completion",
            "created": opened.created if opened else 0,
            "model": opened.model if opened else "",
            "choices": choices,
            "usage": cast("Object", self.usage) or None,
        }


def _without_tail(delta: Delta, cut: int) -> Delta:
    """A delta without its last `cut` tokens, which added nothing to its text."""
    logprobs = delta.logprobs
    if isinstance(logprobs, dict):
        logprobs = {name: part[:-cut] if isinstance(part, list) else part for name, part in logprobs.items()}
    return msgspec.structs.replace(delta, token_ids=delta.token_ids[:-cut], logprobs=logprobs)


def _accumulate_extra(name: str, whole: JSON, piece: JSON) -> JSON:
    """Add a field of `extra`. The `delta` is accumulated from pieces; another field is replaced by its latest value."""
    if name == "delta":
        return accumulate_value(whole, piece)
    return whole | piece if name == "chunk" and isinstance(whole, dict) and isinstance(piece, dict) else piece
