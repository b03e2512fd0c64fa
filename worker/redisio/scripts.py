"""Lua scripts, which Redis executes as one step: what a script reads cannot change before the script writes.

A script takes one round trip on a connection that all callers share. A Redis that forbids scripts cannot be used.

A script has two functions for commands. `call` ends the script with the command's error if the command fails. `try`
returns the reply or the error, and whether the command failed. The kind of an error comes first in it, as in the error
of a command. With `redis.call` it would not: Redis 6.2 puts `@user_script` before it. Where the user lacks a right, no
version names the kind: 6.2 and 7.0 begin with "The user executing the script", Redis 8 and Valkey with "ACL failure in
script".

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

_BEGIN = """
local function try(...)
  local reply = redis.pcall(...)
  local failed = type(reply) == 'table' and reply.err ~= nil
  if failed then
    local text = tostring(reply.err):gsub('^@user_script: %d+: %-?', '')
    local denied = text:find('The user executing the script', 1, true)
      or text:find('ACL failure in script', 1, true)
    local name = string.lower((...))
    reply = {err = denied and "NOPERM this user has no permissions to run the '" .. name .. "' command" or text}
  end
  return reply, failed
end
local function call(...)
  local reply, failed = try(...)
  if failed then error({reply}) end  -- in a table, since `pcall` of Redis 7.0 makes a text of an error
  return reply
end
local done, reply = pcall(function()
"""

_END = """
end)
if done then return reply end
return type(reply) == 'table' and reply[1] or error(reply)
"""


class Script:
    """A script, run by its SHA-1. A Redis that does not know it, as after a restart, is sent its source.

    The keys of a call must be on one server, in a cluster in one slot. A call whose reply is lost may have been
    executed, so a script must be safe to repeat.
    """

    def __init__(self, source: str) -> None:
        self.source = _BEGIN + source + _END
        self._sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()

    async def run(self, batcher: CommandBatcher, keys: Sequence[str], arguments: Iterable[str]) -> Any:  # noqa: ANN401 - the script's own reply
        """Run the script together with the commands of other callers, and return its reply.

        Raises:
            RedisError: the error that the script returns, or that Redis does not run it or does not answer.
        """
        words = [word.encode() for word in chain((str(len(keys)),), keys, arguments)]
        try:
            (reply,) = await batcher.execute(keys[0], pack(b"EVALSHA", self._sha.encode(), *words), 1)
        except NoScriptError:
            (reply,) = await batcher.execute(keys[0], pack(b"EVAL", self.source.encode(), *words), 1)
        return reply

    async def run_on(self, redis: Redis, keys: Sequence[str], arguments: Iterable[str | bytes]) -> Any:  # noqa: ANN401 - as above
        """Run the script as `run` does, by a command of its own on a client's connection."""
        words = [str(len(keys)), *keys, *arguments]
        try:
            return await redis.execute_command("EVALSHA", self._sha, *words)  # type: ignore[no-untyped-call]
        except NoScriptError:
            return await redis.execute_command("EVAL", self.source, *words)  # type: ignore[no-untyped-call]
