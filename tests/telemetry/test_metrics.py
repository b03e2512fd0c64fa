"""Metrics: what a scrape of a worker shows, that workers in one process do not share them, and who may not serve."""

import math
import re

import httpx
import pytest
from conftest import StartSimulator, StartWorker, eventually
from documents import DEPLOY
from proxy import Proxy
from redis.asyncio import Redis

from worker import Client, State
from worker.contract.entries import to_json
from worker.engine.application import Worker
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.settings import ConfigError, load_settings
from worker.telemetry.metrics import Metrics
from worker.version import version


def value(service: Worker, name: str, **labels: str) -> float:
    found = service._metrics.registry.get_sample_value(f"vllm_relay_{name}", labels)
    assert found is not None, name
    return found


async def test_a_scrape_shows_what_was_counted() -> None:
    metrics = Metrics()
    port = metrics.serve("127.0.0.1", 0)
    metrics.finished("done")
    for code in ("gap_timeout", "what a job says", *(f"code_{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(90))):
        metrics.finished("error", code)
    metrics.attempt("started")
    metrics.interrupted("resumed")
    metrics.waited(0.2)
    for reason in ("eos_token", "eos_token", "a reason in words", *("x" * n for n in range(1, 40))):
        metrics.unknown_finish_reason(reason)
    metrics.queue("default", waiting=3, oldest=None)
    async with httpx.AsyncClient(trust_env=False) as http:
        page = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    await metrics.aclose()
    assert 'vllm_relay_jobs_finished_total{code="",outcome="done"} 1.0' in page
    assert 'vllm_relay_jobs_finished_total{code="gap_timeout",outcome="error"} 1.0' in page  # C9
    assert 'vllm_relay_jobs_finished_total{code="other",outcome="error"}' in page
    assert page.count("vllm_relay_jobs_finished_total{") == 51, "whoever writes seals cannot fill the page"
    assert f'vllm_relay_build_info{{version="{version()}"}} 1.0' in page
    assert 'vllm_relay_interrupted_total{how="resumed"} 1.0' in page
    assert 'vllm_relay_unknown_finish_reasons_total{reason="eos_token"} 2.0' in page
    assert page.count("vllm_relay_unknown_finish_reasons_total{") == 20  # a server cannot fill the page
    assert 'vllm_relay_queue_waiting{queue="default"} 3.0' in page
    assert 'vllm_relay_job_wait_seconds_bucket{le="0.3"} 1.0' in page


@pytest.mark.parametrize(("on_interrupt", "how"), [("resume", "resumed"), ("restart", "restarted")])
async def test_how_a_broken_answer_went_on_is_counted(
    client: Client, start_worker: StartWorker, simulator: Simulator, on_interrupt: str, how: str
) -> None:
    worker = await start_worker(simulator, on_interrupt=on_interrupt)
    request = {"messages": [{"role": "user", "content": "Hi"}], "simulate": {"fault": "cut", "after": 3, "times": 1}}
    await client.result(await client.enqueue(request))
    assert value(worker, "interrupted_total", how=how) == 1
    assert value(worker, "attempts_total", reason="upstream_truncated") == 1


async def test_each_vllm_is_told_with_what_it_has_to_do(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    hangs = await start_simulator(Options(orders=Scenario(fault="hang")))
    async with Simulator() as leaves:
        worker = await start_worker(hangs, leaves, first_token_timeout=600)

        async def told(name: str, *expected: float) -> None:
            async def holds() -> bool:
                return [value(worker, name, endpoint=server.url) for server in (hangs, leaves)] == list(expected)

            await eventually(holds)

        await told("vllm_up", 1, 1)
        request_id = await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]})
        await told("vllm_requests", 1, 0)
    other = await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]})
    await told("vllm_up", 1, 0)
    await told("vllm_requests", 2, 0)
    for each in (request_id, other):
        await client.cancel(each)
    await told("vllm_requests", 0, 0)


async def test_that_an_answer_went_on_is_told_while_it_does(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    broken = await start_simulator(Options(orders=Scenario(fault="cut", after=3)))
    stalls = await start_simulator(Options(orders=Scenario(fault="stall", after=10)))
    worker = await start_worker(broken, stalls, gap_timeout=600)
    request_id = await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]})

    async def told() -> bool:
        return worker._metrics.registry.get_sample_value("vllm_relay_interrupted_total", {"how": "resumed"}) == 1

    await eventually(told)
    assert (await client.status(request_id)).state is State.RUNNING
    await client.cancel(request_id)


async def test_a_workers_jobs_are_counted(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    one = await start_worker(simulator, lease=0.5, slots=7)
    other = await start_worker(simulator, lease=0.5, queues="other")
    ask: dict[str, object] = {"messages": [{"role": "user", "content": "Who are you?"}]}
    for number in range(3):
        await client.result(await client.enqueue(ask, id=f"r-{number}"))
    for _ in range(2):  # the same request again is no further job that ended
        await redis.xadd("chat:jobs", {"id": "r-1", "request": to_json(ask)})
    await redis.xadd("chat:jobs", {"id": "no/id"})

    async def all_counted() -> bool:
        return (value(one, "jobs_buried_total"), value(one, "jobs_running")) == (1, 0)

    async def measured() -> bool:
        return one._metrics.registry.get_sample_value("vllm_relay_oldest_pending_seconds", {"queue": "default"}) == 0

    await eventually(all_counted)
    await eventually(measured)
    assert value(one, "slots") == 7
    assert value(one, "jobs_finished_total", outcome="done", code="") == 3
    assert value(one, "attempts_total", reason="started") == 3
    assert value(one, "job_wait_seconds_count") == value(one, "first_delta_seconds_count") == 3
    assert value(one, "log_entries_total") > 3
    assert (
        other._metrics.registry.get_sample_value("vllm_relay_jobs_finished_total", {"outcome": "done", "code": ""})
        is None
    )


async def test_a_redis_that_is_away_shows_and_what_was_measured_before_does_not(
    redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator
) -> None:
    worker = await start_worker(simulator, redis_url=redis_proxy.redis_url, lease=0.5)

    def shown(name: str, **labels: str) -> float | None:
        return worker._metrics.registry.get_sample_value(f"vllm_relay_{name}", labels)

    async def measured() -> bool:
        return shown("oldest_pending_seconds", queue="default") == 0  # the other is NaN on Redis 6.2 all along

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


async def test_an_address_that_is_taken_ends_the_worker_with_a_sentence(redis_url: str) -> None:
    metrics = Metrics()
    address = f"127.0.0.1:{metrics.serve('127.0.0.1', 0)}"
    try:
        with pytest.raises(ConfigError, match=rf"^WORKER_METRICS is '{address}', and cannot be served: .*in use"):
            await Worker(load_settings(redis_url=redis_url, metrics=address)).run()
    finally:
        await metrics.aclose()


@pytest.mark.parametrize("bad", ["9100", ":9100", "host:port", "127.0.0.1:70000"])
def test_what_is_no_address_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"WORKER_METRICS is .*such as 127\.0\.0\.1:9100"):
        load_settings(metrics=bad)


def test_every_metric_is_described() -> None:
    names = {metric.name for metric in Metrics().registry.collect()}
    named = {name.removesuffix("_total") for name in re.findall(r"`(vllm_relay_\w+)", DEPLOY.text)}
    assert named == names
