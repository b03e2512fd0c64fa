"""A soak of health: an installation with deploys now and then, in which no fault may be named.

    .venv/bin/python tests/operation/healthy_soak.py --minutes 60

The load is moderate. With `--idle` there is none, and one of the servers takes two seconds to answer a probe.

Every five seconds it reads `worker status --json`, and prints each fault that was named. Exit status 1 if one was.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from installation import read_status, start_installation, watching

_EVERY = 5.0
_DEPLOY_EVERY = 40.0
_STREAMS = 6
_PROBE_DELAY = 2.0


async def soak(minutes: float, *, idle: bool) -> Counter[str]:
    """Run for some minutes. Returns how many pictures named each fault."""
    faults = Counter[str]()
    async with start_installation(streams=0 if idle else _STREAMS) as it:
        it.vllm[1].simulator.probe_delay = _PROBE_DELAY if idle else 0.0
        async with watching(it.url) as watch:
            await watch.healthy(idle=idle)
        began = time.monotonic()
        deploys = asyncio.create_task(_deploy_now_and_then(it.replace_worker))
        pictures = 0
        while True:
            picture = await read_status(it.url)
            pictures += 1
            for fault in picture["faults"]:
                faults[fault["fault"]] += 1
                click.echo(f"{time.monotonic() - began:7.1f} s  {fault['subject']}: {fault['text']}")
            if deploys.done():
                deploys.result()
            if time.monotonic() - began >= minutes * 60:
                break
            await asyncio.sleep(_EVERY)
        deploys.cancel()
        finished = sum(worker["finished"] for worker in picture["workers"])
    click.echo(
        f"{pictures} pictures in {minutes:g} min; the last workers finished {finished} jobs; faults: {dict(faults)}"
    )
    return faults


async def _deploy_now_and_then(replace: Callable[[int], Awaitable[None]]) -> None:
    for number in count():
        await asyncio.sleep(_DEPLOY_EVERY)
        await replace(number % 2)


@click.command(help=__doc__)
@click.option("--minutes", type=float, default=60, show_default=True)
@click.option("--idle", is_flag=True)
def main(minutes: float, *, idle: bool) -> None:
    sys.exit(1 if asyncio.run(soak(minutes, idle=idle)) else 0)


if __name__ == "__main__":
    main()
