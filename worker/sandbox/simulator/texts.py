"""The simulated vLLM's routes for token ids: /tokenize, /detokenize and text completions. No I/O."""

from collections.abc import Iterator
from typing import TypeVar

import msgspec

from .answers import END, START, VOCABULARY, decode, encode
from .replies import FINGERPRINT, Chunk, Reply, Step
from .requests import (
    ASSISTANT,
    ChatRequest,
    Json,
    KvTransferParams,
    Message,
    Options,
    Scenario,
    StreamOptions,
    TextRequest,
    bad_request,
    check_model,
    check_request,
    scenario_of,
    validation_error,
)

__all__ = ["TextReply", "detokenize", "parse_text_request", "tokenize"]

_DEFAULT_TOKENS = 16
_T = TypeVar("_T")


class _TextBody(msgspec.Struct, frozen=True):
    """The fields of a text completion that change the simulated answer; others are ignored."""

    prompt: str | list[int] | None = None
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None


def parse_text_request(body: Json, options: Options) -> tuple[TextRequest, Scenario]:
    """The request of a text completion, and the scenario of its answer.

    Raises:
        RefusedError: when vLLM would refuse, and for several prompts, `echo` and `logprobs`, which are not simulated.
    """
    accepted = {field: value for field, value in body.items() if field not in options.ignores}
    text = _convert(accepted, _TextBody)
    check_model(text.model, options)
    if text.prompt is None:
        raise bad_request("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if not text.prompt:
        raise bad_request("You must pass at least one prompt")
    if text.echo or text.logprobs is not None:
        raise bad_request("echo and logprobs of text completions are not simulated")
    ids = encode(text.prompt) if isinstance(text.prompt, str) else text.prompt
    request = TextRequest(
        messages=_messages(ids),
        model=text.model,
        stream=text.stream,
        stream_options=text.stream_options,
        temperature=text.temperature,
        max_tokens=_DEFAULT_TOKENS if text.max_tokens is None else text.max_tokens,
        min_tokens=text.min_tokens,
        n=text.n,
        stop=text.stop,
        include_stop_str_in_output=text.include_stop_str_in_output,
        ignore_eos=text.ignore_eos,
        return_token_ids=text.return_token_ids,
        kv_transfer_params=KvTransferParams(ids),
    )
    scenario = scenario_of(body, options)
    check_request(request, options)
    return request, scenario


def _messages(ids: list[int]) -> list[Message]:
    """The messages that the template renders to these ids. Plain text is one message of the user."""
    if START not in ids:
        return [Message("user", decode(ids))]
    starts = [place for place, number in enumerate(ids) if number == START]
    messages = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        role, _, content = decode(_until_end(ids[start + 1 : end])).partition("\n")
        messages.append(Message(role, content))
    begun = ids[starts[-1] :]
    if len(messages) > 1 and begun[: len(ASSISTANT)] == ASSISTANT:
        messages.pop()  # the rest is the answer, perhaps with its end token
    return messages


def _until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END)] if END in ids else ids


class TextReply(Reply):
    """The answer to a text completion, whose text is not split by a parser."""

    _kind = _event = "text_completion"
    _prefix = "cmpl"

    def __init__(self, request: ChatRequest, scenario: Scenario, options: Options) -> None:
        super().__init__(request, scenario, msgspec.structs.replace(options, reasoning=False))
        self._opened: set[int] = set()

    def opening(self) -> Iterator[Json]:
        """No chunks, since a text completion has no roles."""
        yield from ()

    def _usage_so_far(self, completion: int) -> Json:
        return self._usage(completion)

    def _sends(self, step: Step) -> bool:  # noqa: ARG002, vLLM sends a step without text too
        return True

    def _delta_chunk(self, choice: int, step: Step, *, last: bool) -> Chunk:
        first = choice not in self._opened
        self._opened.add(choice)
        body: Json = {"index": choice, "text": step.content, "logprobs": None}
        body |= {"finish_reason": step.finish_reason, "stop_reason": step.stop_reason}
        body["prompt_token_ids"] = self._prompt if first and self._request.return_token_ids else None
        body["token_ids"] = self._token_ids([step])
        chunk = self._chunk([body], self.tokens[choice])
        if last and not self._usage_last:
            chunk["system_fingerprint"] = FINGERPRINT
        return Chunk(choice, chunk, step.content, "", "")

    def complete(self) -> Json:
        """The answer as one JSON object, for a request that does not stream."""
        completion = sum(self.lengths)
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        return {
            **self._head(self._kind),
            "choices": [self._complete_choice(choice, steps) for choice, steps in enumerate(self._choices)],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": self._usage(completion) | details,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _complete_choice(self, choice: int, steps: list[Step]) -> Json:
        return {
            "index": choice,
            "text": self.contents[choice],
            "logprobs": None,
            "finish_reason": steps[-1].finish_reason,
            "stop_reason": steps[-1].stop_reason,
            "token_ids": self._token_ids(steps),
            "prompt_logprobs": None,
            "prompt_token_ids": self._prompt if self._request.return_token_ids else None,
            "routed_experts": None,
        }


class _Tokenize(msgspec.Struct, frozen=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False


def tokenize(body: Json, options: Options) -> Json:
    """The response of /tokenize for messages or a prompt. Raises RefusedError when vLLM would refuse."""
    if "prompt" not in body and "messages" not in body:
        raise validation_error("missing", "body.prompt", "Field required", f"<dict of {len(body)} items>")
    parsed = _convert(body, _Tokenize)
    check_model(parsed.model, options)
    if parsed.messages is None:
        ids = encode(parsed.prompt or "")
    elif not parsed.messages:
        raise bad_request("Cannot apply chat template to an empty conversation. Provide at least one message.")
    elif parsed.continue_final_message and parsed.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt are not compatible. Use continue_final_message when you "
            "want the model to continue the final message, and add_generation_prompt when you want to add a header "
            "that will prompt it to start a new assistant message instead."
        )
    else:
        ids = ChatRequest(
            messages=parsed.messages,
            continue_final_message=parsed.continue_final_message,
            add_generation_prompt=parsed.add_generation_prompt,
        ).prompt
    strings = [VOCABULARY[number].decode(errors="replace") for number in ids] if parsed.return_token_strs else None
    return {"count": len(ids), "max_model_len": options.max_model_len, "tokens": ids, "token_strs": strings}


class _Detokenize(msgspec.Struct, frozen=True):
    tokens: list[int]
    model: str | None = None


def detokenize(body: Json, options: Options) -> Json:
    """The response of /detokenize. Raises RefusedError when vLLM would refuse."""
    if "tokens" not in body:
        raise validation_error("missing", "body.tokens", "Field required", f"<dict of {len(body)} items>")
    if not isinstance(body["tokens"], list):
        raise validation_error("list_type", "body.tokens", "Input should be a valid list", body["tokens"])
    parsed = _convert(body, _Detokenize)
    check_model(parsed.model, options)
    if any(number < 0 for number in parsed.tokens):
        raise validation_error(
            "greater_than_equal", "body.tokens", "Input should be greater than or equal to 0", parsed.tokens
        )
    return {"prompt": decode(parsed.tokens)}


def _convert(body: Json, kind: type[_T]) -> _T:
    try:
        return msgspec.convert(body, kind, strict=False)
    except msgspec.ValidationError as error:
        raise validation_error("value_error", "body", str(error), f"<dict of {len(body)} items>") from error
