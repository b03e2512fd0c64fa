"""The types of the entries of a token log, which are read from Redis fields and written to them.

A field that is JSON on the wire is a Python value here; a field that is missing has its default.
Readers ignore types (`Unknown`) and fields that they do not know, so that the contract can grow.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeAlias, TypedDict

import msgspec

from .fields import READERS, TEXTS, Reader
from .ids import SEAL, EntryId

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
Object: TypeAlias = dict[str, JSON]
Fields: TypeAlias = dict[str, str]
"""An entry as it goes to Redis: field names and values, text in both."""


BURIED = "buried"
"""The `code` of the error that ends a buried job: it is not tried again, and becomes a dead letter."""

TAKEOVER = "takeover"
"""The `reason` of a claim by which a worker continues a job that it or another worker began."""


class BadEntry(ValueError):
    """An entry of a known type holds a field that cannot be read."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The base of every entry: its id, and the name of its type.

    Ids compare as in Redis. `str(entry.id)` is the id as Redis writes it: keep it to continue after this entry.
    """

    type: ClassVar[str] = ""
    id: EntryId

    def as_dict(self) -> Object:
        """The entry as one JSON object: id (as text) and type first, without fields that have their defaults."""
        return {"id": str(self.id), "type": self.type, **dict(_values(self))}

    def to_json(self) -> str:
        """The entry as compact JSON text, as `--json` prints it."""
        return to_json(self.as_dict())

    def chunk(self, opened: "Opened | None" = None) -> Object | None:  # noqa: ARG002 - see Delta and Opened
        """The entry as a `chat.completion.chunk` of OpenAI's API, or None for an entry that is not a chunk.

        `opened` is the latest one of the log: every chunk gets its id, model and time. A delta is a chunk. So is an
        `opened`, which begins a message: send only the first of several. A failed answer has no last chunk, and clients
        treat a stream that ends without an error as complete. So a server of chunks must send an error event.
        """
        return None


class Queued(Entry, frozen=True, kw_only=True):
    """The client has enqueued the request, and no worker has started it. `deadline` is the job's; times are Unix ms.

    `time` and `queue` are when and where the client enqueued it, for an estimate of how many jobs are before it.
    """

    type: ClassVar[Literal["queued"]] = "queued"
    v: int = 1
    digest: str = ""
    deadline: int = 0
    queue: str = ""
    time: int = 0


class Started(Entry, frozen=True, kw_only=True):
    """A worker has started the job. `owner` is a nonce of its process; `time` is Unix ms; `digest` is as in `Queued`.

    `delivery` is how often the consumer group had delivered the job at that time. A hand-over does not increase it.
    """

    type: ClassVar[Literal["started"]] = "started"
    v: int = 1
    queue: str = ""
    job: str = ""
    worker: str = ""
    owner: str = ""
    time: int = 0
    digest: str = ""
    delivery: int = 0


class Claimed(Entry, frozen=True, kw_only=True):
    """An owner begins another attempt, which fences every earlier one. `delivery` is as in `Started`, or 0."""

    type: ClassVar[Literal["claimed"]] = "claimed"
    queue: str = ""
    job: str = ""
    worker: str = ""
    owner: str = ""
    time: int = 0
    reason: str = ""
    delivery: int = 0


class Resumed(Entry, frozen=True, kw_only=True):
    """The text continues where it stopped. Token ids and logprobs of earlier attempts beyond `after` are void.

    The last `cut` token ids of the entry `after` are void too, since its chunk ended inside a character. `forgets`
    lists the sampling settings that count generated tokens, and now ignore those of earlier attempts.
    """

    type: ClassVar[Literal["resumed"]] = "resumed"
    after: str = ""
    cut: int = 0
    forgets: list[str] = msgspec.field(default_factory=list)


class Restarted(Entry, frozen=True, kw_only=True):
    """Everything before is void: the answer begins again."""

    type: ClassVar[Literal["restarted"]] = "restarted"


class Opened(Entry, frozen=True, kw_only=True):
    """The fields that are the same in every chunk of vLLM's answer. A log may have several; the latest is valid."""

    type: ClassVar[Literal["opened"]] = "opened"
    response_id: str = ""
    model: str = ""
    created: int = 0
    role: str = ""
    prompt_tokens: int | None = None
    prompt_digest: str = ""
    extra: Object = msgspec.field(default_factory=dict)

    def chunk(self, opened: "Opened | None" = None) -> Object:
        delta: Object = {"role": self.role or "assistant", "content": ""}
        return _chunk(opened or self, {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None})


