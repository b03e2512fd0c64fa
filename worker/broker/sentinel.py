"""Redis under Sentinel as one client: every new connection goes to what the sentinels call the master."""

from typing import Any, cast

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool, SentinelManagedConnection
from redis.exceptions import ConnectionError as RedisConnectionError

from worker.broker.urls import RedisUrl

_ASK_TIMEOUT = 1.0
"""Seconds that one sentinel has to answer; then the next is asked."""


class SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Waits for a free connection, as the pool of a single server does: redis-py's own fails where there is none."""

    async def get_master_address(self) -> tuple[str, int]:
        """Ask the sentinels.

        Raises:
            MasterNotFoundError: in words for people: redis-py's quotes its connections.
        """
        try:
            return cast("tuple[str, int]", await super().get_master_address())  # type: ignore[no-untyped-call]  # so in redis-py
        except MasterNotFoundError:
            raise MasterNotFoundError(f"no sentinel that answers knows a master {self.service_name!r}") from None

    async def aclose(self) -> None:
        """Close every connection, those to the sentinels too."""
        await super().aclose()
        await self.sentinel_manager.aclose()


class _MasterConnection(SentinelManagedConnection):
    """Asks the server itself as well: a sentinel may still name the former master, whose data is old."""

    async def connect_to(self, address: tuple[str, int]) -> None:
        await super().connect_to(address)  # type: ignore[no-untyped-call]  # here and below: redis-py 8.1 has no types
        await self.send_command("ROLE")
        role = await self.read_response()
        if role[0] != b"master":
            await self.disconnect()
            raise RedisConnectionError(f"{address[0]}:{address[1]} is no master any more")


class _SecureMasterConnection(_MasterConnection, SSLConnection):
    pass


def sentinel_pool(url: RedisUrl, **options: Any) -> SentinelPool:  # noqa: ANN401 - whatever connections take
    """A pool of connections to the master; the sentinels are asked without the user's name and password."""
    given = options | dict(url.options)
    secure = given.pop("connection_class", None) is SSLConnection
    shared = {name: value for name, value in given.items() if name.startswith("ssl_") or name in ("protocol", "retry")}
    limits = {"socket_timeout": _ASK_TIMEOUT, "socket_connect_timeout": _ASK_TIMEOUT}
    sentinels = Sentinel(  # type: ignore[no-untyped-call]
        url.nodes, sentinel_kwargs={**shared, **limits, "ssl": secure}
    )
    kind = _SecureMasterConnection if secure else _MasterConnection
    return SentinelPool(  # type: ignore[no-untyped-call]
        url.service, sentinels, connection_class=kind, **given
    )
