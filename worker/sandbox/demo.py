"""The demo: three prompts are followed live, the worker of the longest answer is killed, and the answer continues.

The workers are processes of the real program. Without URLs, an embedded Redis and a simulated vLLM are started. All
keys have a prefix of their own, and are deleted at the end.
"""

import asyncio
import secrets
import shlex
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ..client.async_client import Client
from ..client.errors import Unavailable
from ..contract.answer import Answer
from ..contract.entries import Claimed, Delta, Entry, Idle, Object, Restarted, Resumed
from ..contract.keys import Keys
from ..redisio.urls import database_of
from ..settings import Settings, load_settings, redacted_url, variable
from ..vllm.errors import UpstreamError
from ..vllm.servers.pool import ServerPool
from ..vllm.stream.watchdog import StreamTimeouts
from .demo_web import DemoGateway, start_gateway, wait_until_opened
from .demo_workers import LEASE, DemoWorkers, start_workers
from .embedded_redis import start_redis
from .programs import Report, SandboxFailed, timed
from .simulator.server import Options, Scenario, Simulator

STORY = "Tell me a long story"
QUESTIONS = (STORY, "你是谁?", "Who are you?")
_KEYS = ("vllm_api_key", "vllm_api_key_2", "vllm_api_key_file")
"""The only settings that the demo reads. It sets the others for its workers."""
_RATE = 60.0
_LINE = 48
_IDLE = 0.3
"""Seconds without a token after which the text of an unfinished line is printed."""
_LATE_AFTER = 60
"""The number of entries after which the late follower begins."""
_KILL_AFTER = 2.0
"""Seconds from the first text to the kill."""
_TIME_LIMIT = 120.0


@dataclass
class DemoFollower:
    """A reader of one request's log, with its own position. Only one follower of a request prints the text."""

    name: str
    request_id: str
    question: str
    workers: DemoWorkers
    report: Report
    first_text: asyncio.Event
    """Shared by all followers, and set once one of them has received a token."""
    prints: bool = True
    entries: list[Entry] = field(default_factory=list)
    answer: Answer = field(default_factory=Answer)
    is_underway: asyncio.Event = field(default_factory=asyncio.Event)
    holds_text: bool = False
    """Whether text waits for `resumed`: the last tokens of a killed worker may arrive as late as `claimed`."""
    _pending: str = ""

    async def follow(self, client: Client) -> None:
        """Follow to the end; report the text in pieces of about a line, and every takeover."""
        async for entry in client.follow(self.request_id, idle=_IDLE):
            if isinstance(entry, Idle):
                self.report_text()
                continue
            self.entries.append(entry)
            before = 0 if isinstance(entry, Restarted) else len(self.answer.text)
            self.answer.add(entry)
            self._pending += self.answer.text[before:]
            if isinstance(entry, Delta):
                self.first_text.set()
            if len(self.entries) > _LATE_AFTER or self.answer.end:
                self.is_underway.set()
            if self.answer.end or isinstance(entry, Restarted):
                self.holds_text = False
            self._report_takeover(entry)
            if len(self._pending) >= _LINE or self.answer.end:
                self.report_text()

    def _report_takeover(self, entry: Entry) -> None:
        match entry:
            case Claimed():
                text, color = f"claimed: {self.workers.name_of(entry.worker)} takes the answer over", "yellow"
            case Resumed():
                text, color = f"resumed: the text continues after entry {entry.after}", "green"
            case Restarted():
                text, color = "restarted: the answer begins again, the text above is void", "yellow"
            case _:
                return
        self.report_text()
        self._report_line(click.style(text, fg=color, bold=True), {"entry": entry.as_dict()})
        if isinstance(entry, Resumed):
            self.holds_text = False

    def report_text(self) -> None:
        """Report the text that has arrived and is shorter than a line."""
        if self._pending and not self.holds_text:
            self._report_line(self._pending.replace("\n", "⏎"), {"text": self._pending})
            self._pending = ""

    def _report_line(self, line: str, data: Object) -> None:
        shown = f"{self.name:>10} │ {line}" if self.prints else None
        self.report(shown, {"follower": self.name, "id": self.request_id, **data})