class Delta(Entry, frozen=True, kw_only=True):
    """The text and fields that one chunk added to one choice."""

    type: ClassVar[Literal["delta"]] = "delta"
    content: str = ""
    reasoning: str = ""
    tool_calls: list[Object] = msgspec.field(default_factory=list)
    index: int = 0
    finish_reason: str = ""
    stop_reason: JSON = None
    logprobs: JSON = None
    token_ids: list[int] = msgspec.field(default_factory=list)
    extra: Object = msgspec.field(default_factory=dict)

    @property
    def refusal(self) -> str:
        """The text by which the model refuses to answer."""
        return refusal_of(self.extra)

    @property
    def text(self) -> str:
        """The content, including content that a server sends in parts."""
        return self.content + text_of_parts(self.extra)

    def chunk(self, opened: Opened | None = None) -> Object:
        delta = rest_of_message(self.extra)
        if self.content:
            delta["content"] = self.content
        if self.reasoning:
            delta["reasoning"] = self.reasoning
        if self.tool_calls:
            delta["tool_calls"] = list(self.tool_calls)
        choice: Object = {"index": self.index, "delta": delta, "logprobs": self.logprobs}
        choice["finish_reason"] = self.finish_reason or None
        if self.stop_reason is not None:
            choice["stop_reason"] = self.stop_reason
        if self.token_ids:
            choice["token_ids"] = list(self.token_ids)
        return _chunk(opened, choice)


class PromptTokensDetails(TypedDict, total=False):
    """Details of the tokens of a prompt."""

    cached_tokens: int | None
    audio_tokens: int | None


class CompletionTokensDetails(TypedDict, total=False):
    """Details of the tokens of a completion."""

    reasoning_tokens: int | None
    audio_tokens: int | None
    accepted_prediction_tokens: int | None
    rejected_prediction_tokens: int | None


class Usage(TypedDict, total=False):
    """The numbers of tokens of an answer, as its server counts them. The server may add fields."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None
    completion_tokens_details: CompletionTokensDetails | None


class Terminal(Entry, frozen=True, kw_only=True):
    """The seal: how the request ended. `timings` are in milliseconds."""

    attempt: int = 0
    finish_reason: str = ""
    usage: Usage = msgspec.field(default_factory=Usage)
    model: str = ""
    timings: Object = msgspec.field(default_factory=dict)
    extra: Object = msgspec.field(default_factory=dict)


class Done(Terminal, frozen=True, kw_only=True):
    """The answer is complete."""

    type: ClassVar[Literal["done"]] = "done"


class Failed(Terminal, frozen=True, kw_only=True):
    """The request failed. `code` is for programs, `message` for people."""

    type: ClassVar[Literal["error"]] = "error"
    code: str = ""
    message: str = ""


class Cancelled(Terminal, frozen=True, kw_only=True):
    """A client cancelled the request."""

    type: ClassVar[Literal["cancelled"]] = "cancelled"


class Idle(Entry, frozen=True, kw_only=True):
    """No entry came for the time that a follower set. This entry is in no log; its id is that of the entry before."""

    type: ClassVar[Literal["idle"]] = "idle"


class Unknown(Entry, frozen=True, kw_only=True):
    """An entry of a type that this version does not know. With the seal's id the entry ends the log anyway."""

    type: ClassVar[Literal[""]] = ""
    name: str = ""
    fields: Fields = msgspec.field(default_factory=dict)

    def as_dict(self) -> Object:
        named: Object = {"id": str(self.id), "type": self.name}
        return named | self.fields | named


AnyEntry: TypeAlias = (
    Queued | Started | Claimed | Resumed | Restarted | Opened | Delta | Done | Failed | Cancelled | Idle | Unknown
)
"""An entry of any type: type checkers narrow it by its `type`. `Idle` comes only if a follower has set a time."""

TEXT_FIELDS = frozenset({"content", "reasoning", "reasoning_content", "refusal", "tool_calls", "function_call"})
"""Fields of a delta that hold the model's output: a finish reason that is followed by one of them was not the end."""
_FIELDS_OF_MESSAGE = frozenset({"role", "content", "reasoning", "reasoning_content", "tool_calls"})
_KNOWN: tuple[type[AnyEntry], ...] = (
    Queued,
    Started,
    Claimed,
    Resumed,
    Restarted,
    Opened,
    Delta,
    Done,
    Failed,
    Cancelled,
)
_BLANK: dict[type[Entry], Entry] = {kind: kind(id=SEAL) for kind in (*_KNOWN, Idle)}
_TYPES: dict[str, tuple[Callable[..., AnyEntry], dict[str, Reader]]] = {
    kind.type: (kind, {name: (READERS | TEXTS).get(name, str) for name in kind.__struct_fields__ if name != "id"})
    for kind in _KNOWN
}


