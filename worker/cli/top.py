"""The command `worker top`: an installation in the terminal, live, with its running requests."""

import sys

import click

from ..settings import load_settings
from .options import CLIENT_OPTIONS, exit_status, run_async, settings_options, until_stopped
from .status import status

_INSTALL = "pip install '.[top]'"


@click.command(epilog="Example: worker top --redis-url redis://127.0.0.1:6379/0")
@settings_options(*CLIENT_OPTIONS)
def top(**options: object) -> None:
    """Watch an installation and its requests, live.

    Of each running request it shows age, tokens, rate and silence. Keys filter and sort, cancel a request, pause a
    queue, drain a worker, and follow a request: ? shows them. Without the extra `top` this is `worker status
    --watch`.
    """
    settings = load_settings(options, **options)
    try:
        from ..top.app import TopApp  # noqa: PLC0415 - only with the extra `top`
        from ..top.installation import Installation  # noqa: PLC0415
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
        raise click.UsageError("worker top needs a terminal: use worker status for a file or a pipe")

    async def show() -> bool:
        url = settings.redis_url.get_secret_value()
        async with Installation(url, settings.prefix, lease=settings.lease) as installation:
            app = TopApp(installation)
            await app.run_async()
        return not app.return_code

    exit_status(run_async(lambda: until_stopped(show())))
