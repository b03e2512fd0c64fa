"""The command `worker health`: whether the worker process on this machine is alive. It imports next to nothing."""

import click

_STUCK_AFTER = 3.0
"""Seconds without a tick of the event loop after which a worker counts as stuck. A heartbeat is at most 1.3 s old."""


@click.command(epilog="Example: worker health && echo alive", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--pid", type=int, help="Look at this process only.  [default: all workers of this user]")
@click.pass_context
def health(ctx: click.Context, pid: int | None) -> None:
    """Check that the workers here are alive, for probes of containers. Exit status 1 if one is stuck or none runs.

    A worker is alive while its event loop runs, even if it drains, and even if Redis or vLLM is away. The command
    reads heartbeat files and connects to nothing.
    """
    from ..telemetry.heartbeat import directories, read_heartbeats  # noqa: PLC0415 - not available on Windows

    beats = [beat for beat in read_heartbeats() if pid in (None, beat.pid)]
    stuck = [beat for beat in beats if beat.age > _STUCK_AFTER]
    if not beats:
        which = "no worker of this user runs here" if pid is None else f"no worker with pid {pid} runs here"
        click.echo(f"{which}: there is no heartbeat in {' or '.join(map(str, directories()))}")
    for beat in stuck:
        click.echo(f"worker {beat.pid} is stuck: its event loop has not run for {beat.age:.1f} s")
    for beat in beats:
        if not stuck:
            click.echo(f"worker {beat.pid} is alive: its event loop ran {beat.age:.1f} s ago")
    ctx.exit(1 if stuck or not beats else 0)
