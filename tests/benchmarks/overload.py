"""Overload: more jobs than a server can answer at once, with far more slots than it has places.

    python tests/benchmarks/overload.py                     # every kind of server, one after the other
    python tests/benchmarks/overload.py 503 silent --slots 8

The simulated server and the workers are processes of their own, beside a Redis of their own.
"""
# ruff: noqa: E402 - where the project is not installed, the imports below need the changed sys.path

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import click
import msgspec

from worker import Answer, Client
from worker.contract.entries import Failed
from worker.sandbox.embedded_redis import find_servers, start_redis
from worker.sandbox.simulator.server import Options, Scenario, Simulator

SERVERS: dict[str, tuple[str, Options]] = {
    "503": ("answers 503 beyond the queue", Options()),
    "late": ("refuses in the stream (status 200)", Options(full_status=200)),
    "429": ("answers 429 beyond the queue", Options(full_status=429)),
    "429-after": ("the same, with Retry-After: 1", Options(full_status=429, full_retry_after=1)),
    "silent": ("lets requests wait in silence", Options()),
    "no-metrics": ("the same, without /metrics", Options(lacks=frozenset({"/metrics"}))),
    "drain": ("one of two drains, and starts again", Options()),
}
WAITING = ("silent", "no-metrics")


class Result(msgspec.Struct):
    """What came of the jobs."""

    jobs: int
    failed: list[str]
    """The codes of the jobs that failed."""
    requests: int
    seconds: float
    capacity: float
    """Answers per second that the servers could give."""
    circuit: int
    """How often the workers logged that a server is away."""

    def line(self, name: str) -> str:
        failed = " ".join([f"{len(self.failed)} of {self.jobs}", *sorted(set(self.failed))])
        goodput = (self.jobs - len(self.failed)) / self.seconds / self.capacity
        return (
            f"| {SERVERS[name][0]} | {failed} | {self.requests / self.jobs:.2f} "
            f"| {self.seconds:.1f} | {self.jobs / self.capacity:.1f} | {goodput:.2f} | {self.circuit} |"
        )


class Load(msgspec.Struct, frozen=True):
    """The size of a run. Times are in seconds."""

    jobs: int
    seconds: float
    slots: int
    workers: int
    at_once: int
    queued: int
    first_token_timeout: float


async def run(name: str, load: Load, folder: Path) -> Result:
    """All jobs at once, before one kind of server."""
    options = msgspec.structs.replace(
        SERVERS[name][1],
        max_num_seqs=load.at_once,
        max_num_queued_reqs=None if name in WAITING else load.queued,
        scenario=Scenario(first_token=load.seconds / 10, rate=20 / (load.seconds * 0.9), tokens=20),
    )
    count = 2 if name == "drain" else 1
    logs = [folder / f"{name}-{number}.log" for number in range(load.workers)]
    async with contextlib.AsyncExitStack() as stack:
        redis = stack.enter_context(start_redis(next(iter(find_servers()))))
        servers = [await stack.enter_async_context(Simulator(options)) for _ in range(count)]
        stack.enter_context(workers(redis.url, servers, load, logs))
        client = await stack.enter_async_context(Client(redis.url))
        await client.result(await client.enqueue(request("warm up")))
        before = sum(len(server.served) for server in servers)

        began = time.monotonic()
        ids = await asyncio.gather(*(client.enqueue(request(f"{name} {number}")) for number in range(load.jobs)))
        restart = asyncio.create_task(drained(stack, servers, load.seconds * 2)) if count > 1 else None
        answers = await asyncio.gather(*map(client.result, ids))
        seconds = time.monotonic() - began
        if restart is not None:
            await restart
    return Result(
        jobs=load.jobs,
        failed=[code_of(answer) for answer in answers if answer.outcome != "done"],
        requests=sum(len(server.served) for server in servers) - before,
        seconds=seconds,
        capacity=count * load.at_once / load.seconds,
        circuit=sum('"vllm_away"' in line for log in logs for line in log.read_text().splitlines()),
    )


def code_of(answer: Answer) -> str:
    return answer.end.code if isinstance(answer.end, Failed) else answer.outcome


def request(content: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}]}


async def drained(stack: contextlib.AsyncExitStack, servers: list[Simulator], after: float) -> None:
    """Drain the last server after some seconds, and start another one at its address."""
    await asyncio.sleep(after)
    leaving = servers[-1]
    await leaving.drain(closing=1)
    port = int(leaving.url.rpartition(":")[2])
    servers.append(await stack.enter_async_context(Simulator(leaving.options, port=port)))


@contextlib.contextmanager
def workers(redis: str, servers: list[Simulator], load: Load, logs: list[Path]) -> Iterator[None]:
    """Worker processes, which write their logs to these files."""
    env = os.environ | {
        "REDIS_URL": redis,
        "VLLM_URLS": ",".join(server.url for server in servers),
        "WORKER_SLOTS": str(load.slots),
        "WORKER_FIRST_TOKEN_TIMEOUT": str(load.first_token_timeout),
        "WORKER_LOG_FORMAT": "json",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    started = []
    try:
        for log in logs:
            with log.open("wb") as output:
                started.append(subprocess.Popen([sys.executable, "-m", "worker", "run"], env=env, stderr=output))
        yield
    finally:
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.wait(timeout=60)


@click.command()
@click.argument("servers", nargs=-1, type=click.Choice(list(SERVERS)))
@click.option("--jobs", default=60, show_default=True)
@click.option("--seconds", default=2.5, show_default=True, help="Of one answer.")
@click.option("--slots", default=64, show_default=True, help="WORKER_SLOTS of each worker.")
@click.option("--workers", default=1, show_default=True)
@click.option("--at-once", default=4, show_default=True, help="Answers that a server generates at once.")
@click.option("--queued", default=8, show_default=True, help="Requests beyond which a server refuses.")
@click.option("--first-token-timeout", default=8.0, show_default=True)
@click.option("--logs", type=click.Path(path_type=Path), help="Keep the logs of the workers in this folder.")
def main(servers: tuple[str, ...], logs: Path | None, **load: float) -> None:
    """Give workers more jobs than their vLLM server can answer at once, for each kind of server."""
    click.echo("| the server | failed | requests per job | seconds | ideal | goodput | times away |")
    click.echo("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="vllm-relay-bench-") as folder:
        for name in servers or SERVERS:
            result = asyncio.run(run(name, msgspec.convert(load, Load), logs or Path(folder)))
            click.echo(result.line(name))


if __name__ == "__main__":
    main()
