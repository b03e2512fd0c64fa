"""Keeps what Redis knows of one answered request up to date: for its repetitions, and for the limits of its owner."""

import asyncio
from contextlib import suppress

from redis.exceptions import RedisError

from ..client.errors import ClientError
from .limits import Limits
from .repeats import Repeats

_FAILURES = (RedisError, OSError, ClientError)
"""What is suppressed: a repetition then costs a second job, and the limits look for ended requests by themselves."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
"""Seconds between two looks whether the feed has a subscriber."""
_LOOKS = 60
"""How many looks there are. After these, Redis refuses the subscription, and the log is polled."""


class NotedCall:
    """The note of one request. Without a fingerprint there is none: an idempotency key names the answer."""

    __slots__ = (
        "_fingerprint",
        "_has_byte",
        "_is_noted",
        "_is_over",
        "_limits",
        "_owner",
        "_repeats",
        "_request_id",
        "_task",
    )

    def __init__(self, repeats: Repeats, limits: Limits, owner: str, fingerprint: str, request_id: str) -> None:
        self._repeats = repeats
        self._limits = limits
        self._owner = owner
        self._fingerprint = fingerprint
        self._request_id = request_id
        self._has_byte = self._is_noted = self._is_over = False
        self._task: asyncio.Task[None] | None = None

    @property
    def has_key(self) -> bool:
        """Whether an idempotency key names the answer, so that every repetition gets this one."""
        return not self._fingerprint

    def begin(self) -> None:
        """Note the request once its feed has a subscriber. Call this when the follower starts.

        Before that, identical requests would attach, which arrive at the same time.
        """
        if self._fingerprint:
            self._task = asyncio.create_task(self._note_once_followed())

    def on_first_byte(self) -> None:
        """Note that the response begins."""
        if self._fingerprint and not self._has_byte:
            self._has_byte = True
            if self._is_noted:
                self._task = asyncio.create_task(self._note_answered())

    async def end(self, *, is_whole: bool) -> None:
        """End. Only the first call counts.

        If the client gets the whole response, nobody may attach any more: call this before the follower leaves.
        Otherwise the request stays known, because its client may repeat it.
        """
        if self._is_over:
            return
        self._is_over = True
        if self._task is not None:
            await asyncio.wait([self._task])
        with suppress(*_FAILURES):
            if self._fingerprint and is_whole:
                await self._repeats.forget(self._fingerprint, self._request_id)
            elif self._fingerprint and not self._is_noted:
                await self._repeats.note(self._fingerprint, self._request_id, is_answered=self._has_byte)
            if is_whole:
                await self._limits.ended(self._owner, self._request_id)

    async def _note_once_followed(self) -> None:
        pause = _FIRST_PAUSE
        with suppress(*_FAILURES):
            for _ in range(_LOOKS):
                if self._is_over:
                    return
                if await self._repeats.presence.is_followed(self._request_id):
                    had_byte = self._has_byte
                    await self._repeats.note(self._fingerprint, self._request_id, is_answered=had_byte)
                    self._is_noted = True
                    if self._has_byte != had_byte:
                        await self._note_answered()
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _note_answered(self) -> None:
        with suppress(*_FAILURES):
            await self._repeats.note_answered(self._fingerprint, self._request_id)
