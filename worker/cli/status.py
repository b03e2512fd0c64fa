"""The command `worker status`: what is wrong, and the state of all parts in one picture."""

import asyncio
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import click

from ..contract.entries import to_json
from ..contract.keys import Keys
from ..settings import load_settings
from .options import CLIENT_OPTIONS, exit_status, json_option, run_async, settings_options

EVERY = 2.0
"""Seconds between two pictures of `--watch`."""
_TIMEOUT = 3.0
"""Seconds that Redis has for each reply."""


@click.command(epilog="Example: worker status --watch")
@click.option("--watch", is_flag=True, help="Show a new picture every 2 s, until Ctrl-C.")
@json_option
@settings_options(*CLIENT_OPTIONS)
def status(watch: bool, as_json: bool, **options: object) -> None:
    """Show what is wrong, and the state of all parts.

    The parts are queues, workers, gateways, vLLM servers, Redis and dead letters.

    Exit status 1 if one of the faults is an error: Redis does not answer, is full or refuses writes, all vLLM servers
    of a model are away, or jobs wait that no worker takes. Warnings leave it at 0. With --watch it is 130, that of
    Ctrl-C.
    """
    from ..ops.survey import Surveyor  # noqa: PLC0415 - clients need not load it
    from ..ops.units import WIDTH  # noqa: PLC0415
    from ..redisio.clients import command_client  # noqa: PLC0415
    from ..redisio.urls import database_of  # noqa: PLC0415
    from .status_view import lines_of  # noqa: PLC0415

    settings = load_settings(options, **options)
    url = settings.redis_url.get_secret_value()

    async def show() -> bool:
        redis = command_client(url, timeout=_TIMEOUT)
        try:
            surveyor = Surveyor(redis, Keys(settings.prefix, database_of(url)), url, lease=settings.lease)
            while True:
                survey = await surveyor.survey()
                if as_json:
                    click.echo(to_json(survey.as_dict()))
                elif watch:
                    width = min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH
                    _redraw([f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", *lines_of(survey, width)])
                else:
                    click.echo("\n".join(lines_of(survey)))
                if not watch:
                    return not survey.has_error
                await asyncio.sleep(EVERY)
        finally:
            await redis.aclose()

    exit_status(run_async(show))


def _redraw(lines: Sequence[str]) -> None:
    """Show lines in place of the former ones on a terminal, else below them."""
    if sys.stdout.isatty():
        shown = lines[: shutil.get_terminal_size().lines - 1]  # a longer picture would scroll
        click.echo("\x1b[H" + "".join(line + "\x1b[K\n" for line in shown) + "\x1b[J", nl=False)
    else:
        click.echo("\n".join([*lines, ""]))
