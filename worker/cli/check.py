"""The command `worker check`: whether a worker can work with these settings, and how to fix what is wrong."""

from contextlib import aclosing

import click

from ..contract.entries import to_json
from .options import exit_status, json_option, run_async, settings_options


@click.command(epilog="Example: worker check --vllm-urls http://127.0.0.1:8000")
@json_option
@settings_options()
def check(as_json: bool, **options: object) -> None:
    """Check the settings, Redis, the workers and every vLLM server. Exit status 1 if a worker cannot work."""
    from ..ops.checks import check as find  # noqa: PLC0415 - clients need not load it

    async def report() -> bool:
        can_work = True
        marks = {"ok": click.style("ok     ", fg="green"), "warning": click.style("warning", fg="yellow")}
        async with aclosing(find(options)) as findings:  # a closed pipe ends the loop early
            async for finding in findings:
                can_work = can_work and finding.level != "error"
                if as_json:
                    click.echo(to_json(finding.as_dict()))
                    continue
                mark = marks.get(finding.level, click.style("error  ", fg="red"))
                fix = f" → {finding.fix}" if finding.fix else ""
                click.echo(f"{mark} {finding.subject}: {finding.message}{fix}")
        return can_work

    exit_status(run_async(report))
