"""The command `worker`: the list of its subcommands, in the sections of `worker --help`.

To add a command, write it as a `@click.command` in this package, in the module of its kind or in a new one, and list it
in `_SECTIONS`. Options that are settings come from `settings_options`. A module that only this command needs, such as
the engine, is imported in its function, so that the other commands do not start slower.
"""

import os

import click

from ..version import version
from .check import check
from .dead_letters import dead
from .explain import explain
from .gateway import gateway, key
from .group import SectionedGroup
from .health import health
from .lifecycle_log import log
from .requests import cancel, enqueue, follow
from .run import run
from .sandbox import demo, drill, simulate
from .status import status
from .steering import drain, pause, resume
from .top import top

_SECTIONS = {
    "Requests": (enqueue, follow, cancel, explain),
    "Workers": (run, status, top, pause, resume, drain, check, log, health, dead),
    "Gateway": (gateway, key),
    "Try it": (demo, drill, simulate),
}


def _print_version(ctx: click.Context, _parameter: click.Parameter, given: bool) -> None:
    if given:
        click.echo(f"vllm-relay {version() or '(not installed: run from its source)'}")
        ctx.exit()


@click.group(
    cls=SectionedGroup,
    sections=_SECTIONS,
    epilog="Exit status: 0 success, 1 failure, 2 wrong usage, 130 Ctrl-C. To begin: worker demo",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "-V", "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
    help="Show the version.",
)  # fmt: skip
@click.pass_context
def main(ctx: click.Context) -> None:
    """Token streams of vLLM on Redis Streams: durable, shared, and not lost when a worker dies."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False
