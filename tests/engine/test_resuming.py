"""An answer that breaks off is resumed without a trace in its text; one that cannot be resumed begins again."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import StartProcess, StartSimulator, StartWorker, stream
from redis.asyncio import Redis
from waits import eventually

from worker import Answer, Client, Delta, Done, Entry, Failed, Restarted, Resumed
from worker.contract.entries import Claimed, Object, Opened, Usage, parse
from worker.contract.ids import SEAL
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.servers.pool import ServerPool
from worker.vllm.stream.watchdog import StreamTimeouts

QUESTIONS = ("Who are you?", "你是谁?", "Send emoji", "Write code", "Think first")
PATIENT: dict[str, object] = {"lease": 20, "first_token_timeout": 60, "gap_timeout": 60}
"""On a busy machine no timeout of the worker may end one of many answers at once: only the first try is broken off."""
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


def chat_request(content: str = "Who are you?", **more: object) -> dict[str, object]:
    return {"model": "reciter", "messages": [{"role": "user", "content": content}], **more}


async def entries_of(client: Client, request: dict[str, object], **options: Any) -> list[Entry]:  # noqa: ANN401 - options
    return [entry async for entry in client.follow(await client.enqueue(request, **options))]


def kinds(entries: Sequence[Entry]) -> list[str]:
    return [entry.type for entry in entries if isinstance(entry, Resumed | Restarted)]


async def breaking(start: StartSimulator, after: int, **options: Any) -> tuple[Simulator, Simulator]:  # noqa: ANN401
    """A server whose streams are cut after so many chunks, and a healthy one."""
    broken = await start(Options(scenario=Scenario(fault="cut", after=after)))
    return broken, await start(Options(**options))


async def direct(request: dict[str, object], server: Simulator) -> Answer:
    """The uninterrupted answer, read with nothing between."""
    options = request.get("stream_options")
    parser = ChunkParser(
        n=2 if request.get("n") else 1, keep_prompt_ids=bool(request.get("return_token_ids")), keep_usage=bool(options)
    )
    entries: list[Entry] = []
    upstream = ServerPool([server.url], limits=StreamTimeouts())
    plain = {name: value for name, value in request.items() if name != "simulate"}
    async with upstream.stream(upstream.servers[0], cast("Object", plain)) as stream:

        def on_events(events: list[bytes]) -> bool:
            for data in events:
                entries.extend(parse(f"1-{n}", fields) for n, fields in enumerate(parser.parse(data)))
            return parser.done

        while await stream.read_into(on_events) and not parser.done:
            pass
    await upstream.aclose()
    parser.check_complete()
    return Answer([*entries, Done(id=SEAL, usage=cast("Usage", parser.usage), model=parser.model)])


def same(answer: Answer, expected: Answer) -> None:
    """Check that text, tokens and usage of both answers are equal."""
    assert answer.outcome == expected.outcome == "done"
    assert answer.choices == expected.choices
    assert answer.usage == expected.usage
    assert (answer.opened and answer.opened.prompt_digest) == (expected.opened and expected.opened.prompt_digest)


async def test_a_stream_that_breaks_is_resumed_at_another_server(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    broken, well = await breaking(start_simulator, 8)
    await start_worker(broken, well)
    entries = await entries_of(client, chat_request())
    same(Answer(entries), await direct(chat_request(), well))
    assert [str(entry.id) for entry in entries if isinstance(entry, Claimed | Resumed)] == ["2-0", "2-1"]
    assert len(broken.served) == 1
    assert well.served[0].after > 0


async def test_the_log_names_the_request_of_a_resumed_answer(
    client: Client, start_process: StartProcess, simulator: Simulator, tmp_path: Path
) -> None:
    """With uvloop a stream arrives in the context in which its connection was opened, for example by another job."""
    start_process(simulator)
    await asyncio.gather(*(entries_of(client, chat_request(question)) for question in QUESTIONS))
    request_id = await client.enqueue(chat_request("Goodbye", simulate={"fault": "cut", "after": 5, "times": 1}))
    assert (await client.result(request_id)).outcome == "done"
    lines = [json.loads(line) for line in (tmp_path / "worker-0.log").read_text().splitlines()]
    assert [line.get("request_id") for line in lines if line["event"] == "answer_resumed"] == [request_id]


async def test_the_log_names_the_fields_because_of_which_an_answer_begins_again(
    client: Client, start_process: StartProcess, simulator: Simulator, tmp_path: Path
) -> None:
    start_process(simulator)
    request = chat_request("Weather in Paris", tools=[TOOL], simulate={"fault": "cut", "after": 12, "times": 1})
    assert kinds(await entries_of(client, request)) == ["restarted"]
    lines = [json.loads(line) for line in (tmp_path / "worker-0.log").read_text().splitlines()]
    reasons = [line["reason"] for line in lines if line["event"] == "answer_restarted"]
    assert reasons == ["the answer holds more than text: tool_calls"]


async def test_a_break_leaves_no_trace_in_the_answer_wherever_it_is(
    client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    """At every fifth chunk of every kind of answer, within characters and within reasoning; all at once."""
    await start_worker(simulator, **PATIENT)

    async def break_off(question: str, after: int) -> str:
        # Each case has messages of its own: the simulator breaks off the first answer to the same messages.
        case = {"role": "system", "content": f"case {after}"}
        request = chat_request(question, simulate={"fault": "cut", "after": after, "times": 1})
        request["messages"] = [case, *cast("list[object]", request["messages"])]
        expected = await direct(request, simulator)
        if after > len(expected.deltas):
            return ""
        entries = await entries_of(client, request)
        same(Answer(entries), expected)
        assert kinds(entries) in ([], ["resumed"])
        return "".join(kinds(entries))

    every = [(question, after) for question in QUESTIONS for after in range(1, 40, 5)]
    ended = await asyncio.gather(*(break_off(question, after) for question, after in every))
    assert ended.count("resumed") > 25


async def test_an_answer_is_resumed_more_than_once(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    """A try that makes progress does not count, so the number of tries does not limit the number of breaks."""
    request = chat_request("Tell me a story")
    servers = [await start_simulator(Options(scenario=Scenario(fault="cut", after=40))) for _ in range(2)]
    await start_worker(*servers)
    entries = await entries_of(client, request)
    assert kinds(entries) == ["resumed"] * 6
    same(Answer(entries), await direct(request, await start_simulator()))


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_is_found_wherever_the_stream_breaks(
    client: Client, start_worker: StartWorker, simulator: Simulator, *, include: bool
) -> None:
    await start_worker(simulator, **PATIENT)

    async def break_off(after: int) -> None:
        stop = ["one line at", "no such text anywhere"]
        request = chat_request("Tell me a story", stop=stop, include_stop_str_in_output=include)
        case = {"role": "system", "content": f"case {after}"}
        request["messages"] = [case, *cast("list[object]", request["messages"])]
        expected = await direct(request, simulator)
        entries = await entries_of(client, request | {"simulate": {"fault": "cut", "after": after, "times": 1}})
        assert kinds(entries) == ["resumed"]
        same(Answer(entries), expected)
        assert expected.choices[0].stop_reason == "one line at"

    await asyncio.gather(*map(break_off, range(44, 58)))


@pytest.mark.parametrize(
    "more", [{"max_tokens": 9}, {"max_completion_tokens": 9, "min_tokens": 8}, {"ignore_eos": True, "max_tokens": 60}]
)
async def test_the_limits_of_an_answer_hold_for_all_of_it(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker, more: dict[str, Any]
) -> None:
    servers = await breaking(start_simulator, 5)
    await start_worker(*servers)
    entries = await entries_of(client, chat_request(**more))
    assert kinds(entries) == ["resumed"]
    same(Answer(entries), await direct(chat_request(**more), servers[1]))


@pytest.mark.parametrize("most", [20.0, "20"])
async def test_an_answer_whose_limit_is_no_json_integer_begins_again_to_keep_it(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker, most: float | str
) -> None:
    await start_worker(*await breaking(start_simulator, 10))
    entries = await entries_of(client, chat_request(max_tokens=most))
    assert kinds(entries) == ["restarted"]
    assert Answer(entries).usage["completion_tokens"] == 20


async def test_logprobs_ids_and_continuous_usage_are_those_of_one_answer(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    request = chat_request(
        "Send emoji", logprobs=True, top_logprobs=2, return_token_ids=True, stream_options=options, presence_penalty=0.1
    )
    servers = await breaking(start_simulator, 5)
    await start_worker(*servers)
    entries = await entries_of(client, request)
    expected = await direct(request, servers[1])
    same(Answer(entries), expected)
    (resumed,) = [entry for entry in entries if isinstance(entry, Resumed)]
    assert resumed.forgets == ["presence_penalty"]
    assert [entry.extra["prompt_token_ids"] for entry in entries if isinstance(entry, Opened)] == (
        [expected.opened and expected.opened.extra["prompt_token_ids"]] * 2
    )


@pytest.mark.parametrize(
    ("options", "question", "kind"),
    [
        ({"ignores": frozenset({"kv_transfer_params"})}, "Who are you?", "resumed"),
        ({"ignores": frozenset({"kv_transfer_params"})}, "Think first", "restarted"),
        (
            {"ignores": frozenset({"kv_transfer_params"}), "lacks": frozenset({"/v1/completions"})},
            "你是谁?",
            "restarted",
        ),
        ({"lacks": frozenset({"/tokenize"})}, "Who are you?", "restarted"),
        ({"scenario": Scenario(fault="prefill")}, "Who are you?", "restarted"),
        ({"rejects": frozenset({"kv_transfer_params"})}, "Who are you?", "resumed"),
    ],
    ids=["ids passed over", "and reasoning", "and no completions", "no tokenize", "refused", "one route refused"],
)
async def test_a_server_that_refuses_to_resume_answers_from_the_beginning(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker,
    options: dict[str, Any], question: str, kind: str,
) -> None:  # fmt: skip
    broken, well = await breaking(start_simulator, 8, **options)
    await start_worker(broken, well)
    entries = await entries_of(client, chat_request(question))
    same(Answer(entries), await direct(chat_request(question), await start_simulator()))
    assert kinds(entries) == [kind]


@pytest.mark.parametrize(
    ("question", "more"),
    [
        ("Weather in Paris", {"tools": [TOOL]}),
        ("Give JSON", {"response_format": {"type": "json_object"}}),
        ("no such question", {"n": 2, "temperature": 1}),
    ],
)
async def test_an_answer_that_cannot_be_resumed_is_restarted_visibly(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker, question: str, more: dict[str, Any]
) -> None:
    servers = await breaking(start_simulator, 20)
    await start_worker(*servers)
    entries = await entries_of(client, chat_request(question, **more))
    assert kinds(entries) == ["restarted"]
    expected = await direct(chat_request(question, **more), servers[1])
    ours, direct_ones = Answer(entries).choices, expected.choices
    for choice in [*ours, *direct_ones]:
        for call in choice.tool_calls:
            call.pop("id")  # the id differs between answers
    assert ours == direct_ones
    assert Answer(entries).usage == expected.usage


@pytest.mark.parametrize(
    ("on_interrupt", "expected"), [("resume", ["resumed"]), ("restart", ["restarted"]), ("fail", [])]
)
async def test_a_setting_decides_about_a_broken_answer(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker, on_interrupt: str, expected: list[str]
) -> None:
    await start_worker(*await breaking(start_simulator, 8), on_interrupt=on_interrupt)
    entries = await entries_of(client, chat_request())
    assert kinds(entries) == expected
    end = Answer(entries).end
    assert isinstance(end, Failed) == (on_interrupt == "fail")
    if isinstance(end, Failed):
        assert end.code == "upstream_truncated"
        tokens = [token for entry in entries if isinstance(entry, Delta) for token in entry.token_ids]
        assert (end.model, end.usage["completion_tokens"]) == ("reciter", len(tokens)), (
            "the usage of what was generated"
        )


@pytest.mark.parametrize(
    ("on_interrupt", "expected"), [("resume", ["resumed"]), ("restart", ["restarted"]), ("fail", [])]
)
async def test_the_setting_holds_for_another_worker_too(
    client: Client, redis: Redis, start_simulator: StartSimulator, start_process: StartProcess,
    on_interrupt: str, expected: list[str],
) -> None:  # fmt: skip
    simulator = await start_simulator(Options(scenario=Scenario(rate=50)))
    first = start_process(simulator, lease=1, on_interrupt=on_interrupt)
    entries = []
    async for entry in client.follow(await client.enqueue(chat_request("Tell me a story"))):
        entries.append(entry)
        if isinstance(entry, Delta) and entry.id == (1, 10):
            first.kill()
            await asyncio.to_thread(first.wait)
            start_process(simulator, lease=1, on_interrupt=on_interrupt)
    assert kinds(entries) == expected
    answer = Answer(entries)
    if on_interrupt == "fail":
        assert isinstance(answer.end, Failed)
        assert answer.end.code == "interrupted"
        assert answer.end.model == "reciter"
        assert answer.end.usage == answer.usage

        async def is_in_the_lifecycle() -> bool:
            return any(b"completion_tokens" in f.get(b"usage", b"") for _, f in await stream(redis, "chat:lifecycle"))

        await eventually(is_in_the_lifecycle)
        return
    assert answer.text == answer_to(chat_request("Tell me a story")["messages"])
    assert len(simulator.served) == 2
    assert (simulator.served[1].after > 0) == (on_interrupt == "resume")


async def test_an_answer_that_broke_before_its_first_text_begins_again_unseen(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    """The first tokens of an emoji carry no text: the log has them, and readers have seen nothing."""
    request = chat_request(simulate={"text": "🙂 done"})
    broken, well = await breaking(start_simulator, 2)
    await start_worker(broken, well)
    entries = await entries_of(client, request)
    assert kinds(entries) == ["resumed"]
    assert well.served[0].after == 0
    assert Answer(entries).text == "🙂 done"


async def test_an_answer_that_has_min_tokens_is_resumed_to_its_end(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    broken, well = await start_simulator(Options(scenario=Scenario(fault="cut", after=37))), await start_simulator()
    await start_worker(broken, well)
    entries = await entries_of(client, chat_request(min_tokens=37))
    assert kinds(entries) == ["resumed"]
    same(Answer(entries), await direct(chat_request(min_tokens=37), await start_simulator()))


@pytest.mark.parametrize("text", ["🙂 done", "Hi 🙂 done"], ids=["at the start", "later"])
async def test_tokens_without_text_are_no_progress(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker, text: str
) -> None:
    """They are generated anew each time. A server that always breaks off there would be tried for ever."""
    broken = await start_simulator(Options(scenario=Scenario(fault="cut", after=2)))
    await start_worker(broken)
    answer = Answer(await entries_of(client, chat_request(simulate={"text": text})))
    assert isinstance(answer.end, Failed)
    assert (answer.end.code, len(broken.served)) == ("upstream_truncated", 3)


async def test_another_model_does_not_resume_though_it_reads_the_same_ids(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    """A job without a model may reach servers of two models that share a tokenizer."""
    large = await start_simulator(Options(model="large", scenario=Scenario(fault="cut", after=8)))
    small = await start_simulator(Options(model="small"))
    await start_worker(large, small)
    request = chat_request()
    del request["model"]
    entries = await entries_of(client, request)
    assert kinds(entries) == ["restarted"]
    assert [entry.model for entry in entries if isinstance(entry, Opened)] == ["large", "small"]


async def test_a_server_with_a_shorter_context_does_not_end_what_it_cannot_resume(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    """The kept part is longer than its whole context, and the answer was not at its end."""
    broken = await start_simulator(Options(scenario=Scenario(fault="cut", after=100)))
    await start_worker(broken, await start_simulator(Options(max_model_len=90)))
    entries = await entries_of(client, chat_request("Tell me a story"))
    assert kinds(entries) == ["restarted"]


class Odd(Simulator):
    """A server that replies to one path as the test orders, and breaks the first stream off."""

    def __init__(self, path: str, status: int, body: bytes) -> None:
        super().__init__(Options(scenario=Scenario(fault="cut", after=8, times=1)))
        self._path, self._status, self._body = path, status, body

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        if request.path == self._path:
            await connection.respond(self._status, "application/json", self._body)
        else:
            await super()._handle(request, connection)


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/tokenize", 500, b"broken"),
        ("/tokenize", 503, b"try again later"),
        ("/tokenize", 200, b'{"tokens": "many"}'),
        ("/tokenize", 200, b'{"tokens": [-1], "max_model_len": 99999999999999999999}'),
        ("/detokenize", 200, b'{"prompt": "\xff"}'),
    ],
    ids=["failing", "refusing", "no ids", "absurd numbers", "no UTF-8"],
)
async def test_an_answer_begins_again_where_no_server_tokenizes_the_prompt(
    client: Client, start_worker: StartWorker, path: str, status: int, body: bytes
) -> None:
    async with Odd(path, status, body) as server:
        await start_worker(server)
        entries = await entries_of(client, chat_request(stop=["never said"]))
    assert kinds(entries) == ["restarted"]
    assert Answer(entries).outcome == "done"


@pytest.mark.parametrize("after", [5, 7])
async def test_a_stop_string_before_min_tokens_ends_no_resumed_answer(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker, after: int
) -> None:
    """Servers search for stop strings only after min_tokens, but hold text back from the start."""
    request = chat_request(stop=["assistant developed"], min_tokens=12)
    servers = await breaking(start_simulator, after)
    await start_worker(*servers)
    same(Answer(await entries_of(client, request)), await direct(request, servers[1]))
