"""Converts the chunks of a chat completion into log entries, and loses nothing that the server sent. No I/O.

The fields that entries need as text are decoded. All others stay the JSON of the server (`msgspec.Raw`), byte for byte.
The shapes are those of vLLM 0.32.0 and of other OpenAI-compatible servers: choices or a delta that are missing or null,
null content, an empty finish_reason, `reasoning_content` for `reasoning`, and everything that `shapes` reads.
"""

from contextlib import suppress

import msgspec
from msgspec import Raw

from ...contract.entries import TEXT_FIELDS, Fields, Object
from ..error_bodies import excerpt
from ..errors import CannotResume, UpstreamError, truncated
from .error_chunks import error_instead_of, error_within, unreadable
from .extra_fields import ExtraFields
from .finish_reasons import is_fault, is_known
from .lenient_json import ChunkDecoder
from .plain import PlainChunk, decode_plain, last_fields, rich_fields, usage_after_last
from .shapes import (
    NULL,
    RawObject,
    as_text,
    delta_of,
    digest_of_prompt,
    has_value,
    ids_of,
    lift_fields,
    read_finish_reason,
    read_index,
    read_message,
    read_tokens,
    text_of,
    unread_in,
)

_decode_choices = msgspec.json.Decoder(list[RawObject | None] | None).decode
_decode = msgspec.json.decode
_encode = msgspec.json.encode

_HEAD = frozenset({"response_id", "model", "created"})
_RICH = frozenset({"logprobs", "tool_calls"})
_VISIBLE = frozenset({"content", "reasoning", "tool_calls"})
_NONE: frozenset[int] = frozenset()
_FIRST = frozenset({0})
"""The indexes of an answer's choices. The answers share them, since nearly all answers have one choice."""
_LONGEST_REASON = 100
_MAX_MODELS = 2


