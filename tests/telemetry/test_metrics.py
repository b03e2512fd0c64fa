"""Metrics: which event counts where, what a scrape of a worker shows, and how an address in use is reported."""

import math
import re

import httpx
import pytest
from conftest import StartSimulator, StartWorker
from documents import MONITORING
from prometheus_client import generate_latest
from proxy import Proxy
from redis.asyncio import Redis
from waits import eventually

from worker import Client, State
from worker.contract.entries import to_json
from worker.engine.application import Worker
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.settings import ConfigError, load_settings
from worker.telemetry.events import (
    EntriesAccepted,
    Event,
    IntakePaused,
    QueueMeasured,
    ReaderGap,
    RecordRefused,
    RedisMeasured,
    VllmRefused,
    WriteFailed,
)
from worker.telemetry.job_events import (
    AnswerRestarted,
    AnswerResumed,
    AnswerStreamEnded,
    AttemptBegun,
    FirstDelta,
    JobBuried,
    JobFinished,
    JobParked,
    JobStarted,
    LeaseWasLost,
    ModelWaitBegan,
    ModelWaitEnded,
    UnknownFinishReason,
)
from worker.telemetry.metrics import Metrics
from worker.version import version


def page_of(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def finished(outcome: str, code: str | None = None) -> JobFinished:
    return JobFinished(outcome, code, attempt=1, queue="default", model="", tokens=None, seconds=1.0)


def value(service: Worker, name: str, **labels: str) -> float:
    found = service.metrics.registry.get_sample_value(f"vllm_relay_{name}", labels)
    assert found is not None, name
    return found


COUNTED: list[tuple[list[Event], str]] = [
    # the events, and a line of the page that a scrape gets after them
    ([EntriesAccepted(3), EntriesAccepted(4)], "vllm_relay_log_entries_total 7.0"),
    ([AttemptBegun("started", 1)], 'vllm_relay_attempts_total{reason="started"} 1.0'),
    ([AttemptBegun("gap_timeout", 2)], 'vllm_relay_attempts_total{reason="gap_timeout"} 1.0'),
    ([AnswerResumed(2, "http://a")], 'vllm_relay_interrupted_total{how="resumed"} 1.0'),
    ([AnswerRestarted(2, "tools")], 'vllm_relay_interrupted_total{how="restarted"} 1.0'),
    ([JobStarted(0.2)], 'vllm_relay_job_wait_seconds_bucket{le="0.25"} 1.0'),
    ([FirstDelta(0.2)], 'vllm_relay_first_delta_seconds_bucket{le="0.1"} 0.0'),
    ([AnswerStreamEnded(0.02, 4)], 'vllm_relay_inter_delta_mean_seconds_bucket{le="0.025"} 1.0'),
    ([AnswerStreamEnded(0.02, 4)], 'vllm_relay_inter_delta_max_seconds_bucket{le="2.5"} 0.0'),
    ([ReaderGap("takeover", 16)], 'vllm_relay_gap_seconds_bucket{cause="takeover",le="20.0"} 1.0'),
    ([finished("done")], 'vllm_relay_job_duration_seconds_bucket{le="1.0",outcome="done"} 1.0'),
    ([finished("done")], 'vllm_relay_jobs_finished_total{code="",outcome="done"} 1.0'),
    ([finished("error", "gap_timeout")], 'vllm_relay_jobs_finished_total{code="gap_timeout",outcome="error"} 1.0'),
    ([finished("error", "two words")], 'vllm_relay_jobs_finished_total{code="other",outcome="error"} 1.0'),
    ([JobParked(), JobParked()], "vllm_relay_jobs_parked_total 2.0"),
    ([JobBuried("default", "1-0", "buried")], "vllm_relay_jobs_buried_total 1.0"),
    ([LeaseWasLost("default", "1-0")], "vllm_relay_lease_lost_total 1.0"),
    ([UnknownFinishReason("eos_token", "")] * 2, 'vllm_relay_unknown_finish_reasons_total{reason="eos_token"} 2.0'),
    ([UnknownFinishReason("two words", "")], 'vllm_relay_unknown_finish_reasons_total{reason="other"} 1.0'),
    ([VllmRefused("http://a")] * 2, 'vllm_relay_vllm_busy_total{endpoint="http://a"} 2.0'),
    ([WriteFailed()], "vllm_relay_redis_write_failures_total 1.0"),
    ([RecordRefused("feed")], 'vllm_relay_records_refused_total{record="feed"} 1.0'),
    ([IntakePaused("no_vllm", on=True)], 'vllm_relay_claims_paused{reason="no_vllm"} 1.0'),
    ([IntakePaused("no_vllm", on=True), IntakePaused("no_vllm", on=False)],
     'vllm_relay_claims_paused{reason="no_vllm"} 0.0'),
    ([RedisMeasured(500, 1000)], "vllm_relay_redis_memory_bytes 500.0"),
    ([RedisMeasured(500, 1000)], "vllm_relay_redis_memory_limit_bytes 1000.0"),
    ([], "vllm_relay_redis_memory_bytes NaN"),
    ([], 'vllm_relay_gap_seconds_count{cause="takeover"} 0.0'),
    ([QueueMeasured("default", 3, None)], 'vllm_relay_queue_waiting{queue="default"} 3.0'),
    ([QueueMeasured("default", 3, None)], 'vllm_relay_oldest_pending_seconds{queue="default"} 0.0'),
    ([QueueMeasured("default", None, 1.5)], 'vllm_relay_queue_waiting{queue="default"} NaN'),
    ([QueueMeasured("default", None, 1.5)], 'vllm_relay_oldest_pending_seconds{queue="default"} 1.5'),
    ([ModelWaitBegan(), ModelWaitBegan(), ModelWaitEnded()], "vllm_relay_jobs_waiting_for_model 1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("events", "line"), COUNTED, ids=[row[1] for row in COUNTED])
def test_an_event_is_counted(events: list[Event], line: str) -> None:
    metrics = Metrics()
    for event in events:
        metrics.emit(event)
    assert line in page_of(metrics)


def test_every_event_that_is_neither_logged_nor_for_traces_is_counted() -> None:
    of_worker = [kind for kind in Event.__subclasses__() if kind.__module__.endswith((".events", ".job_events"))]
    of_traces = {"RequestSent", "JobRunEnded"}
    silent = {kind.__name__ for kind in of_worker if kind.level == "silent"} - of_traces
    assert not silent - {type(event).__name__ for events, _ in COUNTED for event in events}


def test_words_that_others_choose_cannot_fill_the_page() -> None:
    metrics = Metrics()
    for number in range(90):
        word = f"word_{chr(97 + number % 26)}{chr(97 + number // 26)}"
        metrics.emit(finished("error", word))
        metrics.emit(UnknownFinishReason(word, ""))
    page = page_of(metrics)
    assert page.count("vllm_relay_jobs_finished_total{") == 51
    assert page.count("vllm_relay_unknown_finish_reasons_total{") == 21


async def test_a_scrape_gets_the_metrics_with_the_version_and_what_is_observed() -> None:
    metrics = Metrics()
    running = 3
    metrics.observe_worker(7, lambda: running)
    metrics.observe_server(
        "http://a", up=lambda: True, requests=lambda: 2, limit=lambda: 4.5, silences=lambda: ([4, 6], []),
        probe_silence=lambda: 7,
    )  # fmt: skip
    metrics.emit(VllmRefused("http://a"))
    port = metrics.serve("127.0.0.1", 0)
    running = 4
    async with httpx.AsyncClient(trust_env=False) as http:
        page = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    await metrics.aclose()
    for line in (
        f'vllm_relay_build_info{{version="{version()}"}} 1.0',
        "vllm_relay_slots 7.0",
        "vllm_relay_jobs_running 4.0",
        'vllm_relay_vllm_up{endpoint="http://a"} 1.0',
        'vllm_relay_vllm_requests{endpoint="http://a"} 2.0',
        'vllm_relay_vllm_limit{endpoint="http://a"} 4.5',
        'vllm_relay_vllm_busy_total{endpoint="http://a"} 1.0',
        'vllm_relay_streams_silent{endpoint="http://a",phase="first_token"} 1.0',
        'vllm_relay_longest_silence_seconds{endpoint="http://a",phase="first_token"} 6.0',
        'vllm_relay_longest_silence_seconds{endpoint="http://a",phase="answer"} 0.0',
        'vllm_relay_longest_silence_seconds{endpoint="http://a",phase="probe"} 7.0',
    ):
        assert line in page


@pytest.mark.parametrize(("on_interrupt", "how"), [("resume", "resumed"), ("restart", "restarted")])
async def test_how_a_broken_answer_continued_is_counted(
    client: Client, start_worker: StartWorker, simulator: Simulator, on_interrupt: str, how: str
) -> None:
    worker = await start_worker(simulator, on_interrupt=on_interrupt)
    request = {"messages": [{"role": "user", "content": "Hi"}], "simulate": {"fault": "cut", "after": 3, "times": 1}}
    await client.result(await client.enqueue(request))
    assert value(worker, "interrupted_total", how=how) == 1
    assert value(worker, "attempts_total", reason="upstream_truncated") == 1


async def test_each_vllm_is_shown_with_its_requests(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    hangs = await start_simulator(Options(scenario=Scenario(fault="hang")))
    async with Simulator() as leaves:
        worker = await start_worker(hangs, leaves, first_token_timeout=600)

        async def shows(name: str, *expected: float) -> None:
            async def holds() -> bool:
                return [value(worker, name, endpoint=server.url) for server in (hangs, leaves)] == list(expected)

            await eventually(holds)

        await shows("vllm_up", 1, 1)
        request_id = await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]})
        await shows("vllm_requests", 1, 0)
    other = await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]})
    await shows("vllm_up", 1, 0)
    await shows("vllm_requests", 2, 0)
    for each in (request_id, other):
        await client.cancel(each)
    await shows("vllm_requests", 0, 0)


