"""A client for Redis under Sentinel: every new connection is to the master that the sentinels report."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool, SentinelManagedConnection
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from .shared_call import SharedCall
from .urls import RedisUrl

_SENTINEL_TIMEOUT = 1.0
"""Seconds that a sentinel has to answer before the next one is queried."""


class SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Waits for a free connection, as the pool of a single server does. redis-py's own pool raises an error instead."""

    async def aclose(self) -> None:
        """Close every connection, including those to the sentinels."""
        await super().aclose()
        await self.sentinel_manager.aclose()


class _MasterConnection(SentinelManagedConnection):
    """Checks the role of the server, since a sentinel may still report the former master, whose data is old."""

    async def connect_to(self, address: tuple[str, int]) -> None:
        await super().connect_to(address)  # type: ignore[no-untyped-call]  # here and below: redis-py 8.1 has no types
        await self.send_command("ROLE")
        role = await self.read_response()
        if role[0] != b"master":
            await self.disconnect()
            raise RedisConnectionError(f"{address[0]}:{address[1]} is no longer the master")


class _SecureMasterConnection(_MasterConnection, SSLConnection):
    pass


class _Sentinels(Sentinel):
    """The sentinels of a URL, each once for every login. The one that answered last is queried first."""

    def __init__(self, nodes: Sequence[tuple[str, int]], logins: Iterable[Mapping[str, Any]], **options: Any) -> None:  # noqa: ANN401 - any option of a connection
        super().__init__([], sentinel_kwargs=options)  # type: ignore[no-untyped-call]
        self._queries: dict[str, SharedCall[tuple[str, int]]] = {}
        self.sentinels = [Redis(host=host, port=port, **options, **login) for login in logins for host, port in nodes]

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """The address of the master, from the first sentinel that knows it.

        If one sentinel refuses, another may answer, so all of them are queried before this fails. Callers at the same
        time share one query: after a failover, a client opens all of its connections at once.

        Raises:
            MasterNotFoundError: with the last refusal in its message. redis-py's own message quotes its connections.
        """
        if service_name not in self._queries:
            self._queries[service_name] = SharedCall(partial(self._query_sentinels, service_name))
        return await self._queries[service_name]()

    async def _query_sentinels(self, service_name: str) -> tuple[str, int]:
        refused = silent = ""
        has_answer = False
        for sentinel in list(self.sentinels):
            try:
                masters = cast("dict[str, dict[str, Any]]", await sentinel.sentinel_masters())
            except (AuthenticationError, ResponseError) as refusal:
                refused = f"no sentinel names the master {service_name!r}: {refusal.status_code or ''} {refusal}"
            except (RedisError, OSError) as error:
                silent = f"no sentinel answers: {error}"
            else:
                has_answer = True
                state = masters.get(service_name)
                if state and self.check_master_state(state, service_name):
                    self.sentinels.remove(sentinel)
                    self.sentinels.insert(0, sentinel)
                    return state["ip"], state["port"]
        unknown = f"no sentinel that answers knows a master {service_name!r}"
        raise MasterNotFoundError(unknown if has_answer else refused or silent)


def sentinel_pool(url: RedisUrl, **options: Any) -> SentinelPool:  # noqa: ANN401 - any option of a connection
    """A pool of connections to the master.

    The sentinels get the user name and password that the URL has for them. Without these they are queried first with
    no login, and then with the master's.
    """
    secure = options.pop("connection_class", None) is SSLConnection
    of_both = ("ssl_", "protocol", "retry", "driver_info")
    shared = {name: value for name, value in options.items() if name.startswith(of_both)}
    limits = {"socket_timeout": _SENTINEL_TIMEOUT, "socket_connect_timeout": _SENTINEL_TIMEOUT}
    master_login = {name: url.options[name] for name in ("username", "password") if name in url.options}
    logins: list[Mapping[str, Any]] = (
        [url.for_sentinels] if url.for_sentinels else [{}, master_login] if master_login else [{}]
    )
    sentinels = _Sentinels(url.nodes, logins, **shared, **limits, ssl=secure)
    connection_class = _SecureMasterConnection if secure else _MasterConnection
    return SentinelPool(  # type: ignore[no-untyped-call]
        url.service, sentinels, connection_class=connection_class, **options
    )
