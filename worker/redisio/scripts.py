"""Lua scripts, which Redis executes as one step: what a script reads cannot change before the script writes.

A script takes one round trip, and no connection of its own as a WATCH does. A Redis that forbids scripts cannot be
used.

Each script begins with `try`. It is `redis.pcall` that also returns whether the command failed. A script returns the
error of a command in place of raising it, because Redis rewrites raised errors. The errors that `try` returns have the
kind first, as those of a command have: Redis 6.2 puts `@user_script` before it, and both 6.2 and 7.0 name no kind
where the user lacks a right.

With full memory Redis refuses the first command of a script that needs memory, and no later one. So a script begins
its writes with such a command.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from .batching import CommandBatcher
from .pipelined import pack

_TRY = """
local function try(...)
  local reply = redis.pcall(...)
  local failed = type(reply) == 'table' and reply.err ~= nil
  if failed then
    local text = tostring(reply.err):gsub('^@user_script: %d+: %-?', '')
    reply = {err = text:find('The user executing the script', 1, true) and 'NOPERM ' .. text:gsub('^ERR ', '') or text}
  end
  return reply, failed
end
"""


class Script:
    """A script, run by its SHA-1. A Redis that does not know it, as after a restart, is sent its source.

    The keys of a call must be on one server, in a cluster in one slot. A call whose reply is lost may have been
    executed, so a script must be safe to repeat.
    """

    def __init__(self, source: str) -> None:
        self._source = _TRY + source
        self._sha = hashlib.sha1(self._source.encode(), usedforsecurity=False).hexdigest()

    async def run(self, batcher: CommandBatcher, keys: Sequence[str], arguments: Iterable[str]) -> Any:  # noqa: ANN401 - the script's own reply
        """Run the script together with the commands of other callers, and return its reply.

        Raises:
            RedisError: the error that the script returns, or that Redis does not run it or does not answer.
        """
        words = [word.encode() for word in chain((str(len(keys)),), keys, arguments)]
        try:
            (reply,) = await batcher.execute(keys[0], pack(b"EVALSHA", self._sha.encode(), *words), 1)
        except NoScriptError:
            (reply,) = await batcher.execute(keys[0], pack(b"EVAL", self._source.encode(), *words), 1)
        return reply

    async def run_on(self, redis: Redis, keys: Sequence[str], arguments: Iterable[str]) -> Any:  # noqa: ANN401 - as above
        """Run the script as `run` does, by a command of its own on a client's connection."""
        words = [str(len(keys)), *keys, *arguments]
        try:
            return await redis.execute_command("EVALSHA", self._sha, *words)  # type: ignore[no-untyped-call]
        except NoScriptError:
            return await redis.execute_command("EVAL", self._source, *words)  # type: ignore[no-untyped-call]