async def run_demo(
    report: Report,
    redis_url: str | None = None,
    vllm_url: str | None = None,
    *,
    servers: "list[Path] | None" = None,
    web: bool = False,
) -> None:
    """Run the demo to its end. With `web` it then serves the page until it is cancelled.

    Args:
        report: receives each line.
        redis_url: the Redis to use instead of an embedded one.
        vllm_url: the vLLM to use instead of a simulated one.
        servers: the redis-server binaries to choose the embedded Redis from; by default those of this machine.
        web: whether to start a gateway, whose page shows the answers. The demo begins when somebody has opened it.

    Raises:
        SandboxFailed: when a server does not answer, an answer is incomplete, followers of one request received
            different entries, or the text differs from that of an undisturbed run.
        ConfigError: when a URL is malformed.
    """
    given = {name: url for name, url in (("redis_url", redis_url), ("vllm_urls", vllm_url)) if url is not None}
    load_settings([*_KEYS, *given], **given)
    prefix = f"demo-{secrets.token_hex(3)}"
    report_timed = timed(report)
    with ExitStack() as stack:
        if redis_url is None:
            embedded = stack.enter_context(start_redis(servers=servers))
            redis_url, what = embedded.url, embedded.what
        else:
            what = redacted_url(redis_url)
            await _check_redis(redis_url)
        report_timed(f"Redis: {what}", {"redis": what})
        async with _vllm(vllm_url) as (url, what):
            report_timed(f"vLLM: {what}", {"vllm": what})
            demo = _Demo(redis_url, prefix, await _model_of(url), report_timed, simulated=vllm_url is None)
            try:
                gateway = stack.enter_context(start_gateway(redis_url, prefix)) if web else None
                if gateway is not None:
                    await demo.open_page(gateway)
                with start_workers(redis_url, url, prefix) as workers:
                    report_timed("two workers start, and three prompts wait for them", {"workers": 2})
                    usual, name = Settings.model_fields["lease"].default, variable("lease")
                    line = f"their lease is {LEASE} s, so that a takeover is quick; by default, {name} is {usual:g} s"
                    report_timed(line, {"lease": LEASE, "default_lease": usual})
                    async with asyncio.timeout(_TIME_LIMIT):
                        await demo.run(workers)
                    if gateway is not None:
                        report(f"\nThe page is yours until Ctrl-C: {gateway.url}", {"page": gateway.url})
                        await asyncio.Event().wait()
            finally:  # after the end of the workers, which would create their group again
                await _delete_keys(redis_url, prefix)
    _report_commands(report)


