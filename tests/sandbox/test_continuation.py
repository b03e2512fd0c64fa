"""The simulated vLLM continues an answer that another server began, as a real one did in recorded answers."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from worker.sandbox.simulator.answers import END, VOCABULARY, decode, encode
from worker.sandbox.simulator.requests import ChatRequest, Message, answer_to
from worker.sandbox.simulator.server import Options, Served, Simulator

Event = dict[str, Any]
RECORDED: dict[str, Event] = msgspec.json.decode(
    (Path(__file__).parent.parent / "transcripts" / "continuation.json").read_bytes()
)
ANSWERS = [name for name in RECORDED if name.startswith(("completion", "chat"))]
ERRORS = [name for name in RECORDED if name.startswith("error_")]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
QUESTIONS = ("Who are you?", "你是谁?", "Send emoji", "Write code", "Think first", "What no model was taught")


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator() as running:
        yield running


@pytest.fixture
async def client(simulator: Simulator) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=simulator.url, timeout=10) as client:
        yield client


def messages_of(question: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": question}]


def prompt_of(question: str) -> list[int]:
    return ChatRequest(messages=[Message("user", question)]).prompt


def chat(question: str, ids: Sequence[int] = (), **fields: Any) -> Event:  # noqa: ANN401, JSON
    """A streamed chat that continues after these token ids of the answer."""
    begun = {"kv_transfer_params": {"prompt_token_ids": [*prompt_of(question), *ids]}} if ids else {}
    return {"messages": messages_of(question), "stream": True, "return_token_ids": True, **begun, **fields}


def text(question: str, ids: list[int], **fields: object) -> Event:
    """A text completion that continues after these token ids of the answer."""
    limit = {"max_tokens": 1000}
    return {"prompt": prompt_of(question) + ids, "stream": True, "return_token_ids": True, **limit, **fields}


def chunks(body: bytes) -> list[Event]:
    events = [event.removeprefix("data: ") for event in body.decode().split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return [msgspec.json.decode(event) for event in events[:-1]]


def choices(body: bytes) -> list[Event]:
    return [choice for chunk in chunks(body) for choice in chunk["choices"]]


def part(choice: Event, field: str = "content") -> str:
    """The text of a choice of either route, complete or streamed."""
    message = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
    return message.get(field) or ""


def joined(body: bytes, field: str = "content") -> str:
    return "".join(part(choice, field) for choice in choices(body))


def ids_of(body: bytes) -> list[int]:
    return [number for choice in choices(body) for number in choice.get("token_ids") or []]


def finishes(body: bytes) -> list[tuple[str, str | None]]:
    return [(choice["finish_reason"], choice["stop_reason"]) for choice in choices(body) if choice["finish_reason"]]


def shape(value: object) -> object:
    """The keys at every level in their order, and the types of their values."""
    if isinstance(value, dict):
        return tuple((key, shape(inner)) for key, inner in value.items())
    return type(value).__name__


def shapes(body: bytes) -> list[object]:
    """The shapes of the events and their choices in order of first appearance; tokens are cut differently."""
    seen = [(shape(chunk), *(shape(choice) for choice in chunk["choices"])) for chunk in chunks(body)]
    return list(dict.fromkeys(seen))


async def post(client: httpx.AsyncClient, path: str, request: Event) -> bytes:
    response = await client.post(path, json=request)
    assert response.status_code == 200, response.text
    return response.content


def here(recorded: Event) -> Event:
    """A recorded request, with the simulator's token ids of its text."""
    request: Event = recorded["request"]
    ids = prompt_of(recorded["question"]) + encode(recorded["kept"])
    return request | ({"prompt": ids} if "prompt" in request else {"kv_transfer_params": {"prompt_token_ids": ids}})


