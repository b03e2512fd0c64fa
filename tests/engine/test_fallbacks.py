"""Fallback models of a job: when a model is given up for the next, and what the log reports."""

from typing import Any

import msgspec
import pytest
from conftest import StartSimulator, StartWorker
from waits import eventually

from worker import Answer, Client, Done, Entry, Failed, State
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.requests import Fault, answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest

LONG = "word " * 200


def chat_request(content: str = "Who are you?", **more: object) -> dict[str, object]:
    return {"model": "large", "messages": [{"role": "user", "content": content}], **more}


async def entries_of(client: Client, request: dict[str, object], **options: Any) -> list[Entry]:  # noqa: ANN401 - options
    return [entry async for entry in client.follow(await client.enqueue(request, **options))]


@pytest.mark.parametrize("fault", ["429", "503", "refuse", "error_under_200", "abort"])
async def test_the_next_model_is_asked_when_the_tries_of_the_first_are_exhausted(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator, fault: Fault
) -> None:
    large = await start_simulator(Options(model="large", scenario=Scenario(fault=fault, retry_after=0.01)))
    small = await start_simulator(Options(model="small"))
    await start_worker(large, small, tries=2)
    answer = Answer(await entries_of(client, chat_request(), fallbacks=["small"]))
    assert isinstance(answer.end, Done)
    assert (answer.end.model, answer.model) == ("small", "small")
    assert answer.text == answer_to(chat_request()["messages"])
    # After a refusal by a full server the job takes the model that has room. A request that gets no reply at all over a
    # kept connection is sent again at once.
    assert len(large.served) in ({2, 3} if fault == "refuse" else {1} if fault in {"429", "503"} else {2})
    assert len(small.served) == 1


async def test_a_prompt_too_long_for_one_model_is_not_tried_twice(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    large = await start_simulator(Options(model="large", max_model_len=64))
    small = await start_simulator(Options(model="small"))
    await start_worker(large, small)
    answer = Answer(await entries_of(client, chat_request(LONG), fallbacks=["small"]))
    assert (answer.outcome, answer.model) == ("done", "small")
    assert len(large.served) == 1


async def test_a_model_that_no_server_has_is_given_up_for_the_next(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_worker(await start_simulator(Options(model="small")))
    answer = Answer(await entries_of(client, chat_request(), fallbacks=["medium", "small"]))
    assert (answer.outcome, answer.model) == ("done", "small")


class Forgetful(Simulator):
    """A server that lists its model and replies in these words that it does not have it."""

    def __init__(self, status: int, body: bytes, options: Options) -> None:
        super().__init__(options)
        self.answer = status, body

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        if request.path == "/v1/chat/completions":
            await connection.respond(self.answer[0], "application/json", self.answer[1])
        else:
            await super()._handle(request, connection)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b'{"error":{"message":"no","type":"invalid_request_error","code":"model_not_found"}}'),
        (400, b'{"error":{"message":"no","type":"invalid_request_error","code":"model_not_found"}}'),
        (400, b'{"error":{"message":"Invalid model name passed in model=large","code":"400"}}'),
    ],
)
async def test_a_model_that_a_server_says_it_lacks_is_given_up_for_the_next(
    status: int, body: bytes, client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    async with Forgetful(status, body, Options(model="large")) as large:
        await start_worker(large, await start_simulator(Options(model="small")))
        answer = Answer(await entries_of(client, chat_request(), fallbacks=["small"]))
    assert (answer.outcome, answer.model) == ("done", "small")


class Prudish(Simulator):
    """A server that refuses every request by its policy."""

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        if request.path == "/v1/chat/completions":
            error = {"message": "not allowed", "code": "content_policy_violation"}
            await connection.respond(400, "application/json", msgspec.json.encode({"error": error}))
        else:
            await super()._handle(request, connection)


async def test_a_request_that_a_policy_refuses_goes_to_no_other_model(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    small = await start_simulator(Options(model="small"))
    async with Prudish(Options(model="large")) as large:
        await start_worker(large, small)
        answer = Answer(await entries_of(client, chat_request(), fallbacks=["small"]))
    assert isinstance(answer.end, Failed)
    assert (answer.end.code, len(small.served)) == ("content_policy", 0)


async def test_a_request_that_is_wrong_goes_to_no_other_model(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    servers = [await start_simulator(Options(model=model)) for model in ("large", "small")]
    await start_worker(*servers)
    answer = Answer(await entries_of(client, chat_request(temperature=-3), fallbacks=["small"]))
    assert isinstance(answer.end, Failed)
    assert (answer.end.code, len(servers[1].served)) == ("invalid_request", 0)


async def test_an_answer_that_another_model_takes_over_begins_again(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    large = await start_simulator(Options(model="large", scenario=Scenario(fault="cut", after=4, then="503")))
    small = await start_simulator(Options(model="small"))
    await start_worker(large, small, tries=1)
    entries = await entries_of(client, chat_request(), fallbacks=["small"])
    assert [entry.type for entry in entries if entry.type in {"restarted", "resumed"}] == ["restarted"]
    assert Answer(entries).text == answer_to(chat_request()["messages"])
    assert Answer(entries).model == "small"


async def test_an_error_names_every_model_that_was_asked(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_worker(*[
        await start_simulator(Options(model=model, scenario=Scenario(fault="500")))
        for model in ("large", "small")
    ], tries=1)  # fmt: skip
    answer = Answer(await entries_of(client, chat_request(), fallbacks=["small"]))
    assert isinstance(answer.end, Failed)
    assert answer.end.code == "upstream_error"
    assert answer.end.message.endswith("(before it: large: upstream_error)")


async def test_an_answer_that_broke_off_goes_to_no_other_model_where_a_setting_says_fail(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    large = await start_simulator(Options(model="large", scenario=Scenario(fault="cut", after=4)))
    small = await start_simulator(Options(model="small"))
    await start_worker(large, small, on_interrupt="fail")
    answer = Answer(await entries_of(client, chat_request(), fallbacks=["small"]))
    assert isinstance(answer.end, Failed)
    assert (answer.end.code, len(small.served)) == ("upstream_truncated", 0)


@pytest.mark.parametrize("known", [True, False], ids=["that was there", "that was never there"])
async def test_a_model_whose_only_server_is_away_is_given_up_for_one_with_a_server(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator, *, known: bool
) -> None:
    small = await start_simulator(Options(model="small"))
    async with Simulator(Options(model="large")) as large:
        if known:
            await start_worker(large, small)
            assert Answer(await entries_of(client, chat_request())).model == "large"
    if not known:
        await start_worker(large, small)
    assert Answer(await entries_of(client, chat_request(), fallbacks=["small"])).model == "small"


async def test_a_job_waits_for_its_model_while_the_fallbacks_are_away_too(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    port = free_port()
    async with Simulator(Options(model="large")) as large, Simulator(Options(model="small"), port=port) as small:
        other = await start_simulator()
        await start_worker(large, small, other)
        for model in ("large", "small"):  # so that the worker knows the models of both servers
            assert Answer(await entries_of(client, chat_request() | {"model": model})).model == model
    request_id = await client.enqueue(chat_request(), fallbacks=["small"])

    async def begun() -> bool:
        return (await client.status(request_id)).state is State.RUNNING

    await eventually(begun)
    await start_simulator(Options(model="small"), port)
    answer = await client.result(request_id)
    assert (answer.outcome, answer.model) == ("done", "small")
