"""A worker with several vLLM servers, or a failing one: where its jobs go, and that they wait rather than fail."""

import asyncio
from typing import Any

import pytest
from conftest import StartSimulator, StartWorker
from structlog.testing import capture_logs
from waits import eventually

from worker import Answer, Client, Failed, State
from worker.contract.entries import Object
from worker.engine.pace import Pace
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.requests import Fault, answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest
from worker.telemetry.logging import configure_logging
from worker.vllm.servers.circuit import FAILURES, CircuitState
from worker.vllm.servers.pace import ServerPace


def chat_request(content: str, model: str = "reciter", **more: Any) -> Object:  # noqa: ANN401
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


async def answers(client: Client, *requests: Object) -> list[Answer]:
    ids = [await client.enqueue(request) for request in requests]
    return list(await asyncio.gather(*map(client.result, ids)))


async def test_every_job_goes_to_a_server_that_has_its_model(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    small, large = [await start_simulator(Options(model=model)) for model in ("small", "large")]
    await start_worker(small, large)
    got = await answers(client, *(chat_request(f"q{n}", ("small", "large")[n % 2]) for n in range(10)))
    assert [answer.model for answer in got] == ["small", "large"] * 5
    assert [len(small.served), len(large.served)] == [5, 5]


async def test_a_model_that_no_server_has_is_an_error_with_a_servers_message(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """Only one server gets a request with the field, and only the first time."""
    servers = [await start_simulator(Options(model=model)) for model in ("small", "large")]
    await start_worker(*servers)
    for _ in range(3):
        (answer,) = await answers(client, chat_request("Hi", "no"))
        assert isinstance(answer.end, Failed)
        assert (answer.end.code, answer.attempt) == ("model_not_found", 1)
        assert answer.end.message.startswith("The model `no` does not exist.")
    assert sum(len(server.served) for server in servers) == 1


async def test_a_model_that_one_server_does_not_know_is_asked_of_another_that_lists_nothing(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """A server that lists nothing may have any model. That the first does not have this one is remembered."""
    servers = [
        await start_simulator(Options(model=model, lacks=frozenset({"/v1/models"}))) for model in ("small", "large")
    ]
    await start_worker(*servers, tries=1)
    for _ in range(3):
        got = await answers(client, chat_request("Hi", "large"), chat_request("Hi", "small"))
        assert [answer.outcome for answer in got] == ["done", "done"]
    assert [sum(served.status == 404 for served in server.served) for server in servers] in ([1, 0], [1, 1], [0, 1])
    (answer,) = await answers(client, chat_request("Hi", "no"))
    assert isinstance(answer.end, Failed)
    assert answer.end.code == "model_not_found"


@pytest.mark.parametrize("guards_its_list", [True, False])
async def test_jobs_avoid_a_server_that_refuses_the_workers_key(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator, *, guards_its_list: bool
) -> None:
    """It replies at once, so it would always be the server with the fewest requests."""
    async with Guarded(lists=not guards_its_list) as refusing:
        good = await start_simulator(Options(scenario=Scenario(rate=200)))
        worker = await start_worker(refusing, good, tries=1)
        got = await answers(client, *(chat_request(f"question {n}", max_tokens=5) for n in range(40)))
        assert [answer.outcome for answer in got] == ["done"] * 40
        assert len(good.served) == 40
        if guards_its_list:
            assert worker._servers.servers[0].refuses_key


async def test_a_fallback_is_asked_where_every_server_of_the_model_refuses_the_key(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    async with Guarded(Options(model="large", api_key="another"), lists=True) as refusing:
        await start_worker(refusing, await start_simulator(Options(model="small")))
        for _ in range(2):
            answer = await client.result(await client.enqueue(chat_request("Hi", "large"), fallbacks=["small"]))
            assert (answer.outcome, answer.model) == ("done", "small")


class Choosy(Simulator):
    """A server that replies to some requests that it lacks the model, and lists its models only once."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self.lists = 0
        self.released = asyncio.Event()

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        if request.path == "/v1/models":
            self.lists += 1
            if self.lists > 1:
                await self.released.wait()
        if b"a bad one" in request.body:
            error = b'{"error":{"message":"The model does not exist: http://files/image.png","code":404}}'
            await connection.respond(404, "application/json", error)
        else:
            await super()._handle(request, connection)


async def test_a_job_whose_model_a_server_denies_does_not_take_the_model_from_other_jobs(
    client: Client, start_worker: StartWorker, server_pace: ServerPace
) -> None:
    """The worker requests the list of models again meanwhile."""
    server_pace.probe_every = 0.05
    async with Choosy() as server:
        await start_worker(server)
        (bad,) = await answers(client, chat_request("a bad one"))
        assert isinstance(bad.end, Failed)
        assert bad.end.code == "model_not_found"

        async def asked_again() -> bool:
            return server.lists > 1

        await eventually(asked_again)
        got = await answers(client, *(chat_request(f"question {n}") for n in range(3)))
        assert [answer.outcome for answer in got] == ["done"] * 3
        server.released.set()


async def test_a_job_whose_model_one_server_denies_goes_to_the_other(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    async with Choosy() as choosy:
        good = await start_simulator()
        await start_worker(choosy, good, tries=1)
        got = await answers(client, *(chat_request(f"a bad one {n}") for n in range(6)))
        assert [answer.outcome for answer in got] == ["done"] * 6
        assert len(good.served) == 6


class Wrong(Simulator):
    """A misconfigured server: every request but those for its health and its list gets this reply."""

    def __init__(self, status: int, body: bytes, options: Options | None = None) -> None:
        super().__init__(options)
        self.answer = status, body
        self.requests = 0

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        if request.path in {"/health", "/v1/models"}:
            await super()._handle(request, connection)
        else:
            self.requests += request.path == "/v1/chat/completions"
            await connection.respond(self.answer[0], "text/plain", self.answer[1])


QUICK_RETRIES = Pace(longest_block=0.1, first_retry=0.01)
LONG_WAITS = Pace(longest_block=0.1, longest_wait_here=3600)
"""A job waits in its worker until the test has seen that, and not in its queue after a second."""
WRONG = [
    (307, b"elsewhere", "upstream_error"),
    (404, b'{"detail":"Not Found"}', "not_found"),
    (405, b'{"detail":"Method Not Allowed"}', "upstream_error"),
    (501, b"", "upstream_unavailable"),
    (404, b"<html>404 Not Found</html>", "not_found"),
    (413, b"<html>413 Request Entity Too Large</html>", "invalid_request"),
    (200, b"<html>Welcome to nginx!</html>", "not_a_stream"),
]


@pytest.mark.parametrize(("status", "body"), [case[:2] for case in WRONG])
async def test_a_misconfigured_server_ends_no_job_that_another_can_serve(
    status: int, body: bytes, client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """It replies at once, so it would always be the server with the fewest requests."""
    async with Wrong(status, body) as wrong:
        good = await start_simulator()
        worker = await start_worker(wrong, good, tries=2)
        got = await answers(client, *(chat_request(f"question {n}", max_tokens=5) for n in range(12)))
        assert [answer.outcome for answer in got] == ["done"] * 12
        assert len(good.served) == 12
        got = await answers(client, *(chat_request(f"again {n}", max_tokens=5) for n in range(12)))
        assert [answer.outcome for answer in got] == ["done"] * 12
        if status != 413:
            assert wrong.requests <= 12
            assert worker._servers.servers[0].circuit.state in {CircuitState.OPEN, CircuitState.HALF_OPEN}


@pytest.mark.parametrize(("status", "body", "code"), WRONG)
async def test_a_job_ends_with_the_servers_message_where_every_server_is_misconfigured(
    status: int,
    body: bytes,
    code: str,
    client: Client,
    start_worker: StartWorker,
    server_pace: ServerPace,
) -> None:
    """Each job tries each server once, even after all of them have failed."""
    server_pace.probe_every = 0.05
    async with Wrong(status, body) as one, Wrong(status, body) as other:
        await start_worker(one, other, pace=QUICK_RETRIES, tries=1 if status in {200, 501} else 5)
        got = await answers(client, *(chat_request(f"question {n}") for n in range(2 * FAILURES)))
        codes = {answer.end.code for answer in got if isinstance(answer.end, Failed)}
        assert (codes, len(got)) == ({code}, 2 * FAILURES)
        if status not in {200, 501}:
            assert (one.requests, other.requests) == (2 * FAILURES, 2 * FAILURES)


async def test_an_answer_is_resumed_though_one_server_is_misconfigured(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """That one server cannot plan a resume is no reason to begin again."""
    first = await start_simulator(Options(scenario=Scenario(fault="cut", after=4)))
    async with Wrong(307, b"") as wrong:
        await start_worker(first, wrong, await start_simulator(), tries=5)
        entries = [entry async for entry in client.follow(await client.enqueue(chat_request("Who are you?")))]
    assert [entry.type for entry in entries if entry.type in {"resumed", "restarted"}] == ["resumed"]
    assert Answer(entries).text == answer_to(chat_request("Who are you?")["messages"])


class Guarding(Simulator):
    """A server behind a proxy that lets completions through and redirects everything else to its login page."""

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        if request.path == "/tokenize":
            await connection.respond(302, "text/plain", b"log in")
        else:
            await super()._handle(request, connection)


@pytest.mark.parametrize("count", [1, 2])
async def test_an_answer_begins_again_where_no_server_plans_a_resume(
    client: Client, start_worker: StartWorker, count: int
) -> None:
    first = Options(scenario=Scenario(fault="cut", after=4, times=1))
    async with Guarding(first) as one, Guarding() as other:
        await start_worker(*[one, other][:count], tries=2)
        entries = [entry async for entry in client.follow(await client.enqueue(chat_request("Who are you?")))]
    assert [entry.type for entry in entries if entry.type in {"resumed", "restarted"}] == ["restarted"]
    assert Answer(entries).text == answer_to(chat_request("Who are you?")["messages"])


async def test_a_fallback_is_asked_where_every_server_of_the_model_is_misconfigured(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    async with Wrong(307, b"", Options(model="large")) as wrong:
        await start_worker(wrong, await start_simulator(Options(model="small")))
        answer = await client.result(await client.enqueue(chat_request("Hi", "large"), fallbacks=["small"]))
    assert (answer.outcome, answer.model) == ("done", "small")


class Guarded(Simulator):
    """A server that requires a key that the worker does not have; with `lists` it lists its models without one."""

    def __init__(self, options: Options | None = None, *, lists: bool = False) -> None:
        super().__init__(options or Options(api_key="another"))
        self._lists = lists

    def _authorized(self, request: HttpRequest) -> bool:
        return (self._lists and request.path == "/v1/models") or super()._authorized(request)


class Sick(Simulator):
    """A server whose health endpoint reports its failures."""

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        if request.path == "/health" and self.options.scenario.fault:
            await connection.respond(503, "text/plain", b"")
        else:
            await super()._handle(request, connection)


@pytest.mark.parametrize("fault", ["503", "cut"])
async def test_a_server_that_fails_does_not_turn_the_queue_into_errors(
    fault: Fault, client: Client, start_worker: StartWorker, server_pace: ServerPace
) -> None:
    server_pace.probe_every = 0.05
    async with Sick() as server:
        worker = await start_worker(server, tries=1, slots=1)
        await answers(client, chat_request("before"))
        server.options = Options(scenario=Scenario(fault=fault, after=3))
        ids = [await client.enqueue(chat_request(f"question {n}")) for n in range(FAILURES + 5)]

        async def away() -> bool:
            return not worker._servers.is_available

        await eventually(away)
        states = [(await client.status(request_id)).state for request_id in ids]
        lost = states.count(State.ENDED)
        # Jobs that were read before the circuit opened wait for it; no other job is claimed.
        assert lost <= FAILURES
        assert states.count(State.RUNNING) <= 1
        assert len(server.served) <= lost + 2
        server.options = Options()
        outcomes = [answer.outcome for answer in await asyncio.gather(*map(client.result, ids))]
        assert outcomes.count("done") >= len(ids) - lost - 1


async def test_jobs_that_make_their_server_fail_do_not_fail_the_others(
    client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    await start_worker(simulator)
    poison = [chat_request(f"poison {n}", simulate={"fault": "error_under_200"}) for n in range(4)]
    good = [chat_request(f"question {n}") for n in range(20)]
    got = await answers(client, *poison, *good)
    assert [answer.outcome for answer in got] == ["error"] * 4 + ["done"] * 20


@pytest.mark.parametrize("fault", ["freeze", "hang"])
async def test_no_job_waits_for_a_server_that_goes_down_with_its_streams_frozen(
    fault: Fault, client: Client, start_worker: StartWorker, start_simulator: StartSimulator,
    server_pace: ServerPace,
) -> None:  # fmt: skip
    """As vLLM 0.32.0 does on SIGTERM: it accepts no connections, and its open streams send comments for ever."""
    server_pace.frozen_after = 0.1
    server_pace.probe_every = 0.05
    async with Simulator(Options(keep_alive=0.02, scenario=Scenario(fault=fault, after=6))) as going_down:
        # The limits are so long that only the refused connection can end the wait.
        await start_worker(going_down, await start_simulator(), gap_timeout=60, first_token_timeout=60)
        request_id = await client.enqueue(chat_request("Who are you?"))

        async def frozen() -> bool:
            return bool(going_down.served and going_down.served[0].fault)

        await eventually(frozen)
        going_down.refuse()
        answer = await client.result(request_id)
    assert (answer.outcome, answer.text) == ("done", answer_to(chat_request("Who are you?")["messages"]))


async def test_a_job_that_waits_for_its_model_is_logged_once(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator, server_pace: ServerPace
) -> None:
    server_pace.probe_every = 0.05
    configure_logging("json", "info")
    port = free_port()
    async with Simulator(Options(model="large"), port=port) as large:
        worker = await start_worker(large, await start_simulator(Options(model="small")), pace=LONG_WAITS)
        await answers(client, chat_request("before", "large"))
    with capture_logs() as logs:
        request_id = await client.enqueue(chat_request("a secret prompt", "large"))

        async def waits() -> bool:
            return worker.metrics.registry.get_sample_value("vllm_relay_jobs_waiting_for_model") == 1

        await eventually(waits)
        await start_simulator(Options(model="large"), port)
        assert (await client.result(request_id)).outcome == "done"
    logged = [line for line in logs if line["event"] == "waiting_for_model"]
    assert logged == [{"event": "waiting_for_model", "model": "large", "log_level": "info"}]
    assert "a secret prompt" not in str(logs)


async def test_a_waiting_job_without_a_model_is_logged_without_one(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator, server_pace: ServerPace
) -> None:
    """The log had an empty model once."""
    server_pace.probe_every = 0.05
    configure_logging("json", "info")
    port = free_port()
    async with Simulator(port=port) as away:
        worker = await start_worker(away, pace=LONG_WAITS)
        await answers(client, chat_request("before"))
    with capture_logs() as logs:
        request = {"messages": [{"role": "user", "content": "Hi"}]}
        request_id = await client.enqueue(request)

        async def waits() -> bool:
            return worker.metrics.registry.get_sample_value("vllm_relay_jobs_waiting_for_model") == 1

        await eventually(waits)
        await start_simulator(port=port)
        assert (await client.result(request_id)).outcome == "done"
    logged = [line for line in logs if line["event"] == "waiting_for_model"]
    assert logged == [{"event": "waiting_for_model", "log_level": "info"}]
    assert not await waits()


async def test_an_answer_waits_while_all_of_several_servers_are_away(
    client: Client,
    start_worker: StartWorker,
    start_simulator: StartSimulator,
    server_pace: ServerPace,
) -> None:
    """A server that cannot be reached has seen no request: that does not count as a try, for any number of servers."""
    server_pace.probe_every = 0.05
    ports = [free_port() for _ in range(3)]
    servers = [Simulator(Options(scenario=Scenario(rate=50)), port=port) for port in ports]
    for server in servers:
        await server.__aenter__()
    worker = await start_worker(*servers, pace=QUICK_RETRIES, tries=2)
    request_id = await client.enqueue(chat_request("Who are you?"))

    async def begun() -> bool:
        return any(served.chunks > 3 for server in servers for served in server.served)

    await eventually(begun)
    for server in servers:
        await server.__aexit__(None, None, None)

    async def refused() -> bool:
        return not worker._servers.is_available

    await eventually(refused)
    assert (await client.status(request_id)).state is State.RUNNING
    await start_simulator(port=ports[1])
    answer = await client.result(request_id)
    assert (answer.outcome, answer.text) == ("done", answer_to(chat_request("Who are you?")["messages"]))
