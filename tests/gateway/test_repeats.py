"""A request that is sent again costs no second job, and one that is new is never taken for a repetition."""

import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import httpx
import pytest
from conftest import StartSimulator, StartWorker
from gateway_fixtures import KEY_A, KEY_B, KEYS, Served, StartGateway, StartGatewayProcess
from openai import APIConnectionError, AsyncOpenAI
from proxy import Proxy
from raw_posts import RawPost
from redis.asyncio import Redis
from redis.exceptions import TimeoutError as RedisTimeoutError
from waits import eventually

from worker import Client
from worker.contract.keys import Keys
from worker.gateway.ids import new_id, owner_hash
from worker.gateway.limits import Limits
from worker.gateway.neighbours import Neighbours
from worker.gateway.noted_calls import NotedCall
from worker.gateway.repeats import Presence, Repeats
from worker.redisio.batching import CommandBatcher
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator

ASK: list[Any] = [{"role": "user", "content": "Who are you?"}]
TEXT = answer_to(ASK)
BODY = {"model": "reciter", "messages": ASK, "stream": True}
WHOLE = BODY | {"stream": False}
EITHER_WAY = pytest.mark.parametrize("body", [BODY, WHOLE], ids=["stream", "whole"])
CUTS = pytest.mark.parametrize("cut", [RawPost.close, RawPost.reset], ids=["FIN", "RST"])
NOTED = "chat:gateway:unanswered:*"
UNHURRIED = {"lease": 60, "first_token_timeout": 100, "gap_timeout": 60}
"""Settings of a worker that requests no answer twice though a busy machine does not run it for seconds."""


async def jobs(redis: Redis) -> int:
    return int(await redis.xlen("chat:jobs"))


async def wait_noted(redis: Redis, count: int = 1) -> None:
    """Wait until so many requests are known to those that repeat them, and one at least is followed."""

    async def are_noted() -> bool:
        sets = [cast("list[bytes]", await redis.zrange(key, 0, -1)) async for key in redis.scan_iter(NOTED)]
        ids = [member.decode() for members in sets for member in members if not member.startswith(b"~")]
        counts = await redis.pubsub_numsub(*(f"chat:feed:{{{request_id}}}" for request_id in ids)) if ids else []
        return len(ids) >= count and any(number for _, number in counts)

    await eventually(are_noted)


@pytest.fixture
async def commands(redis: Redis) -> AsyncIterator[CommandBatcher]:
    commands = CommandBatcher(redis)
    yield commands
    await commands.aclose()


@pytest.fixture
async def presence(redis: Redis) -> AsyncIterator[Presence]:
    """Reads from a connection of its own, on which no paused write is before it."""
    own = CommandBatcher(redis)
    yield Presence(own, Keys())
    await own.aclose()


@asynccontextmanager
async def paused_writes(redis: Redis) -> AsyncIterator[None]:
    """Redis answers no command that writes meanwhile."""
    await redis.client_pause(60_000, all=False)
    try:
        yield
    finally:
        await redis.client_unpause()


async def wait_left(redis: Redis) -> None:
    """Wait until nobody follows a request."""

    async def is_left() -> bool:
        channels = await redis.pubsub_channels("chat:feed:{*")
        return not channels

    await eventually(is_left)


@pytest.fixture
async def patient(start_gateway: StartGateway) -> Served:
    """A gateway that sends no byte before the first entry of an answer, and waits for what other processes know."""
    gateway = await start_gateway(grace=30)
    gateway.gateway.services.neighbours._patience = 60
    return gateway


@EITHER_WAY
@CUTS
@pytest.mark.parametrize("reuse", [False, True], ids=["fresh", "reused"])
async def test_a_hidden_repetition_attaches_to_the_first_job(
    body: dict[str, Any], cut: Callable[[RawPost], None], patient: Served, redis: Redis, start_worker: StartWorker,
    simulator: Simulator, *, reuse: bool,
) -> None:  # fmt: skip
    """As a browser does: at once, without a count, up to three requests."""
    for _ in range(2):
        post = await RawPost.send(patient.port, body, reuse=reuse)
        await wait_noted(redis)
        cut(post)
        await wait_left(redis)
    post = await RawPost.send(patient.port, body)
    await wait_noted(redis)
    await start_worker(simulator)
    assert await post.read_head() == 200
    assert await jobs(redis) == 1
    post.close()


