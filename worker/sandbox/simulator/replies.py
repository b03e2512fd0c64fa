"""The simulated vLLM's answer to a request, in the form of vLLM 0.32.0: chunks, usage, complete answers. No I/O.

As in vLLM, a step without text is sent only if the request wants its token id or logprob. The end token counts, and
comes in the finish chunk. With stop strings, text that may become one is withheld.
"""

import time
from collections.abc import Iterator
from itertools import chain, repeat, zip_longest
from typing import NamedTuple
from uuid import uuid4

from .answers import END, VOCABULARY, WORDS, Kind, Token, answer_tokens, filler
from .requests import ChatRequest, Json, Options, Scenario, answer_to

__all__ = ["FINGERPRINT", "Chunk", "Reply", "Step"]

FINGERPRINT = "vllm-0.32.0-simulated"
_SPECIAL = 4  # token ids below this are markers, which are never in the text
_END_TOKEN = Token(END, "", "content", "")


class Step(NamedTuple):
    """The result of one step of the engine for one choice."""

    tokens: list[Token]
    content: str
    delta: Json
    finish_reason: str | None = None
    stop_reason: str | None = None


class Chunk(NamedTuple):
    """One chunk with a delta."""

    choice: int
    body: Json
    content: str
    reasoning: str
    arguments: str


