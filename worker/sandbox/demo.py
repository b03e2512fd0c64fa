"""The demo: a Redis, a simulated vLLM, two workers and several followers, from nothing to a summary.

The workers are the real program, each a process of its own; real servers take the place of the embedded ones when
their URLs are given. Everything lives under a prefix of its own, which is gone at the end.
"""

import asyncio
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ..client.async_client import Client
from ..client.errors import Unavailable
from ..contract.answer import Answer
from ..contract.entries import Entry, Object
from ..settings import load_settings, shown_url
from ..vllm.errors import UpstreamError
from ..vllm.servers.pool import ServerPool
from ..vllm.stream.watchdog import StreamTimeouts
from .embedded_redis import start_redis
from .simulator.server import Options, Scenario, Simulator

Tell: TypeAlias = Callable[[str, Object], None]
"""Takes a line for people and the same as JSON."""

STORY = "Tell me a story"
QUESTIONS = (STORY, "Who are you?", "你是谁?", "Send emoji")
_KEYS = ("vllm_api_key", "vllm_api_key_2", "vllm_api_key_file")
"""All of the settings that the demo reads: its workers get values of its own for the rest."""

_RATE = 60.0
_LINE = 48
_LATE_AFTER = 100
_PATIENCE = 120.0
_LAST_WORDS = 8.0


class DemoFailed(RuntimeError):
    """The demo did not come to its end."""


@dataclass
class DemoFollower:
    """Somebody who reads one request's stream, with a cursor of their own."""

    name: str
    request_id: str
    question: str
    entries: list[Entry] = field(default_factory=list)
    answer: Answer = field(default_factory=Answer)
    halfway: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self, client: Client, tell: Tell) -> None:
        """Read to the end, telling the text in pieces of about a line."""
        unsaid = ""
        async for entry in client.follow(self.request_id):
            self.entries.append(entry)
            before = len(self.answer.text)
            self.answer.add(entry)
            unsaid += self.answer.text[before:]
            if len(self.entries) > _LATE_AFTER or self.answer.end:
                self.halfway.set()
            if unsaid and (len(unsaid) >= _LINE or self.answer.end):
                line = unsaid.replace("\n", "⏎")
                tell(f"{self.name:>10} │ {line}", {"follower": self.name, "id": self.request_id, "text": unsaid})
                unsaid = ""


async def run_demo(tell: Tell, redis_url: str | None = None, vllm_url: str | None = None) -> None:
    """Run the demo to its end.

    Raises:
        DemoFailed: when a server does not answer, an answer is missing, or followers of one request saw different
            streams.
        ConfigError: when a URL is none.
    """
    given = {name: url for name, url in (("redis_url", redis_url), ("vllm_urls", vllm_url)) if url is not None}
    load_settings([*_KEYS, *given], **given)
    prefix = f"demo-{secrets.token_hex(3)}"
    began = time.monotonic()

    def timed(line: str, data: Object) -> None:
        at = time.monotonic() - began
        tell(f"{at:6.2f} s  {line}", {"at": round(at, 3), **data})

    with ExitStack() as stack:
        if redis_url is None:
            embedded = stack.enter_context(start_redis())
            redis_url, what = embedded.url, embedded.what
        else:
            what = shown_url(redis_url)
            await _check_redis(redis_url)
        timed(f"Redis: {what}", {"redis": what})
        async with _vllm(vllm_url) as (url, what):
            timed(f"vLLM: {what}", {"vllm": what})
            model = await _model_of(url)
            try:
                with _workers(redis_url, url, prefix) as workers:
                    timed("two workers start, and four questions wait for them", {"workers": len(workers)})
                    followers = await _follow_all(redis_url, prefix, model, workers, timed)
            finally:  # not before the workers are gone: they would make their group again
                await _clean(redis_url, prefix)
            _sum_up(followers, timed)


async def _follow_all(
    redis_url: str, prefix: str, model: str, workers: "list[subprocess.Popen[bytes]]", tell: Tell
) -> list[DemoFollower]:
    async with Client(redis_url, prefix=prefix) as client, asyncio.timeout(_PATIENCE), asyncio.TaskGroup() as group:
        watch = group.create_task(_watch(workers))
        followers = []
        for number, question in enumerate(QUESTIONS, 1):
            request: Object = {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": 400,
                "temperature": 0,
            }
            request_id = await client.enqueue(request)
            tell(f"asked: {question}", {"asked": question, "id": request_id})
            names = ("websocket", "logger") if question == STORY else (f"reader {number}",)
            followers += [DemoFollower(name, request_id, question) for name in names]
        readers = [group.create_task(follower.follow(client, tell)) for follower in followers]
        await followers[0].halfway.wait()
        late = DemoFollower("billing", followers[0].request_id, STORY)
        tell("billing comes late, and reads from the start", {"late": late.name, "id": late.request_id})
        followers.insert(2, late)
        readers.append(group.create_task(late.follow(client, tell)))
        await asyncio.wait(readers)
        watch.cancel()
    return followers


