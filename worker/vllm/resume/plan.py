"""Going on mid-stream: what of an answer is kept, and the requests by which a server goes on from there.

A server gets the ids of the prompt and of the kept tokens as its prompt, so that nothing is tokenized anew. That is
exact only where the kept tokens end with a whole character: a cut inside one makes vLLM 0.32.0 send the end of the
prompt as text (vllm#48853).
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, TypeVar

import msgspec

from ...contract.answer import Answer
from ...contract.entries import Delta, Fields, Object, Resumed, to_fields
from ...contract.ids import BEFORE_ALL, EntryId
from ..chunks.parser import ChunkParser, digest_of
from ..errors import CannotResume, UpstreamError
from ..servers.circuit import Caller
from ..servers.pool import CHAT, COMPLETIONS, ServerPool
from ..servers.server import Server
from .stop_strings import StopStrings, stops_of

_T = TypeVar("_T")
_Post: TypeAlias = Callable[[str, Object], Awaitable[bytes]]
"""Asks the server something: a path and a body."""

_STRUCTURED = (
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag",
)  # fmt: skip
_LIMITS = ("max_tokens", "max_completion_tokens", "min_tokens")
_OF_THE_PROMPT = ("echo", "prompt_logprobs", "truncate_prompt_tokens", "use_beam_search")
_COUNTING = (
    "presence_penalty", "frequency_penalty", "bad_words", "thinking_token_budget", "repetition_detection",
)  # fmt: skip
"""What looks back on generated tokens alone: the kept ones are part of the prompt then."""

_TOKENIZED = (
    "model", "messages", "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template",
    "chat_template_kwargs",
)  # fmt: skip
_NOT_OF_COMPLETIONS = frozenset({
    "messages", "max_completion_tokens", "logprobs", "top_logprobs", "logprob_token_ids", "add_generation_prompt",
    "continue_final_message", "chat_template", "chat_template_kwargs", "response_format", "tools", "tool_choice",
    "parallel_tool_calls", "reasoning_effort", "include_reasoning", "documents", "echo",
})  # fmt: skip
_decode_ids = msgspec.json.Decoder(list[int]).decode
_BROKEN = "\ufffd"
_SHOWN = frozenset({"content", "reasoning", "tool_calls", "finish_reason"})


@dataclass(frozen=True, slots=True)
class Kept:
    """What of a broken-off answer stands.

    `after` is the last entry kept, `last` how many of `tokens` came with it, `content` the text up to there, `cut`
    how many tokens at the end of that entry are void as well: a chunk of several tokens may end inside a character.
    """

    after: EntryId
    tokens: list[int]
    last: int
    content: str
    plain: bool
    cut: int = 0


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """How a server goes on with an answer.

    Attributes:
        request: the job's request.
        kept: what stands of the answer.
        prompt_ids: the prompt that the server is given, the kept tokens included; empty when none are kept.
        withheld: text of the kept tokens that was not published, since it might have become a stop string.
        room: how many more tokens the model has room for; None when that is not known.
        model: the name that the model of the first attempt gave itself.
    """

    request: Object
    kept: Kept
    prompt_ids: list[int]
    withheld: str = ""
    room: int | None = None
    model: str = ""

    @property
    def is_exhausted(self) -> bool:
        """Whether the answer has all the tokens that it may have."""
        return 0 in (self.budget, self.room)

    @property
    def budget(self) -> int | None:
        """How many more tokens the job allows; None when it sets no limit."""
        asked = self.request.get("max_completion_tokens")
        asked = self.request.get("max_tokens") if asked is None else asked
        return max(0, asked - len(self.kept.tokens)) if isinstance(asked, int) else None

    @property
    def requests(self) -> Iterator[tuple[str, Object]]:
        """The ways to ask, each a route and a body, the best first."""
        if not self.prompt_ids:
            yield CHAT, self.request
            return
        body = {name: value for name, value in self.request.items() if name != "stop"}  # see StopStrings
        body |= {name: self.budget for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None}
        least = body.get("min_tokens")
        if isinstance(least, int):
            body["min_tokens"] = max(0, least - len(self.kept.tokens))
        yield CHAT, body | {"kv_transfer_params": {"prompt_token_ids": list(self.prompt_ids)}}
        most = self.room if self.budget is None else self.budget
        if self.kept.plain and not body.get("logprobs") and most is not None:
            plain = {name: value for name, value in body.items() if name not in _NOT_OF_COMPLETIONS}
            # Without a limit this route gives 16 tokens, where the other gives all that there is room for.
            yield COMPLETIONS, plain | {"prompt": list(self.prompt_ids), "max_tokens": most}

    @property
    def entry(self) -> Fields:
        """The `resumed` entry."""
        forgets = [name for name in _COUNTING if self.prompt_ids and self.request.get(name)]
        return to_fields(Resumed(id=BEFORE_ALL, after=str(self.kept.after), cut=self.kept.cut, forgets=forgets))


class ResumedChunkParser(ChunkParser):
    """Reads the stream of a server that goes on: `resumed` comes out first, once the server has shown that it does."""

    __slots__ = ("_new", "_plan", "_said", "_stops", "has_progressed")

    def __init__(self, plan: ResumePlan, *, n: int, keep_prompt_ids: bool, keep_usage: bool) -> None:
        super().__init__(
            n=n, keep_prompt_ids=keep_prompt_ids, keep_usage=keep_usage,
            sent=plan.prompt_ids or None, kept=len(plan.kept.tokens),
        )  # fmt: skip
        self._plan = plan
        self._stops = StopStrings(plan.request, plan.kept.content, plan.withheld) if plan.prompt_ids else None
        self._said = False
        self._new = 0
        self.has_progressed = False
        """Whether it showed more of the answer than stood before: tokens without text are generated anew each time."""

    @property
    def is_committed(self) -> bool:
        return self._said

    def parse(self, data: bytes) -> list[Fields]:
        entries = super().parse(data)
        if self._stops is not None and self._stops.stops:
            entries = list(self._stopped(self._stops, entries))
        if entries and not self.has_progressed:
            self.has_progressed = any(_SHOWN & fields.keys() for fields in entries)
        if entries and not self._said:
            if self._plan.prompt_ids and self.model != self._plan.model:
                raise CannotResume("another model answers")  # one may read the ids of another as its own
            self._said = True
            entries.insert(0, self._plan.entry)
        return entries

    def _stopped(self, stops: StopStrings, entries: list[Fields]) -> Iterator[Fields]:
        for fields in entries:
            if fields["type"] != Delta.type:
                yield fields
                continue
            self._new += len(_decode_ids(fields.get("token_ids", "[]")))
            yield stops.take(fields)
            if stops.found:
                self._end_at_stop()
                return

    def _end_at_stop(self) -> None:
        """The server would go on."""
        prompt, kept = len(self._plan.prompt_ids), len(self._plan.kept.tokens)
        self.usage = {
            "prompt_tokens": prompt - kept, "completion_tokens": kept + self._new, "total_tokens": prompt + self._new
        }  # fmt: skip
        self.end("stop")


def obstacle(request: Object) -> str:
    """Why an answer to this request cannot be gone on with; nothing when it can."""
    if request.get("tools") or request.get("functions"):
        return "tools"
    form = request.get("response_format")
    if any(request.get(name) for name in _STRUCTURED) or (isinstance(form, dict) and form.get("type") != "text"):
        return "structured output"  # its grammar would start over
    if any(isinstance(count := request.get(name), int) and count > 1 for name in ("n", "best_of")):
        return "several choices"
    for name in _LIMITS:
        if not isinstance(request.get(name, 0), int | None):  # "50" or 50.0, which vLLM takes for a number too
            return f"{name} that is no integer"
    for name in _OF_THE_PROMPT:
        if request.get(name):
            return name
    messages = request.get("messages")
    for message in messages if isinstance(messages, list) else []:
        parts = message.get("content") if isinstance(message, dict) else None
        if isinstance(parts, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in parts):
            return "multimodal input"  # the ids would drop it
    return ""


def kept_of(deltas: Sequence[Delta]) -> Kept:
    """What stands of these deltas, up to the last that said something: later tokens have shown no text yet.

    Raises:
        CannotResume: when something of them cannot be put into a prompt.
    """
    spoken = [n for n, delta in enumerate(deltas) if delta.content or delta.reasoning or delta.tool_calls]
    if not spoken:
        first = deltas[0].id
        return Kept(EntryId(first.attempt, first.n - 1), [], 0, "", plain=True)
    kept = deltas[: spoken[-1] + 1]
    for delta in kept:
        if delta.index or delta.tool_calls or "delta" in delta.extra:
            raise CannotResume("it holds more than text")
        if (delta.content or delta.reasoning) and not delta.token_ids:
            raise CannotResume("the server gave no token ids")
    return Kept(
        after=kept[-1].id,
        tokens=[token for delta in kept for token in delta.token_ids],
        last=len(kept[-1].token_ids),
        content="".join(delta.content for delta in kept),
        plain=not any(delta.reasoning for delta in kept),
    )


async def plan_resume(
    upstream: ServerPool, endpoint: Server, request: Object, history: Answer, caller: Caller | None = None
) -> ResumePlan:
    """Find out how a server can go on with an answer; `caller` is the job.

    Raises:
        CannotResume: when it cannot.
        UpstreamError: when the server does not say, and another might.
    """
    kept = kept_of(history.deltas)
    if not kept.tokens:
        return ResumePlan(request, kept, [])
    if why := obstacle(request):
        raise CannotResume(why)
    stops = stops_of(request)
    if stops and not kept.plain:
        raise CannotResume("stop strings with reasoning")
    if stops and isinstance(least := request.get("min_tokens"), int) and least > len(kept.tokens):
        raise CannotResume("stop strings before min_tokens")  # no server looks for them until then
    post = partial(upstream.post, endpoint, caller=caller)
    prompt, longest = await _tokenize(post, request)
    if history.opened is None or digest_of(prompt) != history.opened.prompt_digest:
        raise CannotResume("the prompt's tokens are not those of the first attempt")
    held = ""
    if kept.last > 1 or stops:
        kept, text = await _whole_characters(post, request, kept)
        if stops and not request.get("include_stop_str_in_output"):
            held = _held_back(text, kept.content, max(map(len, stops)) - 1)
    whole = prompt + kept.tokens
    room = None if longest is None else longest - len(whole)
    if room is not None and room < 0:
        raise CannotResume("this server has less room than the one that began")
    return ResumePlan(request, kept, whole, held, room, history.opened.model)


async def _tokenize(post: _Post, request: Object) -> tuple[list[int], int | None]:
    """The ids of the prompt as this server makes them, and how many tokens its model has room for in all."""
    body = {name: request[name] for name in _TOKENIZED if request.get(name) is not None}
    answer = await _ask(post, "/tokenize", body, _Tokens)
    return answer.tokens, answer.max_model_len


async def _whole_characters(post: _Post, request: Object, kept: Kept) -> tuple[Kept, str]:
    """The kept tokens up to the end of a character, and their text."""
    for cut in range(max(1, kept.last)):
        tokens = kept.tokens[: len(kept.tokens) - cut]
        body: Object = {"tokens": list(tokens)}
        if request.get("model"):
            body["model"] = request["model"]
        text = (await _ask(post, "/detokenize", body, _Detokenized)).prompt
        if not text.endswith(_BROKEN):
            return replace(kept, tokens=tokens, cut=cut), text
    raise CannotResume("its last chunk ends inside a character")


def _held_back(text: str, published: str, most: int) -> str:
    """What of the text of the kept tokens was not published, at most so many characters."""
    for whole, shown in ((text, published), (text.lstrip(), published.lstrip())):
        if whole.startswith(shown) and len(whole) - len(shown) <= most:
            return whole[len(shown) :]
    raise CannotResume("its tokens do not read as its text")


class _Tokens(msgspec.Struct):
    tokens: list[int]
    max_model_len: int | None = None


class _Detokenized(msgspec.Struct):
    prompt: str


async def _ask(post: _Post, path: str, body: Object, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(await post(path, body), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise CannotResume(f"{path} gives no answer that can be read") from None
    except UpstreamError as error:
        if error.elsewhere or (
            error.retryable and error.status != 403
        ):  # a route may be forbidden as it may be missing
            raise
        raise CannotResume(f"{path}: {error.code}") from None
