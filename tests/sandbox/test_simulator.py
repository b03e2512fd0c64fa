"""The simulated vLLM compared with the answers of a real vLLM 0.32.0, and the bytes of each fault and quirk."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from worker.sandbox.simulator.answers import VOCABULARY, encode, pseudo_text
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Served, Simulator, serve_forever

TRANSCRIPTS = Path(__file__).parent.parent / "transcripts"
INDEX: dict[str, dict[str, Any]] = msgspec.json.decode((TRANSCRIPTS / "index.json").read_bytes())
STREAMS = [name for name, entry in INDEX.items() if entry["events"] > 2]
ERRORS = [name for name in INDEX if name.startswith("error_")]

Event = dict[str, Any]
PATH = "/v1/chat/completions"
WHO = [{"role": "user", "content": "Who are you?"}]
EMOJI = [{"role": "user", "content": "Send emoji"}]
OTHER = [{"role": "user", "content": "Something that no model was taught"}]


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator() as running:
        yield running


@pytest.fixture
async def client(simulator: Simulator) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=simulator.url, timeout=10) as client:
        yield client


def asking(messages: object = WHO, **fields: object) -> Event:
    return {"model": "reciter", "stream": True, "messages": messages, **fields}


def payloads(body: bytes) -> list[str]:
    """The data of each event, by the rules of the SSE standard."""
    lines = body.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n\n")
    events = [[line[5:].removeprefix(" ") for line in event.split("\n") if line.startswith("data:")] for event in lines]
    return ["\n".join(event) for event in events if event]


def chunks(body: bytes) -> list[Event]:
    return [msgspec.json.decode(payload) for payload in payloads(body) if payload != "[DONE]"]


def choices(body: bytes) -> list[Event]:
    return [choice for chunk in chunks(body) for choice in chunk.get("choices") or []]


def texts(body: bytes, field: str = "content") -> dict[int, str]:
    """The text of each choice in this field of its deltas."""
    joined: dict[int, str] = {}
    for choice in choices(body):
        joined[choice["index"]] = joined.get(choice["index"], "") + ((choice.get("delta") or {}).get(field) or "")
    return joined


def arguments(body: bytes) -> str:
    calls = [call for choice in choices(body) for call in choice["delta"].get("tool_calls", [])]
    return "".join(call["function"].get("arguments", "") for call in calls)


def finishes(body: bytes) -> list[tuple[str, str | None]]:
    return [(choice["finish_reason"], choice["stop_reason"]) for choice in choices(body) if choice.get("finish_reason")]


def shape(value: object) -> object:
    """The keys at every level in their order, and the types of their values."""
    if isinstance(value, dict):
        return tuple((key, shape(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return tuple(dict.fromkeys(shape(inner) for inner in value))
    return type(value).__name__


def shapes(body: bytes) -> list[object]:
    """The shapes of a stream's events in order of first appearance: tokens are cut differently, so counts differ."""
    return list(dict.fromkeys(shape(chunk) for chunk in chunks(body)))


def agree(recorded: str, simulated: str, *, whole: bool) -> bool:
    """Whether texts are equal or, where a token limit cut them, one begins with the other."""
    return recorded == simulated or (not whole and (recorded.startswith(simulated) or simulated.startswith(recorded)))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110, a record has no event to wait for
            await asyncio.sleep(0.001)


async def post(client: httpx.AsyncClient, request: Event) -> bytes:
    response = await client.post(PATH, json=request)
    assert response.status_code == 200, response.text
    return response.content


def recorded_request(name: str) -> Event:
    request: Event = msgspec.json.decode((TRANSCRIPTS / f"{name}.request.json").read_bytes())
    return request


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_has_the_recorded_shape_and_text(client: httpx.AsyncClient, name: str) -> None:
    recorded = (TRANSCRIPTS / f"{name}.body").read_bytes()
    request = recorded_request(name)
    died = name == "engine_death_mid_stream"
    if died:
        request["simulate"] = {"fault": "error_under_200", "after": 40}
    if name == "json_schema":
        request["max_tokens"] = 20  # the recorded model never came to the end of its JSON

    response = await client.post(PATH, json=request)

    body = response.content
    assert response.headers["content-type"] == INDEX[name]["content_type"]
    assert shapes(body) == shapes(recorded)
    assert finishes(body) == finishes(recorded)
    assert payloads(body)[-1] == payloads(recorded)[-1] == "[DONE]"
    assert arguments(body) == arguments(recorded)
    whole = not died and finishes(recorded)[0][0] != "length"
    for field in ("content", "reasoning"):
        for index, text in texts(recorded, field).items():
            if name != "json_schema":
                assert agree(text, texts(body, field)[index], whole=whole)


