"""Twelve kinds of faults are injected into an installation, under load or idle. `worker status` alone must name each.

Names and seconds: `pytest -rP tests/operation/test_twelve_faults.py`.
"""

import random
from pathlib import Path

import pytest
from injected_faults import FAULTS
from installation import LEASE, start_installation, watching

_OF_ANSWERS = {"vllm_frozen", "poison_job"}
"""The faults that only answers show."""


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind != "poison_job"])
async def test_the_first_fault_that_the_status_names_is_the_one_injected(kind: str, redis_binary: Path) -> None:
    async with start_installation(redis_binary) as it, watching(it.url) as watch:
        await watch.healthy()
        async with FAULTS[kind].inject(it):
            named, seconds = await watch.diagnose()
    print(f"{kind}: {named} after {seconds:.1f} s")  # noqa: T201 - the figure that is measured
    assert named in FAULTS[kind].named


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind not in _OF_ANSWERS])
async def test_a_fault_of_an_idle_installation_is_named(kind: str, redis_binary: Path) -> None:
    async with start_installation(redis_binary, streams=0) as it, watching(it.url) as watch:
        await watch.healthy(idle=True)
        async with FAULTS[kind].inject(it):
            named, seconds = await watch.diagnose()
    print(f"{kind}, idle: {named} after {seconds:.1f} s")  # noqa: T201 - as above
    assert named in FAULTS[kind].named


async def test_a_job_that_kills_its_workers_is_named(redis_binary: Path) -> None:
    """Workers die before it is known why, so other faults come first. It takes three deliveries, of a lease each."""
    async with start_installation(redis_binary, lease=LEASE / 5) as it, watching(it.url) as watch:
        await watch.healthy()
        async with FAULTS["poison_job"].inject(it):
            _, seconds = await watch.diagnose(FAULTS["poison_job"].named)
    print(f"poison_job: after {seconds:.1f} s, with a lease of {LEASE / 5:g} s")  # noqa: T201 - as above


async def test_a_fault_that_nobody_knows_beforehand_is_named(redis_binary: Path) -> None:
    kind = random.choice([kind for kind in FAULTS if kind != "poison_job"])  # noqa: S311 - no secret
    async with start_installation(redis_binary) as it, watching(it.url) as watch:
        await watch.healthy()
        async with FAULTS[kind].inject(it):
            named, _ = await watch.diagnose()
    assert named in FAULTS[kind].named, kind
