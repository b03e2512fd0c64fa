"""The times of an answer: when its first delta, its gaps and the gaps of its interruptions are emitted."""

import asyncio
import signal
import time
from itertools import pairwise

import pytest
from conftest import StartProcess, StartSimulator, StartWorker, metric
from steered_clock import SteeredClock
from waits import eventually

from worker import Client, State
from worker.broker.job_queue import Delivery
from worker.contract.entries import Claimed, Delta, Entry, Started
from worker.contract.ids import EntryId
from worker.engine.answer_times import AnswerTimes, FormerTimes, former_times
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.telemetry.events import Event, ReaderGap
from worker.telemetry.job_events import AnswerStreamEnded, FirstDelta
from worker.vllm.servers.pace import ServerPace
from worker.vllm.stream.watchdog import StreamTimeouts, StreamWatchdog

ASK: dict[str, object] = {"messages": [{"role": "user", "content": "Hi"}]}


class Recorder:
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def watched(last_event: float) -> StreamWatchdog:
    watchdog = StreamWatchdog(StreamTimeouts(), since=last_event)
    watchdog.longest_gap = 3.0
    return watchdog


def stream(times: AnswerTimes, first: float, last: float, entries: int) -> None:
    """A stream whose first batch is one entry."""
    times.awaits_delta = True
    times.on_first_delta(first, 1)
    times.on_stream_end(entries, watched(last))


def test_a_whole_answer_has_a_first_delta_and_the_gaps_of_one_stream() -> None:
    recorder = Recorder()
    stream(AnswerTimes(recorder, 10, FormerTimes(), now_ms=0), first=12, last=20, entries=5)
    assert recorder.events == [FirstDelta(2), AnswerStreamEnded(mean_gap_s=2, longest_gap_s=3)]


def test_a_stream_without_a_second_delta_has_no_gap() -> None:
    recorder = Recorder()
    stream(AnswerTimes(recorder, 10, FormerTimes(), now_ms=0), first=12, last=12, entries=1)
    assert recorder.events == [FirstDelta(2)]


def test_a_broken_stream_leaves_a_gap_up_to_the_first_delta_after_all_failed_tries() -> None:
    recorder = Recorder()
    times = AnswerTimes(recorder, 10, FormerTimes(), now_ms=0)
    stream(times, first=12, last=20, entries=5)
    times.awaits_delta = True
    times.on_stream_end(1, watched(26))  # a try that brought nothing but `resumed`
    times.restart(redis_lost_it=False)
    stream(times, first=30, last=30, entries=1)
    assert recorder.events[2:] == [ReaderGap("vllm", 10)]
    assert times.first_delta == 30


def test_an_answer_that_redis_has_lost_leaves_a_gap_by_redis_and_the_next_one_is_by_vllm_again() -> None:
    recorder = Recorder()
    times = AnswerTimes(recorder, 10, FormerTimes(), now_ms=0)
    stream(times, first=12, last=20, entries=1)
    times.restart(redis_lost_it=True)
    stream(times, first=21, last=22, entries=1)
    stream(times, first=24, last=24, entries=1)
    assert recorder.events[1:] == [ReaderGap("redis", 1), ReaderGap("vllm", 2)]


def claimed(time: int, reason: str) -> Claimed:
    return Claimed(id=EntryId(2, 0), time=time, reason=reason)


STARTED = Started(id=EntryId(1, 0), time=1000)
BEGUN: list[Entry] = [STARTED, Delta(id=EntryId(1, 1), content="a")]
HANDED_OVER = Delivery("default", "1-0", {}, left_for=0.5, handed_over=True)
TAKEN_OVER = Delivery("default", "1-0", {}, left_for=15)
PARKED = Delivery("default", "1-0", {})


@pytest.mark.parametrize(
    ("history", "delivery", "expected"),
    [
        ([], PARKED, FormerTimes(cause="takeover")),
        ([STARTED], TAKEN_OVER, FormerTimes(1000, has_begun=False, interrupted=85_000, cause="takeover")),
        (BEGUN, HANDED_OVER, FormerTimes(1000, has_begun=True, interrupted=99_500, cause="handover")),
        (BEGUN, TAKEN_OVER, FormerTimes(1000, has_begun=True, interrupted=85_000, cause="takeover")),
        (BEGUN, PARKED, FormerTimes(1000, has_begun=True, interrupted=0, cause="takeover")),
        (
            [*BEGUN, claimed(40_000, "upstream_truncated")],
            PARKED,
            FormerTimes(1000, has_begun=True, interrupted=40_000, cause="vllm"),
        ),
        (
            [*BEGUN, claimed(40_000, "gap_timeout")],
            PARKED,
            FormerTimes(1000, has_begun=True, interrupted=10_000, cause="vllm"),
        ),
        (
            [*BEGUN, claimed(40_000, "upstream_truncated"), Delta(id=EntryId(2, 1), content="b")],
            TAKEN_OVER,
            FormerTimes(1000, has_begun=True, interrupted=85_000, cause="takeover"),
        ),
        (  # it went back to its queue here, and Redis refused that
            [*BEGUN, claimed(90_000, "upstream_truncated")],
            TAKEN_OVER,
            FormerTimes(1000, has_begun=True, interrupted=90_000, cause="vllm"),
        ),
        (
            [*BEGUN, claimed(90_000, "takeover")],
            TAKEN_OVER,
            FormerTimes(1000, has_begun=True, interrupted=85_000, cause="takeover"),
        ),
    ],
)
def test_what_came_before_is_read_from_the_log_and_the_delivery(
    history: list[Entry], delivery: Delivery, expected: FormerTimes
) -> None:
    assert former_times(history, delivery, delivered=100_000, gap_timeout=30) == expected