async def calls(redis: Redis, command: str) -> int:
    """How often Redis has executed a command."""
    stats = cast("dict[str, dict[str, int]]", await redis.info("commandstats"))
    return stats.get(f"cmdstat_{command}", {"calls": 0})["calls"]


async def looks(redis: Redis) -> int:
    """How often a request has looked for those that it may repeat."""
    return await calls(redis, "zrevrangebyscore")


@EITHER_WAY
@CUTS
async def test_a_hidden_repetition_waits_until_redis_knows_that_a_connection_here_is_lost(
    body: dict[str, Any], cut: Callable[[RawPost], None], start_gateway: StartGateway, redis_proxy: Proxy,
    redis: Redis, simulator: Simulator, start_worker: StartWorker,
) -> None:  # fmt: skip
    """On a busy machine, that takes longer than a browser, which repeats its request within milliseconds."""
    gateway = await start_gateway(grace=30, redis_url=redis_proxy.redis_url)
    before = await looks(redis)
    order = redis_proxy.hold(b"^UNSUBSCRIBE")
    first = await RawPost.send(gateway.port, body, reuse=True)
    await wait_noted(redis)
    cut(first)
    second = await RawPost.send(gateway.port, body)

    async def has_looked() -> bool:
        assert await jobs(redis) <= 1
        return await looks(redis) >= before + 12

    await eventually(has_looked)
    order.release()
    await start_worker(simulator)
    assert await second.read_head() == 200
    assert await jobs(redis) == 1
    second.close()


@CUTS
async def test_a_hidden_repetition_waits_until_another_process_knows_that_its_connection_is_lost(
    cut: Callable[[RawPost], None], patient: Served,
    start_gateway_process: StartGatewayProcess, redis_proxy: Proxy, redis: Redis,
) -> None:  # fmt: skip
    """The other process stands still from before the loss until it is asked. Then Redis learns late of the loss."""
    other = await start_gateway_process(grace=30, redis_url=redis_proxy.redis_url)
    order = redis_proxy.hold(b"^UNSUBSCRIBE")
    first = await RawPost.send(other.port, BODY)
    await wait_noted(redis)
    before = await looks(redis)
    asked = await calls(redis, "publish")
    other.process.send_signal(signal.SIGSTOP)
    try:
        cut(first)
        second = await RawPost.send(patient.port, BODY)

        async def has_asked() -> bool:
            return await calls(redis, "publish") > asked

        await eventually(has_asked)
    finally:
        other.process.send_signal(signal.SIGCONT)

    async def has_looked() -> bool:
        assert await jobs(redis) <= 1
        return await looks(redis) >= before + 12

    await eventually(has_looked)
    order.release()
    await wait_noted(redis)
    assert await jobs(redis) == 1
    second.close()


async def test_a_request_is_not_delayed_by_an_identical_one_whose_connection_elsewhere_is_open(
    patient: Served, start_gateway_process: StartGatewayProcess, redis: Redis
) -> None:
    """A second look would take time, and is not needed."""
    other = await start_gateway_process(grace=30)
    posts = [await RawPost.send(other.port, BODY)]
    await wait_noted(redis)
    before = await looks(redis)
    posts.append(await RawPost.send(patient.port, BODY))
    await wait_noted(redis, 2)
    assert await jobs(redis) == 2
    assert await looks(redis) == before + 1
    for post in posts:
        post.close()


@EITHER_WAY
async def test_hidden_repetitions_whose_connections_are_lost_too_are_no_jobs(
    body: dict[str, Any], start_gateway: StartGateway, redis_proxy: Proxy, redis: Redis
) -> None:
    """The last one attaches to the first request. The lost ones between must not be new requests because of that."""
    gateway = await start_gateway(grace=30, redis_url=redis_proxy.redis_url)
    order = redis_proxy.hold(b"^UNSUBSCRIBE")
    post = await RawPost.send(gateway.port, body)
    await wait_noted(redis)
    for _ in range(10):
        before = await looks(redis)
        post.close()
        post = await RawPost.send(gateway.port, body)

        async def has_looked(before: int = before) -> bool:
            return await looks(redis) > before + 1

        await eventually(has_looked)
    order.release()

    async def are_decided() -> bool:
        keys = [key async for key in redis.scan_iter("chat:gateway:asked:*")]
        members = [member for key in keys for member in cast("list[bytes]", await redis.zrange(key, 0, -1))]
        return not any(member.startswith(b"~") for member in members)

    await eventually(are_decided)
    assert await jobs(redis) == 1
    post.close()