@pytest.mark.parametrize("name", ANSWERS)
async def test_a_continuation_has_the_recorded_shape_and_text(client: httpx.AsyncClient, name: str) -> None:
    recorded = RECORDED[name]
    request = here(recorded)
    body = await post(client, recorded["path"], request)
    body_recorded = recorded["body"].encode()
    if not request.get("stream"):
        simulated, real = msgspec.json.decode(body), msgspec.json.decode(body_recorded)
        assert shape(simulated) == shape(real)
        assert part(simulated["choices"][0]) == part(real["choices"][0])
        return
    assert finishes(body) == finishes(body_recorded)
    if finishes(body_recorded)[0][0] == "length":
        assert joined(body).startswith(joined(body_recorded))
    else:
        assert joined(body) == joined(body_recorded)
    assert shapes(body) == shapes(body_recorded)


@pytest.mark.parametrize("name", ERRORS)
async def test_an_error_equals_the_recorded_bytes(client: httpx.AsyncClient, name: str) -> None:
    recorded = RECORDED[name]
    response = await client.post(recorded["path"], json=recorded["request"])
    assert response.text == recorded["body"]
    assert (response.status_code, response.headers["content-type"]) == (recorded["status"], recorded["content_type"])


@pytest.mark.parametrize("name", ["tokenize", "tokenize_strings", "tokenize_prompt", "detokenize"])
async def test_token_ids_are_sent_as_recorded(client: httpx.AsyncClient, name: str) -> None:
    recorded = RECORDED[name]
    request = recorded["request"] | (
        {"tokens": encode(answer_to(messages_of("Send emoji")))} if name == "detokenize" else {}
    )
    answer = (await client.post(recorded["path"], json=request)).json()
    real = msgspec.json.decode(recorded["body"])
    assert shape(answer) == shape(real)
    assert answer.get("prompt", "").strip() == real.get("prompt", "").removesuffix("<|im_end|>").strip()
    assert answer.get("count") == (len(answer["tokens"]) if "tokens" in answer else None)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [{"type": "function", "function": {"name": "get_weather"}}]},
        {"continue_final_message": True, "add_generation_prompt": False},
    ],
)
async def test_tokenize_gives_the_prompt_of_the_same_chat(client: httpx.AsyncClient, fields: Event) -> None:
    request = {
        "messages": [*messages_of("你是谁?"), {"role": "assistant", "content": "我"}, *messages_of("🙂")],
        **fields,
    }
    tokens = (await client.post("/tokenize", json=request)).json()["tokens"]
    first = chunks(await post(client, CHAT, request | {"stream": True, "return_token_ids": True}))[0]
    assert tokens == first["prompt_token_ids"]


async def test_detokenize_shows_a_character_cut_in_two(client: httpx.AsyncClient) -> None:
    ids = encode("Sure 🙂")
    shown = [
        (await client.post("/detokenize", json={"tokens": ids[:count]})).json()["prompt"] for count in (-3, -1, 99)
    ]
    assert shown == ["Sure \ufffd", "Sure \ufffd", "Sure 🙂"]
    assert (await client.post("/detokenize", json={"tokens": [3, 999_999, 2]})).json() == {
        "prompt": "<|im_start|><|im_end|>"
    }


@pytest.mark.parametrize("question", QUESTIONS)
async def test_a_chat_continues_exactly_at_every_token_with_text(client: httpx.AsyncClient, question: str) -> None:
    whole = await post(client, CHAT, chat(question))
    ids, content, reasoning = [], "", ""
    for choice in choices(whole)[1:-1]:
        ids += choice["token_ids"]
        content += part(choice)
        reasoning += part(choice, "reasoning")
        if choice["delta"]:
            rest = await post(client, CHAT, chat(question, ids))
            assert (content + joined(rest), reasoning + joined(rest, "reasoning")) == (
                joined(whole),
                joined(whole, "reasoning"),
            )
            assert ids + ids_of(rest) == ids_of(whole)
            assert chunks(rest)[0]["prompt_token_ids"] == prompt_of(question) + ids


