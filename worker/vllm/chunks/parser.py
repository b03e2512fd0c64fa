"""Chunks of a chat completion into entries of the log, without I/O, losing nothing that the server said.

What the entries need as text is decoded; the rest stays the JSON that came (`msgspec.Raw`), byte for byte.
The shapes are those of vLLM 0.32.0 and of other OpenAI-compatible servers: choices or a delta that are missing or
null, null content, an empty finish_reason, `reasoning_content` for `reasoning`, and what `shapes` reads.
"""

import hashlib

import msgspec
from msgspec import Raw

from ...contract.entries import TEXT_FIELDS, Fields, Object
from ..error_bodies import excerpt
from ..errors import CannotResume, UpstreamError, truncated
from .error_chunks import error_beside, error_in_place_of, unreadable
from .finish_reasons import is_known, is_of_a_fault
from .lenient_json import ChunkDecoder
from .plain import PlainChunk, RichChunk, decode_plain, decode_rich, rich_fields
from .shapes import (
    NULL,
    PRIVATE,
    RawObject,
    as_text,
    delta_of,
    ids_of,
    lift,
    read_finish_reason,
    read_index,
    read_message,
    read_tokens,
    said_in,
    says,
    text_of,
)

_decode_choices = msgspec.json.Decoder(list[RawObject | None] | None).decode
_decode = msgspec.json.decode
_encode = msgspec.json.encode

_CHUNK_FIELDS = frozenset({"id", "object", "created", "model", "choices", "usage", "prompt_token_ids", *PRIVATE})
_OF_THE_SERVER = frozenset({"system_fingerprint", "service_tier"})
"""Fields beside the choices that say nothing of an error."""
_RICH = frozenset({"logprobs", "tool_calls"})
_SAID = frozenset({"content", "reasoning", "tool_calls"})
_LONGEST_REASON = 100
_MOST_MODELS = 2