def _sum_up(followers: list[DemoFollower], tell: Tell) -> None:
    for follower in followers:
        end, started = follower.answer.end, follower.answer.started
        timings = end.timings if end else {}
        tell(
            f"{follower.question:>16} → {follower.name:9} {len(follower.entries):4} entries, "
            f"{follower.answer.outcome} in {timings.get('total_ms')} ms, first text after "
            f"{timings.get('first_delta_ms')} ms, by {started.worker if started else 'nobody'}",
            {
                "question": follower.question,
                "follower": follower.name,
                "entries": len(follower.entries),
                "outcome": follower.answer.outcome,
                "timings": timings,
                "worker": started.worker if started else "",
            },
        )
    failed = [follower.answer.error or "no end" for follower in followers if follower.answer.outcome != "done"]
    if failed:
        raise DemoFailed(f"not every answer is whole: {failed[0]}")
    seen = [[entry.as_dict() for entry in follower.entries] for follower in followers if follower.question == STORY]
    if any(entries != seen[0] for entries in seen):
        raise DemoFailed("the followers of one request did not see the same stream")
    tell(f"all {len(seen)} followers of the story saw the same {len(seen[0])} entries", {"same": True})


@asynccontextmanager
async def _vllm(url: str | None) -> AsyncIterator[tuple[str, str]]:
    if url is not None:
        yield url, shown_url(url)
        return
    async with Simulator(Options(orders=Scenario(rate=_RATE, first_token=0.2))) as simulator:
        yield simulator.url, f"simulated, {_RATE:g} tokens/s, {simulator.url}"


async def _check_redis(url: str) -> None:
    async with Client(url) as client:
        try:
            await client.ping()
        except (Unavailable, RedisError) as error:
            raise DemoFailed(f"{shown_url(url)} cannot be used: {error}") from None


async def _model_of(url: str) -> str:
    upstream = ServerPool([url], keys=load_settings(_KEYS).api_keys(), limits=StreamTimeouts())
    try:
        return (await upstream.list_models(upstream.servers[0]))[0]
    except (UpstreamError, IndexError) as error:
        raise DemoFailed(f"{shown_url(url)} does not say which model it serves: {error}") from None
    finally:
        await upstream.aclose()


@contextmanager
def _workers(redis_url: str, vllm_url: str, prefix: str) -> "Iterator[list[subprocess.Popen[bytes]]]":
    """Two workers as processes, gone at the end."""
    own = {"REDIS_URL": redis_url, "VLLM_URLS": vllm_url, "WORKER_PREFIX": prefix, "WORKER_SLOTS": "2"}
    own["WORKER_DRAIN_TIMEOUT"] = "0"  # whoever leaves the demo early does not wait for the answers
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("WORKER_", "VLLM_URL"))}
    package = str(Path(__file__).parents[2])
    rest["PYTHONPATH"] = os.pathsep.join(filter(None, (package, rest.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory(prefix="vllm-relay-demo-") as folder:
        processes = []
        try:
            for number in range(2):
                with (Path(folder) / f"{number}.log").open("wb") as log:
                    command = [sys.executable, "-m", "worker", "run"]
                    processes.append(
                        # In a session of its own: Ctrl-C is for the demo, which then ends all in order.
                        subprocess.Popen(command, env=rest | own, cwd=folder, stderr=log, start_new_session=True)  # noqa: S603
                    )
            yield processes
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(_LAST_WORDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


async def _watch(workers: "list[subprocess.Popen[bytes]]") -> None:
    while all(worker.poll() is None for worker in workers):  # noqa: ASYNC110 - a process is no asyncio event
        await asyncio.sleep(0.2)
    raise DemoFailed("a worker ended before its time: start `worker run` by hand to see why")


async def _clean(redis_url: str, prefix: str) -> None:
    with suppress(RedisError, OSError):  # an embedded one may have met the same Ctrl-C
        async with Redis.from_url(redis_url, protocol=2) as redis:
            keys = [key async for key in redis.scan_iter(match=f"{prefix}:*", count=1000)]
            if keys:
                await redis.delete(*keys)
