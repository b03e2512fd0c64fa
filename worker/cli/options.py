"""Shared parts of the commands: options for settings, the client, and the event loop."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import click
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from ..client.async_client import Client
from ..client.errors import Unavailable
from ..contract.ids import is_request_id
from ..settings import WORKER_SOURCE, load_settings, redacted_url, variable
from ..settings_source import SettingsSource

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., object])
CLIENT_OPTIONS = ("redis_url", "prefix")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")


def _check_request_id(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not is_request_id(value):
        raise click.BadParameter("a request id is 1 to 128 characters of A-Za-z0-9_-")
    return value


request_id_argument = click.argument("request_id", metavar="ID", callback=_check_request_id)


def _stdin_is_terminal() -> bool:
    return sys.stdin.isatty()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The environment in which a command runs: the `obj` of click's context, which a test may replace."""

    redis_patience: float = 10.0
    """Seconds to wait for Redis: long enough for a failover, and short enough for a user who waits."""
    can_confirm: bool = field(default_factory=_stdin_is_terminal)
    """Whether a person can answer a question on the terminal."""

    @classmethod
    def current(cls) -> "Surroundings":
        """The environment of the command that runs."""
        return click.get_current_context().ensure_object(cls)


def settings_options(*names: str, source: SettingsSource[Any] = WORKER_SOURCE) -> Callable[[_F], _F]:
    """Add an option for each of these settings, or for all. Values stay text, since `source` checks them."""
    fields: dict[str, FieldInfo] = source.kind.model_fields

    def add(command: _F) -> _F:
        for name in reversed(names or tuple(fields)):
            field = fields[name]
            secret = "SecretStr" in repr(field.annotation)
            default = _as_text(field.get_default())
            shown = "" if not default or (secret and not name.endswith("_url")) else f"  [default: {default}]"
            text = f"{field.description} ({source.variable(name)}){shown}"
            command = _option(name, field, text)(command)
        return command

    return add


def _option(name: str, field: FieldInfo, text: str) -> Callable[[_F], _F]:
    option = f"--{name.replace('_', '-')}"
    if field.annotation is not bool:
        return click.option(option, name, metavar=_metavar(name, field), help=text)
    if not name.startswith("no_"):
        option = f"{option}/--no-{option.removeprefix('--')}"
    return click.option(option, name, is_flag=True, default=None, help=text)


def _as_text(default: object) -> str:
    match default:
        case SecretStr():
            return default.get_secret_value()
        case tuple():
            return ",".join(map(str, default))
        case float():
            return f"{default:g}"
        case _:
            return str(default)


def _metavar(name: str, field: FieldInfo) -> str:
    """The word that the help shows in place of a value."""
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
    import uvloop  # noqa: PLC0415 - not available on Windows

    return uvloop.run(make())


async def until_stopped(work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work` until it ends, or until SIGTERM cancels it, so that it can stop the processes that it started.

    SIGTERM is needed because a shell lets background commands ignore SIGINT (`worker … &`).

    Raises:
        KeyboardInterrupt: after SIGTERM, as after Ctrl-C.
    """
    task = asyncio.ensure_future(work)
    if sys.platform != "win32":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def exit_status(success: bool) -> NoReturn:
    """End the command with status 0 or 1."""
    raise click.exceptions.Exit(0 if success else 1)


@asynccontextmanager
async def open_client(options: dict[str, object]) -> AsyncIterator[Client]:
    """Yield a client with these settings, even if Redis does not answer.

    If Redis does not answer, a note with its URL is printed at once. The command's own calls then wait for Redis, as
    in a failover, and raise `Unavailable` after the client's patience.
    """
    settings = load_settings(options, **options)
    url = settings.redis_url.get_secret_value()
    limit = settings.queue_limit if "queue_limit" in options else 0  # a command without this option has no limit
    patience = Surroundings.current().redis_patience
    async with Client(url, prefix=settings.prefix, patience=patience, queue_limit=limit) as client:
        try:
            await client.ping()
        except Unavailable as error:
            where = f"{redacted_url(url)} ({variable('redis_url')})"
            click.echo(f"· {error}. Trying {where} for {patience:g} s", err=True)
        yield client
