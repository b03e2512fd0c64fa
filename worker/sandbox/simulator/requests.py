"""The requests that the simulated vLLM accepts, and its refusals with the messages of a real one. No I/O."""

import msgspec

from .answers import END, START, VOCABULARY, encode, known_answer, pseudo_text
from .options import Fault, Options, Scenario, Shape

__all__ = [
    "ASSISTANT",
    "ChatRequest",
    "Fault",
    "Json",
    "KvTransferParams",
    "Message",
    "Options",
    "RefusedError",
    "Scenario",
    "Shape",
    "TextRequest",
    "answer_to",
    "bad_request",
    "check_model",
    "check_request",
    "error_body",
    "late_error",
    "parse_chat_request",
    "parse_json",
    "scenario_of",
    "validation_error",
]

Json = dict[str, object]

ASSISTANT = [START, *encode("assistant\n")]
"""The token ids that open the answer in the template, after those of the messages."""


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str | list[dict[str, object]] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(str(part.get("text", "")) for part in self.content)
        return self.content or ""


class KvTransferParams(msgspec.Struct, frozen=True):
    prompt_token_ids: object = None


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a chat completion that change the simulated answer; others are ignored."""

    messages: list[Message]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    return_token_ids: bool | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    kv_transfer_params: KvTransferParams | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def continued(self) -> str:
        """The text of an unfinished last message, which the answer continues; empty without one."""
        return self.messages[-1].text if self.continue_final_message else ""

    @property
    def prompt(self) -> list[int]:
        """Token ids by the model's template (ChatML)."""
        ids: list[int] = []
        for message in self.messages:
            ids += [START, *encode(f"{message.role}\n{message.text}"), END, *encode("\n")]
        if self.continue_final_message:
            return ids[: -1 - len(encode("\n"))]
        return ids if self.add_generation_prompt is False else [*ids, *ASSISTANT]

    @property
    def given(self) -> list[int]:
        """The token ids that the request has instead of messages; empty without them."""
        given = self.kv_transfer_params and self.kv_transfer_params.prompt_token_ids
        return given if isinstance(given, list) else []


class TextRequest(ChatRequest, frozen=True, kw_only=True):
    """A text completion, converted to the chat request with the same prompt, which is also in `given`."""


