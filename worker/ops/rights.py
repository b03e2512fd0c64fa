"""The rights in Redis that a worker needs, and which of them a user lacks: those of `worker` in deploy/redis/users.acl.

Redis checks a user's rights before it checks a command's arguments. So each command is sent once in a form that has no
effect: with an id that no entry can have, or to a key that never exists. Other replies are ignored.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.keys import GROUP, Keys
from ..redisio.errors import is_permission_denied, is_unknown_command
from ..redisio.pipelined import PipelinedConnection, pack

_NOBODY = ".check"
"""A placeholder for a request id. Request ids have no dot, so its log and its tombstone never exist."""

_KEY_PATTERNS = {
    "@jobs": "jobs*", "@tokens": "tokens:*", "@ended": "ended:*", "@lifecycle": "lifecycle", "@dead": "dead",
    "@lifecycle_losses": "lost:*", "@workers": "workers", "@control": "control", "@queues": "queues", "@probe": "probe",
    "@feed": "feed:*", "@cancel": "cancel",
}  # fmt: skip
"""The patterns of keys and channels for the placeholders in probes, without the prefix, in the form of ACL SETUSER."""

_CONTAINERS = frozenset(("COMMAND", "MEMORY", "XGROUP", "XINFO"))
"""Commands of which a user may have the right to a single subcommand."""

# The consequences of missing rights.
_NO_FEED = "the feed is silent, and followers read the logs instead"
_NO_HINTS = "a cancel takes effect within two thirds of a lease, not at once"
_NO_RECORD = "neither this check nor the other workers see this worker"
_NO_CONTROL = "pauses of queues and drains have no effect on this worker"
_NO_CONTROL_HINTS = "pauses of queues and drains take effect with the next heartbeat, not at once"
_NO_QUEUE_NAMES = "the queues of this worker are not in the set of queues in use"
_NO_LIFECYCLE = "the lifecycle is not written"
_NO_BYTES = "the memory of the lifecycle is only estimated"
_NO_LOSSES = "nobody knows how many entries of the lifecycle a group has lost"
_NO_BURIAL = "jobs that should be buried stay pending until they can be"
_NO_WRITE_TEST = "jobs are taken while Redis takes no writes"
_NO_TAKE_OVER = "jobs of dead workers, and jobs that were handed over or wait for a server, are not continued"
_NO_TIDYING = "consumers of dead workers stay in the group"
_NO_TRIMMING = "the job streams are not trimmed, and the number of waiting jobs is unknown"


@dataclass(frozen=True, slots=True)
class _Probe:
    """A command in a form that has no effect. Words with an @ are placeholders for keys and channels.

    `without` is the consequence if a worker lacks the right; empty if no job can be done without the right.
    """

    words: str
    without: str = ""
    where: Literal["", "cluster", "replicas"] = ""
    """Where the command is used: in a cluster (from Redis 7 on), or with WORKER_WAIT_REPLICAS. Empty: everywhere."""


_PROBES = (
    _Probe("TIME"),
    _Probe("PING", _NO_HINTS),
    _Probe("INFO server", "version, memory and storage of Redis are not checked"),
    _Probe("EVALSHA none 1 @tokens"),
    _Probe("EVAL return 1 @tokens"),
    _Probe("XADD @tokens 0-0 type check"),
    _Probe("XRANGE @tokens 0-0 0-0"),
    _Probe("XREVRANGE @tokens 0-0 0-0"),
    _Probe("XLEN @tokens"),
    _Probe("XINFO STREAM @tokens"),
    _Probe("EXISTS @tokens"),
    _Probe("EXPIRE @tokens 1"),
    _Probe("PEXPIREAT @tokens 1"),
    _Probe("EXISTS @ended"),
    _Probe("SET @ended check XX EX 1"),
    _Probe("GET @ended"),
    _Probe("EXISTS @jobs"),
    _Probe("XRANGE @jobs 0-0 0-0"),
    _Probe("XLEN @jobs", _NO_TRIMMING),
    _Probe("XINFO GROUPS @jobs", _NO_TRIMMING),
    _Probe(f"XGROUP CREATE @jobs {GROUP} none"),
    _Probe(f"XREADGROUP GROUP {GROUP} {_NOBODY} COUNT 1 STREAMS @jobs none"),
    _Probe(f"XCLAIM @jobs {GROUP} {_NOBODY} 1000000 none"),
    _Probe(f"XPENDING @jobs {GROUP} 0-0 0-0 1"),
    _Probe(f"XACK @jobs {GROUP} 0-0"),
    _Probe("XTRIM @jobs MINID 0-0", _NO_TRIMMING),
    _Probe(f"XINFO CONSUMERS @jobs {GROUP}", _NO_TAKE_OVER),
    _Probe(f"XGROUP DELCONSUMER @jobs {GROUP} {_NOBODY}", _NO_TIDYING),
    _Probe("XADD @probe NOMKSTREAM 0-0 type check", _NO_WRITE_TEST),
    _Probe("XADD @lifecycle 0-0 type check", _NO_LIFECYCLE),
    _Probe("XLEN @lifecycle", _NO_LIFECYCLE),  # finds a key of another type
    _Probe("MEMORY USAGE @lifecycle", _NO_BYTES),
    _Probe(f"HINCRBY @lifecycle_losses {_NOBODY} none", _NO_LOSSES),
    _Probe("XADD @dead 0-0 type check", _NO_BURIAL),
    _Probe("XTRIM @dead MINID 0-0", _NO_BURIAL),
    _Probe("XREVRANGE @dead 0-0 0-0", _NO_BURIAL),
    _Probe(f"HSET @workers {_NOBODY} 1 {_NOBODY}", _NO_RECORD),  # the second field has no value
    _Probe(f"HDEL @workers {_NOBODY}", _NO_RECORD),
    _Probe("HGETALL @workers", _NO_RECORD),
    _Probe("HKEYS @workers", _NO_RECORD),
    _Probe("HGETALL @control", _NO_CONTROL),
    _Probe(f"HGET @control {_NOBODY}", "pauses that have ended stay in Redis"),
    _Probe(f"HDEL @control {_NOBODY}", "drains that were done and pauses that have ended stay in Redis"),
    _Probe("PUBLISH @feed []", _NO_FEED),
    _Probe("SPUBLISH @feed []", _NO_FEED, "cluster"),
    _Probe("COMMAND INFO SPUBLISH", _NO_FEED, "cluster"),
    _Probe("WAIT 0 0", where="replicas"),
    # Commands that change the state of the connection come last.
    _Probe("MULTI"),
    _Probe(f"SADD @queues {_NOBODY}", _NO_QUEUE_NAMES),
    _Probe("EXISTS"),  # with too few arguments, so that EXEC executes nothing
    _Probe("EXEC"),
    _Probe("SUBSCRIBE @cancel", _NO_HINTS),
    _Probe("SUBSCRIBE @control", _NO_CONTROL_HINTS),
)


@dataclass(frozen=True, slots=True)
class Missing:
    """A right that a user lacks, a command that this Redis lacks, or a key of another type.

    `name` is the right in the form of ACL SETUSER, the command, or the key. `without` is the consequence; empty if no
    job can be done.
    """

    kind: Literal["right", "command", "key"]
    name: str
    without: str = ""


async def find_missing(
    server: Redis, keys: Keys, queues: Iterable[str], *, cluster: bool, replicas: bool
) -> list[Missing]:
    """Try each command on a server of Redis, without an effect there.

    Raises:
        RedisError: when Redis does not answer.
    """
    used = {"", "cluster" if cluster else "", "replicas" if replicas else ""}
    probes = [probe for probe in _PROBES if probe.where in used]
    # After a subscription, replies may be mixed with messages, so each subscription has a connection of its own.
    alone = [[probe] for probe in probes if probe.words.startswith(("SUBSCRIBE", "SSUBSCRIBE"))]
    found: list[Missing | None] = []
    for group in [[probe for probe in probes if [probe] not in alone], *alone]:
        sent = [
            (probe, pack(*[_resolved(word, keys, queue).encode() for word in probe.words.split()]))
            for probe in group
            for queue in (queues if "@jobs" in probe.words else ("",))
        ]
        connection = await PipelinedConnection.open(server.connection_pool)
        try:
            replies = await connection.execute(b"".join([packed for _, packed in sent]), len(sent))
        finally:
            await connection.close()
        refusals = zip([probe for probe, _ in sent], replies[: len(sent)], strict=True)
        found += [_missing_by(probe, reply, keys) for probe, reply in refusals if isinstance(reply, ResponseError)]
    return list(dict.fromkeys(filter(None, found)))


def _missing_by(probe: _Probe, refusal: ResponseError, keys: Keys) -> Missing | None:
    command, *rest = probe.words.split()
    word = next((word for word in rest if word in _KEY_PATTERNS), "")
    pattern = f"{keys.prefix}:{_KEY_PATTERNS[word]}" if word else ""
    if is_unknown_command(refusal):  # the feed of a cluster is sharded only from Redis 7 on
        return None if probe.where == "cluster" else Missing("command", command, probe.without)
    if is_permission_denied(refusal):
        if found := re.search(r"access (?:one of the|an?|the) (key|channel)", str(refusal)):
            return Missing("right", f"{'~' if found[1] == 'key' else '&'}{pattern}", probe.without)
        name = f"{command}|{rest[0]}" if command in _CONTAINERS else command
        return Missing("right", f"+{name.lower()}", probe.without)
    if str(refusal).startswith("WRONGTYPE") and word in ("@lifecycle", "@dead", "@workers", "@control"):
        return Missing("key", pattern, probe.without)
    return None


def _resolved(word: str, keys: Keys, queue: str) -> str:
    """A word of a probe as it is sent: the key or channel of a placeholder, or the word itself."""
    match word:
        case "@jobs":
            return keys.jobs(queue)
        case "@tokens" | "@ended" | "@feed":
            return str(getattr(keys, word[1:])(_NOBODY))
        case _:
            return str(getattr(keys, word[1:])) if word in _KEY_PATTERNS else word
