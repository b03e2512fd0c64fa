"""A short soak in the suite; the long one is run by hand (tests/chaos/soak.py)."""

from pathlib import Path

import pytest
from soak import soak


@pytest.mark.timeout(1800)
async def test_a_thousand_jobs_under_all_harm_are_neither_lost_nor_doubled_nor_stuck(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    server = pytestconfig.getoption("--redis-server")
    report = await soak(jobs=1000, workers=3, seed=7, pause=0.5, harms=25, redis_server=server, folder=tmp_path)
    print(report.table)  # noqa: T201, shown when it fails
    assert not report.violations
    assert report.outcomes["done"] > 800
    assert report.restarted + report.resumed > 10, "the harm met answers in their middle"
