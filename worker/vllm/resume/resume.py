"""Makes a `ResumePlan` for an interrupted answer, with queries to the vLLM server that will continue it."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TypeAlias, TypeVar

import msgspec

from ...contract.answer import Answer
from ...contract.entries import Object
from ..chunks.shapes import digest_of_prompt
from ..errors import CannotResume, UpstreamError
from ..servers.circuit import Caller
from ..servers.pool import ServerPool
from ..servers.server import Server
from .plan import KeptAnswer, ResumePlan, keep_answer, why_not_resumable
from .stop_strings import stops_of

_T = TypeVar("_T")
_Post: TypeAlias = Callable[[str, Object], Awaitable[bytes]]
"""Posts a body to a path of the server; returns the body of the response."""

_TOKENIZED = (
    "model", "messages", "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template",
    "chat_template_kwargs",
)  # fmt: skip
_REPLACEMENT = "\ufffd"


async def plan_resume(
    pool: ServerPool, server: Server, request: Object, history: Answer, caller: Caller | None = None
) -> ResumePlan:
    """Plan how a server continues the answer in `history`, for the job `caller`.

    The server is queried with `/tokenize` and `/detokenize`.

    Raises:
        CannotResume: when the answer cannot be resumed.
        UpstreamError: when this server does not answer, and another server may.
    """
    kept = keep_answer(history.deltas)
    if not kept.token_ids:
        return ResumePlan(request, kept, [])
    if why := why_not_resumable(request):
        raise CannotResume(why)
    stops = stops_of(request)
    if stops and not kept.is_plain:
        raise CannotResume("stop strings with reasoning")
    if stops and isinstance(minimum := request.get("min_tokens"), int) and minimum > len(kept.token_ids):
        raise CannotResume("stop strings before min_tokens")  # servers ignore stop strings before that
    post = partial(pool.post, server, caller=caller)
    # This server must tokenize the prompt to the same token ids as the first server did.
    fields = {name: request[name] for name in _TOKENIZED if request.get(name) is not None}
    prompt = await _query(post, "/tokenize", fields, _Tokenized)
    if history.opened is None or digest_of_prompt(prompt.tokens) != history.opened.prompt_digest:
        raise CannotResume("the prompt's tokens are not those of the first attempt")
    withheld = ""
    if kept.last_count > 1 or stops:
        kept, text = await _whole_characters(post, request, kept)
        if stops and not request.get("include_stop_str_in_output"):
            withheld = _withheld_text(text, kept.content, max(map(len, stops)) - 1)
    prompt_ids = prompt.tokens + kept.token_ids
    context_left = None if prompt.max_model_len is None else prompt.max_model_len - len(prompt_ids)
    if context_left is not None and context_left < 0:
        raise CannotResume("this server's context is smaller than the first server's")
    return ResumePlan(request, kept, prompt_ids, withheld, context_left, history.opened.model)


async def _whole_characters(post: _Post, request: Object, kept: KeptAnswer) -> tuple[KeptAnswer, str]:
    """The kept tokens up to the end of a character, and their text."""
    for cut in range(max(1, kept.last_count)):
        token_ids = kept.token_ids[: len(kept.token_ids) - cut]
        body: Object = {"tokens": list(token_ids)}
        if request.get("model"):
            body["model"] = request["model"]
        text = (await _query(post, "/detokenize", body, _Detokenized)).prompt
        if not text.endswith(_REPLACEMENT):
            return replace(kept, token_ids=token_ids, cut=cut), text
    raise CannotResume("its last chunk ends inside a character")


def _withheld_text(text: str, published: str, limit: int) -> str:
    """The part of the kept tokens' text that was not published, of at most `limit` characters."""
    # SentencePiece tokenizers write a space before each word. `/detokenize` removes the space before the first token. A
    # stream keeps this space, since its text follows the prompt (tokenizers 0.23.3: `decode` and `DecodeStream`).
    for whole, shown in ((text, published), (text.lstrip(), published.lstrip())):
        if whole.startswith(shown) and len(whole) - len(shown) <= limit:
            return whole[len(shown) :]
    raise CannotResume("the text of its tokens is not the published text")


class _Tokenized(msgspec.Struct):
    tokens: list[int]
    max_model_len: int | None = None


class _Detokenized(msgspec.Struct):
    prompt: str


async def _query(post: _Post, path: str, body: Object, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(await post(path, body), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise CannotResume(f"the response of {path} cannot be read") from None
    except UpstreamError as error:
        # A proxy may forbid a route (403), or may not have it.
        if error.elsewhere or (error.retryable and error.status != 403):
            raise
        raise CannotResume(f"{path}: {error.code}") from None