async def test_an_answer_that_continues_is_counted_while_it_still_runs(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    broken = await start_simulator(Options(scenario=Scenario(fault="cut", after=3)))
    stalls = await start_simulator(Options(scenario=Scenario(fault="stall", after=10)))
    worker = await start_worker(broken, stalls, gap_timeout=600)
    request_id = await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]})

    async def counted() -> bool:
        return worker.metrics.registry.get_sample_value("vllm_relay_interrupted_total", {"how": "resumed"}) == 1

    await eventually(counted)
    assert (await client.status(request_id)).state is State.RUNNING
    await client.cancel(request_id)


async def test_a_workers_jobs_are_counted(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    one = await start_worker(simulator, lease=6, slots=7)
    other = await start_worker(simulator, lease=6, queues="other")
    ask: dict[str, object] = {"messages": [{"role": "user", "content": "Who are you?"}]}
    for number in range(3):
        await client.result(await client.enqueue(ask, id=f"r-{number}"))
    for _ in range(2):  # the same request again does not count as another job
        await redis.xadd("chat:jobs", {"id": "r-1", "request": to_json(ask)})
    await redis.xadd("chat:jobs", {"id": "no/id"})

    async def all_counted() -> bool:
        return (value(one, "jobs_buried_total"), value(one, "jobs_running")) == (1, 0)

    async def measured() -> bool:
        return one.metrics.registry.get_sample_value("vllm_relay_oldest_pending_seconds", {"queue": "default"}) == 0

    async def entries_counted() -> bool:
        return value(one, "log_entries_total") > 3

    await eventually(all_counted)
    await eventually(measured)
    await eventually(entries_counted)
    assert value(one, "slots") == 7
    assert value(one, "jobs_finished_total", outcome="done", code="") == 3
    assert value(one, "attempts_total", reason="started") == 3
    assert value(one, "job_wait_seconds_count") == value(one, "first_delta_seconds_count") == 3
    assert (
        other.metrics.registry.get_sample_value("vllm_relay_jobs_finished_total", {"outcome": "done", "code": ""})
        is None
    )


async def test_while_redis_is_away_that_is_shown_and_earlier_measurements_are_not(
    redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator
) -> None:
    worker = await start_worker(simulator, redis_url=redis_proxy.redis_url, lease=0.5)

    def shown(name: str, **labels: str) -> float | None:
        return worker.metrics.registry.get_sample_value(f"vllm_relay_{name}", labels)

    async def measured() -> bool:
        return shown("oldest_pending_seconds", queue="default") == 0  # queue_waiting is always NaN on Redis 6.2

    async def away() -> bool:
        return shown("claims_paused", reason="redis_away") == 1

    async def forgotten() -> bool:
        names = ("queue_waiting", "oldest_pending_seconds")
        return all(math.isnan(value(worker, name, queue="default")) for name in names)

    async def back() -> bool:
        return shown("claims_paused", reason="redis_away") == 0

    await eventually(measured)
    redis_proxy.refuse()
    await redis_proxy.cut()
    await eventually(away)
    await eventually(forgotten)
    await redis_proxy.heal()
    await eventually(back)
    await eventually(measured)


async def test_an_address_in_use_ends_the_worker_with_a_sentence(redis_url: str) -> None:
    metrics = Metrics()
    address = f"127.0.0.1:{metrics.serve('127.0.0.1', 0)}"
    try:
        with pytest.raises(ConfigError, match=rf"^WORKER_METRICS is '{address}', and cannot be served: .*in use"):
            await Worker(load_settings(redis_url=redis_url, metrics=address)).run()
    finally:
        await metrics.aclose()


@pytest.mark.parametrize("bad", ["9100", ":9100", "host:port", "127.0.0.1:70000"])
def test_a_bad_address_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"WORKER_METRICS is .*such as 127\.0\.0\.1:9100"):
        load_settings(metrics=bad)


def test_every_metric_is_described() -> None:
    names = {metric.name for metric in Metrics().registry.collect()}
    named = {name.removesuffix("_total") for name in re.findall(r"`(vllm_relay_(?!gateway_)\w+)", MONITORING.text)}
    assert named == names
