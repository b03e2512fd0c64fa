"""Two real replicas of vLLM: a worker and an engine are killed mid-answer, and no text shows it; runs with VLLM_URLS.

`VLLM_URLS` names two servers of one model on this machine. The last test kills the engine of the first: start it again
afterwards. Each answer must be the one that the server gives directly and undisturbed, at temperature 0.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from conftest import StartProcess
from redis.asyncio import Redis
from waits import eventually

from worker import Answer, Client
from worker.contract.entries import Entry, parse
from worker.contract.records import WorkerRecord

# Read here, because the suite hides the settings of the person who runs it.
URLS = [url.rstrip("/").removesuffix("/v1") for url in os.environ.get("VLLM_URLS", "").split(",") if url]
pytestmark = [
    pytest.mark.real_vllm,
    pytest.mark.skipif(len(URLS) != 2, reason="VLLM_URLS does not name two real vLLMs"),
]

QUESTIONS = (
    "Who are you?", "你是谁?", "Send emoji", "Tell me a story", "Write code", "Think first", "Give JSON",
    "Weather in Paris",
)  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"type": "string"}}},
    },
}
COPIES = 4
SOME = 5
"""Entries of a log that has some tokens: after queued, started and opened."""

Parts = tuple[str, str, str, list[tuple[str, str]]]


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Client]:
    """A client that does not give up when a busy machine pauses this process or Redis for seconds."""
    async with Client(redis_url, patience=200) as client:
        yield client


async def model() -> str:
    async with httpx.AsyncClient() as http:
        return str((await http.get(f"{URLS[0]}/v1/models")).json()["data"][0]["id"])


def chat_request(name: str, question: str) -> dict[str, Any]:
    tools = {"tools": [TOOL]} if "Weather" in question else {}
    return {
        "model": name, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 400, **tools
    }  # fmt: skip


async def ask_directly(request: dict[str, Any]) -> Parts:
    async with httpx.AsyncClient(timeout=120) as http:
        (choice,) = (await http.post(f"{URLS[1]}/v1/chat/completions", json=request)).json()["choices"]
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
    return message["content"] or "", message.get("reasoning") or "", choice["finish_reason"], calls


def parts_of(answer: Answer) -> Parts:
    (choice,) = answer.choices
    calls: Any = [call["function"] for call in choice.tool_calls]
    arguments = [(call["name"], call["arguments"]) for call in calls]
    return choice.content, choice.reasoning, choice.finish_reason, arguments


async def log_of(redis: Redis, request_id: str) -> list[Entry]:
    raw: Any = await redis.xrange(f"chat:tokens:{{{request_id}}}")
    return [parse(*entry) for entry in raw]


@contextmanager
def held(urls: Iterable[str]) -> Iterator[list[psutil.Process]]:
    """Engines that compute nothing until the test lets them: otherwise the short answers end before anything dies."""
    engines = [worker for url in urls for worker in engine_of(url).children(recursive=True)]
    for engine in engines:
        engine.suspend()
    try:
        yield engines
    finally:
        for engine in engines:
            with suppress(psutil.NoSuchProcess):
                engine.resume()


async def learn_limits(client: Client, redis: Redis, name: str, servers: int) -> None:
    """Let the worker learn that its servers answer all the questions at once: at first it sends few requests."""
    short = chat_request(name, QUESTIONS[0]) | {"max_tokens": 8}

    async def are_learnt() -> bool:
        added = [await client.enqueue(short) for _ in range(64)]
        for request_id in added:
            await client.result(request_id)
        records = [msgspec.json.decode(value, type=WorkerRecord) for value in await redis.hvals("chat:workers")]
        limits = [server.limit for record in records for server in record.servers]
        return len(limits) == servers and min(limits) >= len(QUESTIONS) * COPIES

    await eventually(are_learnt, within=100)


async def under_way(client: Client, redis: Redis, name: str, engine: psutil.Process) -> dict[str, list[str]]:
    """Each question several times; this engine has computed some tokens of each of them, and finished none."""
    repeated = [question for question in QUESTIONS for _ in range(COPIES)]
    added = await asyncio.gather(*(client.enqueue(chat_request(name, question)) for question in repeated))
    ports = {httpx.URL(url).port for url in URLS}

    async def are_at_the_servers() -> bool:
        return len([c for c in psutil.net_connections("tcp") if c.raddr and c.laddr and c.laddr.port in ports]) >= len(
            added
        )

    async def lengths() -> list[int]:
        return [await redis.xlen(f"chat:tokens:{{{request_id}}}") for request_id in added]

    async def have_begun() -> bool:
        engine.resume()
        await asyncio.sleep(0.002)  # some steps of it; how many does not matter, as long as none of the answers ends
        engine.suspend()
        seen: list[int] = []
        while seen != (seen := await lengths()):  # noqa: ASYNC110 - what arrives comes from another process
            await asyncio.sleep(0.1)
        return all(max(seen[n : n + COPIES]) > SOME for n in range(0, len(seen), COPIES))

    await eventually(are_at_the_servers)  # all of them first: then they advance together, one token each at a time
    await eventually(have_begun, within=100)
    logs = [await log_of(redis, request_id) for request_id in added]
    if any(log[-1].type == "done" for log in logs):  # the machine stood still meanwhile, and the engine went too far
        return await under_way(client, redis, name, engine)
    return {question: added[n * COPIES : (n + 1) * COPIES] for n, question in enumerate(QUESTIONS)}


async def compare(client: Client, redis: Redis, name: str, ids: dict[str, list[str]]) -> dict[str, list[str]]:
    """Every answer against the direct one; gives what became of those that were broken off."""
    broken: dict[str, list[str]] = {}
    for question, copies in ids.items():
        direct = await ask_directly(chat_request(name, question))
        for request_id in copies:
            answer = await client.result(request_id)
            assert answer.outcome == "done", answer.error
            assert parts_of(answer) == direct, question
            kinds = [
                entry.type
                for entry in await log_of(redis, request_id)
                if entry.type in {"claimed", "resumed", "restarted"}
            ]
            broken.setdefault(question, []).extend(kinds)
    return broken


def check_all_were_broken(broken: dict[str, list[str]]) -> None:
    """Each question was, and went on; but for the tool call, whose answer begins again."""
    assert all("resumed" in broken[question] for question in QUESTIONS[:-1]), broken
    assert "restarted" not in [kind for question in QUESTIONS[:-1] for kind in broken[question]]
    assert "claimed" in broken[QUESTIONS[-1]]


async def test_no_answer_shows_the_death_of_a_worker(client: Client, redis: Redis, start_process: StartProcess) -> None:
    name, (one, two) = await model(), [SimpleNamespace(url=url) for url in URLS]
    first = start_process(one, lease=1)
    await learn_limits(client, redis, name, 1)
    with held(URLS[:1]) as (engine,):
        ids = await under_way(client, redis, name, engine)
        first.kill()
        await asyncio.to_thread(first.wait)
    start_process(two, lease=1)
    check_all_were_broken(await compare(client, redis, name, ids))


async def test_no_answer_shows_the_death_of_an_engine(
    client: Client, redis: Redis, start_process: StartProcess
) -> None:
    name = await model()
    start_process(*[SimpleNamespace(url=url) for url in URLS], lease=5)
    await learn_limits(client, redis, name, 2)
    with held(URLS) as (engine, _):
        ids = await under_way(client, redis, name, engine)
        core = engine_of(URLS[0])
        engine.kill()
        core.kill()
    check_all_were_broken(await compare(client, redis, name, ids))


def engine_of(url: str) -> psutil.Process:
    """The engine's process of the server that listens at this URL."""
    port = httpx.URL(url).port
    (server,) = {
        c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr and c.laddr.port == port
    }
    children = psutil.Process(server).children(recursive=True)
    return next(child for child in children if "EngineCore" in " ".join([child.name(), *child.cmdline()]))
