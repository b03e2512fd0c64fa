"""Advice on errors of Redis and of connections to it: one table for `worker check`, the commands and the log."""

import asyncio
import ssl
from contextlib import suppress

from redis import exceptions
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection
from redis.asyncio.sentinel import MasterNotFoundError

from .urls import parse_redis_url

MORE_ROOM = "give Redis more memory, or shorten WORKER_RETENTION"
_REPLICA = "this is a replica: set REDIS_URL to its master, or to the sentinels that know it (redis+sentinel://…)"
_CLUSTER = "this is a cluster: begin REDIS_URL with redis+cluster:// (rediss+cluster:// for TLS)"
_PLAIN = "this port has no TLS: begin REDIS_URL with redis, not rediss"
_SECURE = "this port requires TLS: begin REDIS_URL with rediss, not redis"
_TRUST = (
    "trust the certificate's issuer: ?ssl_ca_certs=/path/to/ca.pem in REDIS_URL, or SSL_CERT_FILE in the environment"
)
_LOGIN = "put the password into REDIS_URL: redis://:PASSWORD@host:6379/0, or redis://USER:PASSWORD@…"
_WRONG_LOGIN = (
    "correct the password in REDIS_URL (redis://:PASSWORD@host:6379/0, or redis://USER:PASSWORD@…), "
    "or enable that user: ACL SETUSER <user> on"
)

_ADVICE: tuple[tuple[type[Exception], str, str], ...] = (
    (exceptions.RedisError, "address mismatch", "use the host name of the server's certificate in REDIS_URL"),
    (exceptions.RedisError, "Hostname mismatch", "use the host name of the server's certificate in REDIS_URL"),
    (exceptions.RedisError, "CERTIFICATE_VERIFY_FAILED", _TRUST),
    (
        exceptions.RedisError, "CERTIFICATE_REQUIRED",
        "Redis requires a client certificate: ?ssl_certfile=/path&ssl_keyfile=/path in REDIS_URL",
    ),
    (exceptions.RedisError, "WRONG_VERSION_NUMBER", _PLAIN),
    (exceptions.RedisError, "RECORD_LAYER_FAILURE", _PLAIN),
    (exceptions.RedisError, "without any password", "remove the password from REDIS_URL: the server has none"),
    (exceptions.AuthenticationError, "invalid username-password", _WRONG_LOGIN),
    (exceptions.AuthenticationError, "", _LOGIN),
    (
        MasterNotFoundError, "unknown command",
        "no sentinel listens there: set REDIS_URL to the sentinels' port (26379), or begin it with redis://",
    ),
    (
        MasterNotFoundError, "no sentinel names",
        "put the password of the sentinels into REDIS_URL: redis+sentinel://host/<master>?sentinel_password=PASSWORD",
    ),
    (
        MasterNotFoundError, "knows a master",
        "use the name that the sentinels have for the master in REDIS_URL: redis+sentinel://host/<master>",
    ),
    (
        exceptions.NoPermissionError, "",
        "give the user the rights of its line in deploy/redis/users.acl: ACL SETUSER <user> +<command> ~<prefix>:*",
    ),
    (exceptions.RedisError, "DB index", "set REDIS_URL to a database that exists: 0 to 15 by default"),
    (exceptions.MovedError, "", _CLUSTER),
    (exceptions.ClusterCrossSlotError, "", _CLUSTER),
    (exceptions.RedisError, "cluster support disabled", "this is no cluster: begin REDIS_URL with redis://"),
    (exceptions.RedisError, "max number of clients", "raise maxclients in Redis, or stop some of its clients"),
    (exceptions.RedisError, "protected mode", "give Redis a password, or bind it to this machine only"),
    (exceptions.RedisError, "not known", "check the name of the host in REDIS_URL"),
    (exceptions.BusyLoadingError, "", "wait until Redis has loaded its data from disk"),
    (exceptions.ReadOnlyError, "", _REPLICA),
    (exceptions.MasterDownError, "", _REPLICA),
    (exceptions.OutOfMemoryError, "", MORE_ROOM),
    (
        exceptions.ResponseError, "MISCONF",
        "give Redis space on its disk and permission to write there: the log of Redis has the reason",
    ),
    (
        exceptions.ResponseError, "WRONGTYPE",
        "another program wrote to a key of this prefix: remove its data, or choose another WORKER_PREFIX",
    ),
    (exceptions.ResponseError, "NOREPLICAS", "start the replicas of Redis, or lower its min-replicas-to-write"),
)  # fmt: skip
"""The type of an error, words in its message, and the advice. The first row that matches applies."""

_CLOSED = ("Connection lost", "closed by server", "reset by peer", "connection to Redis was lost", "Connection closed")

_PROBE_TIMEOUT = 2.0
"""Seconds that a server has to answer a probe."""


def advice_on(error: BaseException) -> str:
    """How to fix an error; empty if no row applies, as for a server that does not answer."""
    return next((advice for kind, words, advice in _ADVICE if isinstance(error, kind) and words in str(error)), "")


def advice_on_no_answer(error: BaseException) -> str:
    """How to fix a Redis that gives no answer, by how it gives none: for an error without other advice."""
    message = str(error)
    if isinstance(error, exceptions.TimeoutError) and "connecting" not in message:
        return (
            "Redis accepts connections and is silent: look for a slow command (SLOWLOG), swapping or a stopped process"
        )
    if isinstance(error, exceptions.TimeoutError):
        return "check the host and the port in REDIS_URL, and the firewalls on the way"
    if any(words in message for words in _CLOSED):
        return "it closes connections at once: check that REDIS_URL is the port of Redis, and the maxclients of Redis"
    return "start Redis there, or set REDIS_URL"


async def advice_on_silence(url: str) -> str:
    """How to fix a Redis that does not answer because REDIS_URL has TLS and the server does not, or the reverse.

    All servers are probed at the same time for up to 2 s: with TLS if REDIS_URL has no TLS, else without. The result is
    empty if no server answers the probe.
    """
    parsed = parse_redis_url(url)
    connection_class = parsed.options.get("connection_class")
    if connection_class is UnixDomainSocketConnection:
        return ""
    is_secure = connection_class is SSLConnection
    server = (parsed.options.get("host", "localhost"), parsed.options.get("port", 6379))
    nodes = parsed.nodes or (server,)
    answers = await asyncio.gather(*(_answers(host, port, secure=not is_secure) for host, port in nodes))
    return (_PLAIN if is_secure else _SECURE) if any(answers) else ""


async def _answers(host: str, port: int, *, secure: bool) -> bool:
    """Whether a Redis answers at an address. The probe sends nothing secret, so it accepts any certificate."""
    context = ssl.create_default_context() if secure else None
    if context:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                if secure:  # the server may require a client certificate before it answers
                    return True
                writer.write(b"PING\r\n")
                return (await reader.read(1)) in (b"+", b"-")
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError):
        return False