async def test_a_hidden_repetition_that_is_read_together_with_the_loss_of_the_connection_attaches(
    start_gateway: StartGateway, redis: Redis
) -> None:
    """The gateway, in the event loop of this test, finds both in one step."""
    patient = await start_gateway(grace=30, header_timeout=600)
    content = json.dumps(BODY).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%b" % (
        len(content),
        content,
    )
    before = await looks(redis)
    connections = [socket.create_connection(("127.0.0.1", patient.port)) for _ in range(10)]
    for number, connection in enumerate(connections):
        connection.sendall(request)
        if number:
            connections[number - 1].close()

        async def has_looked(count: int = number + 1) -> bool:
            return await looks(redis) >= before + count

        await eventually(has_looked)
        await wait_noted(redis)
    assert await jobs(redis) == 1
    connections[-1].close()


async def test_a_new_request_is_added_in_the_step_that_looks_for_requests_that_it_repeats(
    start_gateway: StartGateway, redis_proxy: Proxy, redis: Redis
) -> None:
    gateway = await start_gateway(redis_url=redis_proxy.redis_url)
    looks_alone = [redis_proxy.hold(b"^ZREVRANGEBYSCORE") for _ in range(100)]
    post = await RawPost.send(gateway.port, BODY)

    async def is_added() -> bool:
        return await jobs(redis) == 1

    await eventually(is_added)
    for look in looks_alone:
        look.release()
    post.close()


async def test_a_request_is_not_delayed_by_an_identical_one_whose_connection_here_is_open(
    patient: Served, redis: Redis
) -> None:
    """A second look would take time, and is not needed."""
    before = await looks(redis)
    posts = []
    for number in range(1, 4):
        posts.append(await RawPost.send(patient.port, BODY))
        await wait_noted(redis, number)
    assert await jobs(redis) == len(posts)
    assert await looks(redis) == before + len(posts)
    for post in posts:
        post.close()


@EITHER_WAY
@pytest.mark.parametrize("reuse", [False, True], ids=["fresh", "reused"])
async def test_a_retry_of_openais_client_attaches_to_the_first_job(
    body: dict[str, Any], patient: Served, redis: Redis, simulator: Simulator, start_worker: StartWorker, *, reuse: bool
) -> None:
    async with Proxy.before(patient.url) as proxy, client_of(proxy.url, max_retries=2) as ai:
        if reuse:
            await ai.models.list()
        calling = asyncio.create_task(ai.chat.completions.create(**body))
        await wait_noted(redis)
        await proxy.cut()

        async def is_tried_again() -> bool:
            return proxy.accepted == 2

        await eventually(is_tried_again)
        await start_worker(simulator, **UNHURRIED)
        assert await text_of(await calling) == TEXT
    assert len(simulator.served) == 1


def client_of(url: str, **options: Any) -> AsyncOpenAI:  # noqa: ANN401 - of the client
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", **options)


async def text_of(answer: Any) -> str:  # noqa: ANN401 - a stream or a completion
    if hasattr(answer, "choices"):
        return str(answer.choices[0].message.content)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])


@pytest.mark.parametrize("chunks", [0, 1], ids=["after the head", "after a chunk"])
async def test_a_stream_that_was_cut_is_no_second_job_of_openais_client(
    chunks: int, start_gateway: StartGateway, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    simulator = await start_simulator(
        Options(scenario=Scenario(first_token=0.0 if chunks else 60.0, rate=1, tokens=500))
    )
    await start_worker(simulator, **UNHURRIED)
    gateway = await start_gateway(grace=0.1)
    async with Proxy.before(gateway.url) as proxy, client_of(proxy.url, max_retries=2) as ai:
        stream = await ai.chat.completions.create(**BODY)  # type: ignore[call-overload]  # a dict for all arguments
        for _ in range(chunks):
            await anext(stream)

        async def asked() -> bool:
            return bool(simulator.served)

        await eventually(asked)
        await proxy.cut()
        with pytest.raises((httpx.TransportError, APIConnectionError)):
            async for _ in stream:
                pass
        assert proxy.accepted == 1
    assert len(simulator.served) == 1


async def test_regenerate_after_a_stop_is_a_new_answer(
    gateway: Served, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=5, tokens=500))))
    first = await RawPost.send(gateway.port, BODY)
    assert await first.read_head() == 200
    await first.read_event()
    first.close()
    second = await RawPost.send(gateway.port, BODY)
    assert await second.read_head() == 200
    assert first.request_id != second.request_id
    second.close()


