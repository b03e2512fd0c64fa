"""What to do about an error of Redis or of the way to it: one table for the check, the commands and the log."""

import asyncio
import ssl
from contextlib import suppress

from redis import exceptions
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection
from redis.asyncio.sentinel import MasterNotFoundError

from .urls import parse_redis_url

MORE_ROOM = "give it more memory, or shorten WORKER_RETENTION"
_OF_A_REPLICA = "this is a replica: set REDIS_URL to its master, or to the sentinels that know it (redis+sentinel://…)"
_PLAIN = "this port has no TLS: begin REDIS_URL with redis, not rediss"
_SECURE = "this port wants TLS: begin REDIS_URL with rediss, not redis"
_TRUST = "trust who signed it: ?ssl_ca_certs=/path/to/ca.pem in REDIS_URL, or SSL_CERT_FILE in the environment"
_LOGIN = "put the password into REDIS_URL: redis://:PASSWORD@host:6379/0, or redis://USER:PASSWORD@…"

_ADVICE: tuple[tuple[type[Exception], str, str], ...] = (
    (exceptions.RedisError, "address mismatch", "name the server in REDIS_URL as its certificate does"),
    (exceptions.RedisError, "Hostname mismatch", "name the server in REDIS_URL as its certificate does"),
    (exceptions.RedisError, "CERTIFICATE_VERIFY_FAILED", _TRUST),
    (
        exceptions.RedisError, "CERTIFICATE_REQUIRED",
        "it wants a certificate of its client: ?ssl_certfile=/path&ssl_keyfile=/path in REDIS_URL",
    ),
    (exceptions.RedisError, "WRONG_VERSION_NUMBER", _PLAIN),
    (exceptions.RedisError, "RECORD_LAYER_FAILURE", _PLAIN),
    (exceptions.RedisError, "without any password", "leave the password out of REDIS_URL: there is none"),
    (exceptions.AuthenticationError, "", _LOGIN),
    (
        MasterNotFoundError, "unknown command",
        "no sentinel listens there: set REDIS_URL to the sentinels' port (26379), or begin it with redis://",
    ),
    (
        MasterNotFoundError, "no sentinel tells",
        "put the password of the sentinels into REDIS_URL: redis+sentinel://host/<master>?sentinel_password=PASSWORD",
    ),
    (
        MasterNotFoundError, "knows a master",
        "set REDIS_URL to the name that the sentinels have for it: redis+sentinel://host/<master>",
    ),
    (
        exceptions.NoPermissionError, "",
        "give the user that right (Rights in Redis, deploy/README.md): ACL SETUSER <user> +<command> ~<prefix>:*",
    ),
    (exceptions.RedisError, "DB index", "set REDIS_URL to a database that there is: 0 to 15, unless Redis has other"),
    (exceptions.RedisError, "cluster support disabled", "this is no cluster: begin REDIS_URL with redis://"),
    (exceptions.RedisError, "max number of clients", "raise its maxclients, or start fewer workers and clients"),
    (exceptions.RedisError, "protected mode", "give it a password, or let it listen on this machine alone"),
    (exceptions.RedisError, "not known", "is the name of the host right? set REDIS_URL"),
    (exceptions.BusyLoadingError, "", "wait: it reads its data from the disk, and then answers"),
    (exceptions.ReadOnlyError, "", _OF_A_REPLICA),
    (exceptions.MasterDownError, "", _OF_A_REPLICA),
    (exceptions.OutOfMemoryError, "", MORE_ROOM),
    (
        exceptions.ResponseError, "MISCONF",
        "give it room on its disk and the right to write there: its own log says what is wrong",
    ),
    (exceptions.ResponseError, "NOREPLICAS", "start its replicas, or lower its min-replicas-to-write"),
)  # fmt: skip
"""The first holds that is of the error's type and whose words are in it."""

_PATIENCE = 2.0
"""Seconds that a server has to show what it speaks."""


def advice_on(error: BaseException) -> str:
    """What to do about an error, or nothing where it says no more than that nobody answers."""
    return next((what for kind, words, what in _ADVICE if isinstance(error, kind) and words in str(error)), "")


async def advice_on_silence(url: str) -> str:
    """What to do about a Redis that does not answer: it is tried with TLS where REDIS_URL has none, and without it.

    Nothing where it does not answer so either.
    """
    place = parse_redis_url(url)
    kind = place.options.get("connection_class")
    if kind is UnixDomainSocketConnection:
        return ""
    secure = kind is SSLConnection
    here = (place.options.get("host", "localhost"), place.options.get("port", 6379))
    nodes = place.nodes or (here,)  # at once: a worker that starts waits for this
    other_way = await asyncio.gather(*(_answers(host, port, secure=not secure) for host, port in nodes))
    return (_PLAIN if secure else _SECURE) if any(other_way) else ""


async def _answers(host: str, port: int, *, secure: bool) -> bool:
    """Whether a Redis answers there, with TLS or without; nothing secret is sent, so nobody has to be trusted."""
    context = ssl.create_default_context() if secure else None
    if context:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(_PATIENCE):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                if secure:  # it may want a certificate before it answers
                    return True
                writer.write(b"PING\r\n")
                return (await reader.read(1)) in (b"+", b"-")
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError):
        return False