@pytest.mark.parametrize("question", ["你是谁?", "Send emoji", "Think first"])
async def test_a_text_completion_continues_exactly_at_every_character(client: httpx.AsyncClient, question: str) -> None:
    whole = await post(client, TEXT, text(question, []))
    assert joined(whole) == answer_to(messages_of(question))
    ids = ids_of(whole)
    for count in range(len(ids)):
        before = b"".join(VOCABULARY[number] for number in ids[:count])
        if decode(ids[:count]).encode() == before:
            rest = await post(client, TEXT, text(question, ids[:count]))
            assert before.decode() + joined(rest) == joined(whole)
            assert ids[:count] + ids_of(rest) == ids
            assert choices(rest)[0]["prompt_token_ids"] == prompt_of(question) + ids[:count]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_cut_through_a_character_leaks_the_prompt(client: httpx.AsyncClient, path: str) -> None:
    ids = encode("Sure! 🙂")[:-1]
    request = chat("Send emoji", ids) if path == CHAT else text("Send emoji", ids)
    assert joined(await post(client, path, request)).startswith("user\nSend emoji\nassistant\nSure! 🙂🚀")


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_stop_string_across_the_cut_is_not_found(client: httpx.AsyncClient, path: str) -> None:
    ids = encode("I am LLaMA, an AI")
    request = chat("Who are you?", ids) if path == CHAT else text("Who are you?", ids)
    rest = await post(client, path, request | {"stop": ["AI assistant"]})
    assert joined(rest) == answer_to(messages_of("Who are you?")).removeprefix("I am LLaMA, an AI")


async def test_a_complete_answer_only_ends(client: httpx.AsyncClient) -> None:
    ids = encode(answer_to(messages_of("Who are you?")))
    for kept in (ids, [*ids, END]):
        rest = await post(client, CHAT, chat("Who are you?", kept))
        assert (joined(rest), ids_of(rest), finishes(rest)) == ("", [END], [("stop", None)])


async def test_ids_that_do_not_answer_the_question_change_only_its_prompt(client: httpx.AsyncClient) -> None:
    body = await post(client, CHAT, chat("Who are you?", encode("It was a dark night")))
    assert joined(body) == answer_to(messages_of("Who are you?"))


async def test_usage_counts_given_ids_as_prompt(client: httpx.AsyncClient) -> None:
    ids = encode("I am LLaMA")
    for path, request in ((CHAT, chat("Who are you?", ids)), (TEXT, text("Who are you?", ids))):
        body = await post(client, path, request | {"stream_options": {"include_usage": True}})
        usage = chunks(body)[-1]["usage"]
        assert usage["prompt_tokens"] == len(prompt_of("Who are you?") + ids)
        assert usage["completion_tokens"] == len(ids_of(body))


@pytest.mark.parametrize("kept", [0, 3, 30, 45])
async def test_no_answer_ends_before_min_tokens(client: httpx.AsyncClient, kept: int) -> None:
    whole = await post(client, CHAT, chat("Who are you?", min_tokens=50))
    assert len(ids_of(whole)) == 51
    assert joined(whole).startswith(answer_to(messages_of("Who are you?")) + " ")
    rest = await post(client, CHAT, chat("Who are you?", ids_of(whole)[:kept], min_tokens=50 - kept))
    assert ids_of(rest) == ids_of(whole)[kept:]


async def test_no_stop_string_ends_an_answer_before_min_tokens(client: httpx.AsyncClient) -> None:
    body = await post(client, CHAT, chat("Who are you?", min_tokens=8, stop=["am", "to"]))
    assert finishes(body) == [("stop", "to")]


async def test_a_text_completion_has_sixteen_tokens_by_default(client: httpx.AsyncClient) -> None:
    request = text("Tell me a story", [])
    del request["max_tokens"]
    body = await post(client, TEXT, request)
    assert (len(ids_of(body)), finishes(body)) == (16, [("length", None)])


async def test_a_prompt_can_be_text(client: httpx.AsyncClient) -> None:
    body = await post(client, TEXT, {"prompt": "Who are you?", "stream": True, "max_tokens": 100})
    assert joined(body) == answer_to(messages_of("Who are you?"))


@pytest.mark.parametrize("fields", [{"echo": True}, {"logprobs": 1}, {"prompt": [[1, 2], [3]]}, {"prompt": ["a", "b"]}])
async def test_fields_that_are_not_simulated_are_refused(client: httpx.AsyncClient, fields: Event) -> None:
    assert (await client.post(TEXT, json=text("Who are you?", []) | fields)).status_code == 400