class RefusedError(Exception):
    """A response with an HTTP error status and a JSON body; underscores in names of headers become hyphens."""

    def __init__(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body
        self.headers = headers or {}


def error_body(code: int, message: str, *, kind: str = "BadRequestError", param: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def parse_json(raw: bytes) -> Json:
    """The JSON object of a body; raises RefusedError."""
    try:
        return msgspec.json.decode(raw, type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise validation_error("json_invalid", "body", "JSON decode error", str(error)) from error


def parse_chat_request(body: Json, options: Options) -> tuple[ChatRequest, Scenario]:
    """The request of a chat completion, and the scenario of its answer.

    Raises:
        RefusedError: when vLLM would refuse before the stream begins.
    """
    for field in sorted(options.rejects & body.keys()):
        raise _rejected(field, body[field], options)
    if "messages" not in body:
        raise validation_error("missing", "body.messages", "Field required", f"<dict of {len(body)} items>")
    if not isinstance(body["messages"], list):
        raise validation_error("list_type", "body.messages", "Input should be a valid list", body["messages"])
    accepted = {field: value for field, value in body.items() if field not in options.ignores}
    try:
        request = msgspec.convert(accepted, ChatRequest, strict=False)
    except msgspec.ValidationError as error:
        raise validation_error("value_error", "body", str(error), f"<dict of {len(body)} items>") from error
    scenario = scenario_of(body, options)
    check_request(request, options)
    return request, scenario


def scenario_of(body: Json, options: Options) -> Scenario:
    """The server's scenario with the overrides of the request's `simulate`. Raises RefusedError."""
    try:
        overrides = msgspec.convert(body.get("simulate") or {}, dict[str, object])
        return msgspec.convert(msgspec.to_builtins(options.scenario) | overrides, Scenario)
    except msgspec.ValidationError as error:
        raise validation_error("value_error", "body", str(error), f"<dict of {len(body)} items>") from error


def check_model(model: str | None, options: Options) -> None:
    """Raise RefusedError for a model that the server does not have."""
    if model not in {None, "", options.model}:
        message = f"The model `{model}` does not exist. Valid aliases: {options.model}."
        raise RefusedError(404, error_body(404, message, kind="NotFoundError", param="model"))


def check_request(request: ChatRequest, options: Options) -> None:
    """Make the checks of vLLM 0.32.0, in the same order. Raises RefusedError."""
    check_model(request.model, options)
    if not request.messages:
        raise bad_request("Cannot apply chat template to an empty conversation. Provide at least one message.")
    if request.stream_options is not None and not request.stream:
        raise bad_request("Stream options can only be defined when `stream=True`.", "stream_options")
    if request.top_logprobs and not request.logprobs:
        raise bad_request("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    if "" in request.stops:
        raise bad_request("stop cannot contain an empty string.")
    _check_given(request)
    _check_numbers(request)
    _check_length(request, options.max_model_len)
    _check_least(request, options.max_model_len)


def _check_given(request: ChatRequest) -> None:
    if request.kv_transfer_params is None or request.kv_transfer_params.prompt_token_ids is None:
        return
    if not request.given or not all(type(number) is int and number >= 0 for number in request.given):
        where = "kv_transfer_params.prompt_token_ids"
        raise bad_request(
            "`kv_transfer_params['prompt_token_ids']` must be a non-empty list of non-negative integers.", where
        )
    if not isinstance(request, TextRequest) and (message := _unknown_token(request)):
        raise bad_request(message, "kv_transfer_params.prompt_token_ids")


def _unknown_token(request: ChatRequest) -> str | None:
    unknown = next((number for number in request.given if number >= len(VOCABULARY)), None)
    return None if unknown is None else f"Token id {unknown} is out of vocabulary"


def _check_least(request: ChatRequest, longest: int) -> None:
    least = request.min_tokens or 0
    most = longest - len(request.given or request.prompt) if request.token_limit is None else request.token_limit
    if least < 0:
        raise bad_request(f"min_tokens must be greater than or equal to 0, got {least}.")
    if least > most:
        raise bad_request(f"min_tokens must be less than or equal to max_tokens={most}, got {least}.")


def _check_numbers(request: ChatRequest) -> None:
    temperature = 1.0 if request.temperature is None else request.temperature
    if temperature < 0:
        raise bad_request(f"temperature must be non-negative, got {temperature}.", "temperature", temperature)
    if temperature > 2:
        raise bad_request(f"temperature must be in [0, 2], got {temperature}.", "temperature", temperature)
    choices = 1 if request.n is None else request.n
    if choices < 1:
        raise bad_request(f"n must be at least 1, got {choices}.")
    if choices > 1 and temperature == 0:
        raise bad_request(f"n must be 1 when using greedy sampling, got {choices}.")


def _check_length(request: ChatRequest, longest: int) -> None:
    limit = request.token_limit
    if limit is not None and limit < 1:
        raise bad_request(f"max_tokens must be at least 1, got {limit}.", "max_tokens", limit)
    if limit is not None and limit > longest:
        message = (
            f"max_tokens={limit} cannot be greater than max_model_len={longest}. Please request fewer output tokens."
        )
        raise bad_request(message, "max_tokens", limit)
    if request.given:
        _check_given_length(request, longest)
    elif len(request.prompt) >= longest:
        # vLLM stops counting at the first token over the limit.
        message = (
            f"This model's maximum context length is {longest} tokens. However, your prompt contains at least "
            f"{longest + 1} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt."
        )
        raise bad_request(message, "input_tokens", longest + 1)


def _check_given_length(request: ChatRequest, longest: int) -> None:
    count = len(request.given)
    if count == longest:
        raise bad_request("max_tokens must be at least 1, got 0.", "max_tokens", 0)
    if count > longest and isinstance(request, TextRequest):
        message = (
            f"This model's maximum context length is {longest} tokens. However, your prompt contains {count} "
            "input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt."
        )
        raise bad_request(message, "input_tokens", count)
    if count > longest:
        raise bad_request(f"Input length ({count}) exceeds model's maximum context length ({longest}).")


def bad_request(message: str, param: str | None = None, value: float | None = None) -> RefusedError:
    """A refusal of vLLM's own checks."""
    if param is not None:
        message += f" (parameter={param}{'' if value is None else f', value={value}'})"
    return RefusedError(400, error_body(400, message, param=param))


def validation_error(kind: str, loc: str, reason: str, value: object) -> RefusedError:
    """A refusal of FastAPI's validation, whose message has the repr of pydantic's details."""
    details = {"type": kind, "loc": loc, "msg": reason, "input": value}
    return RefusedError(400, error_body(400, f"1 validation error:\n  {details}", kind="Bad Request", param=loc))


def _rejected(field: str, value: object, options: Options) -> RefusedError:
    if options.reject_style == "vllm":
        return validation_error("extra_forbidden", f"body.{field}", "Extra inputs are not permitted", value)
    if options.reject_style == "fastapi":
        detail = {"type": "extra_forbidden", "loc": ["body", field], "msg": "Extra inputs are not permitted"}
        return RefusedError(400, {"detail": [detail | {"input": value}]})
    error = {"message": f"Unrecognized request argument supplied: {field}", "type": "invalid_request_error"}
    return RefusedError(400, {"error": error | {"param": None, "code": None}})


def answer_to(messages: object, *, tokens: int | None = None, choice: int = 0) -> str:
    """The complete text of the answer to these messages (JSON, as in a request), unless `simulate` sets another text.

    A known question gets its fixed answer. Any other question, and any with `tokens`, gets pseudo-text that depends on
    the messages up to the user's last one. The choices of a request differ only in pseudo-text.
    """
    chat = msgspec.convert(messages, list[Message])
    while len(chat) > 1 and chat[-1].role == "assistant":
        chat.pop()
    known = known_answer(chat[-1].text)
    if known is not None and tokens is None:
        return known
    seed = "\n".join([f"{message.role}: {message.text}" for message in chat] + ([f"choice {choice}"] if choice else []))
    return pseudo_text(seed, 24 + len(seed) % 24 if tokens is None else tokens)


def late_error(request: ChatRequest) -> Json | None:
    """The error that vLLM detects only after the stream has begun, and sends with HTTP 200."""
    if isinstance(request, TextRequest) and (message := _unknown_token(request)):
        return error_body(400, message)
    count = request.top_logprobs or 0
    if count <= 20:
        return None
    message = f"Requested sample logprobs of {count}, which is greater than max allowed: 20"
    return error_body(400, f"{message} (parameter=logprobs, value={count})", param="logprobs")
