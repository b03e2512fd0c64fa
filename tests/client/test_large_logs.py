"""Logs that are read in pages, also on a slow connection."""

import asyncio
from contextlib import aclosing

import pytest
from proxy import Proxy
from readers import Reader
from redis.asyncio import Redis
from written_log import END, START, WrittenLog, connect, delta

from worker import Answer, Delta
from worker.broker.log_pages import PageSize
from worker.client.following.followers import Followers
from worker.client.timings import Timings
from worker.contract.ids import BEFORE_ALL, SEAL, EntryId


@pytest.mark.parametrize(("count", "entries", "size"), [(40, 100, 1000), (1, 600, 6500)])
async def test_large_logs_are_read_on_a_slow_connection(
    count: int, entries: int, size: int, redis: Redis, redis_proxy: Proxy
) -> None:
    """A limit on the whole reply made 70 of 100 logs of 100 kB unavailable at 1 MB/s, and pages of 6.5 MB for ever.

    Here are 3 MB a second, and a silence of 0.3 s fails: a twentieth of the real scale.
    """
    redis_proxy.down = 0.02  # for each piece of 64 KiB
    logs = [WrittenLog(redis, f"r{number}") for number in range(count)]
    text = "x" * size
    for log in logs:
        deltas = (Delta(id=EntryId(1, n), content=text) for n in range(1, entries + 1))
        await log.write(START, *deltas, END)
    answers = [Answer() for _ in logs]
    async with aclosing(connect(redis_proxy.redis_url, Timings(command_timeout=0.3))) as followers:
        pairs = zip(logs, answers, strict=True)
        await asyncio.gather(*(followers.follow(log.id, BEFORE_ALL).pour(answer.add) for log, answer in pairs))
    assert all(len(answer.text) == entries * size for answer in answers)


async def test_a_page_that_does_not_come_in_time_is_read_in_smaller_ones(
    redis: Redis, redis_proxy: Proxy, *, pours: bool
) -> None:
    log = WrittenLog(redis)
    await log.write(START, *(delta(1, n) for n in range(1, 300)), END)
    for count in (b"200", b"50"):
        redis_proxy.hold(b"XRANGE .* COUNT " + count)
    async with aclosing(connect(redis_proxy.redis_url, Timings(command_timeout=0.1))) as followers:
        reader = Reader(followers, pours=pours)
        await reader.task
    assert reader.seen == log.written


async def test_a_page_has_a_limited_number_of_bytes(followers: Followers, log: WrittenLog) -> None:
    """1,000 entries of 6.5 kB would otherwise be one reply."""
    await log.write(START, *(Delta(id=EntryId(1, n), content="x" * 6500) for n in range(1, 500)), END)
    logs, place, size, pages = followers.logs, BEFORE_ALL, PageSize(), []
    while (page := await logs.read("r", place, size)) is not None:
        pages.append(len(list(page.entries)))
        place = page.last
        if place == SEAL:
            break
    assert sum(pages) == 501
    assert max(pages[1:]) < 50
