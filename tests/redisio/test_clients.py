"""The clients of Redis: which errors pass, in every shape that redis-py gives them, and limits on silence."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from typing import Any, Self

import pytest
from conftest import StartWorker
from proxy import Proxy
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ExecAbortError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from structlog.testing import capture_logs
from waits import eventually

from worker import Client
from worker.redisio.clients import command_client
from worker.redisio.errors import is_transient, redacted_message
from worker.redisio.pipelined import PipelinedConnection, pack
from worker.redisio.retry import Outage, RetryUntilAvailable
from worker.redisio.unsent import unsent
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator
from worker.telemetry.logging import LogReceiver, configure_logging

SECRET = "a private prompt"


@asynccontextmanager
async def setting(redis: Redis, name: str, value: str) -> AsyncIterator[None]:
    await redis.config_set(name, value)
    try:
        yield
    finally:
        await redis.config_set(name, "0")


@pytest.mark.parametrize("transaction", [True, False])
@pytest.mark.parametrize(("name", "value"), [("min-replicas-to-write", "1"), ("maxmemory", "1")])
async def test_a_transient_refusal_is_known_inside_a_pipeline_and_reported_without_the_command(
    name: str,
    value: str,
    transaction: bool,  # noqa: FBT001 - a parameter of the test
    redis: Redis,
) -> None:
    pipe = redis.pipeline(transaction=transaction)
    pipe.xadd("chat:tokens:{r}", {"type": "delta", "content": SECRET}, id="1-1")
    async with setting(redis, name, value):
        with pytest.raises(ResponseError) as refusal:
            await pipe.execute()
    assert SECRET in str(refusal.value), "redis-py quotes the command"
    assert is_transient(refusal.value)
    assert SECRET not in redacted_message(refusal.value)
    assert redacted_message(refusal.value).startswith(("NOREPLICAS", "command not allowed when used memory"))
    assert redacted_message(refusal.value).endswith((".", "replicas to write", "'maxmemory'"))


async def test_a_refusal_that_arises_between_multi_and_exec_is_transient(redis: Redis) -> None:
    async with redis.client() as connection:
        for command in (("MULTI",), ("XADD", "k", "*", "a", "b")):
            await connection.execute_command(*command)  # type: ignore[no-untyped-call]
        async with setting(redis, "min-replicas-to-write", "1"):
            with pytest.raises(ExecAbortError) as refusal:
                await connection.execute_command("EXEC")  # type: ignore[no-untyped-call]
    assert is_transient(refusal.value)


@pytest.mark.parametrize("text", ["MISCONF Errors writing to the AOF file", "BUSY Redis is busy running a script."])
def test_trouble_of_the_server_itself_is_transient(text: str) -> None:
    assert is_transient(ResponseError(text))


@pytest.mark.parametrize("error", [ResponseError("WRONGTYPE Operation against a key"), RedisError("odd")])
def test_a_lasting_error_is_not_transient(error: RedisError) -> None:
    assert not is_transient(error)


@pytest.mark.parametrize("how", ["command", "pipeline", "subscription"])
async def test_a_connection_that_goes_while_it_is_written_to_is_a_lost_connection(
    how: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uvloop raises a RuntimeError then, and redis-py does not map it."""

    async def write(*_: object) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    async with command_client(redis_url) as commands, commands.pubsub() as hints:
        await hints.subscribe("before")
        await commands.ping()
        pipe = commands.pipeline()
        pipe.get("k")
        done = {"command": commands.ping, "pipeline": pipe.execute, "subscription": lambda: hints.subscribe("after")}
        with monkeypatch.context() as broken:
            broken.setattr("redis.asyncio.Connection._send_packed_command", write)
            with pytest.raises(RedisConnectionError) as loss:
                await done[how]()
        assert is_transient(loss.value)
        assert await commands.ping()


async def test_an_outage_that_all_jobs_meet_is_logged_once_and_so_is_its_end() -> None:
    tries = 0

    async def read() -> None:
        nonlocal tries
        tries += 1
        if tries <= 20:
            raise RedisConnectionError("Connection refused")

    configure_logging("json")
    with capture_logs() as logs:
        outage = Outage(LogReceiver())
        await asyncio.gather(*(RetryUntilAvailable(outage=outage)(read) for _ in range(10)))
    assert logs == [
        {"event": "redis_unavailable", "error": "Connection refused", "log_level": "warning"},
        {"event": "recovered", "after": "redis_unavailable", "log_level": "info"},
    ]


async def test_a_large_reply_on_a_slow_network_is_waited_for_as_long_as_it_arrives(
    redis_proxy: Proxy, redis: Redis
) -> None:
    """The limit is on silence, not on a whole reply."""
    await redis.set("large", b"x" * 8_000_000, ex=60)
    redis_proxy.down = 0.04  # for each piece of 64 KiB: longer than the limit for the whole reply
    async with command_client(redis_proxy.redis_url, connections=2, timeout=4) as client:
        connection = await PipelinedConnection.open(client.connection_pool)
        (reply,), same = await asyncio.gather(connection.execute(pack(b"GET", b"large"), 1), client.get("large"))
        assert reply == same == b"x" * 8_000_000
        await connection.close()


