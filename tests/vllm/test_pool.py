"""Several servers with faults: what they serve, when they are away, and how they come back."""

import asyncio
import base64
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
import structlog
from conftest import eventually
from structlog.testing import capture_logs

from worker.contract.entries import Object
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.requests import Fault
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest
from worker.telemetry.logging import LogReceiver, configure_logging
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import UpstreamError
from worker.vllm.http.credentials import ApiKeys
from worker.vllm.servers.api import LateAnswer, VllmApi
from worker.vllm.servers.circuit import FAILURES, Caller, CircuitState
from worker.vllm.servers.pace import ServerPace
from worker.vllm.servers.pool import ServerPool
from worker.vllm.servers.server import Server
from worker.vllm.stream.watchdog import StreamTimeouts

PATIENT = StreamTimeouts(connect=5, first_token=10, gap=10)
IMPATIENT = StreamTimeouts(connect=5, first_token=0.1, gap=0.1)
SHORT = 0.02


class Recorder(Simulator):
    """A simulator that notes the paths it is asked for, answers some with a status alone, and some once released."""

    def __init__(self, options: Options | None = None, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(options, **settings)
        self.asked: list[str] = []
        self.authorization: list[str] = []
        self.statuses: dict[str, int] = {}
        self.slow: set[str] = set()
        self.released = asyncio.Event()

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        self.asked.append(request.path)
        self.authorization.append(request.headers.get("authorization", ""))
        if request.path in self.slow:
            await self.released.wait()
        if status := self.statuses.get(request.path):
            await connection.respond(status, "text/plain", b"no")
        else:
            await super()._handle(request, connection)

    def orders(self, fault: Fault | None = None, *, after: int = 0) -> None:
        """What happens to every request from now on."""
        self.options = Options(model=self.options.model, orders=Scenario(fault=fault, after=after))


BRIEF = {"probe_limit": SHORT, "longest_probe_limit": 4 * SHORT}
"""Probes are late at once, and have no more time than a little."""


def quick(**pace: float) -> ServerPace:
    """A pace with short pauses."""
    fast = {"probe_every": SHORT, "list_again_after": SHORT, "first_pause": SHORT, "longest_pause": SHORT}
    return ServerPace(**fast | pace)


@asynccontextmanager
async def watching(
    *urls: str, limits: StreamTimeouts = PATIENT, api_key: str = "", pace: ServerPace | None = None
) -> AsyncIterator[ServerPool]:
    """The servers, monitored, once each has been probed."""
    upstream = ServerPool(urls, keys=ApiKeys(api_key), limits=limits, telemetry=LogReceiver(), pace=pace or quick())
    task = asyncio.create_task(upstream.monitor())
    try:
        await until(lambda: all(endpoint.is_known for endpoint in upstream.servers))
        yield upstream
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await upstream.aclose()


@asynccontextmanager
async def serving(*models: str, **settings: Any) -> AsyncIterator[tuple[list[Recorder], ServerPool]]:  # noqa: ANN401
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Recorder(Options(model=model))) for model in models]
        yield servers, await stack.enter_async_context(watching(*(server.url for server in servers), **settings))


async def until(condition: Callable[[], object]) -> None:
    async def holds() -> object:
        return condition()

    await eventually(holds)


async def chosen(upstream: ServerPool, model: str = "") -> Server:
    """As whoever has a request does it."""
    while not upstream.accepts(model):
        await upstream.wait_available(model)
    return upstream.choose(model)


async def ask(
    upstream: ServerPool, endpoint: Server | None = None, *, model: str = "", caller: Caller | None = None,
    **fields: Any,  # noqa: ANN401
) -> str:  # fmt: skip
    """The text of a whole answer."""
    parser, texts = ChunkParser(), list[str]()
    request: Object = {"messages": [{"role": "user", "content": "Who are you?"}], **({"model": model} if model else {})}
    endpoint = endpoint or await chosen(upstream, model)
    async with upstream.stream(endpoint, request | fields, caller=caller) as stream:

        def take(events: list[bytes]) -> bool:
            texts.extend(entry.get("content", "") for data in events for entry in parser.parse(data))
            return parser.done

        while await stream.read_into(take) and not parser.done:
            pass
        await stream.read_rest()
        parser.check_complete()
    return "".join(texts)