@pytest.mark.parametrize("name", ["n2", "length"])
async def test_usage_is_as_recorded_where_a_limit_ends_the_answer(client: httpx.AsyncClient, name: str) -> None:
    usage_asked = {"stream_options": {"include_usage": True}}
    body = await post(client, recorded_request(name) | usage_asked)
    usage = chunks(body)[-1]["usage"]
    assert usage["completion_tokens"] == {"n2": 80, "length": 5}[name]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("name", ERRORS)
async def test_an_error_equals_the_recorded_bytes(name: str) -> None:
    options = Options(
        api_key="secret" if name == "error_401_auth" else None,
        scenario=Scenario(fault="500" if name == "error_500_engine_dead" else None),
    )
    if name == "error_400_context":
        request = asking([{"role": "user", "content": "word " * 5000}])
    else:
        request = recorded_request(name)
    async with Simulator(options) as simulator, httpx.AsyncClient(base_url=simulator.url) as client:
        response = await client.post(PATH, json=request)
    assert response.status_code == INDEX[name]["status"]
    assert response.headers["content-type"] == INDEX[name]["content_type"]
    assert response.content == (TRANSCRIPTS / f"{name}.body").read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "empty conversation"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)"),
        ({"temperature": 9.0}, "temperature must be in [0, 2], got 9.0. (parameter=temperature, value=9.0)"),
        ({"n": 0}, "n must be at least 1, got 0."),
        ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling, got 2."),
        ({"stop": ""}, "stop cannot contain an empty string."),
        ({"top_logprobs": 5}, "when using `top_logprobs`, `logprobs` must be set to true. (parameter=top_logprobs)"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "Stream options can only be defined"),
        ({"stream": False, "logprobs": True, "top_logprobs": 500}, "greater than max allowed: 20"),
        ({"simulate": {"fault": "no such fault"}}, "no such fault"),
        ({"simulate": {"falt": "cut"}}, "falt"),
    ],
)
async def test_a_bad_request_is_refused_as_vllm_does(client: httpx.AsyncClient, fields: Event, message: str) -> None:
    response = await client.post(PATH, json=asking() | fields)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == 400


async def test_a_body_that_is_not_json_is_refused_and_recorded(simulator: Simulator, client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, content=b"{bad")
    assert response.status_code == 400
    assert "JSON decode error" in response.json()["error"]["message"]
    assert (simulator.served[-1].status, simulator.served[-1].request) == (400, {})


async def test_models_health_and_unknown_paths(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/models")).json()
    assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("reciter", 4096)]
    health = await client.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    unknown = await client.get("/nope")
    assert (unknown.status_code, unknown.json()) == (404, {"detail": "Not Found"})
    wrong = await client.get(PATH)
    assert (wrong.status_code, wrong.json()) == (405, {"detail": "Method Not Allowed"})


async def test_v1_requires_the_key_and_health_does_not() -> None:
    async with Simulator(Options(api_key="secret")) as simulator, httpx.AsyncClient(base_url=simulator.url) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/v1/models", headers={"authorization": "Bearer secret"})).status_code == 200


@pytest.mark.parametrize("fields", [{}, {"n": 2, "temperature": 1}, {"max_tokens": 4}, {"stop": ["the"]}])
@pytest.mark.parametrize("question", ["Who are you?", "Think first", "Weather in Paris", "Anything else"])
async def test_an_answer_without_streaming_has_the_same_text(
    client: httpx.AsyncClient, question: str, fields: Event
) -> None:
    request = asking([{"role": "user", "content": question}], tools=[{}], return_token_ids=True, logprobs=True) | fields
    streamed = await post(client, request)
    whole = (await client.post(PATH, json=request | {"stream": False})).json()
    for choice in whole["choices"]:
        parts = [part for part in choices(streamed) if part["index"] == choice["index"]]
        message = choice["message"]
        assert (message["content"] or "") == texts(streamed)[choice["index"]]
        assert (message["reasoning"] or "") == texts(streamed, "reasoning")[choice["index"]]
        assert choice["finish_reason"] == parts[-1]["finish_reason"]
        assert choice["stop_reason"] == parts[-1]["stop_reason"]
        assert choice["token_ids"] == [number for part in parts for number in part.get("token_ids", [])]
        entries = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert choice["logprobs"]["content"] == entries
    if "tool_calls" in whole["choices"][0]["message"] and "n" not in fields:
        call = whole["choices"][0]["message"]["tool_calls"][0]
        assert call["function"] == {"name": "get_weather", "arguments": arguments(streamed)}


