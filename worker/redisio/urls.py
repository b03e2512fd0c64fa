"""Parses the URL of one Redis server, a master under Sentinel or a cluster into options of redis-py's connections.

This module does no I/O but to check that the files of TLS exist.
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

_PLAIN = re.compile(r"(redis|rediss|unix)://([^/?#]*)([^?#]*)(.*)", re.DOTALL)
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

_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS = frozenset(
    (*_FILES, "ssl_ca_data", "ssl_ca_path", "ssl_cert_reqs", "ssl_check_hostname", "ssl_ciphers",
     "ssl_exclude_verify_flags", "ssl_include_verify_flags", "ssl_min_version", "ssl_password")
)  # fmt: skip
_OF_SENTINELS = {"sentinel_username": "username", "sentinel_password": "password"}
_TAKEN = frozenset(("client_name", "db", "password", "username"))
_IGNORED = frozenset(
    ("decode_responses", "encoding", "encoding_errors", "health_check_interval", "legacy_responses", "lib_name",
     "lib_version", "max_connections", "protocol", "retry_on_error", "retry_on_timeout", "socket_connect_timeout",
     "socket_keepalive", "socket_read_size", "socket_timeout", "timeout")
)  # fmt: skip
"""Options of redis-py that another program may need in the same URL. The worker sets them itself: it could not read
replies with another protocol or decoding, and with a smaller pool jobs would wait for each other."""


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A parsed URL.

    `nodes` are some sentinels, or some nodes of the cluster. `options` are for the connections. `service` is the name
    of the master under Sentinel. `for_sentinels` is the login of the sentinels, where the URL has one of its own.
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
        ValueError: what is wrong, as the end of a sentence about the URL. The message quotes names of options and the
            database, and nothing else, because a URL may hold a password.
    """
    url = url.strip()  # one from a file often ends with a newline
    several, plain = _SEVERAL.fullmatch(url), _PLAIN.fullmatch(url)
    kind = several[2] if several else ""
    if several:
        scheme, _, place, path, rest = several.groups()
    elif plain:
        scheme, place, path, rest = plain.groups()
    else:
        raise ValueError(_MUST[kind])
    # A password that is not percent-encoded: the message must not quote it.
    if "@" in (rest if scheme == "unix" else path + rest) or "#" in rest:
        raise ValueError(_MUST[kind])
    given = _options(rest, secure=scheme == "rediss", kind=kind)
    nodes: tuple[tuple[str, int], ...] = ()
    query = urlencode({name: value for name, value in given.items() if name in _TAKEN | _TLS})
    try:
        if kind == "":
            db = "" if scheme == "unix" else _db(path)
            options = parse_url(f"{scheme}://{place}{path if scheme == 'unix' else f'/{db}'}?{query}")
            service = ""
        else:
            user, at, hosts = place.rpartition("@")
            nodes = tuple(_address(host, _PORTS[kind]) for host in hosts.split(","))
            service, db = _service_and_db(path) if kind == "sentinel" else ("", _no_db(path))
            options = parse_url(f"{scheme}://{user}{at}redis/{db}?{query}")
            del options["host"]
    except _SafeError:
        raise
    except ValueError as error:  # its message may quote a part of the password
        option = re.match(r"Invalid value for '(\w+)'", str(error))
        raise ValueError(f"has an invalid value for the option {option[1]}" if option else _MUST[kind]) from None
    accepted = cast("dict[str, Any]", options)
    _check_tls(accepted)
    return RedisUrl(
        "sentinel" if service else "cluster" if kind else "standalone",
        accepted,
        nodes,
        service,
        {_OF_SENTINELS[name]: value for name, value in given.items() if name in _OF_SENTINELS},
        tuple(sorted(given.keys() & _IGNORED)),
    )


class _SafeError(ValueError):
    """What is wrong with a URL, in a message without secrets."""


def _options(query: str, *, secure: bool, kind: str) -> dict[str, str]:
    """The options of a URL. Raises for unknown ones and for those without a value."""
    taken = {*_TAKEN, *(_TLS if secure else ()), *(_OF_SENTINELS if kind == "sentinel" else ())}
    if kind == "cluster":
        taken.remove("db")
    known = taken | _IGNORED
    given = dict(
        reversed(parse_qsl(query.removeprefix("?"), keep_blank_values=True))
    )  # as redis-py does: the first value counts
    for name, value in given.items():
        if name in _TLS and not secure:
            raise _SafeError(f"has the option {name}, which needs TLS: begin the URL with rediss, not redis")
        if name in ("ssl", "tls"):
            raise _SafeError(f"has the unknown option {name!r}: for TLS begin the URL with rediss, not redis")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(taken))}"
            raise _SafeError(f"has the unknown option {name[:40]!r}: {hint}")
        if not value:
            raise _SafeError(f"has the option {name} without a value")
    return given


def _db(path: str) -> str:
    found = re.fullmatch(r"/?([0-9]{0,9})/?", path)
    if found is None:
        raise _SafeError(
            f"ends in {unquote(path)[:40]!r}, which is not the number of a database, as in redis://127.0.0.1:6379/0"
        )
    return found[1]


def _check_tls(options: Mapping[str, Any]) -> None:
    """Check the files and options of TLS now: an error while connecting would look like a server that is away."""
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


def database_of(url: str) -> int:
    """The number of the database that a URL selects; 0 where the URL names none.

    Raises:
        ValueError: as `parse_redis_url` does.
    """
    return int(parse_redis_url(url).options.get("db") or 0)


def _address(host: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"redis://{host}")
    if not parts.hostname or parts.port == 0:
        raise ValueError
    return parts.hostname, parts.port or port


def _service_and_db(path: str) -> tuple[str, str]:
    name, slash, db = path.partition("/")
    if not name:
        raise ValueError
    return unquote(name), _db(db) if slash else ""


def _no_db(path: str) -> str:
    if path not in ("", "0"):
        raise ValueError
    return ""
