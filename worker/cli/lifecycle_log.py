"""The command `worker log`: one line of JSON for each finished request, from a consumer group of the lifecycle."""

import asyncio
import os
import re
import secrets
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

import click
import msgspec
from redis.exceptions import RedisError, ResponseError

from ..broker.lifecycle_group import LifecycleGroup
from ..client.async_client import Client
from ..client.errors import ClientError, MappedRetry, Refused, Unavailable, mapped
from ..contract.answer import Answer
from ..contract.entries import Object, to_json
from ..contract.keys import Keys
from ..contract.records import Lifecycle
from ..redisio.clients import blocking_client
from ..redisio.errors import is_transient
from ..settings import load_settings
from .options import CLIENT_OPTIONS, Surroundings, open_client, run_async, settings_options

_WAIT = 1.0
"""Seconds that a read waits for new records, and that the command may need to end."""

_MOST_REMEMBERED = 100_000
"""Requests that are remembered, so that a record that Redis has twice is printed once."""

_PIECE = 4096
"""Bytes that a pipe takes without blocking once it is ready: PIPE_BUF of Linux."""

_FULL_PIPE_PAUSE = 0.05


def _check_group(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"[\w.:-]{1,128}", value, re.ASCII):
        raise click.BadParameter("a group's name is 1 to 128 characters of A-Za-z0-9_.:-")
    return value


@click.command(epilog="Example: worker log --group billing >> requests.jsonl")
@click.option(
    "--group", default="log", show_default=True, metavar="NAME", callback=_check_group,
    help="The consumer group. It remembers its place, and processes with the same group share the requests.",
)  # fmt: skip
@click.option("--content", is_flag=True, help="Add each answer, as long as Redis keeps it (WORKER_RETENTION).")
@click.option("--json", "_json", is_flag=True, help="Print JSON lines. So does the command without it, except errors.")
@settings_options(*CLIENT_OPTIONS)
def log(group: str, *, content: bool, _json: bool, **settings: object) -> None:
    """Print a JSON line for each finished request.

    It goes on with each request that finishes later. A request counts as printed once its line is written to
    standard output: the next run of the group continues there. After a crash a line may come again. If requests
    were lost, because the group was away for too long, a line with the type `lost` has their number.
    """
    run_async(lambda: _print_requests(settings, group, content=content))


async def _print_requests(options: dict[str, object], group: str, *, content: bool) -> None:
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        if not stop.done():
            stop.set_result(None)

    if sys.platform != "win32":
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, end)
    patience = Surroundings.current().redis_patience
    retry = MappedRetry(patience, stop)
    async with open_client(options) as client, _open_group(options, group) as reader:
        lines = _Lines(client if content else None, _Output(stop))
        source = _Source(reader, patience)
        try:
            while not stop.done():
                try:
                    records = await retry(source.read)
                    await _print_loss(reader, group, lines.output)
                    await lines.print(records)
                finally:
                    await retry(reader.acknowledge, lines.take_printed())
        except Unavailable:
            if not stop.done():
                raise


@asynccontextmanager
async def _open_group(options: dict[str, object], group: str) -> AsyncIterator[LifecycleGroup]:
    settings = load_settings(options, **options)
    redis = blocking_client(settings.redis_url.get_secret_value(), _WAIT)
    consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    reader = LifecycleGroup(redis, Keys(settings.prefix), group, consumer)
    try:
        yield reader
    finally:
        with suppress(RedisError, OSError):  # others take the records over in half a minute
            await reader.leave()
        await redis.aclose()


async def _print_loss(reader: LifecycleGroup, group: str, output: "_Output") -> None:
    if not (lost := reader.lost):
        return
    click.echo(
        f"· {lost} lines lost: the group `{group}` was behind for longer than WORKER_LIFECYCLE_MAX_BYTES lasts",
        err=True,
    )
    line: Object = {"type": "lost", "group": group, "lines": lost}
    if await output.write(to_json(line)):
        with suppress(RedisError, OSError):  # it is reported again
            await reader.losses_reported()


class _Source:
    """Reads new records, and prints at once why Redis refuses a read that is tried again for `patience` seconds."""

    def __init__(self, reader: LifecycleGroup, patience: float) -> None:
        self._reader = reader
        self._patience = patience
        self._is_refused = False

    async def read(self) -> list[Lifecycle]:
        try:
            records = await self._reader.read(_WAIT)
        except ResponseError as error:
            if is_transient(error) and not self._is_refused:
                click.echo(f"· {mapped(error)}. Trying for {self._patience:g} s", err=True)
                self._is_refused = True
            raise
        self._is_refused = False
        return records


class _Lines:
    """Prints a line for each request that has finished, once. `client` reads the answers; None for no answers."""

    def __init__(self, client: Client | None, output: "_Output") -> None:
        self._client = client
        self.output = output
        self._seen: dict[tuple[str, int], None] = {}
        self._printed: list[Lifecycle] = []

    async def print(self, records: list[Lifecycle]) -> None:
        """Print the lines of records, until the command must stop.

        Raises:
            BrokenPipeError: when nobody reads standard output.
            ClientError: when an answer cannot be read because Redis is unavailable or refuses.
        """
        client = self._client
        new = [record for record in records if record.type == "finished" and self._key(record) not in self._seen]
        answers = await asyncio.gather(*(_answer(client, record.id) for record in new)) if client else []
        shown = {record.line: answer for record, answer in zip(new, answers, strict=False)}
        for record in records:
            if record.type == "finished" and self._key(record) not in self._seen:
                line = msgspec.structs.asdict(record)
                if client:
                    line["answer"] = shown[record.line]
                if not await self.output.write(to_json(line)):
                    return
                self._seen[self._key(record)] = None
                if len(self._seen) > _MOST_REMEMBERED:
                    del self._seen[next(iter(self._seen))]
            self._printed.append(record)

    def take_printed(self) -> list[Lifecycle]:
        """The records that are done with since the last call."""
        printed, self._printed = self._printed, []
        return printed

    @staticmethod
    def _key(record: Lifecycle) -> tuple[str, int]:
        return record.id, record.attempt


async def _answer(client: Client, request_id: str) -> Object | None:
    """The whole answer as a chat completion; None if it has expired or cannot be read."""
    answer = Answer()
    try:
        async with aclosing(client.pages(request_id)) as pages:
            async for page in pages:
                for entry in page:
                    answer.add(entry)
    except (Unavailable, Refused):
        raise
    except ClientError:
        return None
    return answer.completion()


class _Output:
    """Standard output. While a pipe is full, the event loop goes on and the command can be stopped."""

    def __init__(self, stop: "asyncio.Future[None]") -> None:
        self._stop = stop

    async def write(self, line: str) -> bool:
        """Write a line. Returns false, perhaps within the line, if the command must stop before."""
        file = sys.stdout.fileno()
        left = memoryview(f"{line}\n".encode())
        while left:
            if not _is_writable(file):
                if self._stop.done():
                    return False
                await asyncio.sleep(_FULL_PIPE_PAUSE)
                continue
            left = left[os.write(file, left[:_PIECE]) :]
        return True


def _is_writable(file: int) -> bool:
    if sys.platform == "win32":
        return True
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    return bool(poll.poll(0))