async def test_an_unknown_question_gets_a_text_that_a_test_can_compute(client: httpx.AsyncClient) -> None:
    body = await post(client, asking(OTHER, n=2))
    assert texts(body) == {0: answer_to(OTHER), 1: answer_to(OTHER, choice=1)}
    assert answer_to(OTHER) != answer_to(OTHER, choice=1)
    assert 20 < len(answer_to(OTHER).split()) < 60


async def test_a_scenario_sets_the_number_of_tokens(simulator: Simulator, client: httpx.AsyncClient) -> None:
    body = await post(client, asking(OTHER, simulate={"tokens": 100}, stream_options={"include_usage": True}))
    assert texts(body) == {0: answer_to(OTHER, tokens=100)}
    assert chunks(body)[-1]["usage"]["completion_tokens"] == simulator.served[-1].tokens == 101


def test_tokens_decode_to_their_text() -> None:
    text = "Ünknown <think> words, 🙂 世界 \x00\r\n\u2028 HTTP/2 " + pseudo_text("seed", 50)
    assert b"".join(VOCABULARY[number] for number in encode(text)) == text.encode()


async def test_a_scenario_sets_the_text_and_an_incomplete_character_has_none(client: httpx.AsyncClient) -> None:
    body = await post(client, asking(return_token_ids=True, simulate={"text": "a\u2028🙂"}))
    deltas = [choice["delta"] for choice in choices(body)]
    expected = [{"content": "a"}, {}, {}, {"content": "\u2028"}, {}, {}, {}, {"content": "🙂"}, {}]
    assert deltas[1:] == expected
    assert [len(choice["token_ids"]) for choice in choices(body)[1:]] == [1] * len(expected)


async def test_steps_without_text_are_sent_only_with_token_ids(client: httpx.AsyncClient) -> None:
    body = await post(client, asking(simulate={"text": "🙂"}))
    assert [choice["delta"] for choice in choices(body)[1:]] == [{"content": "🙂"}, {}]


async def test_ignore_eos_generates_up_to_the_limit(client: httpx.AsyncClient) -> None:
    body = await post(client, asking(ignore_eos=True, max_tokens=30, return_token_ids=True))
    assert texts(body) == {0: answer_to(WHO)}
    assert finishes(body) == [("length", None)]
    assert [choice["token_ids"] for choice in choices(body)[-2:]] == [[2], [2]]


@pytest.mark.parametrize(("include", "text"), [(False, "I am "), (True, "I am LLaMA")])
async def test_a_stop_string_ends_the_text(client: httpx.AsyncClient, include: bool, text: str) -> None:  # noqa: FBT001
    body = await post(client, asking(stop=["zzz", "LLaMA"], include_stop_str_in_output=include))
    assert texts(body) == {0: text}
    assert finishes(body) == [("stop", "LLaMA")]


async def test_text_withheld_for_a_stop_string_comes_with_the_end(client: httpx.AsyncClient) -> None:
    body = await post(client, asking(stop=["never said at all"]))
    assert texts(body) == {0: answer_to(WHO)}
    assert choices(body)[-1]["delta"] == {"content": answer_to(WHO)[-16:]}


async def test_an_answer_continues_after_given_token_ids(client: httpx.AsyncClient) -> None:
    whole = await post(client, asking(EMOJI, return_token_ids=True))
    prompt: list[int] = chunks(whole)[0]["prompt_token_ids"]
    ids = [number for choice in choices(whole) for number in choice.get("token_ids", [])]
    begun = {"kv_transfer_params": {"prompt_token_ids": prompt + ids[:7]}}
    rest = await post(client, asking(EMOJI, return_token_ids=True, **begun))
    assert chunks(rest)[0]["prompt_token_ids"] == prompt + ids[:7]
    assert [number for choice in choices(rest) for number in choice.get("token_ids", [])] == ids[7:]
    assert answer_to(EMOJI) == b"".join(VOCABULARY[number] for number in ids[:7]).decode() + texts(rest)[0]


