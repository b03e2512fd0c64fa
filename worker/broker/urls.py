"""The URLs of Redis: one server, Sentinel's master or a cluster, read into what redis-py's connections take."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast
from urllib.parse import unquote, urlsplit

from redis.asyncio.connection import parse_url

from worker.contract.keys import Keys

_PLAIN = ("redis://", "rediss://", "unix://")
_SEVERAL = re.compile(r"(rediss?)\+(sentinel|cluster)://([^/?#]*)/?([^?#]*)(.*)", re.DOTALL)
_PORTS = {"sentinel": 26379, "cluster": 6379}
_MUST = {
    "": (
        "must be a URL such as redis://127.0.0.1:6379/0, rediss://… or unix:///path, "
        "redis+sentinel://host,host2/<master name> or redis+cluster://host,host2"
    ),
    "sentinel": "must be like redis+sentinel://user:password@host:26379,host2:26379/<master name>/0",
    "cluster": "must be like redis+cluster://user:password@host:7000,host2:7001, without a database",
}


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """Where Redis is: `nodes` are some sentinels, or some nodes of the cluster; `options` is for the connections.

    `service` is what the sentinels call the master.
    """

    kind: Literal["standalone", "sentinel", "cluster"]
    options: Mapping[str, Any]
    nodes: tuple[tuple[str, int], ...] = ()
    service: str = ""


def parse_redis_url(url: str) -> RedisUrl:
    """Read a URL.

    Raises:
        ValueError: what it must be like. Nothing of the URL is in the text: it may hold a password.
    """
    several = _SEVERAL.fullmatch(url)
    kind = several[2] if several else ""
    if not several and not url.startswith(_PLAIN):
        raise ValueError(_MUST[kind])
    try:
        if several is None:
            return RedisUrl("standalone", parse_url(url))
        scheme, _, place, path, query = several.groups()
        user, at, hosts = place.rpartition("@")
        nodes = tuple(_address(host, _PORTS[kind]) for host in hosts.split(","))
        service, db = _service_and_db(path) if kind == "sentinel" else ("", _no_db(path))
        options = cast("dict[str, Any]", parse_url(f"{scheme}://{user}{at}redis/{db}{query}"))
    except ValueError:  # its text may quote a part of the password
        raise ValueError(_MUST[kind]) from None
    del options["host"]
    return RedisUrl("sentinel" if service else "cluster", options, nodes, service)


def keys_at(url: str, prefix: str) -> Keys:
    """The keys of an installation at a Redis.

    Raises:
        ValueError: as `parse_redis_url` does.
    """
    return Keys(prefix, int(parse_redis_url(url).options.get("db") or 0))


def _address(host: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"redis://{host}")
    if not parts.hostname or parts.port == 0:
        raise ValueError
    return parts.hostname, parts.port or port


def _service_and_db(path: str) -> tuple[str, str]:
    found = re.fullmatch(r"([^/]+)(?:/(\d*))?", path)
    if found is None:
        raise ValueError
    return unquote(found[1]), found[2] or ""


def _no_db(path: str) -> str:
    if path not in ("", "0"):
        raise ValueError
    return ""