async def fails(upstream: ServerPool, times: int = 1, **fields: Any) -> set[str]:  # noqa: ANN401
    """The codes of requests that fail, whatever the circuit says."""
    codes = set()
    for _ in range(times):
        with pytest.raises(UpstreamError) as caught:
            await ask(upstream, upstream.servers[0], **fields)
        codes.add(caught.value.code)
    return codes


# Which server serves a model


async def test_each_model_is_asked_of_the_server_that_lists_it() -> None:
    async with serving("small", "large", "large") as (servers, upstream):
        assert [endpoint.models for endpoint in upstream.servers] == [{"small"}, {"large"}, {"large"}]
        for _ in range(3):
            await ask(upstream, model="small")
            await ask(upstream, model="large")
        assert [len(servers[0].served), len(servers[1].served) + len(servers[2].served)] == [3, 3]


async def test_a_model_that_is_loaded_later_is_found_when_it_is_asked_for() -> None:
    async with serving("small") as ((server,), upstream):
        assert not upstream.accepts("adapter")
        server.options = Options(model="adapter")
        assert await ask(upstream, model="adapter")


async def test_a_model_that_no_server_lists_is_asked_of_one_once_the_lists_have_been_asked_for_again() -> None:
    """A11. Its answer holds for a minute, for all who ask."""
    async with serving("small", "large") as (servers, upstream):
        before = [server.asked.count("/v1/models") for server in servers]
        await upstream.wait_available("no")
        assert [server.asked.count("/v1/models") for server in servers] == [count + 1 for count in before]
        with pytest.raises(UpstreamError, match=r"The model `no` does not exist\. Valid aliases: small"):
            await ask(upstream, model="no")
        assert not upstream.accepts("no")
        for _ in range(3):
            with pytest.raises(UpstreamError, match=r"The model `no` does not exist\. Valid aliases: small") as caught:
                await upstream.wait_available("no")
            assert (caught.value.code, caught.value.status, caught.value.retryable) == ("model_not_found", 404, False)
        assert [len(server.served) for server in servers] == [1, 0]


async def test_a_model_that_nobody_knew_is_found_once_a_server_lists_it() -> None:
    """A11."""
    async with serving("small") as ((server,), upstream):
        with pytest.raises(UpstreamError):
            await ask(upstream, model="adapter")
        server.options = Options(model="adapter")
        await until(lambda: upstream.accepts("adapter"))
        assert await ask(upstream, model="adapter")


async def test_a_model_that_a_server_without_a_list_did_not_know_is_asked_for_again() -> None:
    """A11. Its answer may change any time, and nothing else would tell."""
    async with Recorder() as server:
        server.statuses["/v1/models"] = 404
        async with watching(server.url) as upstream:
            for _ in range(2):
                with pytest.raises(UpstreamError):
                    await ask(upstream, model="adapter")
            server.options = Options(model="adapter")
            assert await ask(upstream, model="adapter")


class Resolving(Recorder):
    """A server that has more names for its model than it lists, as one that loads an adapter on first use."""

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        self.options = Options(model="listed" if request.path == "/v1/models" else "other")
        await super()._handle(request, connection)


async def test_a_name_that_a_server_answers_to_is_asked_for_at_once_from_then_on() -> None:
    """A11. LoRA resolvers, and `llama3` for `llama3:latest`."""
    async with Resolving() as server, watching(server.url) as upstream:
        assert await ask(upstream, model="other")
        asked = server.asked.count("/v1/models")
        for _ in range(3):
            assert upstream.accepts("other")
            assert await ask(upstream, model="other")
        assert server.asked.count("/v1/models") == asked