def parse(entry_id: str | bytes, fields: Mapping[bytes, bytes] | Mapping[str, str]) -> AnyEntry:
    """Read an entry from the fields that Redis (bytes) or the feed (text) returns.

    All fields are checked here, since readers rely on them. The `after` of a `resumed` is the only required field:
    without it a reader cannot tell which part of the text is valid.

    Raises:
        BadEntry: when a field of a known type cannot be read. The message names the entry and the field.
    """
    parsed_id = EntryId.parse(entry_id)
    texts = {_text(name): _text(value) for name, value in fields.items()}
    name = texts.pop("type", "")
    known = _TYPES.get(name)
    if known is None:
        return Unknown(id=parsed_id, name=name, fields=texts)
    kind, readers = known
    values: dict[str, object] = {}
    for field, text in texts.items():
        reader = readers.get(field)
        if reader is None:
            continue
        try:
            values[field] = reader(text)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise BadEntry(f"entry {parsed_id} ({name}): field {field} cannot be read: {error}") from error
    if kind is Resumed:
        after = texts.get("after")
        if not after or not EntryId.parse(after) < parsed_id:
            raise BadEntry(
                f"entry {parsed_id} ({name}): field after cannot be read: it must be the id of an entry before"
            )
    return kind(id=parsed_id, **values)


def parse_leniently(entry_id: str | bytes, fields: Mapping[bytes, bytes] | Mapping[str, str]) -> AnyEntry:
    """Read an entry as `parse` does. An entry that cannot be read is returned as `Unknown`, without type and fields."""
    try:
        return parse(entry_id, fields)
    except BadEntry:
        return parse(entry_id, {})


def refusal_of(extra: Object) -> str:
    """The text by which a model refuses to answer: the `refusal` of the delta in `extra`."""
    delta = extra.get("delta")
    refusal = delta.get("refusal") if isinstance(delta, dict) else None
    return refusal if isinstance(refusal, str) else ""


def text_of_parts(extra: Object) -> str:
    """The text of content in parts, `[{"type": "text", "text": …}]`: the `content` of the delta in `extra`."""
    delta = extra.get("delta")
    parts = delta.get("content") if isinstance(delta, dict) else None
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))


def transcript_of(extra: Object) -> str:
    """The transcript of spoken audio: the `transcript` of the delta's `audio` in `extra`."""
    delta = extra.get("delta")
    audio = delta.get("audio") if isinstance(delta, dict) else None
    transcript = audio.get("transcript") if isinstance(audio, dict) else None
    return transcript if isinstance(transcript, str) else ""


def rest_of_message(extra: Object) -> Object:
    """The fields of a message that `Delta` has no field for, from the `delta` in `extra`."""
    delta = extra.get("delta")
    rest = delta if isinstance(delta, dict) else {}
    # A field of `Delta` is in `extra` only if its value is malformed, except for content in parts.
    return {
        name: value
        for name, value in rest.items()
        if name not in _FIELDS_OF_MESSAGE or (name == "content" and isinstance(value, list))
    }


def is_terminal(entry: Entry) -> bool:
    """Whether the log ends with this entry."""
    return entry.id == SEAL


def to_fields(entry: Entry) -> Fields:
    """The entry as Redis fields: its type, and every field that does not have its default."""
    texts = {
        name: value if isinstance(value, str) and name not in READERS else to_json(value)
        for name, value in _values(entry)
    }
    return {"type": entry.type, **texts}


def to_json(value: object) -> str:
    """A value as compact JSON text."""
    return msgspec.json.encode(value).decode()


def _chunk(opened: Opened | None, choice: Object) -> Object:
    return {
        "id": opened.response_id if opened else "",
        "object": "chat.completion.chunk",
        "created": opened.created if opened else 0,
        "model": opened.model if opened else "",
        "choices": [choice],
    }


def _values(entry: Entry) -> Iterator[tuple[str, Any]]:
    blank = _BLANK[type(entry)]
    for name in entry.__struct_fields__:
        value = getattr(entry, name)
        # The version is always written, though 1 is the default.
        if name == "v" or (name != "id" and value != getattr(blank, name)):
            yield name, value


def _text(raw: str | bytes) -> str:
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
