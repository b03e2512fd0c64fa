"""Keeps what Redis knows of one answered request up to date: for its repetitions, and for the limits of its owner."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from redis.exceptions import RedisError

from ..client.errors import ClientError
from .limits import Limits
from .repeats import Repeats

_FAILURES = (RedisError, OSError, ClientError)
"""What is suppressed: a repetition then costs a second job, and the limits look for ended requests by themselves."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
"""Seconds between two looks whether Redis has confirmed the subscription to the feed."""
_LOOKS = 60
"""How many looks there are. After these, Redis refuses the subscription, and the log is polled."""


class NotedCall:
    """The note of one request. Without a fingerprint there is none: an idempotency key names the answer.

    Args:
        release: ends the subscription to the feed that this gateway began before the request could be seen. It is
            called once nobody may attach any more because no follower is counted.
    """

    __slots__ = (
        "_ending",
        "_fingerprint",
        "_has_byte",
        "_is_joined",
        "_is_over",
        "_limits",
        "_noted_as",
        "_owner",
        "_release",
        "_repeats",
        "_request_id",
        "_task",
    )

    def __init__(
        self, repeats: Repeats, limits: Limits, owner: str, fingerprint: str, request_id: str,
        release: Callable[[], object],
    ) -> None:  # fmt: skip
        self._repeats = repeats
        self._limits = limits
        self._owner = owner
        self._fingerprint = fingerprint
        self._request_id = request_id
        self._release = release
        self._has_byte = self._is_joined = self._is_over = False
        self._noted_as: Literal["unanswered", "answered", ""] = ""
        self._task: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    @property
    def has_key(self) -> bool:
        """Whether an idempotency key names the answer, so that every repetition gets this one."""
        return not self._fingerprint

    @property
    def is_over(self) -> bool:
        """Whether `end` was called."""
        return self._is_over

    def begin(self) -> None:
        """Note the request once its feed has a subscriber. Call this when the follower starts.

        Before that, identical requests would attach, which arrive at the same time.
        """
        if self._fingerprint:
            self._task = asyncio.create_task(self._note_once_followed())

    def on_first_byte(self) -> None:
        """Note that the response begins."""
        if not self._has_byte:
            self._has_byte = True
            if self._noted_as:
                self._task = asyncio.create_task(self._note_answered())
            self._release_early()

    def on_joined(self) -> None:
        """The response has a follower that stays subscribed to the feed until the response ends."""
        self._is_joined = True
        self._release_early()

    async def on_done(self) -> None:
        """The request has ended, and does not count against the limits any more. Others may still have to attach."""
        with suppress(*_FAILURES):
            await self._limits.ended(self._owner, self._request_id)

    async def end(self, *, is_whole: bool, has_ended: bool = True) -> None:
        """End. Only the first call counts, and it takes effect even if the caller is cancelled meanwhile.

        If the client gets the whole response, nobody may attach any more: call this before the follower leaves.
        Otherwise the request stays known, because its client may repeat it. `has_ended` is whether the request has
        ended if the response is whole, and `on_done` was not called.
        """
        if self._ending is None:
            self._is_over = True
            self._ending = asyncio.create_task(self._end(is_whole=is_whole, has_ended=has_ended))
        await asyncio.shield(self._ending)

    async def _end(self, *, is_whole: bool, has_ended: bool) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])
        try:
            with suppress(*_FAILURES):
                if self._fingerprint and is_whole:
                    await self._repeats.forget(self._fingerprint, self._request_id)
                elif self._fingerprint:
                    await self._note()
        finally:
            self._release()
        if is_whole and has_ended:
            await self.on_done()

    async def _note_once_followed(self) -> None:
        pause = _FIRST_PAUSE
        with suppress(*_FAILURES):
            for _ in range(_LOOKS):
                if self._is_over:
                    return
                if self._repeats.is_subscribed(self._request_id):
                    await self._note()
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _note_answered(self) -> None:
        with suppress(*_FAILURES):
            await self._note()

    async def _note(self) -> None:
        """Note the request, with or without a byte, unless that was done."""
        if not self._noted_as:
            had_byte = self._has_byte
            await self._repeats.note(self._fingerprint, self._request_id, is_answered=had_byte)
            self._noted_as = "answered" if had_byte else "unanswered"
        if self._has_byte and self._noted_as == "unanswered":
            await self._repeats.note_answered(self._fingerprint, self._request_id)
            self._noted_as = "answered"
        self._release_early()

    def _release_early(self) -> None:
        """End the subscription before the response ends, since an idle stream needs only that of its follower.

        Until Redis has the note that a byte was sent, an identical request would attach if no follower were counted.
        """
        if self._is_joined and (self._noted_as == "answered" or (self.has_key and self._has_byte)):
            # The follower subscribes in a task that was created before this call.
            asyncio.get_running_loop().call_soon(self._release)
