"""Redis under Sentinel as one client: every new connection goes to what the sentinels call the master."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool, SentinelManagedConnection
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from .urls import RedisUrl

_ASK_TIMEOUT = 1.0
"""Seconds that one sentinel has to answer; then the next is asked."""


class SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Waits for a free connection, as the pool of a single server does: redis-py's own fails where there is none."""

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


class _Sentinels(Sentinel):
    """The sentinels of a URL, each once for every way to log in there: the one that answered is asked first again."""

    def __init__(self, nodes: Sequence[tuple[str, int]], logins: Iterable[Mapping[str, Any]], **options: Any) -> None:  # noqa: ANN401 - whatever connections take
        super().__init__([], sentinel_kwargs=options)  # type: ignore[no-untyped-call]
        self.sentinels = [Redis(host=host, port=port, **options, **login) for login in logins for host, port in nodes]

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Ask one after another. Another one may answer where one refuses, so all are asked before it is said.

        Raises:
            MasterNotFoundError: in words for people, with what was refused: redis-py's quotes its connections.
        """
        refused = silent = ""
        answered = False
        for sentinel in list(self.sentinels):  # others may move one to the front meanwhile
            try:
                masters = cast("dict[str, dict[str, Any]]", await sentinel.sentinel_masters())
            except (AuthenticationError, ResponseError) as refusal:
                refused = (
                    f"no sentinel tells where the master {service_name!r} is: {refusal.status_code or ''} {refusal}"
                )
            except (RedisError, OSError) as error:
                silent = f"no sentinel answers: {error}"
            else:
                answered = True
                state = masters.get(service_name)
                if state and self.check_master_state(state, service_name):
                    self.sentinels.remove(sentinel)
                    self.sentinels.insert(0, sentinel)
                    return state["ip"], state["port"]
        unknown = f"no sentinel that answers knows a master {service_name!r}"
        raise MasterNotFoundError(unknown if answered else refused or silent)


def sentinel_pool(url: RedisUrl, **options: Any) -> SentinelPool:  # noqa: ANN401 - whatever connections take
    """A pool of connections to the master.

    The sentinels are asked with the name and password that the URL has for them. Where it has none they are asked
    without, and then, if they want a password, with the master's.
    """
    secure = options.pop("connection_class", None) is SSLConnection
    shared = {name: value for name, value in options.items() if name.startswith(("ssl_", "protocol", "retry"))}
    limits = {"socket_timeout": _ASK_TIMEOUT, "socket_connect_timeout": _ASK_TIMEOUT}
    masters = {name: url.options[name] for name in ("username", "password") if name in url.options}
    logins: list[Mapping[str, Any]] = [url.for_sentinels] if url.for_sentinels else [{}, masters] if masters else [{}]
    sentinels = _Sentinels(url.nodes, logins, **shared, **limits, ssl=secure)
    kind = _SecureMasterConnection if secure else _MasterConnection
    return SentinelPool(  # type: ignore[no-untyped-call]
        url.service, sentinels, connection_class=kind, **options
    )
