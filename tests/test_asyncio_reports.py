"""The guard of `conftest.py` against errors that nobody handles."""

import asyncio
import gc

from asyncio_reports import UNHANDLED, AsyncioReports


async def fail() -> None:
    raise ConnectionError


async def test_the_error_of_a_task_that_nobody_retrieves_is_reported_by_the_name_of_its_coroutine(
    asyncio_reports: AsyncioReports,
) -> None:
    await asyncio.wait([asyncio.create_task(fail())])
    gc.collect()
    (report,) = asyncio_reports.drain()
    assert UNHANDLED[0] in report
    assert "fail()" in report


async def test_an_error_that_is_retrieved_is_not_reported(asyncio_reports: AsyncioReports) -> None:
    await asyncio.gather(fail(), return_exceptions=True)
    gc.collect()
    assert not asyncio_reports.drain()