async def test_prefill_refuses_only_continuations(simulator: Simulator, client: httpx.AsyncClient) -> None:
    scenario: Event = {"simulate": {"fault": "prefill"}}
    assert joined(await post(client, CHAT, chat("Who are you?", **scenario))) == answer_to(messages_of("Who are you?"))
    refused = await client.post(CHAT, json=chat("Who are you?", encode("I am"), **scenario))
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "BadRequestError")
    whole = await client.post(TEXT, json=text("Who are you?", encode("I am"), **scenario) | {"stream": False})
    assert (whole.status_code, whole.json()["error"]["type"]) == (400, "BadRequestError")
    (error,) = chunks(await post(client, TEXT, text("Who are you?", encode("I am"), **scenario)))
    assert error["error"]["code"] == 400
    assert [served.fault for served in simulator.served] == [None, *["prefill"] * 3]


async def test_a_scenario_breaks_a_stream_and_then_refuses_its_continuation(client: httpx.AsyncClient) -> None:
    scenario: Event = {"simulate": {"fault": "abort", "after": 3, "times": 1, "then": "prefill"}}
    assert finishes(await post(client, CHAT, chat("Who are you?", **scenario))) == [("abort", None)]
    assert (await client.post(CHAT, json=chat("Who are you?", encode("I am"), **scenario))).status_code == 400
    assert finishes(await post(client, CHAT, chat("Who are you?", **scenario))) == [("stop", None)]


async def test_a_server_can_ignore_the_ids_and_lack_routes() -> None:
    options = Options(
        ignores=frozenset({"kv_transfer_params"}), lacks=frozenset({"/tokenize", "/detokenize", TEXT, "/health"})
    )
    async with Simulator(options) as simulator, httpx.AsyncClient(base_url=simulator.url) as client:
        body = await post(client, CHAT, chat("Who are you?", encode("I am")))
        assert joined(body) == answer_to(messages_of("Who are you?"))
        assert chunks(body)[0]["prompt_token_ids"] == prompt_of("Who are you?")
        missing = [await client.post(path, json={}) for path in ("/tokenize", "/detokenize", TEXT)]
        missing.append(await client.get("/health"))
        assert [(reply.status_code, reply.json()) for reply in missing] == [(404, {"detail": "Not Found"})] * 4
        assert len(simulator.served) == 1


async def test_the_record_holds_where_a_continuation_began(tmp_path: Path) -> None:
    path = tmp_path / "served.jsonl"
    ids = encode("I am LLaMA")
    async with Simulator(Options(record=path)) as simulator, httpx.AsyncClient(base_url=simulator.url) as client:
        await post(client, CHAT, chat("Who are you?"))
        await post(client, CHAT, chat("Who are you?", ids))
        await post(client, TEXT, text("Who are you?", ids))
        await post(client, TEXT, text("Who are you?", ids, simulate={"fault": "cut", "after": 1}) | {"stream": False})
        await client.post(TEXT, json={})
    records = [msgspec.json.decode(line, type=Served) for line in path.read_bytes().splitlines()]
    begun = [record for record in records if record.ended is None]
    ended = {record.order: record for record in records if record.ended is not None}
    digest = hashlib.sha256(str(prompt_of("Who are you?")).replace(" ", "").encode()).hexdigest()[:16]
    seen = [(record.route, record.prompt, record.after) for record in begun]
    assert seen == [(CHAT, digest, 0), (CHAT, digest, 3), (TEXT, digest, 3), (TEXT, digest, 3)]
    assert sorted(ended) == [1, 2, 3, 4, 5]
    assert ended[2].texts == ended[3].texts == [answer_to(messages_of("Who are you?")).removeprefix("I am LLaMA")]
    assert [ended[order].finished for order in (1, 2, 3, 5)] == [True, True, True, False]
    assert (ended[5].status, ended[5].prompt) == (400, None)


async def test_the_record_holds_the_arguments_of_a_tool_call(simulator: Simulator, client: httpx.AsyncClient) -> None:
    tools: Event = {"tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    await post(client, CHAT, chat("Weather in Paris", **tools))
    assert simulator.served[-1].arguments == ['{"city": "Paris", "unit": "celsius"}']
