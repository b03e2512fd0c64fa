"""The plan for resuming an interrupted answer mid-stream. No I/O.

A server gets the token ids of the prompt and of the kept tokens as its prompt, so that nothing is tokenized again. That
is exact only if the kept tokens end with a whole character: after a cut inside a character, vLLM 0.32.0 sends the end
of the prompt as text (vllm#48853).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...contract.entries import Delta, Fields, Object, Resumed, to_fields
from ...contract.ids import BEFORE_ALL, EntryId
from ..errors import CannotResume
from ..servers.pool import CHAT, COMPLETIONS

_STRUCTURED = (
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag",
)  # fmt: skip
_LIMITS = ("max_tokens", "max_completion_tokens", "min_tokens")
_NOT_RESUMABLE = ("echo", "prompt_logprobs", "truncate_prompt_tokens", "use_beam_search")
"""Options that would apply to the kept tokens too, since these are part of the prompt; or need several candidates."""

_COUNTING = (
    "presence_penalty", "frequency_penalty", "bad_words", "thinking_token_budget", "repetition_detection",
)  # fmt: skip
"""Options that depend on generated tokens only. They ignore the kept tokens, which are part of the prompt."""

_NOT_OF_COMPLETIONS = frozenset({
    "messages", "max_completion_tokens", "logprobs", "top_logprobs", "logprob_token_ids", "add_generation_prompt",
    "continue_final_message", "chat_template", "chat_template_kwargs", "response_format", "tools", "tool_choice",
    "parallel_tool_calls", "reasoning_effort", "include_reasoning", "documents", "echo",
})  # fmt: skip
"""Fields of a chat request that `/v1/completions` does not support, or reads differently."""

_LONGEST_NAMES = 200
"""Characters of the names of fields in an error, since a server chooses the names."""


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """The part of an interrupted answer that is kept.

    Attributes:
        after: the last entry that is kept.
        token_ids: the kept tokens.
        last_count: how many of these tokens came with the last entry.
        content: the text up to this entry, without reasoning.
        is_plain: whether the answer has only text, and no reasoning.
        cut: how many tokens at the end of the last entry are void: a chunk of several may end inside a character.
    """

    after: EntryId
    token_ids: list[int]
    last_count: int
    content: str
    is_plain: bool
    cut: int = 0


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """How a server continues an answer.

    Attributes:
        request: the job's request.
        kept: the part of the answer that is kept.
        prompt_ids: the prompt that the server gets, which includes the kept tokens; empty if none are kept.
        withheld: text of the kept tokens that was not published, since it might have become a stop string.
        context_left: how many more tokens fit into the model's context; None if that is not known.
        model: the name of the model in the first attempt's chunks.
    """

    request: Object
    kept: KeptAnswer
    prompt_ids: list[int]
    withheld: str = ""
    context_left: int | None = None
    model: str = ""

    @property
    def is_exhausted(self) -> bool:
        """Whether the answer has as many tokens as it may have."""
        return 0 in (self.job_limit_left, self.context_left)

    @property
    def job_limit_left(self) -> int | None:
        """How many more tokens the job allows; None if it sets no limit."""
        limit = self.request.get("max_completion_tokens")
        limit = self.request.get("max_tokens") if limit is None else limit
        return max(0, limit - len(self.kept.token_ids)) if isinstance(limit, int) else None

    @property
    def requests(self) -> Iterator[tuple[str, Object]]:
        """The requests with which a server may continue, each a route and a body, the best first."""
        if not self.prompt_ids:
            yield CHAT, self.request
            return
        body = {name: value for name, value in self.request.items() if name != "stop"}  # see StopStrings
        body |= {
            name: self.job_limit_left for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None
        }
        minimum = body.get("min_tokens")
        if isinstance(minimum, int):
            body["min_tokens"] = max(0, minimum - len(self.kept.token_ids))
        yield CHAT, body | {"kv_transfer_params": {"prompt_token_ids": list(self.prompt_ids)}}
        limit = self.context_left if self.job_limit_left is None else self.job_limit_left
        if self.kept.is_plain and not body.get("logprobs") and limit is not None:
            plain = {name: value for name, value in body.items() if name not in _NOT_OF_COMPLETIONS}
            # Without a limit this route generates 16 tokens; the chat route fills the model's context.
            yield COMPLETIONS, plain | {"prompt": list(self.prompt_ids), "max_tokens": limit}

    @property
    def entry(self) -> Fields:
        """The `resumed` entry."""
        forgets = [name for name in _COUNTING if self.prompt_ids and self.request.get(name)]
        return to_fields(Resumed(id=BEFORE_ALL, after=str(self.kept.after), cut=self.kept.cut, forgets=forgets))


def why_not_resumable(request: Object) -> str:
    """The reason why an answer to this request cannot be resumed; empty if it can."""
    if request.get("tools") or request.get("functions"):
        return "tools"
    form = request.get("response_format")
    if any(request.get(name) for name in _STRUCTURED) or (isinstance(form, dict) and form.get("type") != "text"):
        return "structured output"  # the grammar would start over
    if any(isinstance(count := request.get(name), int) and count > 1 for name in ("n", "best_of")):
        return "several choices"
    for name in _LIMITS:
        if not isinstance(request.get(name, 0), int | None):  # "50" or 50.0, which vLLM accepts as a number too
            return f"{name} that is not an integer"
    for name in _NOT_RESUMABLE:
        if request.get(name):
            return name
    messages = request.get("messages")
    for message in messages if isinstance(messages, list) else []:
        parts = message.get("content") if isinstance(message, dict) else None
        if isinstance(parts, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in parts):
            return "multimodal input"  # token ids would lose it
    return ""


def keep_answer(deltas: Sequence[Delta]) -> KeptAnswer:
    """The part of an answer that is kept: up to the last delta with text. Later tokens have no text yet.

    Raises:
        CannotResume: when a delta cannot become a part of a prompt.
    """
    with_text = [n for n, delta in enumerate(deltas) if delta.content or delta.reasoning or delta.tool_calls]
    if not with_text:
        first = deltas[0].id
        return KeptAnswer(EntryId(first.attempt, first.n - 1), [], 0, "", is_plain=True)
    kept = deltas[: with_text[-1] + 1]
    for delta in kept:
        if names := _fields_beside_text(delta):
            raise CannotResume(f"the answer holds more than text: {', '.join(names)[:_LONGEST_NAMES]}")
        if (delta.content or delta.reasoning) and not delta.token_ids:
            raise CannotResume("the server sent no token ids")
    return KeptAnswer(
        after=kept[-1].id,
        token_ids=[token for delta in kept for token in delta.token_ids],
        last_count=len(kept[-1].token_ids),
        content="".join(delta.content for delta in kept),
        is_plain=not any(delta.reasoning for delta in kept),
    )


def _fields_beside_text(delta: Delta) -> list[str]:
    """The names of a delta's fields that cannot become a part of a prompt, as the server sends them."""
    names = [name for name in ("index", "tool_calls") if getattr(delta, name)]
    rest = delta.extra.get("delta", {})
    return [*names, *(rest if isinstance(rest, dict) else ["delta"])]