# Faults


@pytest.mark.parametrize("status", [429, 503, 500])
async def test_a_refusal_has_its_status_and_retry_after(client: httpx.AsyncClient, status: int) -> None:
    response = await client.post(PATH, json=asking(simulate={"fault": str(status), "retry_after": 1.5}))
    assert (response.status_code, response.json()["error"]["code"]) == (status, status)
    assert response.headers["retry-after"] == "1.5"


async def test_refuse_closes_without_an_answer(simulator: Simulator, client: httpx.AsyncClient) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post(PATH, json=asking(simulate={"fault": "refuse"}))
    assert (simulator.served[-1].status, simulator.served[-1].fault) == (None, "refuse")


async def test_hang_never_answers(simulator: Simulator, client: httpx.AsyncClient) -> None:
    with pytest.raises(httpx.ReadTimeout):
        await client.post(PATH, json=asking(simulate={"fault": "hang"}), timeout=httpx.Timeout(10, read=0.2))
    await until(lambda: len(simulator.served) == 1 and simulator.served[-1].closed_early)


async def test_stall_sends_the_given_number_of_deltas_and_then_nothing(
    simulator: Simulator, client: httpx.AsyncClient
) -> None:
    body = b""
    async with client.stream("POST", PATH, json=asking(simulate={"fault": "stall", "after": 3})) as response:
        sent = response.aiter_raw()
        while body.count(b"\n\n") < 4:  # the role and three deltas
            body += await anext(sent)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(sent), 0.2)
    assert texts(body) == {0: "I am LLaMA"}
    await until(lambda: simulator.served[-1].closed_early)


async def test_freeze_sends_only_comments() -> None:
    async with Simulator(Options(keep_alive=0.001)) as simulator, httpx.AsyncClient(base_url=simulator.url) as client:
        body = b""
        async with client.stream("POST", PATH, json=asking(simulate={"fault": "freeze", "after": 3})) as response:
            async for data in response.aiter_raw():
                body += data
                if body.count(b": keep-alive\n\n") >= 3:
                    break
        assert texts(body) == {0: "I am LLaMA"}
        assert b"data:" not in body.partition(b": keep-alive")[2]


async def test_cut_ends_the_body_early_and_cleanly(simulator: Simulator, client: httpx.AsyncClient) -> None:
    body = await post(client, asking(simulate={"fault": "cut", "after": 3}))
    assert (texts(body), finishes(body)) == ({0: "I am LLaMA"}, [])
    assert b"[DONE]" not in body
    served = simulator.served[-1]
    assert (served.fault, served.chunks, served.finished, served.closed_early) == ("cut", 3, False, False)


async def test_reset_breaks_the_connection(simulator: Simulator) -> None:
    reader, writer = await asyncio.open_connection(*httpx.URL(simulator.url).netloc.decode().split(":"))
    content = msgspec.json.encode(asking(simulate={"fault": "reset", "after": 3, "rate": 1000}))
    writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (PATH.encode(), len(content)) + content)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    assert (simulator.served[-1].fault, simulator.served[-1].chunks) == ("reset", 3)


async def test_no_done_leaves_out_only_the_done_event(simulator: Simulator, client: httpx.AsyncClient) -> None:
    body = await post(client, asking(simulate={"fault": "no_done"}))
    assert (texts(body), finishes(body)) == ({0: answer_to(WHO)}, [("stop", None)])
    assert b"[DONE]" not in body
    assert simulator.served[-1].finished


async def test_malformed_sends_one_chunk_that_is_not_json(client: httpx.AsyncClient) -> None:
    body = await post(client, asking(simulate={"fault": "malformed", "after": 3}))
    lines = payloads(body)
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(lines.pop(4))
    assert texts("".join(f"data: {line}\n\n" for line in lines).encode()) == {0: answer_to(WHO)}


async def test_abort_ends_every_choice_with_that_reason(client: httpx.AsyncClient) -> None:
    body = await post(client, asking(OTHER, n=2, simulate={"fault": "abort", "after": 4}))
    assert finishes(body) == [("abort", None), ("abort", None)]
    assert payloads(body)[-1] == "[DONE]"


