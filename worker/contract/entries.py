"""The entries of a token log, typed: how they are read from Redis fields and written to them.

A field that is JSON on the wire is a Python value here; a field that is not there is its default.
Readers pass over types and fields that they do not know (`Unknown`), so that the contract can grow.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeAlias

import msgspec

from worker.contract.ids import SEAL, EntryId
from worker.contract.keys import is_queue_name

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
Object: TypeAlias = dict[str, JSON]
Fields: TypeAlias = dict[str, str]
"""An entry as it goes to Redis: field names and values, text in both."""


BURIED = "buried"
"""The `code` of the error that ends a job which is not tried again; it is among the dead letters too."""

TAKEOVER = "takeover"
"""The `reason` of a claim by which a job came to another worker, or came back."""


class BadEntry(ValueError):
    """An entry of a known type holds a field that cannot be read."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What every entry has: its id, and the name of its type."""

    type: ClassVar[str] = ""
    id: EntryId


class Queued(Entry, frozen=True, kw_only=True):
    """The client has enqueued the request: no worker has it yet."""

    type: ClassVar[str] = "queued"
    v: int = 1
    digest: str = ""


class Started(Entry, frozen=True, kw_only=True):
    """A worker has begun. `owner` is a nonce of its process; `time` is Unix ms; `digest` as in `Queued`.

    `delivery` is how often the group had delivered the job by then. A hand-over does not raise it.
    """

    type: ClassVar[str] = "started"
    v: int = 1
    queue: str = ""
    job: str = ""
    worker: str = ""
    owner: str = ""
    time: int = 0
    digest: str = ""
    delivery: int = 0


class Claimed(Entry, frozen=True, kw_only=True):
    """An owner took the request over: it fences every earlier attempt. `delivery` as in `Started`, if one led here."""

    type: ClassVar[str] = "claimed"
    queue: str = ""
    job: str = ""
    worker: str = ""
    owner: str = ""
    time: int = 0
    reason: str = ""
    delivery: int = 0


class Resumed(Entry, frozen=True, kw_only=True):
    """The text goes on where it stopped. Token ids and logprobs of former attempts beyond `after` are void.

    So are the last `cut` token ids of the entry `after` itself, whose chunk ended inside a character. `forgets` names
    sampling settings that count generated tokens and do not see those from before.
    """

    type: ClassVar[str] = "resumed"
    after: str = ""
    cut: int = 0
    forgets: list[str] = msgspec.field(default_factory=list)


class Restarted(Entry, frozen=True, kw_only=True):
    """What came before is void: the answer begins again."""

    type: ClassVar[str] = "restarted"


class Opened(Entry, frozen=True, kw_only=True):
    """What is the same in every chunk of vLLM's answer. It may come again; the latest holds."""

    type: ClassVar[str] = "opened"
    response_id: str = ""
    model: str = ""
    created: int = 0
    role: str = ""
    prompt_tokens: int | None = None
    prompt_digest: str = ""
    extra: Object = msgspec.field(default_factory=dict)


class Delta(Entry, frozen=True, kw_only=True):
    """What one chunk added to one choice."""

    type: ClassVar[str] = "delta"
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
        """What the model says in place of an answer."""
        return refusal_of(self.extra)


class Terminal(Entry, frozen=True, kw_only=True):
    """The seal: how the request ended. `timings` are in milliseconds."""

    attempt: int = 0
    finish_reason: str = ""
    usage: Object = msgspec.field(default_factory=dict)
    model: str = ""
    timings: Object = msgspec.field(default_factory=dict)
    extra: Object = msgspec.field(default_factory=dict)


class Done(Terminal, frozen=True, kw_only=True):
    """The answer is whole."""

    type: ClassVar[str] = "done"


class Failed(Terminal, frozen=True, kw_only=True):
    """The answer could not be had: `code` is for programs, `message` for people."""

    type: ClassVar[str] = "error"
    code: str = ""
    message: str = ""


class Cancelled(Terminal, frozen=True, kw_only=True):
    """Somebody cancelled the request."""

    type: ClassVar[str] = "cancelled"


class Unknown(Entry, frozen=True, kw_only=True):
    """An entry of a type that this version does not know. At the seal's id it still ends the log."""

    name: str = ""
    fields: Fields = msgspec.field(default_factory=dict)


def _count(text: str) -> int:
    """A number of things.

    Raises:
        ValueError: when it is no whole number, or below 0.
    """
    if (count := int(text)) < 0:
        raise ValueError(f"{text} is below 0")
    return count


def _stream_id(text: str) -> str:
    """An id of an entry, as text.

    Raises:
        ValueError: when Redis has no such id; a command that held it would fail each time.
    """
    if text and max(EntryId.parse(text)) > SEAL.n:
        raise ValueError(f"{text[:50]!r} is above the greatest id")
    return text


def _queue(text: str) -> str:
    """The name of a queue.

    Raises:
        ValueError: when no queue has such a name.
    """
    if text and not is_queue_name(text):
        raise ValueError(f"{text[:80]!r} is no name of a queue")
    return text


_Reader: TypeAlias = Callable[[str], object]


def _time(text: str) -> int:
    """Unix seconds or milliseconds; 0 where a server or another writer has something else, for nothing hangs on it."""
    try:
        return int(text)
    except ValueError:
        return 0


