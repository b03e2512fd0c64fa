"""A pool of servers with faults: what they serve, when they are away, and how they come back."""

import asyncio
import base64
import re
import socket
from contextlib import AsyncExitStack

import httpx
import pytest
import structlog
from pools import (
    BRIEF,
    IMPATIENT,
    PATIENT,
    SHORT,
    Recorder,
    fails,
    quick,
    request_answer,
    serving,
    until,
    watching,
)
from structlog.testing import capture_logs

from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.server import Options, Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest
from worker.telemetry.logging import configure_logging
from worker.vllm.errors import UpstreamError
from worker.vllm.servers.api import LateAnswer, VllmApi
from worker.vllm.servers.circuit import FAILURES, CircuitState
from worker.vllm.servers.server import Server

# Which server serves a model


async def test_a_request_goes_to_a_server_that_lists_its_model() -> None:
    async with serving("small", "large", "large") as (servers, pool):
        assert [pooled.models for pooled in pool.servers] == [{"small"}, {"large"}, {"large"}]
        for _ in range(3):
            await request_answer(pool, model="small")
            await request_answer(pool, model="large")
        assert [len(servers[0].served), len(servers[1].served) + len(servers[2].served)] == [3, 3]


async def test_a_model_that_is_loaded_later_is_found() -> None:
    async with serving("small") as ((server,), pool):
        assert not pool.accepts("adapter")
        server.options = Options(model="adapter")
        assert await request_answer(pool, model="adapter")


async def test_a_request_for_an_unlisted_model_is_sent_once_the_lists_were_fetched_again() -> None:
    """The answer holds for all jobs, for a minute."""
    async with serving("small", "large") as (servers, pool):
        before = [server.asked.count("/v1/models") for server in servers]
        await pool.wait_available("no")
        assert [server.asked.count("/v1/models") for server in servers] == [count + 1 for count in before]
        with pytest.raises(UpstreamError, match=r"The model `no` does not exist\. Valid aliases: small"):
            await request_answer(pool, model="no")
        assert not pool.accepts("no")
        for _ in range(3):
            with pytest.raises(UpstreamError, match=r"The model `no` does not exist\. Valid aliases: small") as caught:
                await pool.wait_available("no")
            assert (caught.value.code, caught.value.status, caught.value.retryable) == ("model_not_found", 404, False)
        assert [len(server.served) for server in servers] == [1, 0]


async def test_an_unknown_model_is_found_once_a_server_lists_it() -> None:
    async with serving("small") as ((server,), pool):
        with pytest.raises(UpstreamError):
            await request_answer(pool, model="adapter")
        server.options = Options(model="adapter")
        await until(lambda: pool.accepts("adapter"))
        assert await request_answer(pool, model="adapter")


async def test_a_server_without_a_list_gets_requests_again_for_a_model_it_did_not_know() -> None:
    """The server's answer may change at any time, and only a request shows it."""
    async with Recorder() as server:
        server.statuses["/v1/models"] = 404
        async with watching(server.url) as pool:
            for _ in range(2):
                with pytest.raises(UpstreamError):
                    await request_answer(pool, model="adapter")
            server.options = Options(model="adapter")
            assert await request_answer(pool, model="adapter")


class Resolving(Recorder):
    """A server that answers to more names than it lists, such as one that loads adapters on first use."""

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        self.options = Options(model="listed" if request.path == "/v1/models" else "other")
        await super()._handle(request, connection)


async def test_a_name_that_a_server_has_answered_to_is_sent_there_at_once() -> None:
    """LoRA resolvers, and `llama3` for `llama3:latest`."""
    async with Resolving() as server, watching(server.url) as pool:
        assert await request_answer(pool, model="other")
        asked = server.asked.count("/v1/models")
        for _ in range(3):
            assert pool.accepts("other")
            assert await request_answer(pool, model="other")
        assert server.asked.count("/v1/models") == asked


async def test_many_jobs_that_miss_a_model_share_one_fetch_of_the_lists() -> None:
    async with serving("small") as ((server,), pool):
        before = server.asked.count("/v1/models")
        await asyncio.gather(*(pool.wait_available(f"no-{n}") for n in range(100)))
        assert server.asked.count("/v1/models") - before == 1


@pytest.mark.parametrize("status", [401, 404, 501])
async def test_a_server_that_does_not_list_its_models_may_serve_any(status: int) -> None:
    async with Recorder() as server:
        server.statuses["/v1/models"] = status
        async with watching(server.url) as pool:
            assert await request_answer(pool, model="reciter")
            with pytest.raises(UpstreamError) as caught:  # in its own words
                await request_answer(pool, model="no")
            assert (caught.value.code, len(server.served)) == ("model_not_found", 2)


async def test_a_job_waits_for_a_server_that_has_never_listed_its_models() -> None:
    port = free_port()
    async with (
        Recorder(Options(model="small")) as small,
        watching(small.url, f"http://127.0.0.1:{port}") as pool,
    ):
        asking = asyncio.create_task(request_answer(pool, model="large"))
        assert await request_answer(pool, model="small")
        assert not pool.accepts("large")
        async with Recorder(Options(model="large"), port=port) as large:
            assert await asking
            assert len(large.served) == 1


