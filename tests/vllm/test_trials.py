"""The circuit of a server in a pool: the faults that open it, and the trials that close it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pools import (
    IMPATIENT,
    PATIENT,
    SHORT,
    Recorder,
    chosen,
    fails,
    quick,
    request_answer,
    serving,
    until,
)

from worker.contract.entries import Object
from worker.sandbox.simulator.requests import Fault
from worker.sandbox.simulator.server import Options, Scenario
from worker.vllm.errors import UpstreamError
from worker.vllm.servers.circuit import FAILURES, Caller, CircuitState
from worker.vllm.servers.pace import ServerPace
from worker.vllm.servers.pool import ServerPool
from worker.vllm.stream.watchdog import StreamTimeouts


def limits_for(fault: Fault) -> StreamTimeouts:
    """Short only when the fault is a silence: a busy machine is slow to begin."""
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
    async with serving("reciter", limits=limits_for(fault)) as ((server,), pool):
        # Mid-stream where that matters: a connection that is reset drops what was not read.
        server.orders(fault, after=2 if fault in {"stall", "freeze", "malformed", "abort"} else 0)
        await fails(pool, FAILURES - 1)
        assert pool.is_available
        server.statuses["/health"] = 503
        assert await fails(pool) == {code}
        assert (pool.is_available, len(pool.servers[0].requests)) == (False, 0)
        server.orders()
        server.statuses.clear()
        pool.limits = PATIENT
        assert await request_answer(pool)
        assert pool.servers[0].circuit.state is CircuitState.CLOSED


@pytest.mark.parametrize("fields", [{"simulate": {"fault": "429"}}, {"temperature": -3.0}, {"model": "no"}])
async def test_refusals_leave_the_circuit_closed(fields: dict[str, Any]) -> None:
    async with serving("reciter") as (_, pool):
        await fails(pool, 2 * FAILURES, **fields)
        assert pool.servers[0].circuit.state is CircuitState.CLOSED


async def test_a_whole_answer_between_failures_keeps_the_circuit_closed() -> None:
    async with serving("reciter") as (_, pool):
        for _ in range(3):
            await fails(pool, FAILURES - 1, simulate={"fault": "500"})
            assert pool.servers[0].circuit.state is CircuitState.CLOSED
            assert await request_answer(pool)


async def test_an_exception_of_the_caller_does_not_count_against_the_server() -> None:
    async with serving("reciter") as (_, pool):
        pooled = pool.servers[0]
        for _ in range(2 * FAILURES):
            with pytest.raises(ValueError, match="mine"):
                async with pool.stream(pooled, {"messages": [{"role": "user", "content": "Hi"}]}):
                    raise ValueError("mine")
        assert pooled.circuit.state is CircuitState.CLOSED


@asynccontextmanager
async def half_open(pace: ServerPace | None = None, **settings: Any) -> AsyncIterator[tuple[Recorder, ServerPool]]:  # noqa: ANN401
    """A half-open server whose further pauses are too long for any test."""
    pace = pace or quick()
    async with serving("reciter", pace=pace, **settings) as ((server,), pool):
        pace.first_pause = pace.longest_pause = 3600
        server.orders("500")
        await fails(pool, FAILURES)
        await pool.wait_available("")
        server.orders()
        yield server, pool


async def test_trials_go_one_at_a_time_until_the_first_event_of_one() -> None:
    async with half_open() as (server, pool):
        server.options = Options(scenario=Scenario(first_token=0.2, tokens=400, rate=40))
        tried = len(server.served)
        tasks = [asyncio.create_task(request_answer(pool)) for _ in range(20)]
        await until(lambda: len(server.served) > tried)
        assert (len(server.served) - tried, pool.is_available) == (1, False)
        trial = server.served[-1]
        await until(lambda: len(server.served) == tried + 20)
        assert trial.ended is None, "nobody waits for the end of the trial"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("fault", "code"), [("hang", "first_token_timeout"), ("freeze", "gap_timeout"), ("500", "upstream_error")]
)
async def test_a_trial_has_the_usual_limits_and_its_failure_keeps_the_circuit_half_open(
    fault: Fault, code: str
) -> None:
    async with half_open(limits=limits_for(fault)) as (server, pool):
        server.orders(fault, after=2 if fault == "freeze" else 0)
        caller = Caller()
        (circuit,) = (pooled.circuit for pooled in pool.servers)
        with pytest.raises(UpstreamError) as caught:
            await request_answer(pool, await chosen(pool), caller=caller)
        assert caught.value.code == code
        await until(lambda: circuit.state is CircuitState.HALF_OPEN)
        assert (circuit.admits(caller, last_resort=True), circuit.admits(Caller())) == (False, False)


async def test_the_worker_tries_a_server_itself_for_a_job_that_failed_there() -> None:
    """The request is for one token, so that it hardly burdens a server."""
    async with half_open() as (server, pool):
        caller = Caller(failed_at={pool.servers[0].circuit})
        tried = len(server.served)
        await pool.wait_available("reciter", caller=caller)
        (trial,) = list(server.served)[tried:]
        assert (trial.request["model"], trial.request["max_tokens"], trial.status) == ("reciter", 1, 200)
        assert pool.accepts("reciter", caller)


@pytest.mark.parametrize("status", [400, 404, 429])
async def test_a_server_that_refuses_the_trial_of_the_worker_is_up(status: int) -> None:
    """A base model has no chat template, for example. Jobs must not wait for it for ever."""
    async with half_open() as (server, pool):
        caller = Caller(failed_at={pool.servers[0].circuit})
        server.statuses["/v1/chat/completions"] = status
        await pool.wait_available("", caller=caller)
        assert pool.servers[0].circuit.state is CircuitState.CLOSED


async def test_a_job_that_failed_at_a_server_falls_back_to_another_model() -> None:
    async with serving("large", "small") as ((large, _), pool):
        circuit = pool.servers[0].circuit
        caller = Caller()
        large.orders("500")
        with pytest.raises(UpstreamError):
            await request_answer(pool, pool.servers[0], model="large", caller=caller)
        await fails(pool, FAILURES - 1, model="large")
        await until(lambda: circuit.state is CircuitState.HALF_OPEN)
        with pytest.raises(UpstreamError, match="every server of `large` is away"):
            await pool.wait_available("large", ["small"], caller=caller)


async def test_after_a_cancelled_or_refused_trial_the_next_request_is_the_trial() -> None:
    async with half_open() as (server, pool):
        server.orders("hang")
        tried = len(server.served)
        trial = asyncio.create_task(request_answer(pool))
        await until(lambda: len(server.served) > tried)
        waiting = asyncio.create_task(chosen(pool))
        trial.cancel()
        pooled = await waiting
        await fails(pool, temperature=-3.0)
        assert pooled.circuit.state is CircuitState.HALF_OPEN
        server.orders()
        assert await request_answer(pool)


async def test_after_a_refused_question_another_request_may_be_the_trial() -> None:
    async with half_open() as (server, pool):
        server.statuses["/tokenize"] = 429
        with pytest.raises(UpstreamError):
            await pool.post(await chosen(pool), "/tokenize", {})
        assert pool.is_available


async def test_a_question_has_the_limit_of_a_first_token() -> None:
    pace = quick()
    async with serving("reciter", pace=pace) as ((server,), pool):
        server.slow = {"/tokenize", "/v1/models"}
        question: Object = {"messages": [{"role": "user", "content": "Hi"}]}
        pace.probe_limit = SHORT
        asking = asyncio.create_task(pool.post(pool.servers[0], "/tokenize", question))
        await until(lambda: "/tokenize" in server.asked)
        with pytest.raises(UpstreamError, match="did not answer within"):  # so the time of a probe is over
            await pool.list_models(pool.servers[0])
        server.released.set()
        assert b"tokens" in await asking


async def test_late_answers_to_questions_leave_the_circuit_closed() -> None:
    async with serving("reciter", limits=IMPATIENT) as ((server,), pool):
        (pooled,) = pool.servers
        server.slow = {"/tokenize"}
        late = await asyncio.gather(
            *(pool.post(pooled, "/tokenize", {}) for _ in range(2 * FAILURES)), return_exceptions=True
        )
        assert {getattr(error, "code", error) for error in late} == {"first_token_timeout"}
        assert (pooled.circuit.state, len(pooled.requests)) == (CircuitState.CLOSED, 0)


async def test_a_question_fails_soon_at_a_server_that_shuts_down() -> None:
    limits, pace = StreamTimeouts(connect=5, first_token=600, gap=600), quick(frozen_after=0.1)
    async with serving("reciter", limits=limits, pace=pace) as ((server,), pool):
        server.slow = {"/tokenize"}
        asking = asyncio.create_task(pool.post(pool.servers[0], "/tokenize", {}))
        await until(lambda: "/tokenize" in server.asked)
        server.refuse()
        with pytest.raises(UpstreamError) as caught:
            await asking
        assert caught.value.code == "upstream_truncated"


async def test_a_job_that_waits_for_a_trial_wakes_at_its_end() -> None:
    pace = quick()
    async with half_open(pace) as (server, pool):
        pace.probe_every = 3600
        tried = len(server.served)
        trial = asyncio.create_task(request_answer(pool, simulate={"fault": "hang"}))
        await until(lambda: len(server.served) > tried)
        waiting = asyncio.create_task(request_answer(pool))
        await asyncio.sleep(0)
        trial.cancel()
        assert await waiting


async def test_a_server_on_trial_is_chosen_once() -> None:
    async with half_open() as (_, pool):
        assert pool.is_available
        await chosen(pool)
        assert not pool.is_available


async def test_a_server_that_goes_away_is_probed_at_once() -> None:
    async with serving("reciter", pace=quick(probe_every=3600)) as (_, pool):
        await fails(pool, FAILURES, simulate={"fault": "500"})
        assert await request_answer(pool)


async def test_one_poisonous_request_does_not_close_a_server_to_other_jobs() -> None:
    async with serving("reciter") as (_, pool):
        for _ in range(3):
            await fails(pool, 2 * FAILURES, simulate={"fault": "error_under_200", "after": 3})
            assert all(await asyncio.gather(*(request_answer(pool) for _ in range(10))))
        assert pool.servers[0].circuit.state is CircuitState.CLOSED