class ChunkParser:
    """Converts the events of one answer into log entries, and checks whether the answer is complete.

    Args:
        n: the number of choices in the request.
        keep_prompt_ids: whether the request itself has `return_token_ids`, so that the prompt's ids are published.
        keep_usage: whether the request has `continuous_usage_stats`, so that each delta keeps its usage.
        expected_prompt: the token ids from which the server must continue. Its first chunk must return them.
        kept: how many of the last of these ids belong to the answer.
    """

    __slots__ = (
        "_broken_off", "_decoder", "_extra", "_fault", "_fingerprint", "_finished", "_has_delta", "_head",
        "_is_ended_here", "_is_rich", "_keep_prompt_ids", "_keep_usage", "_kept", "_messages", "_models", "_n",
        "_plain_model", "_seen", "_unchecked_prompt", "_with_output", "done", "finish_reason", "unknown_reason",
        "usage",
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
        """A finish reason that is on no list. The answer counts as complete; the worker logs the reason."""
        self._decoder = ChunkDecoder()
        self._has_delta = False
        self._n = n
        self._keep_prompt_ids = keep_prompt_ids
        self._keep_usage = keep_usage
        self._unchecked_prompt = expected_prompt
        self._kept = kept
        self._seen = self._finished = _NONE
        self._with_output = _NONE  # choices of which `has_output` is true
        self._is_ended_here = False
        self._broken_off = ""
        self._fault: UpstreamError | None = None  # an error that came with text
        self._messages: dict[int, str] = {}  # the text of choices that come as `message` only
        self._models = 0  # how many model names were published
        self._head: Fields = {}
        self._plain_model = ""  # the model of plain chunks, while the fast path is open
        self._is_rich = False  # whether the last chunk had logprobs or a tool call
        self._fingerprint = ""
        self._extra = ExtraFields()

    @property
    def model(self) -> str:
        """The model's name in the server's chunks; empty before the first."""
        return self._head.get("model", "")

    @property
    def has_delta(self) -> bool:
        """Whether a `delta` was made. One with only a finish reason or token ids counts too."""
        return self._has_delta

    @property
    def has_output(self) -> bool:
        """Whether the server has sent text, a tool call or another field of a delta. The role alone does not count."""
        return bool(self._with_output)

    @property
    def needs_next_attempt(self) -> bool:
        """Whether a `delta` or `resumed` was made, which another try must not repeat under the same attempt."""
        return self._has_delta

    @property
    def extra(self) -> Object:
        """The fields of chunks without choices, except the usage, for the terminal entry."""
        return self._extra.unpublished_values()

    @property
    def is_complete(self) -> bool:
        """Whether every choice has finished. After `[DONE]`, the choices that came count: some servers ignore `n`."""
        if self._fault is not None or not self._seen <= self._finished:
            return False
        # The check stops at the first missing choice, since a job may request any `n`.
        return bool(self.done and self._seen) or all(index in self._finished for index in range(self._n))

    def end(self, reason: str) -> None:
        """End the answer before the server does: its only choice has finished."""
        self.done = self._is_ended_here = True
        self.finish_reason = reason
        self._finished = _with(self._finished, 0)

    def check_complete(self, skipped: str = "") -> None:
        """Check the answer at the end of the stream.

        Args:
            skipped: lines of the stream that belong to no event, quoted in the error of an empty answer.

        Raises:
            UpstreamError: when the answer is not complete. `[DONE]` alone does not make it complete.
        """
        if self._fault is not None:
            raise self._fault
        if self._broken_off:
            raise UpstreamError(
                "upstream_aborted", f"vLLM broke the answer off ({self._broken_off})", status=200, retryable=True
            )
        if not self.is_complete:
            quoted = "" if self._has_delta else excerpt(f"{skipped} {self._extra.unusual()}")
            text = f"the stream held only: {quoted}"
            raise truncated(text if quoted else "the stream ended before the answer had a finish_reason")

    def parse(self, data: bytes) -> list[Fields]:
        """The log entries for the data of an event: `opened` if needed, then a `delta` for each choice with content.

        Raises:
            UpstreamError: for an error event, and for data that is not a chunk.
        """
        if self.done or not data:
            if data and not self._is_ended_here:
                self._read_after_done(data)
            return []
        if data == b"[DONE]":
            self.done = True
            return []
        if self._plain_model:
            try:
                return self._rich(data) if self._is_rich else self._plain(decode_plain(data))
            except (msgspec.MsgspecError, UnicodeDecodeError):
                pass  # the chunk has other fields, or is malformed: take the slow path
        if self._plain_model or 0 in self._finished:
            with suppress(msgspec.MsgspecError, UnicodeDecodeError):
                return self._end_of_answer(data)
        try:
            return self._entries(self._decoder.decode(data))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise unreadable(data, str(error)) from error

    def _plain(self, chunk: PlainChunk) -> list[Fields]:
        """The entry of a plain chunk: the same result as `_entries`, at a fifth of its cost.

        Raises:
            ValidationError: when the model or the fingerprint differs.
        """
        if chunk.model != self._plain_model or (
            chunk.system_fingerprint and chunk.system_fingerprint != self._fingerprint
        ):
            raise msgspec.ValidationError("another model or fingerprint")
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
        self._has_delta = True
        return [fields]

    def _rich(self, data: bytes) -> list[Fields]:
        """The entry of a rich chunk. Raises what `rich_fields` raises."""
        fields = rich_fields(data, self._plain_model, self._fingerprint)
        if len(fields) == 1:
            return []
        self._has_delta = True
        return [fields]

    def _end_of_answer(self, data: bytes) -> list[Fields]:
        """The entry of the plain chunk that ends the choice; or none for the usage, which comes after that.

        Raises:
            MsgspecError: for any other chunk.
        """
        if self._plain_model:
            fields = last_fields(data, self._plain_model, self._fingerprint)
            self._plain_model, self.finish_reason = "", fields["finish_reason"]
            self._finished, self._has_delta = _with(self._finished, 0), True
            return [fields]
        chunk = usage_after_last(data, self._head["model"] if self._head.keys() >= _HEAD else "")
        self._read_usage(chunk, of_choices=False)
        self._extra.add_unknown(chunk)
        return []

    def _entries(self, chunk: RawObject) -> list[Fields]:
        self._plain_model = ""
        choices = [choice for choice in _decode_choices(chunk.get("choices", b"null")) or () if choice]
        if not choices and (error := error_instead_of(chunk)):
            raise error
        for choice in choices:
            lift_fields(chunk, choice)
        indexes = [read_index(choice) for choice in choices]
        deltas = [self._delta_of(index, choice) for index, choice in zip(indexes, choices, strict=True)]
        error = error_within(chunk, choices, deltas)
        if choices and self._unchecked_prompt is not None and not error:
            self._check_prompt(chunk)
        self._read_usage(chunk, of_choices=bool(choices))
        self._extra.add_unknown(chunk)
        entries = self._opened(chunk, deltas)
        for index, choice, delta in zip(indexes, choices, deltas, strict=True):
            fields = self._delta(index, choice, delta)
            if len(fields) > 1 + ("index" in fields):
                self._has_delta = True
                entries.append(fields)
        if error:
            if not any(_VISIBLE & fields.keys() for fields in entries):
                raise error
            self.done, self._fault = True, error  # raised by check_complete, so that the text is not lost
        is_running = 0 in self._with_output and 0 not in self._finished
        if is_running and not (self._extra.unpublished or self._messages or self._decoder.holds_half):
            self._plain_model = self._head["model"] if self._head.keys() >= _HEAD else ""
            self._is_rich = bool(entries) and not _RICH.isdisjoint(entries[-1])
            if fingerprint := self._extra.value_of("system_fingerprint"):
                self._fingerprint = as_text(fingerprint)
        return entries

    def _check_prompt(self, chunk: RawObject) -> None:
        """Check the first chunk: a server that ignored the token ids would send text that is already published.

        Raises:
            CannotResume: when the server did not return the ids.
        """
        if _decode(chunk.get("prompt_token_ids", NULL)) != self._unchecked_prompt:
            raise CannotResume("the server does not continue from the tokens that it was given")
        self._unchecked_prompt = None

    def _read_usage(self, chunk: RawObject, *, of_choices: bool) -> None:
        usage = chunk.get("usage", NULL)
        if not has_value(usage):
            return
        value = _decode(usage)
        if not isinstance(value, dict):
            self._extra.add("usage", usage)
            return
        self.usage = value
        if self._kept:  # the kept tokens were in the server's prompt, and belong to the answer
            for name, sign in (("prompt_tokens", -1), ("completion_tokens", 1)):
                count = self.usage.get(name)
                self.usage[name] = count + sign * self._kept if isinstance(count, int) else count
        if self._keep_usage and of_choices:
            self._extra.unpublished["usage"] = Raw(_encode(self.usage)) if self._kept else usage

    def _read_after_done(self, data: bytes) -> None:
        """Read an event after `[DONE]`: some servers send the usage there, or an error.

        Raises:
            UpstreamError: for an error, when the answer is not complete.
        """
        try:
            chunk = self._decoder.decode(data)
            for choice in _decode_choices(chunk.get("choices", NULL)) or ():
                lift_fields(chunk, choice or {})
            if not self.usage or b'"completion_tokens"' in bytes(chunk.get("usage", NULL)):
                self._read_usage(chunk, of_choices=False)
            error = None if self.is_complete else error_within(chunk, [], []) or error_instead_of(chunk)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return
        if error:
            raise error

    def _opened(self, chunk: RawObject, deltas: list[RawObject]) -> list[Fields]:
        """The `opened` entry, if a field is new that should be the same in every chunk."""
        head = dict(self._head) or {"type": "opened"}
        # Some servers send a new id and time in each chunk. Only the first counts, else every delta needs an `opened`.
        if "response_id" not in head and has_value(raw := chunk.get("id", NULL)):
            head["response_id"] = as_text(raw)
        # A router may send its own name first. If names alternate, only two count, for the same reason.
        if self._models < _MAX_MODELS and has_value(raw := chunk.get("model", NULL)):
            head["model"] = as_text(raw)
            self._models += head["model"] != self.model
        if "created" not in head and has_value(raw := chunk.get("created", NULL)) and (created := as_text(raw)) != "0":
            if created.isdecimal():
                head["created"] = created
            elif "created" not in self._extra:  # a fraction or a date: readers rely on a whole number
                self._extra.add("created", raw)
        for delta in deltas:
            if has_value(raw := delta.pop("role", NULL)):
                head["role"] = as_text(raw)
        prompt = chunk.get("prompt_token_ids")
        if prompt is not None and has_value(prompt):
            self._read_prompt(prompt, head)
        if head == self._head or len(head) == 1:
            return []
        self._head = head
        return [head | self._extra.publish()]

    def _read_prompt(self, prompt: Raw, head: Fields) -> None:
        ids = ids_of(prompt)
        if ids is None:
            self._extra.add("prompt_token_ids", prompt)
            return
        ids = ids[: len(ids) - self._kept]
        head["prompt_tokens"] = str(len(ids))
        head["prompt_digest"] = digest_of_prompt(ids)
        if self._keep_prompt_ids:
            self._extra.unpublished["prompt_token_ids"] = Raw(_encode(ids))

    def _delta_of(self, index: int, choice: RawObject) -> RawObject:
        """The delta of a choice. Its `message` counts only if the choice came in messages so far: see `delta_of`."""
        message = choice.get("message")
        published = (self._messages.get(index) or None) if index in self._with_output else ""
        delta = delta_of(choice, published=published)
        if message is not None and "message" not in choice:
            self._messages[index] = (published or "") + text_of(delta)
        elif self._messages and unread_in(delta):
            self._messages.pop(index, None)
        return delta

    def _delta(self, index: int, choice: RawObject, delta: RawObject) -> Fields:
        """The `delta` entry of one choice, with every field that has a value."""
        fields: Fields = {"type": "delta"}
        read_message(delta, fields)
        unread = unread_in(delta)
        if len(fields) > 1 or not TEXT_FIELDS.isdisjoint(unread):
            self._finished -= {index}  # text after a finish reason means that the choice continues
        if unread or len(fields) > 1:
            self._with_output = _with(self._with_output, index)
        if index:
            fields["index"] = str(index)
        self._seen = _with(self._seen, index)
        self._read_finish(choice, index, fields)
        read_tokens(choice, fields)
        extra = unread_in(choice)
        if unread:
            extra["delta"] = Raw(_encode(unread))
        if extra or (self._extra.unpublished and len(fields) > 1 + ("index" in fields)):
            fields |= self._extra.publish(extra)
        return fields

    def _read_finish(self, choice: RawObject, index: int, fields: Fields) -> None:
        if reason := read_finish_reason(choice):
            if is_fault(reason):
                self._broken_off = reason[:_LONGEST_REASON]
            else:
                if not is_known(reason):
                    self.unknown_reason = reason
                fields["finish_reason"] = reason
                self._finished = _with(self._finished, index)
                self.finish_reason = reason if index == 0 else self.finish_reason or reason
        if (raw := choice.pop("stop_reason", None)) is not None and bytes(raw) != b"null":
            fields["stop_reason"] = bytes(raw).decode()


def _with(indexes: frozenset[int], index: int) -> frozenset[int]:
    """Add the index of a choice."""
    if index in indexes:
        return indexes
    return indexes | {index} if indexes or index else _FIRST