class _Demo:
    """The demo's steps, with running servers."""

    def __init__(self, redis_url: str, prefix: str, model: str, report: Report, *, simulated: bool) -> None:
        self._redis_url = redis_url
        self._prefix = prefix
        self._model = model
        self._report = report
        self._simulated = simulated
        self._request_ids: dict[str, str] = {}
        """The id of each question's request."""
        self._followers: list[DemoFollower] = []
        self._first_text = asyncio.Event()
        self._disturbed: DemoFollower | None = None
        """A follower of the answer whose worker was killed."""

    async def open_page(self, gateway: DemoGateway) -> None:
        """Report the URL of a page that shows the answers, and wait until somebody has opened it."""
        await gateway.wait_ready()
        async with Client(self._redis_url, prefix=self._prefix) as client:
            await self._enqueue(client)
        page = gateway.page(list(self._request_ids.values()))
        self._report(f"open this page, the answers wait for it: {page}", {"page": page})
        keys = Keys(self._prefix, database_of(self._redis_url))
        if not await wait_until_opened(self._redis_url, keys, self._request_ids[STORY]):
            self._report("nobody has opened the page: the demo begins", {"opened": False})

    async def run(self, workers: DemoWorkers) -> None:
        self._workers = workers
        async with Client(self._redis_url, prefix=self._prefix) as client, asyncio.TaskGroup() as group:
            watch = group.create_task(self._workers.watch())
            if not self._request_ids:
                await self._enqueue(client)
            await self._follow(client, group)
            self._sum_up()
            await self._compare_with_undisturbed(client)
            watch.cancel()

    def _request(self, question: str) -> Object:
        messages: Object = {"role": "user", "content": question}
        return {"model": self._model, "messages": [messages], "max_tokens": 400, "temperature": 0}

    async def _enqueue(self, client: Client) -> None:
        for question in QUESTIONS:
            self._request_ids[question] = await client.enqueue(self._request(question))
            self._report(f"prompt: {question}", {"prompt": question, "id": self._request_ids[question]})

    async def _follow(self, client: Client, group: asyncio.TaskGroup) -> None:
        """Follow the answers to their end, and meanwhile kill the worker of the longest one."""
        for number, (question, request_id) in enumerate(self._request_ids.items()):
            # The first one's followers have names of their own.
            names = ("websocket", "logger") if question == STORY else (f"reader {number}",)
            self._followers += [self._follower(name, request_id, question) for name in names]
        readers = [group.create_task(follower.follow(client)) for follower in self._followers]
        kill = group.create_task(self._kill_longest())

        story = self._followers[0]
        await story.is_underway.wait()
        late = self._follower("billing", story.request_id, STORY)
        text = "logger reads the story too; billing comes late, and reads it from the start"
        self._report(text, {"late": late.name, "id": late.request_id})
        self._followers.insert(2, late)
        await asyncio.wait([*readers, group.create_task(late.follow(client))])
        kill.cancel()
        if self._disturbed is None:
            line = f"no worker is killed: all answers ended within {_KILL_AFTER:g} s of their first text"
            self._report(line, {"killed": None})

    def _follower(self, name: str, request_id: str, question: str) -> DemoFollower:
        prints = name not in {"logger", "billing"}
        return DemoFollower(
            name, request_id, question, self._workers, self._report, self._first_text, prints=prints
        )  # fmt: skip

    async def _kill_longest(self) -> None:
        await self._first_text.wait()
        await asyncio.sleep(_KILL_AFTER)
        running = [follower for follower in self._followers if follower.answer.started and not follower.answer.end]
        longest = max(running, key=lambda follower: len(follower.entries), default=None)
        if longest is None or longest.answer.started is None:
            return
        self._disturbed = longest
        worker = longest.answer.started.worker
        for follower in running:
            if follower.answer.started and follower.answer.started.worker == worker:
                follower.report_text()
                follower.holds_text = True
        self._workers.kill(worker)
        line = f"{self._workers.name_of(worker)} runs the longest answer, and is killed (SIGKILL)"
        self._report(click.style(line, fg="red", bold=True), {"killed": worker, "id": longest.request_id})

    def _sum_up(self) -> None:
        for follower in self._followers:
            end, started = follower.answer.end, follower.answer.started
            timings = end.timings if end else {}
            worker = started.worker if started else ""
            self._report(
                f"{follower.question:>20} → {follower.name:9} {len(follower.entries):4} entries, "
                f"{follower.answer.outcome} (attempt {end.attempt if end else 'unknown'})",
                {
                    "question": follower.question,
                    "follower": follower.name,
                    "entries": len(follower.entries),
                    "outcome": follower.answer.outcome,
                    "timings": timings,
                    "worker": worker,
                },
            )
        failed = [
            follower.answer.error or "no end" for follower in self._followers if follower.answer.outcome != "done"
        ]
        if failed:
            raise SandboxFailed(f"not every answer is complete: {failed[0]}")
        stories = [follower for follower in self._followers if follower.question == STORY]
        seen = [[entry.as_dict() for entry in follower.entries] for follower in stories]
        if any(entries != seen[0] for entries in seen):
            raise SandboxFailed("the followers of one request did not see the same entries")
        self._report(f"all {len(seen)} followers of the story saw the same {len(seen[0])} entries", {"same": True})

    async def _compare_with_undisturbed(self, client: Client) -> None:
        """Enqueue the same request again, let it run undisturbed, and compare the texts."""
        disturbed = self._disturbed or self._followers[0]
        text = disturbed.answer.text
        request = self._request(disturbed.question)
        if self._simulated:
            request["simulate"] = {"rate": 0, "first_token": 0}  # the same tokens, without the pauses
        again = Answer([entry async for entry in client.follow(await client.enqueue(request))])
        if again.outcome != "done":
            raise SandboxFailed(f"the undisturbed run failed: {again.error or 'no end'}")
        equal = again.text == text
        data: Object = {"equals_undisturbed": equal, "characters": len(text)}
        if equal:
            line = f"the text equals that of an undisturbed run, all {len(text)} characters"
            self._report(click.style(line, fg="green", bold=True), data)
        elif self._simulated:
            raise SandboxFailed("the text differs from that of an undisturbed run")
        else:
            at = next((at for at, (one, other) in enumerate(zip(text, again.text)) if one != other), "its end")  # noqa: B905 - the texts may have different lengths
            line = (
                f"the text differs from that of an undisturbed run at character {at}: "
                "a real vLLM's answers to one request may differ from run to run, at temperature 0 too"
            )
            self._report(click.style(line, fg="yellow"), data)


