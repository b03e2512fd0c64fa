"""A healthy system under a moderate load raises no alert: `.venv/bin/python tests/prometheus/healthy.py --minutes 60`.

Two workers, a gateway and two simulated vLLM servers answer six requests a second. Prometheus evaluates the shipped
alerts twice: as they are, and with durations divided by 30. Exit status 1 if one of them fires.
"""

import argparse
import asyncio
import shutil
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

if __name__ == "__main__":  # pytest has these on its path
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import httpx
from waits import eventually

from worker import Client
from worker.sandbox.embedded_redis import free_port, start_redis
from worker.sandbox.programs import start_programs
from worker.sandbox.prometheus import Prometheus, faster_rules, find_alerts
from worker.sandbox.simulator.server import Options, Scenario, Simulator

WORKER, GATEWAY = "vllm-relay-worker", "vllm-relay-gateway"
_REQUEST = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}]}
_GUARD = 120.0


async def _add_jobs(client: Client) -> None:
    """Five jobs a second."""
    while True:
        await client.enqueue(_REQUEST)
        await asyncio.sleep(0.2)


async def _ask(http: httpx.AsyncClient) -> None:
    """A streamed request to the gateway each second."""
    while True:
        answer = await http.post("/v1/chat/completions", json=_REQUEST | {"stream": True})
        assert answer.status_code == 200, answer.text
        await asyncio.sleep(1)


async def watch_healthy_system(program: str, seconds: int, report: Callable[[str], None]) -> list[str]:
    """Watch with the Prometheus `program` for so many seconds; returns the alerts that have fired by then."""
    one, two, edge, listen = (free_port() for _ in range(4))
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(start_redis(None, "--maxmemory", "512mb", "--maxmemory-policy", "noeviction"))
        programs = stack.enter_context(start_programs("healthy"))
        scenario = Scenario(rate=50, first_token=0.1)
        servers = [await stack.enter_async_context(Simulator(Options(scenario=scenario))) for _ in range(2)]
        shared = {"REDIS_URL": redis.url, "VLLM_URLS": ",".join(server.url for server in servers)}
        for port in (one, two):
            programs.start_own("run", WORKER_METRICS=f"127.0.0.1:{port}", WORKER_RETENTION="300", **shared)
        programs.start_own(
            "gateway", REDIS_URL=redis.url, GATEWAY_NO_AUTH="true", GATEWAY_LISTEN=f"127.0.0.1:{listen}",
            GATEWAY_METRICS=f"127.0.0.1:{edge}", GATEWAY_DRAIN_DELAY="0",
        )  # fmt: skip
        client = await stack.enter_async_context(Client(redis.url))
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{listen}", timeout=60, trust_env=False)
        )

        async def is_ready() -> bool:
            with suppress(httpx.TransportError):
                return (await http.get("/readyz")).is_success and await client.is_served()
            return False

        await eventually(is_ready, within=_GUARD)
        rules = [faster_rules(), find_alerts().read_text()]
        prometheus = Prometheus(programs, program, {WORKER: [one, two], GATEWAY: [edge]}, rules)
        stack.push_async_callback(prometheus.aclose)
        await prometheus.wait_ready(_GUARD)
        async with asyncio.TaskGroup() as load:
            tasks = [load.create_task(_add_jobs(client)), load.create_task(_ask(http))]
            fired = await _fired_within(prometheus, seconds, report)
            for task in tasks:
                task.cancel()
        return fired


async def _fired_within(prometheus: Prometheus, seconds: int, report: Callable[[str], None]) -> list[str]:
    """The alerts that have fired once each target was scraped so many times. Raises AssertionError without load."""
    reported = 0

    async def value(expression: str) -> float:
        found = await prometheus.query(expression)
        return float(found[0]["value"][1]) if found else 0.0

    async def is_over() -> bool:
        nonlocal reported
        seen = await value(f"min(count_over_time(up[{2 * seconds}s]))")
        if seen // 60 > reported:
            reported = int(seen // 60)
            answers = await value("sum(vllm_relay_first_delta_seconds_count)")
            report(f"{reported} of {seconds / 60:g} minutes, {answers:.0f} answers, {await fired() or 'no alert'}")
        return seen >= seconds

    async def fired() -> list[str]:
        samples = await prometheus.query(f'count_over_time(ALERTS{{alertstate="firing"}}[{2 * seconds}s])')
        return sorted({sample["metric"]["alertname"] for sample in samples})

    await eventually(is_over, within=2 * seconds + _GUARD, every=0.5)
    rules = await prometheus.rules()
    assert rules
    assert not [rule["lastError"] for rule in rules if rule["health"] != "ok"]
    assert await value("sum(vllm_relay_first_delta_seconds_count)") > seconds, "too few answers for a moderate load"
    return await fired()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    minutes: float = parser.parse_args().minutes
    program = shutil.which("prometheus")
    if program is None:
        parser.error("the program prometheus is missing: install Debian's package with RUNLEVEL=1")
    watch = watch_healthy_system(program, round(minutes * 60), lambda line: print(line, flush=True))  # noqa: T201 - a program
    fired = asyncio.run(watch)
    print(f"fired: {', '.join(fired)}" if fired else "no alert has fired")  # noqa: T201
    return 1 if fired else 0


if __name__ == "__main__":
    sys.exit(main())
