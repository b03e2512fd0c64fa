"""The same client for services without asyncio: it runs the asynchronous one on a thread of its own."""

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Self, Unpack

from anyio.from_thread import start_blocking_portal

from worker.client import Client, JobOptions, Status
from worker.contract.answer import Answer
from worker.contract.entries import AnyEntry
from worker.contract.ids import EntryId


class SyncClient:
    """What `Client` does, blocking; the methods, their arguments and errors are the same.

    Make it after a fork, not before: it has a thread. It may be used from several threads at once.
    """

    def __init__(
        self, redis_url: str | None = None, *, prefix: str = "chat", patience: float = 30.0, queue_limit: int = 0
    ) -> None:
        self._stack = ExitStack()
        self._portal = self._stack.enter_context(start_blocking_portal("asyncio"))
        self._client = self._portal.call(
            partial(Client, redis_url, prefix=prefix, patience=patience, queue_limit=queue_limit)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection, and end the thread."""
        self._portal.call(self._client.aclose)
        self._stack.close()

    def enqueue(self, request: Mapping[str, object], **options: Unpack[JobOptions]) -> str:
        """See `Client.enqueue`."""
        return self._portal.call(partial(self._client.enqueue, request, **options))

    def follow(
        self, request_id: str, *, after: str | EntryId | None = None, wait: float = 0.0, idle: float | None = None
    ) -> Iterator[AnyEntry]:
        """See `Client.follow`."""
        return self._each(self._client.follow(request_id, after=after, wait=wait, idle=idle))

    def open(
        self, request_id: str, *, after: str | EntryId | None = None, wait: float = 0.0, idle: float | None = None
    ) -> Iterator[AnyEntry]:
        """See `Client.open`."""
        return self._each(self._portal.call(partial(self._client.open, request_id, after=after, wait=wait, idle=idle)))

    def _each(self, entries: AsyncGenerator[AnyEntry]) -> Iterator[AnyEntry]:
        try:
            while (entry := self._portal.call(anext, entries, None)) is not None:
                yield entry
        finally:
            self._portal.call(entries.aclose)

    def generate(self, request: Mapping[str, object], **options: Unpack[JobOptions]) -> Iterator[AnyEntry]:
        """See `Client.generate`."""
        return self.follow(self.enqueue(request, **options))

    def result(self, request_id: str) -> Answer:
        """See `Client.result`."""
        return self._portal.call(self._client.result, request_id)

    def status(self, request_id: str) -> Status:
        """See `Client.status`."""
        return self._portal.call(self._client.status, request_id)

    def cancel(self, request_id: str) -> Status:
        """See `Client.cancel`."""
        return self._portal.call(self._client.cancel, request_id)
