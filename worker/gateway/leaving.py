"""Cancels requests that nobody wants any more: their client has left, and nobody else follows them.

Only this process knows that its client has left, so it forgets that when it stops: a stop cancels nothing.
"""

import asyncio

from redis.exceptions import RedisError

from ..client.async_client import Client, State
from ..client.errors import ClientError, UnknownRequest
from .limits import Limits
from .repeats import Repeats


class Leaving:
    """Cancels the requests of clients that have left, `after` seconds later. It looks again while others follow one."""

    def __init__(self, client: Client, repeats: Repeats, limits: Limits, *, after: float) -> None:
        self._client = client
        self._repeats = repeats
        self._limits = limits
        self._after = after
        self._is_stopping = False
        self._watches: set[asyncio.Task[None]] = set()

    def on_left(self, owner: str, request_id: str, fingerprint: str) -> None:
        """The client of a request has left before the end."""
        if not self._is_stopping:
            watch = asyncio.create_task(self._watch(owner, request_id, fingerprint))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)

    def stop(self) -> None:
        """Cancel no request from now on."""
        self._is_stopping = True
        for watch in self._watches:
            watch.cancel()

    async def _watch(self, owner: str, request_id: str, fingerprint: str) -> None:
        may_be_claimed = bool(fingerprint)
        while True:
            await asyncio.sleep(self._after)
            try:
                status = await self._client.status(request_id)
                if status.state not in (State.QUEUED, State.RUNNING):
                    return
                if await self._repeats.presence.is_followed(request_id):
                    may_be_claimed = bool(fingerprint)
                    continue
                # A repetition that has claimed the request follows it in a moment, and has removed it from the set.
                if may_be_claimed and not await self._repeats.forget(fingerprint, request_id):
                    may_be_claimed = False
                    continue
                await self._client.cancel(request_id, must_exist=True)
                await self._limits.ended(owner, request_id)
            except UnknownRequest:
                return
            except (ClientError, OSError):
                continue  # Redis may answer at the next look
            except RedisError:
                return  # a cluster that cannot count followers: the request goes on
            else:
                return
