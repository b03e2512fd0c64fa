"""Parses the URL of one Redis server, a master under Sentinel or a cluster into options of redis-py's connections.

This module does no I/O, except that it loads the files of TLS to check them.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from redis.asyncio.connection import SSLConnection, parse_url
from redis.exceptions import RedisError

_SINGLE_HOST = re.compile(r"(redis|rediss|unix)://([^/?#]*)([^?#]*)(.*)", re.DOTALL)
_MULTI_HOST = re.compile(r"(rediss?)\+(sentinel|cluster)://([^/?#]*)/?([^?#]*)(.*)", re.DOTALL)
_PORTS = {"sentinel": 26379, "cluster": 6379}
_EXPECTED = {
    "": (
        "must be a URL such as redis://127.0.0.1:6379/0, rediss://… or unix:///path, "
        "redis+sentinel://host,host2/<master name> or redis+cluster://host,host2"
    ),
    "sentinel": "must be like redis+sentinel://user:password@host:26379,host2:26379/<master name>/0",
    "cluster": "must be like redis+cluster://user:password@host:7000,host2:7001, without a database",
}

_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS = frozenset(
    (*_FILES, "ssl_ca_data", "ssl_ca_path", "ssl_cert_reqs", "ssl_check_hostname", "ssl_ciphers",
     "ssl_exclude_verify_flags", "ssl_include_verify_flags", "ssl_min_version", "ssl_password")
)  # fmt: skip
_SENTINEL_LOGIN = {"sentinel_username": "username", "sentinel_password": "password"}
_ACCEPTED = frozenset(("client_name", "db", "password", "username"))
_IGNORED = frozenset(
    ("decode_responses", "encoding", "encoding_errors", "health_check_interval", "legacy_responses", "lib_name",
     "lib_version", "max_connections", "protocol", "retry_on_error", "retry_on_timeout", "socket_connect_timeout",
     "socket_keepalive", "socket_read_size", "socket_timeout", "timeout")
)  # fmt: skip
"""Options of redis-py that another program may need in the same URL. The worker sets them itself: it cannot read
replies in another protocol or decoding, and with a smaller pool jobs would wait for each other."""


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A parsed URL.

    `nodes` are some sentinels, or some nodes of the cluster. `options` are for the connections. `service` is the name
    of the master under Sentinel. `for_sentinels` is the login of the sentinels, if the URL has a separate one.
    `ignored` are options of the URL that have no effect.
    """

    kind: Literal["standalone", "sentinel", "cluster"]
    options: Mapping[str, Any]
    nodes: tuple[tuple[str, int], ...] = ()
    service: str = ""
    for_sentinels: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def parse_redis_url(url: str) -> RedisUrl:
    """Parse a URL.

    Raises:
        ValueError: when the URL is not valid. The message is the end of a sentence about the URL. It quotes only names
            of options and the database, because a URL may hold a password.
    """
    url = url.strip()  # a URL from a file often ends with a newline
    multi_host, single = _MULTI_HOST.fullmatch(url), _SINGLE_HOST.fullmatch(url)
    kind = multi_host[2] if multi_host else ""
    if multi_host:
        scheme, _, authority, path, rest = multi_host.groups()
    elif single:
        scheme, authority, path, rest = single.groups()
    else:
        raise ValueError(_EXPECTED[kind])
    # A password that is not percent-encoded: the message must not quote it.
    if "@" in (rest if scheme == "unix" else path + rest) or "#" in rest:
        raise ValueError(_EXPECTED[kind])
    given = _options(rest, secure=scheme == "rediss", kind=kind)
    query = urlencode({name: value for name, value in given.items() if name in _ACCEPTED | _TLS})
    if (kind == "sentinel" and path[:1] in ("", "/")) or (kind == "cluster" and path not in ("", "0")):
        raise ValueError(_EXPECTED[kind])  # without the name of a master, or with a database
    nodes: tuple[tuple[str, int], ...] = ()
    service = database = ""
    try:
        if kind:
            user, at, hosts = authority.rpartition("@")
            nodes = tuple(_address(host, _PORTS[kind]) for host in hosts.split(","))
            if kind == "sentinel":
                name, slash, number = path.partition("/")
                service, database = unquote(name), _database(number) if slash else ""
            options = parse_url(f"{scheme}://{user}{at}redis/{database}?{query}")
            del options["host"]
        else:
            place = path if scheme == "unix" else f"/{_database(path)}"
            options = parse_url(f"{scheme}://{authority}{place}?{query}")
    except _SafeError:
        raise
    except ValueError as error:  # its message may quote a part of the password
        option = re.match(r"Invalid value for '(\w+)'", str(error))
        reason = f"has an invalid value for the option {option[1]}" if option else _EXPECTED[kind]
        raise ValueError(reason) from None
    accepted = cast("dict[str, Any]", options)
    _check_tls(accepted)
    return RedisUrl(
        "sentinel" if service else "cluster" if kind else "standalone",
        accepted,
        nodes,
        service,
        {_SENTINEL_LOGIN[name]: value for name, value in given.items() if name in _SENTINEL_LOGIN},
        tuple(sorted(given.keys() & _IGNORED)),
    )


def database_of(url: str) -> int:
    """The number of the database that a URL selects; 0 if the URL has none.

    Raises:
        ValueError: as `parse_redis_url` does.
    """
    return int(parse_redis_url(url).options.get("db") or 0)


class _SafeError(ValueError):
    """A URL is not valid. The message has no secrets."""


def _options(query: str, *, secure: bool, kind: str) -> dict[str, str]:
    """The options of a URL.

    Raises:
        _SafeError: for an unknown option, and for an option without a value.
    """
    accepted = {*_ACCEPTED, *(_TLS if secure else ()), *(_SENTINEL_LOGIN if kind == "sentinel" else ())}
    if kind == "cluster":
        accepted.remove("db")
    known = accepted | _IGNORED
    pairs = parse_qsl(query.removeprefix("?"), keep_blank_values=True)
    given = dict(reversed(pairs))  # the first value of an option counts, as in redis-py
    for name, value in given.items():
        if name in _TLS and not secure:
            raise _SafeError(f"has the option {name}, which needs TLS: begin the URL with rediss, not redis")
        if name in ("ssl", "tls"):
            raise _SafeError(f"has the unknown option {name!r}: for TLS begin the URL with rediss, not redis")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(accepted))}"
            raise _SafeError(f"has the unknown option {name[:40]!r}: {hint}")
        if not value:
            raise _SafeError(f"has the option {name} without a value")
    return given


def _database(path: str) -> str:
    found = re.fullmatch(r"/?([0-9]{0,9})/?", path)
    if found is None:
        raise _SafeError(
            f"ends in {unquote(path)[:40]!r}, which is not the number of a database, as in redis://127.0.0.1:6379/0"
        )
    return found[1]


def _check_tls(options: Mapping[str, Any]) -> None:
    """Check the files and options of TLS now, since an error during a connect would look like a server that is away."""
    tls = {name: value for name, value in options.items() if name in _TLS}
    if not tls:
        return
    for name in _FILES:
        if name in options and not Path(options[name]).is_file():
            raise _SafeError(f"has the option {name}, but that file does not exist")
    try:
        SSLConnection(**tls).ssl_context.get()
    except (RedisError, OSError, ValueError, TypeError) as error:
        why = str(error) if isinstance(error, RedisError) else getattr(error, "reason", None) or type(error).__name__
        raise _SafeError(f"has invalid options of TLS: {why}") from None


def _address(host: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"redis://{host}")
    if not parts.hostname or parts.port == 0:
        raise ValueError
    return parts.hostname, parts.port or port
