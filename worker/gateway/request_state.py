"""The state of a request as one JSON object, from its log so far."""

import asyncio
from contextlib import aclosing, suppress

from ..client.async_client import Client, State
from ..client.errors import Expired
from ..contract.answer import Answer
from ..contract.entries import AnyEntry, Object
from ..contract.ids import BEFORE_ALL, SEAL, EntryId
from .held_answers import HeldAnswer
from .open_streams import QueuePosition


class RequestState:
    """The state of one request. What it holds is counted in `held`.

    Raises, when it is read:
        Problem: when too many large answers are held (503).
        UnknownRequest: when nothing is known of the id.
        Unavailable: when Redis does not answer.
    """

    def __init__(self, client: Client, request_id: str, position: QueuePosition, held: HeldAnswer) -> None:
        self._client = client
        self._id = request_id
        self._position = position
        self._held = held
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
                    await self._add(entry)
        except Expired as error:
            self._expired = error
        if self._last.attempt == 0 and (await self._client.status(self._id)).state is State.ENDED:
            await self._read_end()

    async def wait(self, seconds: float) -> None:
        """Wait for the end of the request, for so many seconds at most. Nothing is held meanwhile."""
        if (await self._client.status(self._id)).state not in {State.QUEUED, State.RUNNING}:
            return
        with suppress(TimeoutError, Expired):
            async with asyncio.timeout(seconds):
                await self._client.pour(self._id, _drop)

    async def _read_end(self) -> None:
        if self.has_ended:
            return
        after: EntryId | None = self._last if self._last != BEFORE_ALL else None
        try:
            async with aclosing(self._client.follow(self._id, after=after)) as entries:
                async for entry in entries:
                    await self._add(entry)
        except Expired as error:
            self._expired = error

    async def as_dict(self) -> Object:
        """The state as a JSON object."""
        answer, state = self._answer, self._state()
        shown: Object = {"id": self._id, "state": state.value}
        if self._expired is not None:
            return {**shown, "outcome": self._expired.outcome, "ended_at": self._expired.time}
        if state is State.QUEUED:
            shown["position"] = await self._position(self._id)
        # The steps of a thread take turns with the event loop, however many deltas there are.
        content = await asyncio.to_thread(self._content) if self._held.is_large else self._content()
        shown |= content | {"cursor": str(self._last), "attempt": answer.attempt}
        if (end := answer.end) is not None and end.type == "error":
            shown["error"] = {"message": getattr(end, "message", ""), "code": getattr(end, "code", "")}
        return shown

    def _content(self) -> Object:
        """What the state has that takes long to assemble."""
        answer = self._answer
        content: Object = {"text": answer.text}
        if reasoning := next((choice.reasoning for choice in answer.choices if choice.reasoning), ""):
            content["reasoning"] = reasoning
        if answer.model:
            content["model"] = answer.model
        if usage := answer.usage:
            content["usage"] = dict(usage)  # type: ignore[arg-type]  # a TypedDict holds JSON
        if answer.end is not None:
            content |= {"outcome": answer.outcome, "finish_reason": answer.finish_reason or None}
        return content

    def _state(self) -> State:
        if self._expired is not None:
            return State.EXPIRED
        if self.has_ended:
            return State.ENDED
        return State.RUNNING if self._last.attempt else State.QUEUED

    async def _add(self, entry: AnyEntry) -> None:
        self._answer.add(entry)
        self._last = entry.id
        await self._held.add(entry)


def _drop(_: AnyEntry) -> None:
    pass