async def test_silence_in_the_middle_of_a_reply_ends_in_a_timeout() -> None:
    is_over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1024):
            if b"GET" in data:
                writer.write(b"$4000000\r\n" + b"x" * 100_000)
                await is_over.wait()
                break
            writer.write(b"+OK\r\n")  # the handshake
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with command_client(url, connections=2, timeout=2.5) as client:
            connection = await PipelinedConnection.open(client.connection_pool)
            reads: list[asyncio.Future[Any]] = [
                asyncio.ensure_future(client.get("large")),
                connection.execute(pack(b"GET", b"large"), 1),
            ]
            for read in reads:
                with pytest.raises(RedisTimeoutError):
                    await read
            await connection.close()
        is_over.set()


async def test_a_command_that_is_cancelled_while_the_cluster_is_queried_leaves_no_unhandled_error() -> None:
    queried, is_over = asyncio.Event(), asyncio.Event()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queried.set()
        await is_over.wait()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with command_client(f"redis+cluster://{host}:{port}") as client:
            others = asyncio.all_tasks()
            command = asyncio.ensure_future(client.get("key"))
            await queried.wait()
            command.cancel()
            is_over.set()
            await asyncio.wait(asyncio.all_tasks() - others)  # asyncio would report the error of the query


class SlowServer:
    """A server that reads small pieces slowly, and answers each connection's commands at their end."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._server: asyncio.Server | None = None
        self._open: list[asyncio.StreamWriter] = []
        self._serving: list[asyncio.Task[None]] = []
        self._is_over = asyncio.Event()
        self.url = ""
        self.is_stuck = False

    async def __aenter__(self) -> Self:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        self._server = await asyncio.start_server(self._accept, sock=listening, limit=2048)
        self.url = f"redis://127.0.0.1:{listening.getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self._is_over.set()
        for writer in self._open:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for writer in self._open), return_exceptions=True)
        await asyncio.gather(*self._serving)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.append(writer)
        self._serving.append(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        read = 0
        while data := await reader.read(2048):
            if b"HELLO" in data:  # the handshake
                writer.write(b"+OK\r\n")
                continue
            read += len(data)
            await asyncio.sleep(0.015)
            if read >= self._size:
                writer.write(b"+OK\r\n")
                break
            if self.is_stuck:
                await self._is_over.wait()
        await reader.read(1)
        writer.close()


@pytest.mark.parametrize("stuck", [False, True], ids=["slow", "silent"])
async def test_a_command_that_goes_out_slowly_is_waited_for_and_a_stuck_one_is_not(*, stuck: bool) -> None:
    """As a publisher's flush, or a large job, at 100 kB a second."""
    command = pack(b"SET", b"k", b"x" * 600_000)
    timeout = 3
    async with SlowServer(len(command)) as server, command_client(server.url, connections=2, timeout=timeout) as client:
        server.is_stuck = stuck
        connection = await PipelinedConnection.open(client.connection_pool)
        writes: list[asyncio.Future[Any]] = [
            connection.execute(command, 1),
            asyncio.ensure_future(client.set("k", "x" * 600_000)),
        ]
        for write in writes:
            if stuck:
                with pytest.raises(RedisTimeoutError):
                    await write
            else:
                assert await write
        await connection.close()


@pytest.mark.parametrize(
    "query",
    [
        "max_connections=1&timeout=0.01",
        "protocol=3",
        "decode_responses=yes&encoding=latin-1",
        "socket_timeout=0.0001&socket_connect_timeout=0.0001&retry_on_timeout=yes&health_check_interval=1",
    ],
)
async def test_options_of_the_url_that_the_worker_sets_itself_change_nothing(
    query: str, redis: Redis, redis_url: str, start_worker: StartWorker, simulator: Simulator
) -> None:
    url = f"{redis_url}?{query}"
    await start_worker(simulator, redis_url=url)
    messages = [{"role": "user", "content": "Who are you?"}]
    async with Client(url) as client:
        ids = await asyncio.gather(*(client.enqueue({"messages": messages}) for _ in range(30)))
        answers = await asyncio.gather(*map(client.result, ids))
    assert {answer.text for answer in answers} == {answer_to(messages)}

    async def acknowledged() -> bool:
        return all(not group["pending"] for group in await redis.xinfo_groups("chat:jobs"))

    await eventually(acknowledged)


async def test_a_closed_connection_has_no_unsent_bytes(redis_proxy: Proxy) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", redis_proxy.port)
    writer.transport.abort()
    await asyncio.sleep(0)  # the loop closes it in its next step
    assert unsent(writer.transport) == 0


async def test_a_cancel_is_not_lost_at_any_step_of_a_command(redis_url: str) -> None:
    async with command_client(redis_url) as redis:
        await redis.set("key", "no list", ex=60)
        for command, steps in product((redis.get, redis.llen), range(1, 20)):
            task = asyncio.ensure_future(command("key"))
            for _ in range(steps):
                await asyncio.sleep(0)
            is_cancelled = task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled() == is_cancelled, steps
            await redis.ping()