def test_a_continued_answer_has_the_gap_that_its_former_owner_left_and_no_second_first_delta() -> None:
    recorder = Recorder()
    former = FormerTimes(1000, has_begun=True, interrupted=98_500, cause="takeover")
    stream(AnswerTimes(recorder, 10, former, now_ms=100_000), first=12, last=12, entries=1)
    assert recorder.events == [ReaderGap("takeover", 3.5)]


def test_a_job_that_was_started_before_has_its_first_delta_counted_from_then() -> None:
    recorder = Recorder()
    former = FormerTimes(90_000, has_begun=False, interrupted=95_000, cause="takeover")
    stream(AnswerTimes(recorder, 10, former, now_ms=100_000), first=12, last=12, entries=1)
    assert recorder.events == [FirstDelta(12)]


async def test_the_first_delta_is_visible_while_the_answer_still_runs(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    stalls = await start_simulator(Options(scenario=Scenario(fault="stall", after=3)))
    worker = await start_worker(stalls, gap_timeout=600)
    request_id = await client.enqueue(ASK)

    async def observed() -> bool:
        return metric(worker, "first_delta_seconds_count") == 1

    await eventually(observed)
    assert (await client.status(request_id)).state is State.RUNNING
    await client.cancel(request_id)


async def test_a_silence_in_the_middle_of_an_answer_is_its_longest_gap_and_a_broken_stream_a_gap_of_the_reader(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    stalls = await start_simulator(Options(scenario=Scenario(fault="stall", after=3, times=1)))
    worker = await start_worker(stalls, gap_timeout=1)
    await client.result(await client.enqueue(ASK))

    async def ended() -> bool:
        return metric(worker, "jobs_finished_total", outcome="done", code="") == 1

    await eventually(ended)
    assert metric(worker, "inter_delta_max_seconds_count") == 2
    assert metric(worker, "inter_delta_max_seconds_sum") >= 1
    assert metric(worker, "inter_delta_mean_seconds_sum") < 1
    assert metric(worker, "gap_seconds_count", cause="vllm") == 1
    assert 1 <= metric(worker, "gap_seconds_sum", cause="vllm") < 10
    assert metric(worker, "first_delta_seconds_count") == 1


@pytest.mark.parametrize(("how", "cause"), [(signal.SIGKILL, "takeover"), (signal.SIGTERM, "handover")])
async def test_the_gap_of_an_answer_that_changed_its_worker_is_the_one_that_a_reader_saw(
    how: signal.Signals,
    cause: str,
    client: Client,
    start_process: StartProcess,
    start_worker: StartWorker,
    start_simulator: StartSimulator,
) -> None:
    """It may be a third of a lease longer: nobody knows when the last delta before it came."""
    lease = 3
    clock = SteeredClock(halt_after=6)
    paced = await start_simulator(Options(scenario=Scenario(rate=20)), clock=clock)
    first = start_process(paced, lease=lease, drain_timeout=0)
    request_id = await client.enqueue(ASK)
    arrived: list[float] = []

    async def follow() -> None:
        async for each in client.follow(request_id):
            if isinstance(each, Delta):
                arrived.append(time.monotonic())  # noqa: PERF401 - as they arrive

    reader = asyncio.create_task(follow())

    async def has_begun() -> bool:
        return len(arrived) > 3

    await eventually(has_begun)
    second = await start_worker(paced, lease=lease)
    first.send_signal(how)
    await asyncio.to_thread(first.wait)
    clock.release()
    await reader
    seen = max(later - earlier for earlier, later in pairwise(arrived))
    shown = metric(second, "gap_seconds_sum", cause=cause)
    assert metric(second, "gap_seconds_count", cause=cause) == 1
    assert seen - 2 <= shown <= seen + lease / 3 + 2, "on a busy machine entries come late"
    assert metric(second, "first_delta_seconds_count") == 0, "the first worker has observed it"


async def test_the_gap_of_an_answer_that_waited_in_its_queue_for_a_server_is_the_one_that_a_reader_saw(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator, server_pace: ServerPace
) -> None:
    server_pace.probe_every = 0.1
    port = free_port()
    async with Simulator(port=port, clock=SteeredClock(halt_after=6)) as leaves:
        worker = await start_worker(leaves, gap_timeout=600)
        request_id = await client.enqueue(ASK)
        arrived: list[float] = []

        async def follow() -> None:
            async for each in client.follow(request_id):
                if isinstance(each, Delta):
                    arrived.append(time.monotonic())  # noqa: PERF401 - as they arrive

        reader = asyncio.create_task(follow())

        async def has_begun() -> bool:
            return len(arrived) > 3

        await eventually(has_begun)

    async def is_parked() -> bool:
        return metric(worker, "jobs_parked_total") == 1

    await eventually(is_parked)
    await start_simulator(Options(scenario=Scenario(rate=20)), port)
    await reader
    seen = max(later - earlier for earlier, later in pairwise(arrived))
    assert metric(worker, "gap_seconds_count", cause="vllm") == 1
    shown = metric(worker, "gap_seconds_sum", cause="vllm")
    assert seen - 2 <= shown <= seen + 2, "on a busy machine entries come late"