async def test_a_retry_attaches_though_bytes_were_sent(
    gateway: Served, redis: Redis, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    """The client has not got them: it repeats nothing once it has a head."""
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=5, tokens=500))))
    first = await RawPost.send(gateway.port, BODY)
    assert await first.read_head() == 200
    await first.read_event()
    first.reset()
    await wait_left(redis)
    second = await RawPost.send(gateway.port, BODY, x_stainless_retry_count="1")
    assert await second.read_head() == 200
    assert second.request_id == first.request_id
    second.close()


async def test_a_retry_does_not_attach_to_an_answer_that_somebody_has_got(
    gateway: Served, redis: Redis, simulator: Simulator, start_worker: StartWorker
) -> None:
    await start_worker(simulator, **UNHURRIED)

    async def nobody_may_attach() -> bool:
        return not [key async for key in redis.scan_iter("chat:gateway:asked:*")]

    for _ in range(3):
        post = await RawPost.send(gateway.port, BODY, x_stainless_retry_count="1")
        await post.read_head()
        await post.read_events()
        await eventually(nobody_may_attach)
        post.close()
    assert len(simulator.served) == 3


@pytest.mark.parametrize("retry", ["0", "1"], ids=["hidden", "counted"])
async def test_a_repetition_that_a_limit_refused_attaches_later(
    start_gateway: StartGateway, redis: Redis, retry: str
) -> None:
    a_minute = KEYS.replace('name = "a"', 'name = "a"\nrequests_per_minute = 1')
    limited, gateway = [await start_gateway(grace=30, keys=keys) for keys in (a_minute, KEYS)]
    headers: dict[str, Any] = {"Authorization": f"Bearer {KEY_A}", "x_stainless_retry_count": retry}
    first = await RawPost.send(gateway.port, BODY, **headers)
    await wait_noted(redis)
    first.reset()
    await wait_left(redis)
    minute = int(time.time()) // 60
    for now in (minute, minute + 1):
        await redis.set(Keys().rate(owner_hash("key:a"), now), 1, ex=120)
    refused = await RawPost.send(limited.port, BODY, **headers)
    assert await refused.read_head() == 429
    refused.close()
    third = await RawPost.send(gateway.port, BODY, **headers)
    await wait_noted(redis)
    assert await jobs(redis) == 1
    third.reset()


async def test_a_retry_after_a_refusal_is_a_new_job(
    patient: Served, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(fault="500")))
    await start_worker(simulator, tries=1)
    ids = []
    for count in range(2):
        post = await RawPost.send(patient.port, BODY, x_stainless_retry_count=str(count))
        assert await post.read_head() == 502
        ids.append(post.request_id)
        post.close()
    assert ids[0] != ids[1]


async def test_three_hundred_identical_requests_at_once_are_as_many_jobs(
    start_gateway: StartGateway, redis: Redis, simulator: Simulator, start_worker: StartWorker
) -> None:
    """More than a batch of commands to Redis holds, from each of the gateways."""
    replicas = [await start_gateway(grace=30), await start_gateway(grace=30)]
    posts = await asyncio.gather(*(RawPost.send(replicas[n % 2].port, BODY) for n in range(300)))

    async def are_added() -> bool:
        with suppress(RedisTimeoutError):  # the event loop of this test also serves all of the requests
            return await jobs(redis) == len(posts)
        return False

    await eventually(are_added, within=300)
    await start_worker(simulator, slots=200)
    assert set(await asyncio.gather(*(post.read_head() for post in posts))) == {200}
    assert len({post.request_id for post in posts}) == len(posts)
    for events in await asyncio.gather(*(post.read_events() for post in posts)):
        assert events[-1] == "[DONE]"
    for post in posts:
        post.close()
    assert await jobs(redis) <= len(posts)