def _json_reader(kind: type | None = None) -> _Reader:
    """Reads a field that is JSON, of one type if a reader relies on that.

    What msgspec cannot decode and others can is no reason not to read the rest: a number that is too large, NaN and
    Infinity are null, as in JavaScript's own JSON, and half of a surrogate pair is a question mark.
    """
    decode: Callable[[str | bytes], object] = msgspec.json.Decoder(kind or Any).decode

    def read(text: str) -> object:
        try:
            return decode(text)
        except msgspec.DecodeError as error:
            try:
                value = json.loads(text, parse_float=_number, parse_int=_whole_number, parse_constant=lambda _: None)
            except ValueError:
                raise error from None
            return decode(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))

    return read


def _number(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None


def _whole_number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:  # of more digits than Python reads
        return None


_READERS: dict[str, _Reader] = {
    "v": int,
    "time": _time,
    "index": int,
    "created": _time,
    "attempt": int,
    "delivery": _count,
    "prompt_tokens": int,
    "cut": _count,
    "usage": _json_reader(dict),
    "timings": _json_reader(dict),
    "extra": _json_reader(dict),
    "tool_calls": _json_reader(list[dict[str, Any]]),
    "token_ids": msgspec.json.Decoder(list[int]).decode,
    "forgets": msgspec.json.Decoder(list[str]).decode,
    "logprobs": _json_reader(),
    "stop_reason": _json_reader(),
}
_TEXTS: dict[str, _Reader] = {"queue": _queue, "job": _stream_id, "after": _stream_id}
"""Texts that others make a key or a command of; any other text is taken as it is."""
_KNOWN = (Queued, Started, Claimed, Resumed, Restarted, Opened, Delta, Done, Failed, Cancelled)
_BLANK: dict[type[Entry], Entry] = {kind: kind(id=SEAL) for kind in _KNOWN}
_TYPES: dict[str, tuple[type[Entry], dict[str, _Reader]]] = {
    kind.type: (kind, {name: (_READERS | _TEXTS).get(name, str) for name in kind.__struct_fields__ if name != "id"})
    for kind in _KNOWN
}


def parse(entry_id: str | bytes, fields: Mapping[bytes, bytes] | Mapping[str, str]) -> Entry:
    """Read an entry as Redis (bytes) or the feed (text) gives it.

    Whoever reads an entry relies on what it says, so all of it is checked here. The `after` of a `resumed` is the one
    field that has to be there: without it nobody knows what of the text stands.

    Raises:
        BadEntry: when a field of a known type cannot be read; it names the entry and the field.
    """
    where = EntryId.parse(entry_id)
    texts = {_text(name): _text(value) for name, value in fields.items()}
    name = texts.pop("type", "")
    known = _TYPES.get(name)
    if known is None:
        return Unknown(id=where, name=name, fields=texts)
    kind, readers = known
    values: dict[str, object] = {}
    for field, text in texts.items():
        reader = readers.get(field)
        if reader is None:
            continue
        try:
            values[field] = reader(text)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise BadEntry(f"entry {where} ({name}): field {field} cannot be read: {error}") from error
    if kind is Resumed:
        after = texts.get("after")
        if not after or not EntryId.parse(after) < where:
            raise BadEntry(f"entry {where} ({name}): field after cannot be read: it must be the id of an entry before")
    return kind(id=where, **values)


def parse_leniently(entry_id: str | bytes, fields: Mapping[bytes, bytes] | Mapping[str, str]) -> Entry:
    """Read an entry, whatever it holds: one that cannot be read is of an unknown type, and in nobody's way."""
    try:
        return parse(entry_id, fields)
    except BadEntry:
        return parse(entry_id, {})


def refusal_of(extra: Object) -> str:
    """The text by which a model refuses to answer: what stands in `extra` as the delta's `refusal`."""
    delta = extra.get("delta")
    refusal = delta.get("refusal") if isinstance(delta, dict) else None
    return refusal if isinstance(refusal, str) else ""


def is_terminal(entry: Entry) -> bool:
    """Whether the log ends with this entry."""
    return entry.id == SEAL


def to_fields(entry: Entry) -> Fields:
    """The entry as Redis fields: its type, and of the rest what is not the default."""
    texts = {
        name: value if isinstance(value, str) and name not in _READERS else to_json(value)
        for name, value in _values(entry)
    }
    return {"type": entry.type, **texts}


def as_dict(entry: Entry) -> Object:
    """The entry as one JSON object, id and type first: what `--json` prints."""
    if isinstance(entry, Unknown):
        named: Object = {"id": str(entry.id), "type": entry.name}
        return named | entry.fields | named
    return {"id": str(entry.id), "type": entry.type, **dict(_values(entry))}


def to_json(value: object) -> str:
    """A value as compact JSON text."""
    return msgspec.json.encode(value).decode()


def _values(entry: Entry) -> Iterator[tuple[str, Any]]:
    blank = _BLANK[type(entry)]
    for name in entry.__struct_fields__:
        value = getattr(entry, name)
        # The version is always said, though 1 is the default.
        if name == "v" or (name != "id" and value != getattr(blank, name)):
            yield name, value


def _text(raw: str | bytes) -> str:
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
