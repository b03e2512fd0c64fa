"""The command `worker check`: whether a worker can work with these settings, and how to fix what is wrong."""

from contextlib import aclosing

import click

from ..contract.entries import to_json
from .options import exit_status, json_option, run_async, settings_options


@click.command(epilog="Example: worker check --vllm-urls http://127.0.0.1:8000")
@json_option
@settings_options()
def check(as_json: bool, **options: object) -> None:
    """Check the settings, Redis, the workers and every vLLM server.

    Exit status 1 if one of the findings is an error: a worker with these settings cannot work.
    """
    from ..ops.checks import check as find  # noqa: PLC0415 - clients need not load it
    from .status_view import lines_of_finding  # noqa: PLC0415

    async def report() -> bool:
        can_work = True
        async with aclosing(find(options)) as findings:  # a closed pipe ends the loop early
            async for finding in findings:
                can_work = can_work and finding.level != "error"
                click.echo(to_json(finding.as_dict()) if as_json else "\n".join(lines_of_finding(finding)))
        return can_work

    exit_status(run_async(report))