async def test_an_answer_that_is_complete_before_its_stream_begins_is_followed_until_nobody_may_attach(
    start_gateway: StartGateway, redis_proxy: Proxy, redis: Redis, start_simulator: StartSimulator,
    start_worker: StartWorker, client: Client, presence: Presence,
) -> None:  # fmt: skip
    """The stream reads its log late, and Redis delays the note that a byte was sent."""
    gateway = await start_gateway(grace=30, redis_url=redis_proxy.redis_url)
    reads = [redis_proxy.hold(b"^GET chat:ended") for _ in range(100)]  # also those after a time limit
    first = await RawPost.send(gateway.port, BODY)
    await wait_noted(redis)
    await start_worker(await start_simulator())
    (noted,) = [key async for key in redis.scan_iter(NOTED)]
    (member,) = cast("list[bytes]", await redis.zrange(noted, 0, -1))
    await client.result(member.decode())
    async with paused_writes(redis):
        for read in reads:
            read.release()
        assert await first.read_head() == 200
        assert (await first.read_events())[-1] == "[DONE]"
        first.close()
        for _ in range(20):
            assert await redis.zcard(noted) == 1
            assert await presence.is_followed(member.decode())
    second = await RawPost.send(gateway.port, BODY)
    assert await second.read_head() == 200
    assert second.request_id != first.request_id
    second.close()


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "cut"])
async def test_a_request_is_followed_until_redis_knows_that_nobody_may_attach(
    redis: Redis, client: Client, commands: CommandBatcher, presence: Presence, *, is_whole: bool
) -> None:
    """Redis delays the notes, and the caller that waits for them is cancelled."""
    keys, request_id = Keys(), new_id("")
    repeats = Repeats(commands, keys, client, Neighbours(redis, commands, keys), patience=60)
    limits = Limits(commands, keys, client, patience=60)
    noted = NotedCall(repeats, limits, "", "print", request_id, client.expect(request_id))
    noted.begin()
    await wait_noted(redis)
    async with paused_writes(redis):
        noted.on_first_byte()
        noted.on_joined()
        ending = asyncio.create_task(noted.end(is_whole=is_whole))
        for _ in range(20):
            assert await presence.is_followed(request_id)
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        assert await presence.is_followed(request_id)

    async def is_free() -> bool:
        return not await presence.is_followed(request_id)

    await eventually(is_free)
    assert await redis.zrange(keys.unanswered("print"), 0, -1) == []
    assert await redis.zcard(keys.asked("print")) == (0 if is_whole else 1)


async def test_identical_requests_that_follow_each_other_fast_are_as_many_jobs(
    gateway: Served, simulator: Simulator, start_worker: StartWorker
) -> None:
    """An answer may be complete before its request is noted, and the next request must not attach to it."""
    await start_worker(simulator)

    async def ask() -> str:
        post = await RawPost.send(gateway.port, BODY | {"max_tokens": 1})
        await post.read_head()
        await post.read_events()
        post.close()
        return post.request_id

    ids = [request_id for _ in range(10) for request_id in await asyncio.gather(*(ask() for _ in range(5)))]
    assert len(set(ids)) == 50


@CUTS
async def test_a_hidden_repetition_of_a_native_request_gets_the_id_of_the_first(
    cut: Callable[[RawPost], None], gateway: Served, redis: Redis
) -> None:
    """The connection closes before the response, whose job Redis adds late."""

    async def is_asked() -> bool:
        return any(client["cmd"] in {"eval", "zremrangebyscore"} for client in await redis.client_list())

    async def is_added() -> bool:
        return await jobs(redis) == 1

    async with paused_writes(redis):
        first = await RawPost.send(gateway.port, BODY, path="/requests")
        await eventually(is_asked)
        cut(first)
        for _ in range(50):  # the gateway, in this event loop, notices that the client has left
            await redis.ping()
    await eventually(is_added)
    await wait_left(redis)
    second = await RawPost.send(gateway.port, BODY, path="/requests")
    assert await second.read_head() == 202
    assert await jobs(redis) == 1
    assert await redis.exists(Keys().tokens(second.request_id))
    third = await RawPost.send(gateway.port, BODY, path="/requests")
    assert await third.read_head() == 202
    assert third.request_id != second.request_id
    for post in (second, third):
        post.close()


async def test_identical_native_requests_are_as_many_jobs(start_gateway: StartGateway, redis: Redis) -> None:
    replicas = [await start_gateway(), await start_gateway()]
    chat = await RawPost.send(replicas[0].port, BODY)
    await wait_noted(redis)
    chat.reset()
    await wait_left(redis)

    async def ask(number: int) -> str:
        post = await RawPost.send(replicas[number % 2].port, BODY, path="/requests")
        assert await post.read_head() == 202
        post.close()
        return post.request_id

    ids = await asyncio.gather(*(ask(number) for number in range(60)))
    ids += [await ask(number) for number in range(10)]
    assert len(set(ids)) == 70
    assert await jobs(redis) == 71