async def test_html_and_json_replace_the_stream(simulator: Simulator, client: httpx.AsyncClient) -> None:
    page = await client.post(PATH, json=asking(simulate={"fault": "html"}))
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.text.startswith("<!DOCTYPE html>")
    whole = await client.post(PATH, json=asking(simulate={"fault": "json"}))
    assert (whole.status_code, whole.headers["content-type"]) == (200, "application/json")
    assert whole.json()["choices"][0]["message"]["content"] == answer_to(WHO)
    assert [served.fault for served in simulator.served] == ["html", "json"]


async def test_a_fault_can_be_limited_to_the_first_tries_of_a_prompt(client: httpx.AsyncClient) -> None:
    scenario = {"fault": "503", "times": 2}
    statuses = [(await client.post(PATH, json=asking(WHO, simulate=scenario))).status_code for _ in range(3)]
    assert statuses == [503, 503, 200]
    assert (await client.post(PATH, json=asking(OTHER, simulate=scenario))).status_code == 503


async def test_a_request_overrides_the_scenario_of_the_server() -> None:
    options = Options(scenario=Scenario(fault="503", shape="crlf"))
    async with Simulator(options) as simulator, httpx.AsyncClient(base_url=simulator.url) as client:
        assert (await client.post(PATH, json=asking())).status_code == 503
        body = await post(client, asking(simulate={"fault": None}))
        assert body.endswith(b"data: [DONE]\r\n\r\n")


# Shapes of other servers


@pytest.mark.parametrize(
    ("quirk", "seen"),
    [
        ("no_space", lambda body: b"data: " not in body and b'data:{"' in body),
        ("crlf", lambda body: body.count(b"\n") == body.count(b"\r\n") > 10),
        ("cr", lambda body: b"\n" not in body and body.endswith(b"data: [DONE]\r\r")),
        ("comments", lambda body: body.count(b": keep-alive\n\n") == body.count(b"data: ") > 10),
        ("bom", lambda body: body.startswith(b"\xef\xbb\xbfdata: ") and body.count(b"\xef\xbb\xbf") == 1),
        ("multiline", lambda body: body.count(b"\ndata: ") > 10 * body.count(b"\n\n")),
        (
            "sloppy",
            lambda body: all(odd in body for odd in (b'"choices":null', b'"delta":null', b'"finish_reason":""')),
        ),
        ("finish_text", lambda body: choices(body)[-1]["delta"] == {"content": "."} and len(finishes(body)) == 1),
    ],
)
async def test_a_quirk_changes_the_bytes_and_not_the_text(
    client: httpx.AsyncClient, quirk: str, seen: Callable[[bytes], bool]
) -> None:
    body = await post(client, asking(simulate={"shape": quirk}))
    assert seen(body)
    assert texts(body) == {0: answer_to(WHO)}
    assert payloads(body)[-1] == "[DONE]"


async def test_quirks_can_be_combined(client: httpx.AsyncClient) -> None:
    quirks = ["crlf", "no_space", "multiline", "bom", "comments", "sloppy"]
    body = await post(client, asking(EMOJI, simulate={"shape": quirks}))
    assert texts(body) == {0: answer_to(EMOJI)}


async def test_a_scenario_gives_reasoning_the_name_of_older_servers(client: httpx.AsyncClient) -> None:
    body = await post(
        client, asking([{"role": "user", "content": "Think first"}], simulate={"shape": "reasoning_content"})
    )
    assert texts(body, "reasoning_content")[0].startswith("\nThe user wants me to think.")
    assert texts(body, "reasoning") == {0: ""}


@pytest.mark.parametrize(("style", "where"), [("openai", "error"), ("vllm", "error"), ("fastapi", "detail")])
async def test_a_foreign_server_names_the_field_it_rejects(style: Any, where: str) -> None:  # noqa: ANN401
    options = Options(rejects=frozenset({"return_token_ids"}), reject_style=style)
    async with Simulator(options) as simulator, httpx.AsyncClient(base_url=simulator.url) as client:
        response = await client.post(PATH, json=asking(return_token_ids=True))
        assert response.status_code == 400
        assert "return_token_ids" in str(response.json()[where])
        assert texts(await post(client, asking())) == {0: answer_to(WHO)}


