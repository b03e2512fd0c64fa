"""What a user of Redis needs for a worker and for a client, and what of it is missing.

Redis looks at a user's rights before it looks at a command's arguments. So each command is sent once in a way that does
nothing: with an id that no entry can have, or to a key that is never there. What else Redis says of it does not matter.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.keys import GROUP, Keys
from ..redisio.errors import is_permission_denied, is_unknown_command
from ..redisio.pipelined import PipelinedConnection, pack

Role: TypeAlias = Literal["worker", "client"]
_W: frozenset[Role] = frozenset(("worker",))
_C: frozenset[Role] = frozenset(("client",))
_BOTH = _W | _C

_NOBODY = ".check"
"""In the place of a request id, which has no dot: its log and its tombstone are never there."""

_PATTERNS = {
    "@jobs": "jobs*", "@tokens": "tokens:*", "@ended": "ended:*", "@lifecycle": "lifecycle", "@dead": "dead",
    "@workers": "workers", "@probe": "probe", "@feed": "feed:*", "@cancel": "cancel",
}  # fmt: skip
"""What a word of a probe stands for, behind the prefix, as ACL SETUSER takes it."""

_FEED = "the feed is silent, and followers read the logs instead"
_HINTS = "a cancel takes effect within two thirds of a lease, not at once"
_SEEN = "nobody sees this worker, neither this check nor the other workers"
_TOLD = "the lifecycle is not written"
_DEAD = "jobs that are to be buried stay pending until that can be done"
_FULL = "jobs are taken while Redis takes no writes"
_TIDY = "nobody removes what dead workers leave in the group"
_TRIM = "the job streams are not trimmed, and nobody sees how many jobs wait"


@dataclass(frozen=True, slots=True)
class _Probe:
    """A command as it does nothing; words with a @ stand for keys and channels.

    `without` says what is worse where a worker may not do this, and is empty where it cannot work at all.
    """

    roles: frozenset[Role]
    words: str
    without: str = ""
    where: Literal["", "cluster", "replicas"] = ""
    """Where alone it is used: in a cluster (from Redis 7 on), or with WORKER_WAIT_REPLICAS."""


_PROBES = (
    _Probe(_BOTH, "TIME"),
    _Probe(_C, "PING"),
    _Probe(_W, "PING", _HINTS),
    _Probe(_W, "INFO server", "version, memory and storage of Redis are not looked at"),
    _Probe(_BOTH, "XADD @tokens 0-0 type check"),
    _Probe(_BOTH, "XRANGE @tokens 0-0 0-0"),
    _Probe(_BOTH, "XREVRANGE @tokens 0-0 0-0"),
    _Probe(_C, "XREAD COUNT 1 STREAMS @tokens 0-0"),
    _Probe(_W, "XLEN @tokens"),
    _Probe(_W, "XINFO STREAM @tokens"),
    _Probe(_BOTH, "EXISTS @tokens"),
    _Probe(_BOTH, "EXPIRE @tokens 1"),
    _Probe(_BOTH, "PEXPIREAT @tokens 1"),
    _Probe(_BOTH, "EXISTS @ended"),
    _Probe(_BOTH, "SET @ended check XX EX 1"),
    _Probe(_BOTH, "GET @ended"),
    _Probe(_C, "XADD @jobs 0-0 type check"),
    _Probe(_BOTH, "EXISTS @jobs"),
    _Probe(_BOTH, "XRANGE @jobs 0-0 0-0"),
    _Probe(_BOTH, "XLEN @jobs", _TRIM),
    _Probe(_BOTH, "XINFO GROUPS @jobs", _TRIM),
    _Probe(_W, f"XGROUP CREATE @jobs {GROUP} none"),
    _Probe(_W, f"XREADGROUP GROUP {GROUP} {_NOBODY} COUNT 1 STREAMS @jobs none"),
    _Probe(_W, f"XAUTOCLAIM @jobs {GROUP} {_NOBODY} 1000000 none COUNT 1"),
    _Probe(_W, f"XCLAIM @jobs {GROUP} {_NOBODY} 1000000 none"),
    _Probe(_W, f"XPENDING @jobs {GROUP} 0-0 0-0 1"),
    _Probe(_W, f"XACK @jobs {GROUP} 0-0"),
    _Probe(_W, "XTRIM @jobs MINID 0-0", _TRIM),
    _Probe(_W, f"XINFO CONSUMERS @jobs {GROUP}", _TIDY),
    _Probe(_W, f"XGROUP DELCONSUMER @jobs {GROUP} {_NOBODY}", _TIDY),
    _Probe(_W, "EVAL return 1 @jobs", _TIDY),
    _Probe(_W, "XADD @probe NOMKSTREAM 0-0 type check", _FULL),
    _Probe(_W, "XADD @lifecycle 0-0 type check", _TOLD),
    _Probe(_W, "XLEN @lifecycle", _TOLD),  # shows what else stands there
    _Probe(_W, "XADD @dead 0-0 type check", _DEAD),
    _Probe(_W, "XTRIM @dead MINID 0-0", _DEAD),
    _Probe(_BOTH, "XREVRANGE @dead 0-0 0-0", _DEAD),
    _Probe(_C, "XRANGE @dead 0-0 0-0"),
    _Probe(_C, "XDEL @dead 0-0"),
    _Probe(_W, f"HSET @workers {_NOBODY} 1 {_NOBODY}", _SEEN),  # the second field has no value
    _Probe(_W, f"HDEL @workers {_NOBODY}", _SEEN),
    _Probe(_BOTH, "HGETALL @workers", _SEEN),
    _Probe(_W, "HKEYS @workers", _SEEN),
    _Probe(_BOTH, "PUBLISH @feed []", _FEED),
    _Probe(_C, f"PUBLISH @cancel {_NOBODY}"),
    _Probe(_BOTH, "SPUBLISH @feed []", _FEED, "cluster"),
    _Probe(_W, "COMMAND INFO SPUBLISH", _FEED, "cluster"),
    _Probe(_W, "WAIT 0 0", where="replicas"),
    # What changes the state of the connection comes last.
    _Probe(_BOTH, "WATCH @tokens"),
    _Probe(_BOTH, "UNWATCH"),
    _Probe(_BOTH, "MULTI"),
    _Probe(_BOTH, "EXEC"),
    _Probe(_W, "SUBSCRIBE @cancel", _HINTS),
    _Probe(_C, "SUBSCRIBE @feed"),
    _Probe(_C, "UNSUBSCRIBE @feed"),
    _Probe(_C, "SSUBSCRIBE @feed", where="cluster"),
    _Probe(_C, "SUNSUBSCRIBE @feed", where="cluster"),
)


@dataclass(frozen=True, slots=True)
class Missing:
    """What a user may not do, or nobody can.

    `name` is a right as ACL SETUSER takes it, or a command that Redis does not know, or a key that holds something
    else. `without` says what is worse for the lack of it; it is empty where no job can be done.
    """

    kind: Literal["right", "command", "key"]
    name: str
    roles: frozenset[Role]
    without: str = ""


async def find_missing(
    server: Redis, keys: Keys, queues: Iterable[str], *, cluster: bool, replicas: bool
) -> list[Missing]:
    """Try each command at a server of Redis. Nothing is changed there.

    Raises:
        RedisError: when Redis does not answer.
    """
    used = {"", "cluster" if cluster else "", "replicas" if replicas else ""}
    probes = [probe for probe in _PROBES if probe.where in used]
    # After a subscription messages come among the replies: it has a connection of its own, and its reply is the first.
    alone = [[probe] for probe in probes if probe.words.startswith(("SUBSCRIBE", "SSUBSCRIBE"))]
    found: list[Missing | None] = []
    for group in [[probe for probe in probes if [probe] not in alone], *alone]:
        asked = [
            (probe, pack(*[_word(word, keys, queue).encode() for word in probe.words.split()]))
            for probe in group
            for queue in (queues if "@jobs" in probe.words else ("",))
        ]
        wire = await PipelinedConnection.open(server.connection_pool)
        try:
            replies = await wire.ask(b"".join([packed for _, packed in asked]), len(asked))
        finally:
            await wire.close()
        refusals = zip([probe for probe, _ in asked], replies[: len(asked)], strict=True)
        found += [_missing(probe, reply, keys) for probe, reply in refusals if isinstance(reply, ResponseError)]
    return list(dict.fromkeys(filter(None, found)))


def commands_of(role: Role, where: Literal["", "cluster"] = "") -> list[str]:
    """Every command that a worker or a client uses, as ACL SETUSER takes it without the +; or those of a cluster."""
    own = [probe for probe in _PROBES if role in probe.roles and (probe.where == "cluster") == (where == "cluster")]
    return sorted({probe.words.split()[0].lower() for probe in own})


def _missing(probe: _Probe, refusal: ResponseError, keys: Keys) -> Missing | None:
    command, *rest = probe.words.split()
    named = next((word for word in rest if word in _PATTERNS), "")
    place = f"{keys.prefix}:{_PATTERNS[named]}" if named else ""
    if is_unknown_command(refusal):  # the feed of a cluster is sharded only from Redis 7 on
        return None if probe.where == "cluster" else Missing("command", command, probe.roles, probe.without)
    if is_permission_denied(refusal):
        if found := re.search(r"access (?:one of the|an?|the) (key|channel)", str(refusal)):
            return Missing("right", f"{'~' if found[1] == 'key' else '&'}{place}", probe.roles, probe.without)
        return Missing("right", f"+{command.lower()}", probe.roles, probe.without)
    if str(refusal).startswith("WRONGTYPE") and named in ("@lifecycle", "@dead", "@workers"):
        return Missing("key", place, probe.roles, probe.without)
    return None


def _word(word: str, keys: Keys, queue: str) -> str:
    match word:
        case "@jobs":
            return keys.jobs(queue)
        case "@tokens" | "@ended" | "@feed":
            return str(getattr(keys, word[1:])(_NOBODY))
        case _:
            return str(getattr(keys, word[1:])) if word in _PATTERNS else word