@asynccontextmanager
async def _vllm(url: str | None) -> AsyncIterator[tuple[str, str]]:
    if url is not None:
        yield url, redacted_url(url)
        return
    async with Simulator(Options(scenario=Scenario(rate=_RATE, first_token=0.2))) as simulator:
        yield simulator.url, f"simulated, {_RATE:g} tokens/s, {simulator.url}"


async def _check_redis(url: str) -> None:
    async with Client(url) as client:
        try:
            await client.ping()
        except (Unavailable, RedisError) as error:
            raise SandboxFailed(f"{redacted_url(url)} cannot be used: {error}") from None


async def _model_of(url: str) -> str:
    pool = ServerPool([url], keys=load_settings(_KEYS).api_keys(), limits=StreamTimeouts())
    try:
        return (await pool.list_models(pool.servers[0]))[0]
    except (UpstreamError, IndexError) as error:
        raise SandboxFailed(f"{redacted_url(url)} does not list the model that it serves: {error}") from None
    finally:
        await pool.aclose()


async def _delete_keys(redis_url: str, prefix: str) -> None:
    with suppress(RedisError, OSError):  # the embedded Redis may have ended
        async with Redis.from_url(redis_url, protocol=2) as redis:
            keys = [key async for key in redis.scan_iter(match=f"{prefix}:*", count=1000)]
            if keys:
                await redis.delete(*keys)


def _report_commands(report: Report) -> None:
    """Report three commands to try next, written so that they work in the shell that started the demo."""
    path = Path(sys.argv[0])
    program = shlex.quote(sys.argv[0])
    if path.name == "__main__.py":
        program = f"{shlex.quote(sys.executable)} -m {__name__.partition('.')[0]}"
    elif (found := shutil.which(path.name)) and Path(found).resolve() == path.resolve():
        program = path.name
    commands = {
        f"{program} simulate --port 8000": "a simulated vLLM, until Ctrl-C; --help lists its faults",
        f"{program} demo --vllm-url http://127.0.0.1:8000": "in another terminal: the demo on it, or on your own vLLM",
        f"{program} run --help": "every setting of a worker",
    }
    width = max(map(len, commands))
    lines = "\n".join(f"  {command:{width}}  {purpose}" for command, purpose in commands.items())
    report(f"\nTry next:\n{lines}", {"try_next": list(commands)})