async def test_many_that_miss_a_model_ask_together() -> None:
    async with serving("small") as ((server,), upstream):
        before = server.asked.count("/v1/models")
        await asyncio.gather(*(upstream.wait_available(f"no-{n}") for n in range(100)))
        assert server.asked.count("/v1/models") - before == 1


@pytest.mark.parametrize("status", [401, 404, 501])
async def test_a_server_that_does_not_list_its_models_may_serve_any(status: int) -> None:
    async with Recorder() as server:
        server.statuses["/v1/models"] = status
        async with watching(server.url) as upstream:
            assert await ask(upstream, model="reciter")
            with pytest.raises(UpstreamError) as caught:  # in its own words
                await ask(upstream, model="no")
            assert (caught.value.code, len(server.served)) == ("model_not_found", 2)


async def test_a_model_waits_for_a_server_that_has_never_said_what_it_serves() -> None:
    port = free_port()
    async with (
        Recorder(Options(model="small")) as small,
        watching(small.url, f"http://127.0.0.1:{port}") as upstream,
    ):
        asking = asyncio.create_task(ask(upstream, model="large"))
        assert await ask(upstream, model="small")
        assert not upstream.accepts("large")
        async with Recorder(Options(model="large"), port=port) as large:
            assert await asking
            assert len(large.served) == 1


async def test_a_server_that_comes_back_is_asked_what_it_serves_now() -> None:
    port = free_port()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(Recorder(Options(model="old"), port=port))
        async with watching(first.url) as upstream:
            await stack.aclose()
            assert await fails(upstream) == {"upstream_unreachable"}
            async with Recorder(Options(model="new"), port=port):
                await until(lambda: not upstream.servers[0].is_away)
                assert await ask(upstream, model="new")
                assert upstream.servers[0].models == {"new"}


async def test_the_lists_are_asked_for_again_from_time_to_time() -> None:
    async with serving("small", pace=quick(list_every=SHORT)) as ((server,), upstream):
        server.options = Options(model="other")
        await until(lambda: upstream.servers[0].models == {"other"})
        server.statuses["/v1/models"] = 503
        asked = len(server.asked)
        await until(lambda: len(server.asked) > asked + 2)
        assert upstream.servers[0].models == {"other"}, "what it said before holds"
        assert upstream.is_available


# Whether a server is there


@pytest.mark.parametrize("statuses", [{}, {"/health": 404}, {"/health": 404, "/v1/models": 404}, {"/health": 401}])
async def test_a_server_is_there_when_its_health_or_its_list_is_answered(statuses: dict[str, int]) -> None:
    async with Recorder() as server:
        server.statuses = statuses
        async with watching(server.url) as upstream:
            assert upstream.is_available


@pytest.mark.parametrize("statuses", [{"/health": 503}, {"/health": 404, "/v1/models": 502}])
async def test_a_server_that_answers_with_a_fault_is_away(statuses: dict[str, int]) -> None:
    async with Recorder() as server:
        server.statuses = dict(statuses)
        async with watching(server.url) as upstream:
            assert (upstream.is_available, upstream.servers[0].is_away) == (False, True)
            server.statuses.clear()
            assert await ask(upstream)


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
async def test_a_server_that_answers_late_gets_its_requests(path: str) -> None:
    """A8. A busy vLLM takes half a minute, and a router asks every model; neither was ever asked for anything."""
    async with Recorder() as server:
        server.slow = {path}
        async with watching(server.url, pace=quick(**BRIEF)) as upstream:
            assert await ask(upstream, model="reciter")
            assert upstream.servers[0].circuit.state is CircuitState.CLOSED


