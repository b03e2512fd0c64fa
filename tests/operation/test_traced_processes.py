"""Traces of worker processes: of a job that three of them have in turn, and of many jobs on shared connections."""

import asyncio
import signal
from collections.abc import Iterator

import pytest
from conftest import StartProcess
from otlp_receiver import Collector, collector
from steered_clock import SteeredClock
from waits import eventually

from worker import Claimed, Client, Delta, Entry
from worker.sandbox.simulator.server import Simulator

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector to which workers export that start now."""
    with collector() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield found


async def test_a_job_that_changes_its_worker_twice_stays_in_one_trace(
    client: Client, start_process: StartProcess, traced: Collector
) -> None:
    clock = SteeredClock(halt_after=2)  # no attempt ends its answer before the last worker has it
    async with Simulator(clock=clock) as vllm:
        workers = [start_process(vllm, drain_timeout=0, lease=6, gap_timeout=300)]
        request = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}]}
        request_id = await client.enqueue(request, traceparent=f"00-{TRACE}-{PARENT}-01")
        attempt, entries = 1, list[Entry]()
        async for entry in client.follow(request_id):
            entries.append(entry)
            if isinstance(entry, Delta) and entry.id.attempt == attempt and len(workers) == attempt < 3:
                workers.append(start_process(vllm, drain_timeout=0, lease=6, gap_timeout=300))
                workers[-2].send_signal(signal.SIGTERM if attempt == 1 else signal.SIGKILL)
                attempt += 1
            elif isinstance(entry, Delta) and entry.id.attempt == 3:
                clock.hurry()
        assert [entry.reason for entry in entries if isinstance(entry, Claimed)] == ["takeover", "takeover"]
        sent = [served.traceparent for served in vllm.served]

    async def arrived() -> bool:
        return len(traced.spans) == 2

    await eventually(arrived)
    left, completed = traced.of(request_id)
    assert [(span.trace, span.parent) for span in (left, completed)] == [(TRACE, PARENT)] * 2
    assert [span.attributes["vllm_relay.outcome"] for span in (left, completed)] == ["hand_over", "done"]
    assert completed.attributes["vllm_relay.attempt"] == 3
    assert [name for name, _ in completed.events[:2]] == ["attempt", "request_sent"]
    assert {name for name, _ in completed.events[2:]} == {"gap", "resumed"}  # `resumed` may come before the first delta
    assert completed.attributes_of("gap")[0]["vllm_relay.cause"] == "takeover"
    # The span of the worker that was killed is lost, and its request to vLLM names the span in the same trace.
    assert [traceparent[:36] for traceparent in sent] == [f"00-{TRACE}-"] * 3
    assert [traceparent[36:52] for traceparent in (sent[0], sent[2])] == [left.span, completed.span]
    assert len(set(sent)) == 3


async def test_each_of_many_jobs_on_shared_connections_has_its_own_events(
    client: Client, simulator: Simulator, start_process: StartProcess, traced: Collector
) -> None:
    """With uvloop a stream arrives in the context in which its connection was opened, for example by another job."""
    start_process(simulator, lease=60)  # a worker that the machine does not run for a while begins no other attempt
    ids = []
    for round_ in range(3):  # later jobs use the connections that earlier ones opened
        asked = [
            await client.enqueue({"model": "reciter", "messages": [{"role": "user", "content": f"{round_} {one}"}]})
            for one in range(4)
        ]
        await asyncio.gather(*map(client.result, asked))
        ids += asked

    async def arrived() -> bool:
        return len(traced.spans) == len(ids)

    await eventually(arrived)
    assert len({span.trace for span in traced.spans}) == len(ids)
    for request_id in ids:
        (span,) = traced.of(request_id)
        assert [name for name, _ in span.events] == ["attempt", "request_sent"]
        assert 0 < float(str(span.attributes["gen_ai.response.time_to_first_chunk"])) < 60
    assert {served.traceparent[3:52] for served in simulator.served} == {f"{s.trace}-{s.span}" for s in traced.spans}
