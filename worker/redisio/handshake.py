"""The handshake of a new connection. It finds out why Redis closes a connection before it has read anything.

At its `maxclients`, and in protected mode, Redis sends the reason and closes the connection. redis-py 8.1 writes first,
so the write fails and the reason is lost: in 15 of 16 connections to Redis 6.2 and 7.0 (measured).
"""

import asyncio
from contextlib import suppress
from typing import cast

from redis._parsers.base import BaseParser
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

_REASON_TIMEOUT = 0.5
"""Seconds that Redis has to send the reason. It sends the reason in the step in which it accepts the connection."""


async def handshake(connection: AbstractConnection) -> None:
    """Log in and select the database, as redis-py does: the `redis_connect_func` of every connection.

    redis-py sends nothing if the URL has no login, name or database. HELLO then takes the place of its commands.

    Raises:
        RedisError: the reason that Redis sends for closing the connection, or else the error of redis-py.
    """
    try:
        await connection.on_connect()
        if not (connection.username or connection.password or connection.client_name or connection.db):
            await _wait_accepted(connection)
    except RedisConnectionError as error:
        if type(error) is not RedisConnectionError:  # a subclass, such as a refused login, has the reason
            raise
        raise await _reason_of_closing(connection) or error from None


async def _wait_accepted(connection: AbstractConnection) -> None:
    """Wait for a reply to HELLO, which no rule of an ACL refuses.

    An error may be the reason for which Redis closes the connection: only the next reply shows that it stays open.
    """
    for _ in range(2):
        await connection.send_command("HELLO", check_health=False)
        try:
            await connection.read_response()
        except ResponseError:  # or a proxy does not know HELLO
            continue
        except AuthenticationError as error:  # its text explains how HELLO can log in
            raise AuthenticationError("Authentication required.", status_code=error.status_code) from None
        return


async def _reason_of_closing(connection: AbstractConnection) -> RedisError | None:
    """Connect again and read before anything is written. None if Redis sends no reason or accepts the connection."""
    line = b""
    await connection.disconnect(nowait=True)
    try:
        await connection._connect()  # type: ignore[no-untyped-call]  # noqa: SLF001 - redis-py 8.1 has no other way
        reader = cast("asyncio.StreamReader", connection._reader)  # noqa: SLF001
        async with asyncio.timeout(_REASON_TIMEOUT):
            line = await reader.readline()
    except (RedisError, OSError):  # includes TimeoutError
        pass
    finally:
        with suppress(RedisError, OSError):
            await connection.disconnect(nowait=True)
    if not line.startswith(b"-"):
        return None
    reason = BaseParser.parse_error(line[1:].decode("utf-8", "replace").strip())  # type: ignore[no-untyped-call]
    return cast("RedisError", reason)
