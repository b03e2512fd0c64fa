"""Handles of submitted requests: the id, and what a client can do with it."""

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..contract.answer import Answer
from ..contract.entries import AnyEntry
from ..contract.ids import EntryId

if TYPE_CHECKING:
    from .async_client import Client, Status
    from .sync_client import SyncClient


@dataclass(frozen=True, slots=True)
class RequestHandle:
    """What `Client.submit` returns. Its only state is the id, which is all that another process needs."""

    id: str
    _client: "Client" = field(repr=False)

    def entries(
        self, *, after: str | EntryId | None = None, wait: float = 0.0, idle: float | None = None
    ) -> AsyncGenerator[AnyEntry]:
        """See `Client.follow`."""
        return self._client.follow(self.id, after=after, wait=wait, idle=idle)

    async def result(self) -> Answer:
        """See `Client.result`."""
        return await self._client.result(self.id)

    async def cancel(self) -> "Status":
        """See `Client.cancel`."""
        return await self._client.cancel(self.id)


@dataclass(frozen=True, slots=True)
class SyncRequestHandle:
    """What `SyncClient.submit` returns."""

    id: str
    _client: "SyncClient" = field(repr=False)

    def entries(
        self, *, after: str | EntryId | None = None, wait: float = 0.0, idle: float | None = None
    ) -> Iterator[AnyEntry]:
        """See `Client.follow`."""
        return self._client.follow(self.id, after=after, wait=wait, idle=idle)

    def result(self) -> Answer:
        """See `Client.result`."""
        return self._client.result(self.id)

    def cancel(self) -> "Status":
        """See `Client.cancel`."""
        return self._client.cancel(self.id)
