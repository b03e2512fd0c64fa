"""What the subcommands share: options made of the settings, the client, and how their asynchronous part is run."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from ..client.async_client import Client
from ..client.errors import Unavailable
from ..settings import Settings, load_settings, shown_url, variable

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., object])
CLIENT_OPTIONS = ("redis_url", "prefix")
_PATIENCE = 10.0
"""Seconds that a command waits for Redis: enough for a failover, not so long that somebody wonders."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")


def settings_options(*names: str) -> Callable[[_F], _F]:
    """An option for each setting; its value goes to the settings as text, and is judged there with the rest."""

    def add(command: _F) -> _F:
        for name in reversed(names or tuple(Settings.model_fields)):
            field = Settings.model_fields[name]
            secret = "SecretStr" in repr(field.annotation)
            default = _shown(field.get_default())
            shown = "" if not default or (secret and not name.endswith("_url")) else f"  [default: {default}]"
            command = click.option(
                f"--{name.replace('_', '-')}",
                name,
                metavar=_kind(name, field),
                help=f"{field.description} ({variable(name)}){shown}",
            )(command)
        return command

    return add


def _shown(default: object) -> str:
    if isinstance(default, SecretStr):
        return default.get_secret_value()
    return (
        ",".join(map(str, default))
        if isinstance(default, tuple)
        else f"{default:g}"
        if isinstance(default, float)
        else str(default)
    )


def _kind(name: str, field: FieldInfo) -> str:
    """What stands for the value in the help."""
    if get_origin(field.annotation) is Literal:
        return f"[{'|'.join(get_args(field.annotation))}]"
    if str(field.description).startswith("Seconds "):
        return "SECONDS"
    if name == "metrics":
        return "HOST:PORT"
    return "INTEGER" if field.annotation is int else name.rstrip("_2").rpartition("_")[2].upper()


def run_async(make: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run a command's asynchronous part to its end."""
    if sys.platform == "win32":
        return asyncio.run(make())
    import uvloop  # noqa: PLC0415 - not there on Windows

    return uvloop.run(make())


async def until_stopped(work: Coroutine[Any, Any, _T]) -> _T:
    """SIGTERM cancels, so that what was started is ended, also where a shell has SIGINT ignored (`worker … &`)."""
    task = asyncio.ensure_future(work)
    if sys.platform != "win32":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


@asynccontextmanager
async def open_client(options: dict[str, object]) -> AsyncIterator[Client]:
    """A client; when Redis is not there it says so at once, and where it looked, and then has patience."""
    settings = load_settings(options, **options)
    url = settings.redis_url.get_secret_value()
    limit = settings.queue_limit if "queue_limit" in options else 0  # a command that cannot name it is not held to it
    async with Client(url, prefix=settings.prefix, patience=_PATIENCE, queue_limit=limit) as client:
        try:
            await client.ping()
        except Unavailable as error:
            where = f"{shown_url(url)} ({variable('redis_url')})"
            click.echo(f"· {error}. Trying {where} for {_PATIENCE:g} s", err=True)
        yield client