async def test_requests_that_differ_in_who_asks_or_in_options_do_not_meet(
    start_gateway: StartGateway, redis: Redis
) -> None:
    gateway = await start_gateway(grace=30, keys=KEYS)
    with_option = BODY | {"relay": {"queue": "default", "timeout": 9}}
    asked: list[tuple[dict[str, Any], str]]
    asked = [(BODY, KEY_A), (BODY, KEY_B), (BODY | {"seed": 1}, KEY_A), (with_option, KEY_A)]
    for number, (body, key) in enumerate(asked, 1):
        post = await RawPost.send(gateway.port, body, Authorization=f"Bearer {key}")
        await wait_noted(redis, number)
        post.reset()
    assert await jobs(redis) == len(asked)


Post = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture
def post(http: httpx.AsyncClient) -> Post:
    """Posts a chat completion with an idempotency key."""

    async def send(gateway: Served, key: str, body: dict[str, Any] = WHOLE, **headers: str) -> httpx.Response:
        own = {"Idempotency-Key": key} | {name.replace("_", "-"): value for name, value in headers.items()}
        return await http.post(f"{gateway.url}/v1/chat/completions", json=body, headers=own)

    return send


async def test_an_idempotency_key_names_one_answer(
    start_gateway: StartGateway, post: Post, simulator: Simulator, start_worker: StartWorker
) -> None:
    await start_worker(simulator, **UNHURRIED)
    replicas = [await start_gateway(), await start_gateway()]
    answers = await asyncio.gather(*(post(replicas[n % 2], "k") for n in range(6)))
    answers.append(await post(replicas[0], "k"))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.headers["x-request-id"] for answer in answers}) == 1
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {TEXT}
    conflict = await post(replicas[1], "k", WHOLE | {"seed": 1})
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (422, "idempotency_conflict")
    assert len(simulator.served) == 1


async def test_two_tenants_with_the_same_key_never_meet(
    start_gateway: StartGateway, post: Post, simulator: Simulator, start_worker: StartWorker
) -> None:
    await start_worker(simulator, **UNHURRIED)
    gateway = await start_gateway(keys=KEYS)
    bodies = [WHOLE, WHOLE | {"seed": 1}]  # a conflict would show that the other's request is seen
    answers = [
        await post(gateway, "k", body, Authorization=f"Bearer {key}")
        for key, body in zip((KEY_A, KEY_B), bodies, strict=True)
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 2
    assert len(simulator.served) == 2


async def test_a_repetition_goes_on_after_any_event(
    start_gateway: StartGateway, post: Post, simulator: Simulator, start_worker: StartWorker
) -> None:
    await start_worker(simulator, **UNHURRIED)
    replicas = [await start_gateway(), await start_gateway()]
    body = BODY | {"stream_options": {"include_usage": True}, "n": 2, "max_tokens": 8}
    whole = [event for event in (await post(replicas[0], "k", body)).text.split("\n\n") if event.startswith("data")]
    assert whole[-1] == "data: [DONE]"
    for have in range(len(whole) + 1):
        rest = await post(replicas[have % 2], "k", body, Relay_After=str(have))
        assert [event for event in rest.text.split("\n\n") if event.startswith("data")] == whole[have:]
    assert len(simulator.served) == 1


async def test_a_stream_that_is_cut_again_and_again_goes_on_live_through_two_replicas(
    start_gateway: StartGateway, start_simulator: StartSimulator, start_worker: StartWorker, client: Client
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(rate=50, tokens=60)))
    await start_worker(simulator, **UNHURRIED)
    ports = [(await start_gateway()).port, (await start_gateway()).port]
    events: list[str] = []
    ids = set[str]()
    while not events or events[-1] != "[DONE]":
        post = await RawPost.send(ports[len(events) % 2], BODY, idempotency_key="k", relay_after=str(len(events)))
        assert await post.read_head() == 200
        ids.add(post.request_id)
        for _ in range(7):
            events.append(await post.read_event())
            if events[-1] == "[DONE]":
                break
        post.reset()
    (request_id,) = ids
    chunks = [json.loads(event) for event in events[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == (await client.result(request_id)).text
    assert len(simulator.served) == 1
