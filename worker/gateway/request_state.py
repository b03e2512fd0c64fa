"""The state of a request as one JSON object, from its log so far."""

import asyncio
from contextlib import suppress

from ..client.async_client import Client, State
from ..client.errors import Expired
from ..contract.answer import Answer
from ..contract.entries import AnyEntry, Object
from ..contract.ids import BEFORE_ALL, SEAL, EntryId
from .open_streams import QueuePosition


class RequestState:
    """The state of one request, which is read once, or until it ends.

    Raises, when it is read:
        UnknownRequest: when nothing is known of the id.
        Unavailable: when Redis does not answer.
    """

    def __init__(self, client: Client, request_id: str, position: QueuePosition) -> None:
        self._client = client
        self._id = request_id
        self._position = position
        self._answer = Answer()
        self._last = BEFORE_ALL
        self._expired: Expired | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the request has ended, as far as its log was read."""
        return self._last == SEAL or self._expired is not None

    async def read(self) -> None:
        """Read the log so far. It also ends a request whose deadline passed before a worker took it."""
        try:
            async for page in self._client.pages(self._id):
                for entry in page:
                    self._add(entry)
        except Expired as error:
            self._expired = error
        if self._last.attempt == 0 and (await self._client.status(self._id)).state is State.ENDED:
            await self.read_more()

    async def read_more(self) -> None:
        """Read up to the end of the request. This can be cancelled, and then the state is that of the time."""
        if self.has_ended:
            return
        try:
            after: EntryId | None = self._last if self._last != BEFORE_ALL else None
            await self._client.pour(self._id, self._add, after=after)
        except Expired as error:
            self._expired = error

    async def wait(self, seconds: float) -> None:
        """Read until the request ends, for so many seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.read_more()

    async def as_dict(self) -> Object:
        """The state as a JSON object."""
        answer, state = self._answer, self._state()
        shown: Object = {"id": self._id, "state": state.value}
        if self._expired is not None:
            return {**shown, "outcome": self._expired.outcome, "ended_at": self._expired.time}
        if state is State.QUEUED:
            shown["position"] = await self._position(self._id)
        shown |= {"text": answer.text, "cursor": str(self._last), "attempt": answer.attempt}
        if reasoning := next((choice.reasoning for choice in answer.choices if choice.reasoning), ""):
            shown["reasoning"] = reasoning
        if answer.model:
            shown["model"] = answer.model
        if answer.usage:
            shown["usage"] = dict(answer.usage)  # type: ignore[arg-type]  # a TypedDict holds JSON
        if answer.end is not None:
            shown |= {"outcome": answer.outcome, "finish_reason": answer.finish_reason or None}
        if (end := answer.end) is not None and end.type == "error":
            shown["error"] = {"message": getattr(end, "message", ""), "code": getattr(end, "code", "")}
        return shown

    def _state(self) -> State:
        if self._expired is not None:
            return State.EXPIRED
        if self.has_ended:
            return State.ENDED
        return State.RUNNING if self._last.attempt else State.QUEUED

    def _add(self, entry: AnyEntry) -> None:
        self._answer.add(entry)
        self._last = entry.id