class Reply:
    """The complete answer to one request, which is generated first and then sent chunk by chunk."""

    _kind = "chat.completion"
    _event = "chat.completion.chunk"
    _prefix = "chatcmpl"

    def __init__(self, request: ChatRequest, scenario: Scenario, options: Options) -> None:
        self._request = request
        self._options = options
        self._shapes = scenario.shapes
        self.question = request.prompt
        """The token ids of the messages."""
        self._prompt = request.given or self.question
        known = self._prompt[: len(self.question)] == self.question
        self.begun = self._prompt[len(self.question) :] if known else []
        """Token ids after those of the messages: the beginning of an answer, which this one continues."""
        stream_options = request.stream_options
        self._usage_last = bool(stream_options and stream_options.include_usage)
        self._usage_always = self._usage_last and bool(stream_options and stream_options.continuous_usage_stats)
        self._id = f"{self._prefix}-{uuid4().hex[:16]}"
        self._created = int(time.time())
        self._choices = [self._steps(choice, scenario) for choice in range(request.n or 1)]
        self.tokens = [0] * len(self._choices)
        """Tokens of each choice that `rounds` has returned so far, including the end token."""

    @property
    def choices(self) -> int:
        return len(self._choices)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each complete choice, including the end token."""
        return [sum(len(step.tokens) for step in steps) for steps in self._choices]

    @property
    def contents(self) -> list[str]:
        """The complete text of each choice."""
        return ["".join(step.content for step in steps) for steps in self._choices]

    @property
    def reasonings(self) -> list[str]:
        return [_text_of(steps, "reasoning") for steps in self._choices]

    @property
    def arguments(self) -> list[str]:
        """The arguments of each choice's tool call."""
        return [_text_of(steps, "arguments") for steps in self._choices]

    def _steps(self, choice: int, scenario: Scenario) -> list[Step]:
        request = self._request
        text = scenario.text
        if text is None:
            text = answer_to(request.messages, tokens=scenario.tokens, choice=choice)
        tokens = answer_tokens(
            text.removeprefix(request.continued),
            tools=bool(request.tools) and request.tool_choice != "none",
            reasoning=self._options.reasoning,
        )
        # An answer that must not end yet gets further tokens. So did the beginning that another server generated.
        more = filler(len(self.begun) + (request.min_tokens or 0) - len(tokens))
        if request.min_tokens or [token.id for token in tokens + more] == self.begun:
            tokens += more
        tokens = self._rest(tokens)
        room = max(1, self._options.max_model_len - len(self._prompt))
        limit = room if request.token_limit is None else min(room, request.token_limit)
        field = "reasoning_content" if "reasoning_content" in self._shapes else "reasoning"
        steps = list(_steps(tokens, request, limit, field))
        if "finish_text" in self._shapes and len(steps) > 1 and not steps[-1].delta and "content" in steps[-2].delta:
            last = steps.pop()
            before = steps.pop()
            steps.append(last._replace(tokens=before.tokens + last.tokens, content=before.content, delta=before.delta))
        return steps

    def _rest(self, tokens: list[Token]) -> list[Token]:
        """The tokens after those of `begun`; all of them if the answer does not begin with `begun`."""
        count = len(self.begun)
        begun = tokens[:count]
        if [token.id for token in begun] + [END] * (count - len(begun)) != self.begun:
            return tokens
        rest = tokens[count:]
        if begun and not begun[-1].text:
            # The prompt appears in the output before the character that the cut split (vllm#48853).
            whole = next((place for place, token in enumerate(rest) if token.text), None)
            if whole is not None:
                shown = b"".join(VOCABULARY[number] for number in self._prompt if number >= _SPECIAL)
                rest[whole] = rest[whole]._replace(part=shown.decode(errors="ignore") + rest[whole].part)
        return rest

    def _chunk(self, choices: list[Json], completion: int) -> Json:
        chunk = self._head(self._event) | {"choices": choices}
        if self._usage_always:
            chunk["usage"] = self._usage_so_far(completion)
        return chunk

    def _usage_so_far(self, completion: int) -> Json:
        return self._usage(completion) | {"completion_tokens_details": None}

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._options.model}

    def _usage(self, completion: int) -> Json:
        prompt = len(self._prompt)
        return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}

    @property
    def _shown_prompt(self) -> Json:
        return {"prompt_token_ids": self._prompt if self._request.return_token_ids else None, "prompt_text": None}

    def opening(self) -> Iterator[Json]:
        """The role chunk of each choice, and with `echo` the text that the answer continues."""
        for choice in range(self.choices):
            delta = {"role": "assistant", "content": ""}
            body = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self._chunk([body], 0) | self._shown_prompt
        if self._request.echo and self._request.continued:
            for choice in range(self.choices):
                delta = {"content": self._request.continued}
                yield self._chunk([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}], 0)

    def rounds(self) -> Iterator[list[Chunk]]:
        """The chunks of each step of the engine, in which every choice may have one."""
        unfinished = self.choices
        for steps in zip_longest(*self._choices):
            chunks = []
            for choice, step in enumerate(steps):
                if step is None:
                    continue
                self.tokens[choice] += len(step.tokens)
                unfinished -= step.finish_reason is not None
                if self._sends(step):
                    chunks.append(self._delta_chunk(choice, step, last=not unfinished))
            yield chunks

    def _sends(self, step: Step) -> bool:
        wants_tokens = self._request.return_token_ids or self._request.logprobs
        return bool(step.delta or step.finish_reason or wants_tokens)

    def _delta_chunk(self, choice: int, step: Step, *, last: bool) -> Chunk:
        unfinished = "" if "sloppy" in self._shapes else None
        body: Json = {"index": choice, "delta": step.delta, "logprobs": self._logprobs([step])}
        body["finish_reason"] = step.finish_reason or unfinished
        if step.finish_reason:
            body["stop_reason"] = step.stop_reason
        body["token_ids"] = self._token_ids([step])
        chunk = self._chunk([body], self.tokens[choice])
        if last and not self._usage_last:
            chunk["system_fingerprint"] = FINGERPRINT
        return Chunk(choice, chunk, step.content, _text_of([step], "reasoning"), _text_of([step], "arguments"))

    def closing(self) -> Iterator[Json]:
        """The usage chunk, if the request wants one."""
        if self._usage_last:
            body = self._head(self._event) | {"choices": [], "usage": self._usage(sum(self.tokens))}
            yield body | {"system_fingerprint": FINGERPRINT}

    def aborted(self) -> Iterator[Json]:
        """Chunks that end every choice as vLLM does when it aborts a request."""
        for choice in range(self.choices):
            yield self._delta_chunk(choice, Step([], "", {}, "abort"), last=choice == self.choices - 1).body

    def oddity(self, number: int) -> Json:
        """A chunk without content, in one of the shapes that some servers send."""
        odd: list[Json] = [
            {},
            {"choices": []},
            {"choices": None},
            {"choices": [{"index": 0}]},
            {"choices": [{"index": 0, "delta": None}]},
            {"choices": [{"index": 0, "delta": {"content": None}, "finish_reason": ""}]},
        ]
        return self._head(self._event) | odd[number % len(odd)]

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
            "prompt_logprobs": None,
            **self._shown_prompt,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _complete_choice(self, choice: int, steps: list[Step]) -> Json:
        call = _tool_call([token for step in steps for token in step.tokens])
        content = self.contents[choice]
        if self._request.echo:
            content = self._request.continued + content
        message: Json = {"role": "assistant", "content": None if call else content}
        message |= {"refusal": None, "annotations": None, "audio": None, "function_call": None}
        if call:
            message["tool_calls"] = [call]
        message["reasoning"] = _text_of(steps, "reasoning") or None
        return {
            "index": choice,
            "message": message,
            "logprobs": self._logprobs(steps),
            "finish_reason": steps[-1].finish_reason,
            "stop_reason": steps[-1].stop_reason,
            "token_ids": self._token_ids(steps),
            "routed_experts": None,
        }

    def _token_ids(self, steps: list[Step]) -> list[int] | None:
        return [token.id for step in steps for token in step.tokens] if self._request.return_token_ids else None

    def _logprobs(self, steps: list[Step]) -> Json | None:
        if not self._request.logprobs:
            return None
        others = self._request.top_logprobs or 0
        return {"content": [_logprob(token, others) for step in steps for token in step.tokens]}


