"""A real Prometheus that scrapes workers and gateways, with the shipped alerts at a thirtieth of their durations."""

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import pytest
from waits import eventually

from worker.sandbox.programs import start_programs
from worker.sandbox.prometheus import Prometheus

_GUARD = 240.0
"""Seconds until an alert fires, or until Prometheus serves, at the latest: only for a test that would hang."""


def find_program(name: str) -> str:
    """The path of a program of Prometheus. Without it the test is skipped, except where PROMETHEUS_REQUIRED is set."""
    found = shutil.which(name)
    if found is None:
        missing = f"{name} is missing: install Debian's package prometheus (RUNLEVEL=1 keeps it from starting)"
        if os.environ.get("PROMETHEUS_REQUIRED"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@asynccontextmanager
async def prometheus(targets: Mapping[str, list[int]]) -> AsyncIterator[Prometheus]:
    """A Prometheus that has scraped these ports, by job. It ends on exit."""
    with start_programs("prometheus") as programs:
        server = Prometheus(programs, find_program("prometheus"), targets)
        try:
            await server.wait_ready(_GUARD)
            yield server
        finally:
            await server.aclose()


async def until_fired(
    server: Prometheus, *names: str, meanwhile: Callable[[], Awaitable[object]] | None = None
) -> dict[str, str]:
    """Wait until each of these alerts has fired, not necessarily at the same time; returns all summaries.

    `meanwhile` is called about twice a second until then: it keeps the fault going.
    """
    seen: dict[str, str] = {}

    async def have_fired() -> bool:
        seen.update({alert.name: alert.summary for alert in await server.firing()})
        if meanwhile is not None:
            await meanwhile()
        return set(names) <= set(seen)

    try:
        await eventually(have_fired, within=_GUARD, every=0.4)
    except TimeoutError:
        pytest.fail(f"{set(names) - set(seen)} did not fire, {seen} did")
    assert not [text for text in seen.values() if "error expanding template" in text]
    return seen
