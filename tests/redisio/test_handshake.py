"""The handshake: a connection that Redis closes at once has Redis's reason, not that of a failed write."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from waits import eventually

from worker.redisio.advice import advice_on
from worker.redisio.clients import blocking_client, command_client
from worker.redisio.errors import is_connection_refused
from worker.sandbox.embedded_redis import free_port, start_redis


@pytest.fixture
async def full_redis(redis: Redis) -> AsyncIterator[None]:
    """A Redis that accepts no more clients."""
    before = str((await redis.config_get("maxclients"))["maxclients"])
    await redis.config_set("maxclients", 1)
    yield
    await redis.config_set("maxclients", before)


@pytest.mark.usefixtures("full_redis")
@pytest.mark.parametrize("database", ["0", "5"])
async def test_at_maxclients_every_connection_fails_with_that_reason(redis_url: str, database: str) -> None:
    url = f"{redis_url[:-1]}{database}"
    for redis in (command_client(url), blocking_client(url, 1)):
        for _ in range(10):
            with pytest.raises(RedisConnectionError, match="max number of clients reached") as refusal:
                await redis.ping()
            assert is_connection_refused(refusal.value)
            assert "maxclients" in advice_on(refusal.value)
        await redis.aclose()


@pytest.mark.parametrize(
    ("greeting", "message", "is_refusal"),
    [
        (b"-DENIED Redis is running in protected mode because\r\n", "protected mode", True),
        (b"-ERR max number of clients + cluster connections reached\r\n", "max number of clients", True),
        (b"", "Connection|writing", False),
    ],
)
async def test_a_connection_that_is_closed_at_once_has_the_reason_if_there_is_one(
    greeting: bytes, message: str, *, is_refusal: bool
) -> None:
    closed = []

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()
        closed.append(writer)

    async def all_are_closed() -> bool:
        return bool(greeting) or len(closed) == 2  # without a reason, one more connection is made to read it

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        redis = command_client(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(RedisError, match=message) as refusal:
            await redis.ping()
        assert is_connection_refused(refusal.value) is is_refusal
        await redis.aclose()
        await eventually(all_are_closed)


@pytest.mark.parametrize("login", ["", "modest:x@"])
async def test_a_new_connection_sends_nothing_that_its_user_has_no_right_to(login: str, redis_binary: Path) -> None:
    rules = "reset", "on", ">x", "~*", "+get"
    with start_redis(redis_binary, "--user", "admin", "on", ">x", "~*", "&*", "+@all") as server:
        async with command_client(server.url.replace("//", "//admin:x@")) as admin:
            for user in (("modest", *rules), ("default", *rules, "nopass")):
                await admin.execute_command("ACL SETUSER", *user)  # type: ignore[no-untyped-call]  # so in redis-py 8.1
            async with command_client(server.url.replace("//", f"//{login}")) as redis:
                assert await redis.get("k") is None
            assert await admin.acl_log() == []


async def test_a_server_that_does_not_know_the_command_of_the_handshake_is_used() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1024):
            writer.write(b"+PONG\r\n" if b"PING" in data else b"-ERR unknown command\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        redis = command_client(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        assert await redis.ping()
        await redis.aclose()


async def test_where_nothing_listens_the_error_says_so() -> None:
    redis = command_client(f"redis://127.0.0.1:{free_port()}")
    with pytest.raises(RedisConnectionError, match="Connect") as error:
        await redis.ping()
    assert not is_connection_refused(error.value)
    await redis.aclose()
