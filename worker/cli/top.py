"""The command `worker top`: an installation in the terminal, live, with its running requests."""

import asyncio
import sys
import termios
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import click

from ..contract.entries import to_json
from ..settings import load_settings
from .options import CLIENT_OPTIONS, exit_status, json_option, run_async, settings_options, until_stopped
from .status import EVERY, status

if TYPE_CHECKING:
    from ..top.installation import Installation

_INSTALL = "pip install '.[top]'"


@click.command(epilog="Example: worker top --redis-url redis://127.0.0.1:6379/0")
@json_option
@settings_options(*CLIENT_OPTIONS)
def top(as_json: bool, **options: object) -> None:
    """Watch an installation and its requests, live.

    Of each running request it shows age, tokens, rate and silence. Keys filter and sort, cancel a request, pause a
    queue, drain a worker, and follow a request: ? shows them. Without the extra `top` this is `worker status
    --watch`.

    With --json it needs neither the extra nor a terminal, and prints a line every 2 s: the picture of `worker status
    --json`, with the running requests.
    """
    from ..top.installation import Installation  # noqa: PLC0415 - clients need not load it

    settings = load_settings(options, **options)

    def installation() -> Installation:
        return Installation(settings.redis_url.get_secret_value(), settings.prefix, lease=settings.lease)

    if as_json:
        run_async(lambda: _print_pictures(installation()))
    try:
        from ..top.app import TopApp  # noqa: PLC0415 - only with the extra `top`
    except ModuleNotFoundError as error:
        note = f"· {error.name} is missing: install the extra `top` ({_INSTALL}). Until then: worker status --watch"
        click.echo(note, err=True)
        try:
            click.get_current_context().invoke(status, watch=True, as_json=False, **options)
        finally:
            if sys.stdout.isatty():  # the pictures have overwritten the note
                click.echo(note, err=True)
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("worker top needs a terminal: use worker status or --json for a file or a pipe")

    async def show() -> bool:
        async with installation() as opened:
            app = TopApp(opened)
            await app.run_async()
        return not app.return_code

    modes = termios.tcgetattr(sys.stdin)
    try:
        exit_status(run_async(lambda: until_stopped(show())))
    finally:  # after SIGSTOP and SIGCONT, Textual 8.2.8 leaves the terminal as it was then: raw
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)


async def _print_pictures(installation: "Installation") -> NoReturn:
    async with installation:
        while True:
            click.echo(to_json((await installation.read()).as_dict()))
            await asyncio.sleep(EVERY)
