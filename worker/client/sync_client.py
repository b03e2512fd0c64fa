"""The client for services without asyncio: it runs the asynchronous client on a separate thread."""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar, Unpack

from ..contract.answer import Answer
from ..contract.entries import AnyEntry
from ..contract.ids import EntryId
from ..contract.keys import DEFAULT_QUEUE
from ..contract.records import Lifecycle
from .async_client import Client, Status
from .errors import ClientError, Misused, Unavailable
from .new_job import JobOptions

_T = TypeVar("_T")


class SyncClient:
    """A blocking `Client`: the methods, their arguments and their errors are the same.

    Create it after a fork, not before: it has a thread, and its use in another process raises `Misused`. Several
    threads may use it at once. A process may end without closing it.
    """

    def __init__(
        self, redis_url: str | None = None, *, prefix: str = "chat", patience: float = 30.0, queue_limit: int = 0
    ) -> None:
        self._client = Client(redis_url, prefix=prefix, patience=patience, queue_limit=queue_limit)
        self._pid = os.getpid()
        self._is_closed = False
        self._closing = threading.RLock()
        """Held while a call is passed to the thread, so that no call is passed once the thread must end.

        It is reentrant: while it is held, the garbage collector may end a generator, which passes a call to the thread.
        """
        self._loop = asyncio.new_event_loop()
        # A daemon thread: at its end the interpreter does not wait for it, as it would for the threads of a pool.
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-relay-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection, and end the thread. Calls that still wait raise `Unavailable`."""
        if os.getpid() != self._pid:
            return  # the connections belong to the process that created them
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            closing = asyncio.run_coroutine_threadsafe(self._aclose(), self._loop)
        closing.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def enqueue(self, request: Mapping[str, object], **options: Unpack[JobOptions]) -> str:
        """See `Client.enqueue`."""
        return self._call(lambda: self._client.enqueue(request, **options))

    def submit(self, request: Mapping[str, object], **options: Unpack[JobOptions]) -> "SyncRequestHandle":
        """See `Client.submit`."""
        return SyncRequestHandle(self.enqueue(request, **options), self)

    def follow(
        self, request_id: str, *, after: str | EntryId | None = None, wait: float = 0.0, idle: float | None = None
    ) -> Iterator[AnyEntry]:
        """See `Client.follow`."""
        return self._each(self._client.follow(request_id, after=after, wait=wait, idle=idle))

    def open(
        self, request_id: str, *, after: str | EntryId | None = None, wait: float = 0.0, idle: float | None = None
    ) -> Iterator[AnyEntry]:
        """See `Client.open`."""
        return self._each(self._call(lambda: self._client.open(request_id, after=after, wait=wait, idle=idle)))

    def generate(self, request: Mapping[str, object], **options: Unpack[JobOptions]) -> Iterator[AnyEntry]:
        """See `Client.generate`."""
        return self.submit(request, **options).entries()

    def lifecycle(self, *, after: str | EntryId | None = None) -> Iterator[Lifecycle]:
        """See `Client.lifecycle`."""
        return self._each(self._client.lifecycle(after=after))

    def result(self, request_id: str) -> Answer:
        """See `Client.result`."""
        return self._call(lambda: self._client.result(request_id))

    def status(self, request_id: str) -> Status:
        """See `Client.status`."""
        return self._call(lambda: self._client.status(request_id))

    def cancel(self, request_id: str, *, must_exist: bool = False) -> Status:
        """See `Client.cancel`."""
        return self._call(lambda: self._client.cancel(request_id, must_exist=must_exist))

    def is_served(self, queue: str = DEFAULT_QUEUE) -> bool:
        """See `Client.is_served`."""
        return self._call(lambda: self._client.is_served(queue))

    def _call(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run a coroutine on the thread, and wait for its result."""
        future = self._start(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Unavailable("the client is closed") from None
        except BaseException:  # such as Ctrl-C, after which no caller waits for the result
            future.cancel()
            raise

    def _start(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> "concurrent.futures.Future[_T]":
        if os.getpid() != self._pid:
            raise Misused("this SyncClient was created before a fork, by another process: create one in each process")
        with self._closing:
            if self._is_closed:
                raise Unavailable("the client is closed")
            return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def _each(self, items: AsyncGenerator[_T]) -> Iterator[_T]:
        nothing = object()

        async def next_item() -> _T | object:
            return await anext(items, nothing)

        async def close() -> None:
            await items.aclose()

        try:
            while (item := self._call(next_item)) is not nothing:
                yield item  # type: ignore[misc]  # it is not `nothing`
        finally:
            # This does not wait for the close, since a generator may be collected on any thread, even the client's own.
            with suppress(ClientError):
                self._start(close)

    async def _aclose(self) -> None:
        try:
            await self._client.aclose()
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._loop.shutdown_asyncgens()


@dataclass(frozen=True, slots=True)
class SyncRequestHandle:
    """A handle to a request, from `SyncClient.submit`."""

    id: str
    _client: SyncClient = field(repr=False)

    def entries(
        self, *, after: str | EntryId | None = None, wait: float = 0.0, idle: float | None = None
    ) -> Iterator[AnyEntry]:
        """See `Client.follow`."""
        return self._client.follow(self.id, after=after, wait=wait, idle=idle)

    def result(self) -> Answer:
        """See `Client.result`."""
        return self._client.result(self.id)

    def cancel(self) -> Status:
        """See `Client.cancel`."""
        return self._client.cancel(self.id)