async def test_a_foreign_server_can_ignore_fields() -> None:
    options = Options(ignores=frozenset({"return_token_ids", "stream_options", "kv_transfer_params"}))
    async with Simulator(options) as simulator, httpx.AsyncClient(base_url=simulator.url) as client:
        fields = {"stream_options": {"include_usage": True}, "kv_transfer_params": {"prompt_token_ids": [1, 2]}}
        body = await post(client, asking(return_token_ids=True, **fields))
    assert all("usage" not in chunk for chunk in chunks(body))
    assert {str(choice.get("token_ids")) for choice in choices(body)} == {"None"}
    assert texts(body) == {0: answer_to(WHO)}


# The wire, the pace and the record


async def test_each_event_is_one_http_chunk_and_the_connection_is_kept(simulator: Simulator) -> None:
    reader, writer = await asyncio.open_connection(*httpx.URL(simulator.url).netloc.decode().split(":"))
    content = msgspec.json.encode(asking(EMOJI))
    for _ in range(2):
        head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (PATH.encode(), len(content))
        writer.write(head + content)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
        while size := int(await reader.readuntil(b"\r\n"), 16):
            event = (await reader.readexactly(size + 2))[:-2]
            assert event.startswith(b"data: ")
            assert event.endswith(b"\n\n")
            assert event.count(b"\n") == 2
        await reader.readexactly(2)
    writer.close()
    assert [served.finished for served in simulator.served] == [True, True]


async def test_tokens_come_no_faster_than_the_rate(simulator: Simulator, client: httpx.AsyncClient) -> None:
    await post(client, asking(OTHER, simulate={"tokens": 10, "rate": 100, "first_token": 0.05}))
    served = simulator.served[-1]
    assert served.first_chunk is not None
    assert served.ended is not None
    assert served.first_chunk - served.started >= 0.05
    assert served.ended - served.first_chunk >= 0.09


async def test_a_close_by_the_client_is_recorded(simulator: Simulator, client: httpx.AsyncClient) -> None:
    async with client.stream("POST", PATH, json=asking(OTHER, simulate={"tokens": 4000, "rate": 50})) as response:
        async for _ in response.aiter_raw():
            break
    await until(lambda: simulator.served[-1].ended is not None)
    served = simulator.served[-1]
    assert (served.closed_early, served.finished) == (True, False)
    assert answer_to(OTHER, tokens=4000).startswith(served.texts[0])
    assert served.chunks < 4000


async def test_the_record_holds_what_was_sent(tmp_path: Path) -> None:
    path = tmp_path / "served.jsonl"
    request = asking(OTHER, n=2)
    async with Simulator(Options(record=path)) as simulator, httpx.AsyncClient(base_url=simulator.url) as client:
        body = await post(client, request)
        await client.post(PATH, json=asking(model="nope"))
        await until(lambda: simulator.served[-1].ended is not None)
        first, second = simulator.served
    assert (first.order, first.status, first.request) == (1, 200, request)
    assert (first.finished, first.closed_early, first.fault) == (True, False, None)
    assert first.texts == [answer_to(OTHER), answer_to(OTHER, choice=1)]
    assert first.chunks == len(choices(body)) - 2
    assert first.tokens == sum(len(encode(text)) + 1 for text in first.texts)
    assert (second.order, second.status, second.finished) == (2, 404, False)
    lines = path.read_bytes().splitlines()
    begun, *ended = [msgspec.json.decode(line, type=Served) for line in lines]
    assert ended == [first, second]
    assert (begun.order, begun.ended, begun.texts, begun.prompt) == (1, None, [], first.prompt)


async def test_hundreds_of_paced_streams_run_at_once(simulator: Simulator) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=simulator.url, timeout=30, limits=limits) as client:
        requests = [asking([{"role": "user", "content": f"{number}"}]) for number in range(200)]
        bodies = await asyncio.gather(*(post(client, request | {"simulate": {"rate": 50}}) for request in requests))
    for request, body in zip(requests, bodies, strict=True):
        assert texts(body) == {0: answer_to(request["messages"])}


async def test_serving_ends_when_cancelled_with_streams_open() -> None:
    urls: asyncio.Queue[str] = asyncio.Queue()
    serving = asyncio.create_task(serve_forever(Options(), host="127.0.0.1", port=0, ready=urls.put_nowait))
    async with httpx.AsyncClient(base_url=await urls.get()) as client:
        async with client.stream("POST", PATH, json=asking(simulate={"fault": "stall"})) as response:
            assert response.status_code == 200
            serving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await serving
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")