async def test_a_server_that_is_late_has_more_time_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A8."""
    limits: list[float] = []

    async def health(_: object, __: Server, within: float) -> int:
        limits.append(within)
        if len(limits) in {5, 6}:
            return 503
        raise LateAnswer("http://a", within)

    monkeypatch.setattr(VllmApi, "health", health)
    async with watching("http://127.0.0.1:1", pace=quick(**BRIEF)):
        await until(lambda: len(limits) > 7)
    assert limits[:8] == [n * SHORT for n in (1, 2, 4, 4, 4, 1, 1, 2)]


async def test_a_list_that_is_late_is_asked_for_again_beside_the_requests() -> None:
    """A8. Until it is there the server may have any model, as one that lists nothing."""
    pace = quick(**BRIEF)
    async with Recorder() as server:
        server.slow = {"/v1/models"}
        async with watching(server.url, pace=pace) as upstream:
            assert await ask(upstream, model="reciter")
            asked = server.asked.count("/v1/models")
            await until(lambda: server.asked.count("/v1/models") > asked)
            pace.probe_limit = pace.longest_probe_limit = 5
            server.released.set()
            await until(lambda: upstream.servers[0].models == {"reciter"})


async def test_a_model_is_asked_for_though_the_lists_are_never_there_in_time() -> None:
    """A8 and A11."""
    async with Resolving() as server, watching(server.url, pace=quick(**BRIEF)) as upstream:
        server.slow = {"/v1/models"}
        assert await ask(upstream, model="other")


async def test_a_new_server_that_is_late_once_gets_all_requests_as_soon_as_its_health_is_answered() -> None:
    """A8. The first of them may take minutes: the others are not asked one at a time meanwhile."""
    pace = quick(**BRIEF)
    async with Recorder() as server:
        server.slow = {"/health"}
        server.orders("hang")
        async with watching(server.url, pace=pace) as upstream:
            asking = [asyncio.create_task(ask(upstream)) for _ in range(5)]
            await until(lambda: len(server.served) == 1)
            pace.probe_limit = pace.longest_probe_limit = 5
            server.released.set()
            await until(lambda: len(server.served) == 5)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)


async def test_a_server_that_takes_connections_again_is_tried_before_its_health_is_answered() -> None:
    """A8. A vLLM that came back with a health of 40 s was away for a minute and a half: each longer probe was late."""
    port = free_port()
    async with (
        watching(f"http://127.0.0.1:{port}", pace=quick(probe_limit=0.2)) as upstream,
        Recorder(port=port) as server,
    ):
        server.slow = {"/health", "/v1/models"}
        assert await ask(upstream)


async def test_a_frozen_server_is_left_and_then_tried_with_one_request_at_a_time() -> None:
    """A8. It takes connections, and answers nothing: neither its health nor any request."""
    async with serving("reciter", limits=IMPATIENT, pace=quick(**BRIEF)) as ((server,), upstream):
        circuit = upstream.servers[0].circuit
        server.slow = {"/health", "/v1/models"}
        server.orders("hang")
        await fails(upstream, FAILURES)
        assert circuit.state is CircuitState.OPEN
        upstream._limits = PATIENT
        tried = len(server.served)
        waiting = [asyncio.create_task(ask(upstream)) for _ in range(5)]
        await until(lambda: len(server.served) > tried)
        asked = server.asked.count("/health")
        await until(lambda: server.asked.count("/health") > asked + 2)
        assert len(server.served) == tried + 1
        server.orders()
        server.released.set()
        waiting[0].cancel()
        assert all(text for text in await asyncio.gather(*waiting, return_exceptions=True))


async def test_going_away_and_coming_back_are_logged_once_with_the_reason() -> None:
    configure_logging("json", "info")
    port = free_port()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(Recorder(port=port))
        with capture_logs() as logs:
            async with watching(first.url.replace("//", "//user:hidden@")) as upstream:
                await stack.aclose()
                await fails(upstream, 3)
                async with Recorder(port=port):
                    await ask(upstream)
    assert [(line["event"], line.get("reason")) for line in logs] == [
        ("vllm_away", "upstream_unreachable"),
        ("vllm_back", None),
    ]
    assert {line["endpoint"] for line in logs} == {first.url}


async def test_c8_the_log_says_what_to_do_about_a_server_that_speaks_no_tls() -> None:
    configure_logging("json", "info")
    with capture_logs() as logs:
        async with Recorder() as server, watching(server.url.replace("http:", "https:")):
            pass
    (line,) = logs
    assert (line["event"], line["reason"]) == ("vllm_away", "upstream_unreachable")
    assert line["fix"] == "if the server does not speak TLS there, its URL begins with http://"


async def test_what_is_told_of_a_server_names_no_job() -> None:
    configure_logging("json", "info")
    async with Recorder() as server, watching(server.url) as upstream:
        server.statuses = {"/v1/chat/completions": 401, "/v1/models": 401}
        with (
            capture_logs([structlog.contextvars.merge_contextvars]) as logs,
            structlog.contextvars.bound_contextvars(worker="w", request_id="r"),
        ):
            await fails(upstream)
            structlog.get_logger().info("upstream_failed")
    assert [(line["worker"], line.get("request_id")) for line in logs] == [("w", None), ("w", "r")]


@pytest.mark.parametrize("refused", ["/v1/chat/completions", "/tokenize"])
async def test_a_server_that_refused_the_key_is_back_once_its_list_takes_it(refused: str) -> None:
    async with serving("reciter", "reciter") as ((server, _), upstream):
        endpoint = upstream.servers[0]
        server.statuses = {refused: 401, "/v1/models": 401}
        asking = upstream.post(endpoint, refused, {}) if refused == "/tokenize" else ask(upstream, endpoint)
        with pytest.raises(UpstreamError) as caught:
            await asking
        assert (caught.value.code, endpoint.refuses_key) == ("unauthorized", True)
        asked = len(server.asked)
        await until(lambda: server.asked[asked:].count("/v1/models") > 2)
        assert endpoint.refuses_key, "its health is no answer to that"
        server.statuses.clear()
        await until(lambda: not endpoint.is_away)
        assert await ask(upstream, endpoint)


async def test_a_model_of_which_every_server_refuses_the_key_is_not_waited_for_beside_a_fallback() -> None:
    async with serving("small", "large") as ((small, _), upstream):
        small.statuses = {"/v1/chat/completions": 401, "/v1/models": 401}
        await fails(upstream, model="small")
        with pytest.raises(UpstreamError, match="every server of `small` refuses the keys") as caught:
            await upstream.wait_available("small", ["large"])
        assert caught.value.code == "unauthorized"


# The circuit


def limits_for(fault: Fault) -> StreamTimeouts:
    """Short where the fault is a silence, and only there: a busy machine is slow to begin."""
    if fault == "hang":
        return StreamTimeouts(connect=PATIENT.connect, first_token=0.1, gap=PATIENT.gap)
    return (
        StreamTimeouts(connect=PATIENT.connect, first_token=PATIENT.first_token, gap=0.1)
        if fault in {"stall", "freeze"}
        else PATIENT
    )


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("500", "upstream_error"),
        ("503", "upstream_unavailable"),
        ("refuse", "upstream_unreachable"),
        ("html", "not_a_stream"),
        ("hang", "first_token_timeout"),
        ("stall", "gap_timeout"),
        ("freeze", "gap_timeout"),
        ("cut", "upstream_truncated"),
        ("reset", "upstream_truncated"),
        ("malformed", "upstream_malformed"),
        ("error_under_200", "upstream_error"),
        ("abort", "upstream_aborted"),
    ],
)
async def test_every_fault_in_a_row_opens_the_circuit_and_the_probe_half_opens_it(fault: Fault, code: str) -> None:
    async with serving("reciter", limits=limits_for(fault)) as ((server,), upstream):
        # Mid-stream where that matters: a connection that is reset drops what was not read.
        server.orders(fault, after=2 if fault in {"stall", "freeze", "malformed", "abort"} else 0)
        await fails(upstream, FAILURES - 1)
        assert upstream.is_available
        server.statuses["/health"] = 503
        assert await fails(upstream) == {code}
        assert (upstream.is_available, len(upstream.servers[0].requests)) == (False, 0)
        server.orders()
        server.statuses.clear()
        upstream._limits = PATIENT
        assert await ask(upstream)
        assert upstream.servers[0].circuit.state is CircuitState.CLOSED


@pytest.mark.parametrize("fields", [{"simulate": {"fault": "429"}}, {"temperature": -3.0}, {"model": "no"}])
async def test_refusals_leave_the_circuit_closed(fields: dict[str, Any]) -> None:
    async with serving("reciter") as (_, upstream):
        await fails(upstream, 2 * FAILURES, **fields)
        assert upstream.servers[0].circuit.state is CircuitState.CLOSED


async def test_a_whole_answer_between_failures_keeps_the_circuit_closed() -> None:
    async with serving("reciter") as (_, upstream):
        for _ in range(3):
            await fails(upstream, FAILURES - 1, simulate={"fault": "500"})
            assert upstream.servers[0].circuit.state is CircuitState.CLOSED
            assert await ask(upstream)


async def test_leaving_a_stream_for_reasons_of_ones_own_says_nothing_about_the_server() -> None:
    async with serving("reciter") as (_, upstream):
        endpoint = upstream.servers[0]
        for _ in range(2 * FAILURES):
            with pytest.raises(ValueError, match="mine"):
                async with upstream.stream(endpoint, {"messages": [{"role": "user", "content": "Hi"}]}):
                    raise ValueError("mine")
        assert endpoint.circuit.state is CircuitState.CLOSED


@asynccontextmanager
async def half_open(pace: ServerPace | None = None, **settings: Any) -> AsyncIterator[tuple[Recorder, ServerPool]]:  # noqa: ANN401
    """A server that is on trial, whose further pauses are so long that nobody waits for them."""
    pace = pace or quick()
    async with serving("reciter", pace=pace, **settings) as ((server,), upstream):
        pace.first_pause = pace.longest_pause = 3600
        server.orders("503")
        await fails(upstream, FAILURES)
        await upstream.wait_available("")
        server.orders()
        yield server, upstream


async def test_one_trial_goes_at_a_time_and_its_first_event_lets_the_others_through() -> None:
    async with half_open() as (server, upstream):
        server.options = Options(orders=Scenario(first_token=0.2, tokens=400, rate=40))
        tried = len(server.served)
        tasks = [asyncio.create_task(ask(upstream)) for _ in range(20)]
        await until(lambda: len(server.served) > tried)
        assert (len(server.served) - tried, upstream.is_available) == (1, False)
        trial = server.served[-1]
        await until(lambda: len(server.served) == tried + 20)
        assert trial.ended is None, "nobody waits for the end of the trial"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("fault", "code"), [("hang", "first_token_timeout"), ("freeze", "gap_timeout"), ("503", "upstream_unavailable")]
)
async def test_the_limits_hold_for_a_trial_and_one_that_fails_lets_no_others_through(fault: Fault, code: str) -> None:
    async with half_open(limits=limits_for(fault)) as (server, upstream):
        server.orders(fault, after=2 if fault == "freeze" else 0)
        caller = Caller()
        (circuit,) = (endpoint.circuit for endpoint in upstream.servers)
        with pytest.raises(UpstreamError) as caught:
            await ask(upstream, await chosen(upstream), caller=caller)
        assert caught.value.code == code
        await until(lambda: circuit.state is CircuitState.HALF_OPEN)
        assert (circuit.admits(caller, last_resort=True), circuit.admits(Caller())) == (False, False)


async def test_a_job_that_failed_has_the_server_tried_with_a_request_of_the_workers_own() -> None:
    """A1. It is for one token, and so short that it is no matter which server it costs it."""
    async with half_open() as (server, upstream):
        caller = Caller(failed_at={upstream.servers[0].circuit})
        tried = len(server.served)
        await upstream.wait_available("reciter", caller=caller)
        (trial,) = list(server.served)[tried:]
        assert (trial.request["model"], trial.request["max_tokens"], trial.status) == ("reciter", 1, 200)
        assert upstream.accepts("reciter", caller)


@pytest.mark.parametrize("status", [400, 404, 429])
async def test_a_server_that_refuses_the_workers_own_request_answers(status: int) -> None:
    """A1. A base model has no template, say: nobody is to wait for it for ever."""
    async with half_open() as (server, upstream):
        caller = Caller(failed_at={upstream.servers[0].circuit})
        server.statuses["/v1/chat/completions"] = status
        await upstream.wait_available("", caller=caller)
        assert upstream.servers[0].circuit.state is CircuitState.CLOSED


async def test_a_job_that_failed_does_not_wait_for_a_server_while_one_of_its_fallbacks_can_be_had() -> None:
    """A1."""
    async with serving("large", "small") as ((large, _), upstream):
        circuit = upstream.servers[0].circuit
        caller = Caller()
        large.orders("500")
        with pytest.raises(UpstreamError):
            await ask(upstream, upstream.servers[0], model="large", caller=caller)
        await fails(upstream, FAILURES - 1, model="large")
        await until(lambda: circuit.state is CircuitState.HALF_OPEN)
        with pytest.raises(UpstreamError, match="every server of `large` is away"):
            await upstream.wait_available("large", ["small"], caller=caller)


async def test_a_trial_that_is_cancelled_or_refused_leaves_its_place_to_the_next() -> None:
    async with half_open() as (server, upstream):
        server.orders("hang")
        tried = len(server.served)
        trial = asyncio.create_task(ask(upstream))
        await until(lambda: len(server.served) > tried)
        waiting = asyncio.create_task(chosen(upstream))
        trial.cancel()
        endpoint = await waiting
        await fails(upstream, temperature=-3.0)
        assert endpoint.circuit.state is CircuitState.HALF_OPEN
        server.orders()
        assert await ask(upstream)


async def test_a_question_that_is_refused_leaves_the_place_of_the_trial() -> None:
    async with half_open() as (server, upstream):
        server.statuses["/tokenize"] = 429
        with pytest.raises(UpstreamError):
            await upstream.post(await chosen(upstream), "/tokenize", {})
        assert upstream.is_available


async def test_a_question_has_as_long_as_a_first_token() -> None:
    pace = quick()
    async with serving("reciter", pace=pace) as ((server,), upstream):
        server.slow = {"/tokenize", "/v1/models"}
        question: Object = {"messages": [{"role": "user", "content": "Hi"}]}
        pace.probe_limit = SHORT
        asking = asyncio.create_task(upstream.post(upstream.servers[0], "/tokenize", question))
        await until(lambda: "/tokenize" in server.asked)
        with pytest.raises(UpstreamError, match="did not answer within"):  # so the time of a probe is over
            await upstream.list_models(upstream.servers[0])
        server.released.set()
        assert b"tokens" in await asking


async def test_questions_that_are_answered_late_leave_the_circuit_closed() -> None:
    async with serving("reciter", limits=IMPATIENT) as ((server,), upstream):
        (endpoint,) = upstream.servers
        server.slow = {"/tokenize"}
        late = await asyncio.gather(
            *(upstream.post(endpoint, "/tokenize", {}) for _ in range(2 * FAILURES)), return_exceptions=True
        )
        assert {getattr(error, "code", error) for error in late} == {"first_token_timeout"}
        assert (endpoint.circuit.state, len(endpoint.requests)) == (CircuitState.CLOSED, 0)


async def test_a_question_is_not_waited_for_at_a_server_that_goes_down() -> None:
    limits, pace = StreamTimeouts(connect=5, first_token=600, gap=600), quick(frozen_after=0.1)
    async with serving("reciter", limits=limits, pace=pace) as ((server,), upstream):
        server.slow = {"/tokenize"}
        asking = asyncio.create_task(upstream.post(upstream.servers[0], "/tokenize", {}))
        await until(lambda: "/tokenize" in server.asked)
        server.refuse()
        with pytest.raises(UpstreamError) as caught:
            await asking
        assert caught.value.code == "upstream_truncated"


async def test_who_waits_for_a_trial_to_end_is_woken_then() -> None:
    pace = quick()
    async with half_open(pace) as (server, upstream):
        pace.probe_every = 3600
        tried = len(server.served)
        trial = asyncio.create_task(ask(upstream, simulate={"fault": "hang"}))
        await until(lambda: len(server.served) > tried)
        waiting = asyncio.create_task(ask(upstream))
        await asyncio.sleep(0)
        trial.cancel()
        assert await waiting


async def test_what_is_chosen_for_a_trial_is_not_chosen_twice() -> None:
    async with half_open() as (_, upstream):
        assert upstream.is_available
        await chosen(upstream)
        assert not upstream.is_available


async def test_a_server_that_goes_away_is_probed_at_once() -> None:
    async with serving("reciter", pace=quick(probe_every=3600)) as (_, upstream):
        await fails(upstream, FAILURES, simulate={"fault": "500"})
        assert await ask(upstream)


async def test_one_poisonous_request_does_not_shut_the_others_out() -> None:
    async with serving("reciter") as (_, upstream):
        for _ in range(3):
            await fails(upstream, 2 * FAILURES, simulate={"fault": "error_under_200", "after": 3})
            assert all(await asyncio.gather(*(ask(upstream) for _ in range(10))))
        assert upstream.servers[0].circuit.state is CircuitState.CLOSED


async def test_the_others_serve_while_one_is_frozen() -> None:
    async with serving("reciter", "reciter", limits=IMPATIENT) as ((frozen, good), upstream):
        frozen.statuses["/health"] = 503
        frozen.orders("freeze")
        await fails(upstream, FAILURES)
        before = len(frozen.served)
        upstream._limits = PATIENT
        for _ in range(5):
            assert await ask(upstream)
        assert (len(frozen.served), len(good.served)) == (before, 5)


async def test_a_server_that_asks_to_be_left_alone_is_passed_over() -> None:
    async with serving("reciter", "reciter") as ((busy, good), upstream):
        await fails(upstream, simulate={"fault": "429", "retry_after": 50})
        for _ in range(3):
            assert await ask(upstream)
        assert (len(busy.served), len(good.served)) == (1, 3)


# The way to a server


async def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, nowhere)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with serving("reciter") as (_, upstream):
        assert await ask(upstream)
    async with Simulator() as simulator, httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):  # or this test would prove nothing
            await client.get(f"{simulator.url}/health")


async def test_a_user_in_the_url_goes_before_the_key() -> None:
    async with Recorder() as plain, Recorder() as own:
        url = re.sub("//", "//me:p%40ss@", own.url)
        async with watching(plain.url, url, api_key="key") as upstream:
            for endpoint in upstream.servers:
                assert await ask(upstream, endpoint)
    assert set(plain.authorization) == {"Bearer key"}
    assert set(own.authorization) == {"Basic " + base64.b64encode(b"me:p@ss").decode()}


async def test_a_connection_that_goes_as_it_is_made_is_a_failure_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """As uvloop tells it, in no OSError: a job ended with the code `internal`."""

    async def connect(*_: object, **__: object) -> None:
        raise RuntimeError("the handler is closed")

    async with serving("reciter") as (_, upstream):
        (endpoint,) = upstream.servers
        await upstream._api._transport.aclose()
        with monkeypatch.context() as broken:
            broken.setattr(asyncio.get_running_loop(), "create_connection", connect)
            with pytest.raises(UpstreamError) as raised:
                await ask(upstream, endpoint)
    assert (raised.value.code, raised.value.retryable) == ("upstream_unreachable", True)
