"""The clients of Redis: one that sends each command once, and one for blocking reads.

Every connection of the project is made by one of these. This module uses private parts of redis-py.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from redis import exceptions
from redis._parsers.hiredis import _AsyncHiredisParser
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from .cluster import ClusterClient, ClusterPool
from .handshake import handshake
from .sentinel import sentinel_pool
from .unsent import unsent
from .urls import parse_redis_url

_T = TypeVar("_T")

OLDEST = (6, 2)
"""The oldest version of Redis that has every command in use."""

COMMAND_TIMEOUT = 5.0
"""Seconds of silence after which a command fails. The limit starts again with each piece of a reply."""

_MAX_CONNECTIONS = 64
_NO_LIMIT = 2**31


def command_client(url: str, *, connections: int = _MAX_CONNECTIONS, timeout: float = COMMAND_TIMEOUT) -> Redis:
    """A client that sends each command once.

    By default redis-py 8 resends a command whose reply was lost, up to ten times: a plain XADD then adds two entries,
    and Redis refuses the written entries of a repeated MULTI with `equal or smaller`. With this client the caller
    decides which commands to retry.

    Args:
        url: the URL of Redis.
        connections: how many are open at once. Callers wait for a free one, so more commands at once do not fail.
        timeout: seconds of silence after which a command, or connecting, fails.

    Raises:
        ValueError: when the URL is not valid.
    """
    return _client(url, timeout=timeout, connections=connections)


def blocking_client(url: str, block: float, *, timeout: float = COMMAND_TIMEOUT) -> Redis:
    """A client for reads that block up to `block` seconds: redis-py's own limit of 5 s would end longer ones.

    A read fails after `timeout` seconds more.

    Raises:
        ValueError: when the URL is not valid.
    """
    return _client(url, timeout=timeout, block=block, connections=_NO_LIMIT)


class _NoRetry(Retry):
    """Runs every command of a connection once, without a retry.

    uvloop 0.22 raises a RuntimeError for a connection that is lost during a write, and redis-py 8.1 does not map the
    error, which once ended a worker. This class maps it to the error of a lost connection.

    redis-py sends in an `asyncio.wait_for`, which on Python 3.11 ignores a cancel that arrives once the send is done.
    The task then went on, and who waited for its end waited in vain. This class raises the cancel after the command.
    """

    async def call_with_retry(self, do: Callable[[], Awaitable[_T]], *args: Any, **options: Any) -> _T:  # noqa: ANN401 - redis-py's
        task = asyncio.current_task()
        cancels = task.cancelling() if task else 0

        async def mapped() -> _T:
            try:
                return await do()
            except RuntimeError as error:
                if "closed" not in str(error):
                    raise
                raise exceptions.ConnectionError("Connection closed while it was written to.") from error
            finally:
                if task and task.cancelling() > cancels:
                    raise asyncio.CancelledError

        return await super().call_with_retry(mapped, *args, **options)


class _SilenceLimitParser(_AsyncHiredisParser):
    """Restarts the time limit of a read with each piece that arrives, and while a large command is still being sent.

    The limit of redis-py 8.1 covers a whole reply: on a slow network it cut off a large reply each time, and the caller
    retried forever. Every kind of connection uses this parser: plain, TLS, under Sentinel and in a cluster.
    """

    _connection: AbstractConnection | None = None

    def on_connect(self, connection: AbstractConnection) -> None:
        self._connection = connection
        super().on_connect(connection)  # type: ignore[no-untyped-call]  # here and below: redis-py 8.1 has no types

    def on_disconnect(self) -> None:
        self._connection = None
        super().on_disconnect()  # type: ignore[no-untyped-call]

    async def read_from_socket(self) -> bool:
        connection = self._connection
        writer = connection and connection._writer  # noqa: SLF001 - here and below: no other way in 8.1
        limit = connection and connection.socket_timeout
        sending = None
        if writer and limit and unsent(writer.transport):
            sending = asyncio.ensure_future(self._extend_while_sending(writer.transport, limit))
        try:
            await super().read_from_socket()  # type: ignore[no-untyped-call]
        finally:
            if sending is not None:
                sending.cancel()
        self._extend_limit()
        return True

    async def _extend_while_sending(self, transport: asyncio.WriteTransport, limit: float) -> None:
        left = unsent(transport)
        while True:
            await asyncio.sleep(limit / 2)
            before, left = left, unsent(transport)
            if not 0 < left < before:
                return
            with suppress(RuntimeError):  # the limit has expired meanwhile, because the event loop was blocked
                self._extend_limit()

    def _extend_limit(self) -> None:
        connection = self._connection
        if connection is not None:
            connection._reschedule_active_read_timeout(connection.socket_timeout)  # noqa: SLF001


def _client(url: str, *, timeout: float, block: float = 0.0, connections: int) -> Redis:
    parsed = parse_redis_url(url)
    options: dict[str, Any] = {
        **parsed.options,
        "protocol": 2,  # replies of protocol 3 have other shapes, and none of its features is needed
        "retry": _NoRetry(NoBackoff(), 0),
        "parser_class": _SilenceLimitParser,
        "redis_connect_func": handshake,
        "driver_info": None,  # no CLIENT SETINFO, which Redis refuses to most users and then records in its ACL LOG
        "socket_connect_timeout": timeout,
        "socket_timeout": block + timeout,
        "max_connections": connections,
        "timeout": None,
    }
    if parsed.kind == "sentinel":
        return Redis.from_pool(sentinel_pool(parsed, **options))
    if parsed.kind == "cluster":
        return ClusterClient.from_pool(ClusterPool(parsed.nodes, **options))
    return Redis.from_pool(BlockingConnectionPool(**options))