def _steps(tokens: list[Token], request: ChatRequest, limit: int, reasoning_field: str) -> Iterator[Step]:
    """One step for each token, up to the end token, a stop string or the limit."""
    called = any(token.kind == "name" for token in tokens)
    # The reason is "stop" if the client chose the function, and not the model.
    ending = "tool_calls" if called and not isinstance(request.tool_choice, dict) else "stop"
    held_back = 0 if request.include_stop_str_in_output else max(map(len, request.stops), default=1) - 1
    text, sent = "", 0
    for count, token in enumerate(chain(tokens, repeat(_END_TOKEN)), 1):
        seen = len(text)
        text += token.part if token.kind == "content" else ""
        stop = None
        if count > (request.min_tokens or 0):
            stop = next((stop for stop in request.stops if stop in text[max(0, seen - len(stop) + 1) :]), None)
        finish = None
        if stop is not None:
            finish = "stop"
            start = text.index(stop, max(0, seen - len(stop) + 1))
            text = text[: start + len(stop) * bool(request.include_stop_str_in_output)]
        elif token.id == END and not request.ignore_eos:
            finish = ending
        elif count == limit:
            finish = "length"
        due = len(text) if finish else max(sent, len(text) - held_back)
        content = text[sent:due]
        sent = due
        yield Step([token], content, _delta(token, content, reasoning_field), finish, stop)
        if finish:
            return


def _delta(token: Token, content: str, reasoning_field: str) -> Json:
    if token.kind == "reasoning":
        return {reasoning_field: token.part}
    if token.kind == "name":
        function = {"name": token.part}
        call = {"id": f"chatcmpl-tool-{uuid4().hex[:16]}", "type": "function", "index": 0, "function": function}
        return {"content": None, "tool_calls": [call]}
    if token.kind == "arguments" and token.part:
        return {"content": None, "tool_calls": [{"index": 0, "function": {"arguments": token.part}}]}
    return {"content": content} if content else {}


def _text_of(steps: list[Step], kind: Kind) -> str:
    return "".join(token.part for step in steps for token in step.tokens if token.kind == kind)


def _tool_call(tokens: list[Token]) -> Json | None:
    name = "".join(token.part for token in tokens if token.kind == "name")
    arguments = "".join(token.part for token in tokens if token.kind == "arguments")
    if not name:
        return None
    function = {"name": name, "arguments": arguments}
    return {"id": f"chatcmpl-tool-{uuid4().hex[:16]}", "type": "function", "function": function}


def _logprob(token: Token, others: int) -> Json:
    """A logprob that depends only on the token. The most likely alternative is the token itself."""
    text = VOCABULARY[END].decode() if token.id == END else token.text
    entry: Json = {"token": text, "logprob": -0.001 * (1 + token.id % 9), "bytes": list(text.encode())}
    alternatives = [(WORDS[(token.id + rank) % len(WORDS)], -8.0 - rank) for rank in range(1, others)]
    top = [{"token": word, "logprob": logprob, "bytes": list(word.encode())} for word, logprob in alternatives]
    return entry | {"top_logprobs": [entry, *top] if others else []}
