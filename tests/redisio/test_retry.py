"""Retrying until Redis answers: its limits, and what it reports."""

import asyncio
from itertools import count
from types import SimpleNamespace

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, OutOfMemoryError, ResponseError

from worker.redisio.errors import is_permission_denied, is_transient
from worker.redisio.retry import Backoff, Outage, RetryUntilAvailable
from worker.telemetry.events import Event, Failing, Recovered

REFUSED = Failing("redis_unavailable", "Connection refused")
RECOVERED = Recovered("redis_unavailable")


class Recorder:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


class Flaky:
    """An operation that fails a number of times and then returns its arguments."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.left = failures
        self.error = error or RedisConnectionError("Connection refused")

    async def __call__(self, first: str, *, second: int) -> tuple[str, int]:
        if self.left:
            self.left -= 1
            raise self.error
        return first, second


async def test_an_operation_is_retried_with_its_arguments_until_it_succeeds() -> None:
    recorder = Recorder()
    retry = RetryUntilAvailable(outage=Outage(recorder))
    assert await retry(Flaky(2), "a", second=2) == ("a", 2)
    assert recorder.events == [REFUSED, REFUSED, RECOVERED]


async def test_an_error_that_does_not_pass_is_raised_at_once() -> None:
    recorder = Recorder()
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await RetryUntilAvailable(outage=Outage(recorder))(Flaky(1, ResponseError("WRONGTYPE")), "a", second=2)
    assert recorder.events == []


async def test_the_caller_decides_which_errors_are_waited_for() -> None:
    denied = NoPermissionError("NOPERM this user has no permissions")
    with pytest.raises(NoPermissionError):
        await RetryUntilAvailable()(Flaky(1, denied), "a", second=2)
    retry = RetryUntilAvailable(waits_for=lambda error: is_transient(error) or is_permission_denied(error))
    assert await retry(Flaky(1, denied), "a", second=2) == ("a", 2)


async def test_nothing_is_retried_once_the_caller_has_to_stop() -> None:
    stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    retry = RetryUntilAvailable(stop=stop)
    assert await retry(Flaky(1), "a", second=2) == ("a", 2)
    stop.set_result("lease lost")
    with pytest.raises(RedisConnectionError):
        await retry(Flaky(1), "a", second=2)
    assert await retry(Flaky(0), "a", second=2) == ("a", 2)


async def test_nothing_is_retried_after_the_limit() -> None:
    assert await RetryUntilAvailable(limit=60)(Flaky(1), "a", second=2) == ("a", 2)
    with pytest.raises(RedisConnectionError):
        await RetryUntilAvailable(limit=0.1)(Flaky(100), "a", second=2)


async def test_an_outage_is_over_when_the_last_of_its_operations_succeeds() -> None:
    recorder = Recorder()
    outage = Outage(recorder)
    tries = count()

    async def read() -> None:
        if next(tries) < 20:
            raise RedisConnectionError("Connection refused")

    await asyncio.gather(*(RetryUntilAvailable(outage=outage)(read) for _ in range(10)))
    assert recorder.events == [REFUSED] * 20 + [RECOVERED]


async def test_short_outages_in_a_row_are_reported_once_in_a_while() -> None:
    """At the edge of its memory Redis refuses a command of every job."""
    full = OutOfMemoryError("OOM command not allowed when used memory > 'maxmemory'.")
    recorder = Recorder()
    retry = RetryUntilAvailable(outage=Outage(recorder))
    for _ in range(10):
        await retry(Flaky(1, full), "a", second=2)
    assert [type(event) for event in recorder.events] == [Failing, Recovered]


async def test_an_outage_soon_after_another_is_reported_if_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("worker.redisio.retry.time", SimpleNamespace(monotonic=lambda: now))

    class Lasting(Flaky):
        async def __call__(self, first: str, *, second: int) -> tuple[str, int]:
            nonlocal now
            now += 10
            return await super().__call__(first, second=second)

    recorder = Recorder()
    retry = RetryUntilAvailable(outage=Outage(recorder, quiet_for=30))
    await retry(Flaky(1), "a", second=2)
    assert recorder.events == [REFUSED, RECOVERED]
    await retry(Lasting(5), "a", second=2)
    assert recorder.events[2:] == [REFUSED, REFUSED, RECOVERED], "those after 40 and 50 s"


async def test_mixed_up_tls_is_probed_once_and_advised_with_every_failure() -> None:
    """No error names it: a server without TLS just closes the connection."""
    probes = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal probes
        probes += 1
        await reader.readline()
        writer.write(b"+PONG\r\n")
        writer.close()

    recorder = Recorder()
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        retry = RetryUntilAvailable(outage=Outage(recorder), url=f"rediss://127.0.0.1:{port}")
        await retry(Flaky(3), "a", second=2)
    advice = "this port has no TLS: begin REDIS_URL with redis, not rediss"
    assert recorder.events == [Failing("redis_unavailable", "Connection refused", advice)] * 3 + [RECOVERED]
    assert probes == 1


async def test_an_operation_that_is_given_up_reports_no_recovery() -> None:
    recorder = Recorder()
    retry = RetryUntilAvailable(outage=Outage(recorder))
    given_up = asyncio.create_task(retry(Flaky(100), "a", second=2))
    await asyncio.sleep(0)  # the first try fails
    assert recorder.events
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert RECOVERED not in recorder.events
    await retry(Flaky(1), "a", second=2)
    assert recorder.events[-1] == RECOVERED


async def test_a_cancellation_that_the_operation_swallows_is_raised_after_it() -> None:
    """asyncio.wait_for loses one in Python 3.11 (cpython#86296)."""

    async def swallow() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return

    task = asyncio.create_task(RetryUntilAvailable()(swallow))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_backoff_reports_each_failure_and_the_first_success_after_it() -> None:
    recorder = Recorder()
    backoff = Backoff("claim_failed", recorder, first=0.001)
    backoff.reset()
    await backoff.wait(RedisConnectionError("Connection refused"))
    await backoff.wait(RedisConnectionError("Connection refused"))
    backoff.reset()
    backoff.reset()
    failure = Failing("claim_failed", "Connection refused")
    assert recorder.events == [failure, failure, Recovered("claim_failed")]


async def test_the_pauses_of_a_backoff_grow_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    backoff = Backoff(first=1, most=4)
    for _ in range(4):
        await backoff.wait(OSError())
    backoff.reset()
    await backoff.wait(OSError())
    limits = [1, 2, 4, 4, 1]
    assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses, limits, strict=True))


async def test_arguments_of_commands_are_not_reported() -> None:
    recorder = Recorder()
    error = ResponseError("unknown command 'XADD', with args beginning with: 'k' 'a prompt'")
    await Backoff("claim_failed", recorder, first=0.001).wait(error)
    assert recorder.events == [Failing("claim_failed", "unknown command 'XADD'")]