async def test_the_models_of_a_server_that_comes_back_are_fetched_again() -> None:
    port = free_port()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(Recorder(Options(model="old"), port=port))
        async with watching(first.url) as pool:
            await stack.aclose()
            assert await fails(pool) == {"upstream_unreachable"}
            async with Recorder(Options(model="new"), port=port):
                await until(lambda: not pool.servers[0].is_away)
                assert await request_answer(pool, model="new")
                assert pool.servers[0].models == {"new"}


async def test_the_lists_are_fetched_again_from_time_to_time() -> None:
    async with serving("small", pace=quick(list_every=SHORT)) as ((server,), pool):
        server.options = Options(model="other")
        await until(lambda: pool.servers[0].models == {"other"})
        server.statuses["/v1/models"] = 503
        asked = len(server.asked)
        await until(lambda: len(server.asked) > asked + 2)
        assert pool.servers[0].models == {"other"}, "what it said before holds"
        assert pool.is_available


# Whether a server is there


@pytest.mark.parametrize("statuses", [{}, {"/health": 404}, {"/health": 404, "/v1/models": 404}, {"/health": 401}])
async def test_a_server_is_up_when_it_answers_health_or_models(statuses: dict[str, int]) -> None:
    async with Recorder() as server:
        server.statuses = statuses
        async with watching(server.url) as pool:
            assert pool.is_available


@pytest.mark.parametrize("statuses", [{"/health": 503}, {"/health": 404, "/v1/models": 502}])
async def test_a_server_that_answers_with_a_fault_is_away(statuses: dict[str, int]) -> None:
    async with Recorder() as server:
        server.statuses = dict(statuses)
        async with watching(server.url) as pool:
            assert (pool.is_available, pool.servers[0].is_away) == (False, True)
            server.statuses.clear()
            assert await request_answer(pool)


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
async def test_a_server_that_answers_late_gets_its_requests(path: str) -> None:
    """A busy vLLM takes half a minute, and a router queries every model: neither ever got a request."""
    async with Recorder() as server:
        server.slow = {path}
        async with watching(server.url, pace=quick(**BRIEF)) as pool:
            assert await request_answer(pool, model="reciter")
            assert pool.servers[0].circuit.state is CircuitState.CLOSED


async def test_a_late_server_gets_more_time_with_each_probe(monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_a_late_list_is_fetched_again_while_requests_go_on() -> None:
    """Until the list comes, the server may have any model, as a server without a list."""
    pace = quick(**BRIEF)
    async with Recorder() as server:
        server.slow = {"/v1/models"}
        async with watching(server.url, pace=pace) as pool:
            assert await request_answer(pool, model="reciter")
            asked = server.asked.count("/v1/models")
            await until(lambda: server.asked.count("/v1/models") > asked)
            pace.probe_limit = pace.longest_probe_limit = 5
            server.released.set()
            await until(lambda: pool.servers[0].models == {"reciter"})


async def test_a_request_is_sent_though_the_lists_always_come_late() -> None:
    async with Resolving() as server, watching(server.url, pace=quick(**BRIEF)) as pool:
        server.slow = {"/v1/models"}
        assert await request_answer(pool, model="other")


async def test_a_new_server_that_was_late_gets_all_requests_once_it_answers_a_probe() -> None:
    """The first request may take minutes: the others do not wait for it."""
    pace = quick(**BRIEF)
    async with Recorder() as server:
        server.slow = {"/health"}
        server.orders("hang")
        async with watching(server.url, pace=pace) as pool:
            asking = [asyncio.create_task(request_answer(pool)) for _ in range(5)]
            await until(lambda: len(server.served) == 1)
            pace.probe_limit = pace.longest_probe_limit = 5
            server.released.set()
            await until(lambda: len(server.served) == 5)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)


async def test_a_server_that_accepts_connections_again_is_tried_before_it_answers_a_probe() -> None:
    """A vLLM that came back with a health of 40 s was away for a minute and a half: each longer probe was late."""
    port = free_port()
    async with (
        watching(f"http://127.0.0.1:{port}", pace=quick(probe_limit=0.2)) as pool,
        Recorder(port=port) as server,
    ):
        server.slow = {"/health", "/v1/models"}
        assert await request_answer(pool)


async def test_a_frozen_server_is_tried_with_one_request_at_a_time() -> None:
    """The server accepts connections, and answers neither probes nor requests."""
    async with serving("reciter", limits=IMPATIENT, pace=quick(**BRIEF)) as ((server,), pool):
        circuit = pool.servers[0].circuit
        server.slow = {"/health", "/v1/models"}
        server.orders("hang")
        await fails(pool, FAILURES)
        assert circuit.state is CircuitState.OPEN
        pool.limits = PATIENT
        tried = len(server.served)
        waiting = [asyncio.create_task(request_answer(pool)) for _ in range(5)]
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
            async with watching(first.url.replace("//", "//user:hidden@")) as pool:
                await stack.aclose()
                await fails(pool, 3)
                async with Recorder(port=port):
                    await request_answer(pool)
    assert [(line["event"], line.get("reason")) for line in logs] == [
        ("vllm_away", "upstream_unreachable"),
        ("vllm_back", None),
    ]
    assert {line["endpoint"] for line in logs} == {first.url}