class ChunkParser:
    """Turns the events of one answer into log entries, and knows whether the answer is whole.

    Args:
        n: how many choices the request asks for.
        keep_prompt_ids: whether the request itself asked for `return_token_ids`, so that the prompt's are kept.
        keep_usage: whether it asked for `continuous_usage_stats`, so that each delta keeps the usage.
        sent: the ids that the server was given as its prompt to go on from, which its first chunk must show.
        kept: how many of these, at the end, are of the answer.
    """

    __slots__ = (
        "_begun", "_broken_off", "_chunk_extra", "_decoder", "_fault", "_fingerprint", "_finished", "_head",
        "_is_ended_here", "_is_rich", "_keep_prompt_ids", "_keep_usage", "_kept", "_messages", "_models", "_n", "_same",
        "_seen", "_spoken", "_unproven", "_unsaid", "done", "finish_reason", "unknown_reason", "usage",
    )  # fmt: skip

    def __init__(
        self,
        *,
        n: int = 1,
        keep_prompt_ids: bool = False,
        keep_usage: bool = False,
        expected_prompt: list[int] | None = None,
        kept: int = 0,
    ) -> None:
        self.done = False
        self.usage: Object = {}
        self.finish_reason = ""
        self.unknown_reason = ""
        """A finish reason that is on no list: the answer counts as whole, and people should know."""
        self._decoder = ChunkDecoder()
        self._begun = False
        self._n = n
        self._keep_prompt_ids = keep_prompt_ids
        self._keep_usage = keep_usage
        self._unproven = expected_prompt
        self._kept = kept
        self._seen: set[int] = set()
        self._spoken: set[int] = set()  # choices of which something was said, beside their end
        self._finished: set[int] = set()
        self._is_ended_here = False
        self._broken_off = ""
        self._fault: UpstreamError | None = None  # that came beside text
        self._messages: dict[int, str] = {}  # what was said of choices that come as `message` only
        self._models = 0  # names of models that were written down
        self._head: Fields = {}
        self._same = ""  # the model of plain chunks, once these may come
        self._is_rich = False  # the last chunk had logprobs or a tool call
        self._fingerprint = ""
        self._chunk_extra: dict[str, bytes] = {}
        self._unsaid: RawObject = {}

    @property
    def model(self) -> str:
        """The model that answers, as the server calls it; empty before its first chunk."""
        return self._head.get("model", "")

    @property
    def has_delta(self) -> bool:
        """Whether a delta has come out."""
        return self._begun

    @property
    def has_content(self) -> bool:
        """Whether text, a tool call or something else of a delta has come: the role alone is none."""
        return bool(self._spoken)

    @property
    def is_committed(self) -> bool:
        """Whether something came out that a further try would say twice."""
        return self._begun

    @property
    def extra(self) -> Object:
        """What chunks without a choice said beside the usage, for the terminal entry."""
        return _decode(_encode(self._unsaid), type=dict)

    @property
    def is_complete(self) -> bool:
        """Whether every choice has finished. After `[DONE]` those that came count: some servers pass over `n`."""
        if self._fault is not None or not self._seen <= self._finished:
            return False
        # Stops at the first that lacks: a job may ask for any `n`.
        return bool(self.done and self._seen) or all(index in self._finished for index in range(self._n))

    def end(self, reason: str) -> None:
        """End the answer here, whatever the server would say: its one choice has finished."""
        self.done = self._is_ended_here = True
        self.finish_reason = reason
        self._finished.add(0)

    def check_complete(self, passed_over: str = "") -> None:
        """At the end of the stream, of which `passed_over` was no event: it is quoted where nothing else was said.

        Raises:
            UpstreamError: when the answer is not whole; `[DONE]` alone does not make it so.
        """
        if self._fault is not None:
            raise self._fault
        if self._broken_off:
            raise UpstreamError(
                "upstream_aborted", f"vLLM broke the answer off ({self._broken_off})", status=200, retryable=True
            )
        if not self.is_complete:
            beside = {name: Raw(raw) for name, raw in self._chunk_extra.items() if name not in _OF_THE_SERVER}
            said = "" if self._begun else excerpt(f"{passed_over} {_encode(beside).decode() if beside else ''}")
            text = f"the stream ended with nothing said but: {said}"
            raise truncated(text if said else "the stream ended before the answer had a finish_reason")

    def parse(self, data: bytes) -> list[Fields]:
        """The log entries of one event's data: perhaps an `opened`, then a `delta` for each choice that says something.

        Raises:
            UpstreamError: for an error event, and for data that is no chunk.
        """
        if self.done or not data:
            if data and not self._is_ended_here:
                self._take_late(data)
            return []
        if data == b"[DONE]":
            self.done = True
            return []
        if self._same:
            try:
                return self._rich(decode_rich(data)) if self._is_rich else self._plain(decode_plain(data))
            except (msgspec.MsgspecError, UnicodeDecodeError):
                pass  # it says more, or something is wrong with it: see below
        try:
            return self._entries(self._decoder.decode(data))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise unreadable(data, str(error)) from error

    def _plain(self, chunk: PlainChunk) -> list[Fields]:
        """A chunk as nearly all are, at a fifth of the price; what comes out is the same as below.

        Raises:
            ValidationError: when another model or system answers.
        """
        if chunk.model != self._same or (chunk.system_fingerprint and chunk.system_fingerprint != self._fingerprint):
            raise msgspec.ValidationError("something new")
        (choice,) = chunk.choices
        fields: Fields = {"type": "delta"}
        if choice.delta.content:
            fields["content"] = choice.delta.content
        if choice.delta.reasoning:
            fields["reasoning"] = choice.delta.reasoning
        if choice.token_ids:
            fields["token_ids"] = _encode(choice.token_ids).decode()
        if len(fields) == 1:
            return []
        self._begun = True
        return [fields]

    def _rich(self, chunk: RichChunk) -> list[Fields]:
        """A plain chunk with logprobs or pieces of tool calls; it raises as above, and what `rich_fields` raises."""
        if chunk.model != self._same or (chunk.system_fingerprint and chunk.system_fingerprint != self._fingerprint):
            raise msgspec.ValidationError("something new")
        fields = rich_fields(chunk)
        if len(fields) == 1:
            return []
        self._begun = True
        return [fields]

    def _entries(self, chunk: RawObject) -> list[Fields]:
        self._same = ""
        choices = [choice for choice in _decode_choices(chunk.get("choices", b"null")) or () if choice]
        if not choices and (error := error_in_place_of(chunk)):
            raise error
        for choice in choices:
            lift(chunk, choice)
        indexes = [read_index(choice) for choice in choices]
        deltas = [self._delta_of(index, choice) for index, choice in zip(indexes, choices, strict=True)]
        error = error_beside(chunk, choices, deltas)
        if choices and self._unproven is not None and not error:
            self._prove(chunk)
        self._take_usage(chunk, of_choices=bool(choices))
        self._take_extra(chunk)
        entries = self._opened(chunk, deltas)
        for index, choice, delta in zip(indexes, choices, deltas, strict=True):
            fields = self._delta(index, choice, delta)
            if len(fields) > 1 + ("index" in fields):
                self._begun = True
                entries.append(fields)
        if error:
            if not any(_SAID & fields.keys() for fields in entries):
                raise error
            self.done, self._fault = True, error  # the text is not lost: see check_complete
        is_running = 0 in self._spoken and 0 not in self._finished
        if is_running and not (self._unsaid or self._messages or self._decoder.holds_half):
            self._same = _plain_model(self._head)
            self._is_rich = bool(entries) and not _RICH.isdisjoint(entries[-1])
            if fingerprint := self._chunk_extra.get("system_fingerprint"):
                self._fingerprint = as_text(fingerprint)
        return entries

    def _prove(self, chunk: RawObject) -> None:
        """At the first chunk: a server that passed over the ids would send text that is there already.

        Raises:
            CannotResume: when it did.
        """
        if _decode(chunk.get("prompt_token_ids", NULL)) != self._unproven:
            raise CannotResume("the server does not go on from the tokens that it was given")
        self._unproven = None

    def _take_usage(self, chunk: RawObject, *, of_choices: bool) -> None:
        usage = chunk.get("usage", NULL)
        if not says(usage):
            return
        value = _decode(usage)
        if not isinstance(value, dict):
            self._keep("usage", usage)
            return
        self.usage = value
        if self._kept:  # they were the server's prompt, and are the answer's
            for name, sign in (("prompt_tokens", -1), ("completion_tokens", 1)):
                count = self.usage.get(name)
                self.usage[name] = count + sign * self._kept if isinstance(count, int) else count
        if self._keep_usage and of_choices:
            self._unsaid["usage"] = Raw(_encode(self.usage)) if self._kept else usage

    def _take_late(self, data: bytes) -> None:
        """What comes after `[DONE]`: some servers send the usage there, and an error.

        Raises:
            UpstreamError: for an error, where the answer is not whole.
        """
        try:
            chunk = self._decoder.decode(data)
            for choice in _decode_choices(chunk.get("choices", NULL)) or ():
                lift(chunk, choice or {})
            if not self.usage or b'"completion_tokens"' in bytes(chunk.get("usage", NULL)):
                self._take_usage(chunk, of_choices=False)
            error = None if self.is_complete else error_beside(chunk, [], []) or error_in_place_of(chunk)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return
        if error:
            raise error

    def _take_extra(self, chunk: RawObject) -> None:
        """Keep what the chunk holds beyond the known fields, once for as long as it stays the same."""
        if chunk.keys() <= _CHUNK_FIELDS:
            return
        for name in chunk.keys() - _CHUNK_FIELDS:
            self._keep(name, chunk[name])

    def _keep(self, name: str, raw: Raw) -> None:
        value = bytes(raw)
        if says(raw) and self._chunk_extra.get(name) != value:
            self._chunk_extra[name] = value
            self._unsaid[name] = raw

    def _opened(self, chunk: RawObject, deltas: list[RawObject]) -> list[Fields]:
        """The `opened` entry, when something that should be the same in every chunk is new."""
        head = dict(self._head) or {"type": "opened"}
        # Some servers make a new id and time for each chunk. The first holds, or each delta would bring its `opened`.
        if "response_id" not in head and says(raw := chunk.get("id", NULL)):
            head["response_id"] = as_text(raw)
        # A router may name itself first. A model that alternates would bring an `opened` with each delta.
        if self._models < _MOST_MODELS and says(raw := chunk.get("model", NULL)):
            head["model"] = as_text(raw)
            self._models += head["model"] != self.model
        if "created" not in head and says(raw := chunk.get("created", NULL)) and (created := as_text(raw)) != "0":
            if created.isdecimal():
                head["created"] = created
            elif "created" not in self._chunk_extra:  # a fraction or a date: readers rely on a whole number
                self._keep("created", raw)
        for delta in deltas:
            if says(raw := delta.pop("role", NULL)):
                head["role"] = as_text(raw)
        prompt = chunk.get("prompt_token_ids")
        if prompt is not None and says(prompt):
            self._take_prompt(prompt, head)
        if head == self._head or len(head) == 1:
            return []
        self._head = head
        return [head | self._extra_field()]

    def _take_prompt(self, prompt: Raw, head: Fields) -> None:
        ids = ids_of(prompt)
        if ids is None:
            self._keep("prompt_token_ids", prompt)
            return
        ids = ids[: len(ids) - self._kept]
        head["prompt_tokens"] = str(len(ids))
        head["prompt_digest"] = digest_of_prompt(ids)
        if self._keep_prompt_ids:
            self._unsaid["prompt_token_ids"] = Raw(_encode(ids))

    def _delta_of(self, index: int, choice: RawObject) -> RawObject:
        """What a choice adds. Its `message` counts where nothing was said of it so far but in such messages."""
        message = choice.get("message")
        said = (self._messages.get(index) or None) if index in self._spoken else ""
        delta = delta_of(choice, said=said)
        if message is not None and "message" not in choice:
            self._messages[index] = (said or "") + text_of(delta)
        elif self._messages and said_in(delta):
            self._messages.pop(index, None)
        return delta

    def _delta(self, index: int, choice: RawObject, delta: RawObject) -> Fields:
        """The `delta` entry of one choice: only what it says, and nothing of what it says left out."""
        fields: Fields = {"type": "delta"}
        read_message(delta, fields)
        unread = said_in(delta)
        if len(fields) > 1 or not TEXT_FIELDS.isdisjoint(unread):
            self._finished.discard(index)  # an end that is followed by text was none
        if unread or len(fields) > 1:
            self._spoken.add(index)
        if index:
            fields["index"] = str(index)
        self._seen.add(index)
        self._take_end(choice, index, fields)
        read_tokens(choice, fields)
        extra = said_in(choice)
        if unread:
            extra["delta"] = Raw(_encode(unread))
        if extra or (self._unsaid and len(fields) > 1 + ("index" in fields)):
            fields |= self._extra_field(extra)
        return fields

    def _take_end(self, choice: RawObject, index: int, fields: Fields) -> None:
        if reason := read_finish_reason(choice):
            if is_of_a_fault(reason):
                self._broken_off = reason[:_LONGEST_REASON]
            else:
                if not is_known(reason):
                    self.unknown_reason = reason
                fields["finish_reason"] = reason
                self._finished.add(index)
                self.finish_reason = reason if index == 0 else self.finish_reason or reason
        if (raw := choice.pop("stop_reason", None)) is not None and bytes(raw) != b"null":
            fields["stop_reason"] = bytes(raw).decode()

    def _extra_field(self, extra: RawObject | None = None) -> Fields:
        """`extra` with what is new at the level of the chunk: in `opened` as it is, in a delta under `chunk`."""
        shown, self._unsaid = self._unsaid, {}
        if extra is not None:
            shown = extra | {"chunk": Raw(_encode(shown))} if shown else extra
        return {"extra": _encode(shown).decode()} if shown else {}


def _plain_model(head: Fields) -> str:
    """The model that plain chunks name; nothing while one could still bring something new of a head."""
    return head["model"] if head.keys() >= {"response_id", "model", "created"} else ""


def digest_of_prompt(prompt: list[int]) -> str:
    """The first 16 hex digits of SHA-256 over a prompt's token ids as compact JSON."""
    return hashlib.sha256(_encode(prompt)).hexdigest()[:16]
