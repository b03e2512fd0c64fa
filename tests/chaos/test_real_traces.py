"""The trace that a real vLLM server makes below a job's span; runs when VLLM_COMMAND is set."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import StartProcess
from otlp_receiver import Collector, collector
from real_vllm import COMMAND, Vllm
from waits import eventually

from worker import Client

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
pytestmark = [
    pytest.mark.real_vllm,
    pytest.mark.skipif(not COMMAND, reason="VLLM_COMMAND does not start a real vLLM"),
    pytest.mark.timeout(900),
]


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector to which servers and workers export that start now."""
    with collector() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        yield found


@pytest.fixture
def server(traces: Collector, tmp_path: Path) -> Iterator[Vllm]:
    server = Vllm(8122, tmp_path, "--otlp-traces-endpoint", f"{traces.url}/v1/traces")
    try:
        yield server
    finally:
        server.end()


async def test_the_span_of_vllm_is_below_that_of_the_job(
    client: Client, start_process: StartProcess, server: Vllm, traces: Collector
) -> None:
    await server.ready()
    start_process(server)
    request = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 20}
    answer = await client.result(await client.enqueue(request, traceparent=f"00-{TRACE}-{CALLER}-01"))

    async def have_arrived() -> bool:
        return len([span for span in traces.spans if span.trace == TRACE]) == 2

    await eventually(have_arrived)
    spans = {span.name.partition(" ")[0]: span for span in traces.spans if span.trace == TRACE}
    assert spans["chat"].parent == CALLER
    assert spans["llm_request"].parent == spans["chat"].span
    assert answer.usage
    for kind, tokens in (("input", "prompt"), ("output", "completion")):
        assert (
            spans["chat"].attributes[f"gen_ai.usage.{kind}_tokens"]
            == spans["llm_request"].attributes[f"gen_ai.usage.{tokens}_tokens"]
        )