async def test_the_log_has_the_fix_for_a_server_without_tls() -> None:
    configure_logging("json", "info")
    with capture_logs() as logs:
        async with Recorder() as server, watching(server.url.replace("http:", "https:")):
            pass
    (line,) = logs
    assert (line["event"], line["reason"]) == ("vllm_away", "upstream_unreachable")
    assert line["fix"] == "if the server does not speak TLS there, its URL begins with http://"


async def test_log_lines_about_a_server_name_no_job() -> None:
    configure_logging("json", "info")
    async with Recorder() as server, watching(server.url) as pool:
        server.statuses = {"/v1/chat/completions": 401, "/v1/models": 401}
        with (
            capture_logs([structlog.contextvars.merge_contextvars]) as logs,
            structlog.contextvars.bound_contextvars(worker="w", request_id="r"),
        ):
            await fails(pool)
            structlog.get_logger().info("upstream_failed")
    assert [(line["worker"], line.get("request_id")) for line in logs] == [("w", None), ("w", "r")]


@pytest.mark.parametrize("refused", ["/v1/chat/completions", "/tokenize"])
async def test_a_server_that_refused_the_key_is_back_once_its_list_accepts_it(refused: str) -> None:
    async with serving("reciter", "reciter") as ((server, _), pool):
        pooled = pool.servers[0]
        server.statuses = {refused: 401, "/v1/models": 401}
        asking = pool.post(pooled, refused, {}) if refused == "/tokenize" else request_answer(pool, pooled)
        with pytest.raises(UpstreamError) as caught:
            await asking
        assert (caught.value.code, pooled.refuses_key) == ("unauthorized", True)
        asked = len(server.asked)
        await until(lambda: server.asked[asked:].count("/v1/models") > 2)
        assert pooled.refuses_key, "its health is no answer to that"
        server.statuses.clear()
        await until(lambda: not pooled.is_away)
        assert await request_answer(pool, pooled)


async def test_a_job_with_a_fallback_does_not_wait_for_servers_that_refuse_the_key() -> None:
    async with serving("small", "large") as ((small, _), pool):
        small.statuses = {"/v1/chat/completions": 401, "/v1/models": 401}
        await fails(pool, model="small")
        with pytest.raises(UpstreamError, match="every server of `small` refuses the keys") as caught:
            await pool.wait_available("small", ["large"])
        assert caught.value.code == "unauthorized"


# The circuit


async def test_the_other_servers_serve_while_one_is_frozen() -> None:
    async with serving("reciter", "reciter", limits=IMPATIENT) as ((frozen, good), pool):
        frozen.statuses["/health"] = 503
        frozen.orders("freeze")
        await fails(pool, FAILURES)
        before = len(frozen.served)
        pool.limits = PATIENT
        for _ in range(5):
            assert await request_answer(pool)
        assert (len(frozen.served), len(good.served)) == (before, 5)


async def test_a_server_that_asks_for_a_pause_is_passed_over() -> None:
    async with serving("reciter", "reciter") as ((busy, good), pool):
        await fails(pool, simulate={"fault": "429", "retry_after": 50})
        for _ in range(3):
            assert await request_answer(pool)
        assert (len(busy.served), len(good.served)) == (1, 3)


# The way to a server


async def test_a_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, nowhere)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with serving("reciter") as (_, pool):
        assert await request_answer(pool)
    async with Simulator() as simulator, httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):  # or this test would prove nothing
            await client.get(f"{simulator.url}/health")


async def test_a_user_in_the_url_overrides_the_key() -> None:
    async with Recorder() as plain, Recorder() as own:
        url = re.sub("//", "//me:p%40ss@", own.url)
        async with watching(plain.url, url, api_key="key") as pool:
            for pooled in pool.servers:
                assert await request_answer(pool, pooled)
    assert set(plain.authorization) == {"Bearer key"}
    assert set(own.authorization) == {"Basic " + base64.b64encode(b"me:p@ss").decode()}


async def test_a_connection_that_is_lost_while_it_is_made_is_a_failure_of_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uvloop does not raise an OSError for it: a job ended with the code `internal`."""

    async def connect(*_: object, **__: object) -> None:
        raise RuntimeError("the handler is closed")

    async with serving("reciter") as (_, pool):
        (pooled,) = pool.servers
        await pool._api._transport.aclose()
        with monkeypatch.context() as broken:
            broken.setattr(asyncio.get_running_loop(), "create_connection", connect)
            with pytest.raises(UpstreamError) as raised:
                await request_answer(pool, pooled)
    assert (raised.value.code, raised.value.retryable) == ("upstream_unreachable", True)
