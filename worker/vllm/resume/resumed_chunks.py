"""Converts the stream of a resumed answer into log entries. No I/O."""

from collections.abc import Iterator

import msgspec

from ...contract.entries import Delta, Fields
from ..chunks.parser import ChunkParser
from ..errors import CannotResume
from .plan import ResumePlan
from .stop_strings import StopStrings

_decode_ids = msgspec.json.Decoder(list[int]).decode
_VISIBLE = frozenset({"content", "reasoning", "tool_calls", "finish_reason"})


class ResumedChunkParser(ChunkParser):
    """A chunk parser whose first entry is `resumed`, after it has checked that the server continues the kept tokens.

    Attributes:
        has_extended_answer: whether the server has added something visible to the interrupted answer. Tokens without
            text do not count, since each attempt generates them again.
    """

    __slots__ = ("_has_resumed", "_new_tokens", "_plan", "_stops", "has_extended_answer")

    def __init__(self, plan: ResumePlan, *, n: int, keep_prompt_ids: bool, keep_usage: bool) -> None:
        super().__init__(
            n=n, keep_prompt_ids=keep_prompt_ids, keep_usage=keep_usage,
            expected_prompt=plan.prompt_ids or None, kept=len(plan.kept.token_ids),
        )  # fmt: skip
        self._plan = plan
        self._stops = StopStrings(plan.request, plan.kept.content, plan.withheld) if plan.prompt_ids else None
        self._has_resumed = False
        self._new_tokens = 0
        self.has_extended_answer = False

    @property
    def needs_next_attempt(self) -> bool:
        return self._has_resumed

    def parse(self, data: bytes) -> list[Fields]:
        entries = super().parse(data)
        if self._stops is not None and self._stops.stops:
            entries = list(self._up_to_stop(self._stops, entries))
        if entries and not self.has_extended_answer:
            self.has_extended_answer = any(_VISIBLE & fields.keys() for fields in entries)
        if entries and not self._has_resumed:
            if self._plan.prompt_ids and self.model != self._plan.model:
                raise CannotResume("another model answers")  # token ids have another meaning for another model
            self._has_resumed = True
            entries.insert(0, self._plan.entry)
        return entries

    def _up_to_stop(self, stops: StopStrings, entries: list[Fields]) -> Iterator[Fields]:
        """The entries up to a stop string, which ends the answer here, since the server would continue."""
        for fields in entries:
            if fields["type"] != Delta.type:
                yield fields
                continue
            self._new_tokens += len(_decode_ids(fields.get("token_ids", "[]")))
            yield stops.apply(fields)
            if stops.found:
                prompt, kept = len(self._plan.prompt_ids), len(self._plan.kept.token_ids)
                self.usage = {
                    "prompt_tokens": prompt - kept,
                    "completion_tokens": kept + self._new_tokens,
                    "total_tokens": prompt + self._new_tokens,
                }
                self.end("stop")
                return
