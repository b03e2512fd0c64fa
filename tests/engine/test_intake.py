"""The intake with a real Redis, servers whose room the test sets, and jobs that run as long as the test wants."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest
from proxy import Proxy
from redis.asyncio import Redis
from room import FakeServers
from waits import eventually

from worker.broker.job_queue import Delivery, JobQueue
from worker.broker.parked_jobs import ParkedJobs
from worker.contract.keys import GROUP, Keys
from worker.contract.records import ControlEntry
from worker.engine.admission import Admission
from worker.engine.intake import NO_VLLM, REDIS_FULL, VLLM_FULL, JobIntake
from worker.engine.job_context import MustWait, Stop, Stopped
from worker.engine.line_intake import LineIntake
from worker.engine.lines import KnownLines
from worker.engine.outline import outline_of
from worker.engine.pace import Pace
from worker.engine.parking import Parking
from worker.engine.queue_pauses import QueuePauses
from worker.engine.running_jobs import RunningJobs
from worker.engine.slots import Slots
from worker.redisio.clients import blocking_client, command_client
from worker.redisio.clock import Clock
from worker.settings import load_settings
from worker.telemetry.events import Event, IntakePaused
from worker.telemetry.job_events import JobParked
from worker.vllm.servers.pool import ServerPool
from worker.vllm.servers.room import Demand

MESSAGES = [{"role": "user", "content": "Hi"}]


async def add(redis: Redis, model: str = "a", queue: str = "", count: int = 1, **fields: str) -> list[str]:
    """Add jobs to a queue. Returns their request ids."""
    ids = []
    for _ in range(count):
        add.number += 1  # type: ignore[attr-defined]
        ids.append(f"{model[:1]}{add.number}")  # type: ignore[attr-defined]
        job = {"id": ids[-1], "request": json.dumps({"model": model, "messages": MESSAGES}), **fields}
        await redis.xadd(f"chat:jobs:{queue}" if queue else "chat:jobs", job)  # type: ignore[arg-type]
    return ids


add.number = 0  # type: ignore[attr-defined]


class IntakeProcess:
    """The intake of one worker. A job that it starts is in `started`, and holds its place until `finish`."""

    def __init__(
        self, url: str, name: str, servers: FakeServers, slots: int, queues: str, block: float, pace: Pace
    ) -> None:
        settings = load_settings(redis_url=url, vllm_urls="http://127.0.0.1:1", lease=10, slots=slots, queues=queues)
        self.servers = servers
        self.commands, self.blocking = command_client(url), blocking_client(url, block)
        self.clock = Clock(self.commands)
        self.jobs = JobQueue(self.commands, self.blocking, Keys(), name, 10)
        parked = ParkedJobs(self.commands, Keys(), name, 10, self.clock.now)
        self.lines = KnownLines()
        pool = cast("ServerPool", servers)
        self.slots = Slots(slots)
        self.parking = Parking(parked, self.lines, Admission(servers), self)
        self.running = RunningJobs(
            self.jobs, self._run, lambda: self.slots.release(1), lease=10, telemetry=self, parking=self.parking
        )
        self.pauses = QueuePauses(settings.queues, self.clock.now, self)
        self.intake = JobIntake(
            settings, self.jobs, pool, self.running, self.slots,
            parking=self.parking, pauses=self.pauses, block=block, pace=pace, telemetry=self,
        )  # fmt: skip
        self.line_intake = LineIntake(
            settings, parked, pool, self.running, self.slots, self.intake,
            parking=self.parking, pauses=self.pauses, pace=pace, telemetry=self,
        )  # fmt: skip
        self.queues = settings.queues
        self.started: list[str] = []
        self.deliveries: list[Delivery] = []
        self.may_park: list[bool] = []
        self.parks: Counter[str] = Counter()
        self.events: list[Event] = []
        self.must_wait: Callable[[str], bool] = lambda _: False
        self.tries: int | None = None
        """The tries at servers of jobs that must wait: with a number, they have begun."""
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self.intake.take_new(rank, queue)) for rank, queue in enumerate(self.queues)]
        self._tasks.append(asyncio.create_task(self.line_intake.run()))

    async def stop(self) -> None:
        self.intake.stop()
        self.line_intake.stop()
        await asyncio.gather(*self._tasks)

    def finish(self, *requests: str) -> None:
        for request in requests:
            self._ends[request].set()

    async def _run(
        self, delivery: Delivery, stop: "asyncio.Future[Stop]", _: Callable[[], None], demand: Demand | None,
        *, may_park: bool,
    ) -> None:  # fmt: skip
        request = delivery.fields[b"id"].decode()
        self.started.append(request)
        self.deliveries.append(delivery)
        self.may_park.append(may_park)
        if may_park and self.must_wait(request):
            self.parks[request] += 1
            outline = outline_of(delivery)
            assert outline is not None
            raise MustWait(outline.models[0], self.tries)
        end = self._ends[request] = asyncio.Event()
        ended: asyncio.Future[object] = asyncio.ensure_future(end.wait())
        if demand is not None:  # the place is used for as long as the job runs
            self.servers.rooms[demand.model] = self.servers.rooms.get(demand.model, 0) - 1
            demand.end()
        await asyncio.wait({ended, cast("asyncio.Future[object]", stop)}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            ended.cancel()
            raise Stopped
        await self.jobs.acknowledge(delivery)
        if demand is not None:
            self.servers.set_room(demand.model, self.servers.rooms[demand.model] + 1)


@asynccontextmanager
async def intake(
    url: str, servers: FakeServers, *, name: str = "one", slots: int = 64, queues: str = "default", block: float = 0.1,
    pace: Pace | None = None,
) -> AsyncIterator[IntakeProcess]:  # fmt: skip
    it = IntakeProcess(url, name, servers, slots, queues, block, pace or Pace(scan_every=0.1, read_ahead_every=0.01))
    await it.clock.sync()
    for queue in it.queues:
        await it.jobs.ensure_group(queue)
    it.start()
    try:
        yield it
    finally:
        await it.stop()
        it.running.cancel()
        await asyncio.sleep(0)
        await it.commands.aclose()
        await it.blocking.aclose()


async def parked(redis: Redis, key: str = "chat:jobs") -> int:
    """How many jobs wait in lines."""
    consumers = await redis.xinfo_consumers(key, GROUP)
    return sum(consumer["pending"] for consumer in consumers if consumer["name"].startswith(b"waiting:"))


async def has_parked(redis: Redis, count: int, key: str = "chat:jobs") -> None:
    async def all_parked() -> bool:
        return await parked(redis, key) == count

    await eventually(all_parked)


async def knows_parked(process: IntakeProcess, count: int) -> None:
    """Wait until a process has parked so many jobs and knows of them, a moment after Redis has them in their lines."""

    async def all_are_known() -> bool:
        return sum(isinstance(event, JobParked) for event in process.events) >= count

    await eventually(all_are_known)


async def has_started(process: IntakeProcess, *requests: str) -> None:
    async def all_started() -> bool:
        return set(requests) <= set(process.started)

    await eventually(all_started)


async def unread(redis: Redis) -> int:
    (group,) = await redis.xinfo_groups("chat:jobs")
    return len(await stream_after(redis, group["last-delivered-id"].decode()))


async def stream_after(redis: Redis, last: str) -> list[object]:
    return cast("list[object]", await redis.xrange("chat:jobs", f"({last}"))


async def test_no_more_jobs_are_read_than_the_servers_have_room_for(redis_url: str, redis: Redis) -> None:
    ids = await add(redis, count=10)
    async with intake(redis_url, FakeServers(a=3)) as one:
        await has_started(one, *ids[:3])
        await eventually(lambda: is_paused(one, VLLM_FULL))
        assert await unread(redis) == 7
        for done in range(7):
            one.finish(ids[done])
            await has_started(one, ids[done + 3])
        assert one.started == ids
        assert not await parked(redis)


async def is_paused(process: IntakeProcess, reason: str) -> bool:
    return process.intake.paused == reason


SELDOM_PROBED = Pace(scan_every=0.1, recheck_writes_after=1000)


async def probes(redis: Redis) -> int:
    """How often XADD was called: by `add`, and by an intake that probes whether Redis accepts writes."""
    return int((await redis.info("commandstats"))["cmdstat_xadd"]["calls"])


async def test_redis_is_not_probed_for_each_read(redis_url: str, redis: Redis) -> None:
    ids = await add(redis, count=10)
    before = await probes(redis)
    async with intake(redis_url, FakeServers(a=1), pace=SELDOM_PROBED) as one:
        for number in range(10):
            await has_started(one, ids[number])
            one.finish(ids[number])
        assert await probes(redis) == before + 1


async def test_redis_is_probed_before_the_first_read_after_a_pause(redis_url: str, redis: Redis) -> None:
    (job,) = await add(redis)
    servers = FakeServers(a=2)
    async with intake(redis_url, servers, pace=SELDOM_PROBED) as one:
        await has_started(one, job)
        servers.is_available = False
        await eventually(lambda: is_paused(one, NO_VLLM))
        await add(redis)
        await redis.config_set("maxmemory", "1")
        try:
            servers.is_available = True
            await eventually(lambda: is_paused(one, REDIS_FULL))
            assert await unread(redis) == 1
        finally:
            await redis.config_set("maxmemory", "0")


async def test_redis_is_probed_after_an_error(redis: Redis, redis_proxy: Proxy) -> None:
    (job,) = await add(redis)
    async with intake(redis_proxy.redis_url, FakeServers(a=2), pace=SELDOM_PROBED) as one:
        await has_started(one, job)
        await redis.config_set("maxmemory", "1")
        try:
            redis_proxy.cut_before(rb"^XREADGROUP")
            await eventually(lambda: is_paused(one, REDIS_FULL))
        finally:
            await redis.config_set("maxmemory", "0")


async def test_jobs_of_a_full_model_do_not_stop_those_of_another(redis_url: str, redis: Redis) -> None:
    full = await add(redis, "a", count=50)
    free = await add(redis, "b", count=2)
    async with intake(redis_url, FakeServers(a=0, b=2), slots=4) as one:
        await has_started(one, *free)
        assert set(one.started) == set(free)
        await has_parked(redis, 50)
        one.servers.set_room("a", 4)
        one.finish(*free)
        await has_started(one, *full[:4])
        assert one.started[2:] == full[:4]
        assert all(delivery.count == 1 for delivery in one.deliveries)


async def test_a_line_is_served_at_once_when_room_appears_and_before_new_jobs(redis_url: str, redis: Redis) -> None:
    waiting = await add(redis, "a", count=5)
    servers = FakeServers(a=0, b=1)
    async with intake(redis_url, servers, pace=Pace(scan_every=120)) as one:
        await has_parked(redis, 5)
        await add(redis, "b")
        await eventually(lambda: started_count(one, 1))  # the servers are full now, and new jobs stay unread
        late = await add(redis, "a", count=3)
        servers.set_room("a", 5)
        began = time.monotonic()
        await has_started(one, *waiting)
        assert time.monotonic() - began < 30
        assert one.started[1:] == waiting
        servers.set_room("a", 3)
        await has_started(one, *late)


async def started_count(process: IntakeProcess, count: int) -> bool:
    return len(process.started) == count


async def is_read_again(redis: Redis) -> bool:
    """Whether a reader waits for new jobs."""
    return bool((await redis.info("clients"))["blocked_clients"])


async def searches_for_lines(redis: Redis) -> int:
    """How often the lines of parked jobs were listed."""
    calls = await redis.info("commandstats")
    return int(calls["cmdstat_xpending"]["calls"]) if "cmdstat_xpending" in calls else 0


async def has_searched_for_lines(redis: Redis) -> bool:
    return bool(await searches_for_lines(redis))


async def test_a_reader_that_waits_for_new_jobs_does_not_delay_a_line(redis_url: str, redis: Redis) -> None:
    (waiting,) = await add(redis, "a")
    servers = FakeServers(a=0, b=1)
    async with intake(redis_url, servers, slots=1, block=40, pace=Pace()) as one:
        await has_parked(redis, 1)
        await eventually(lambda: is_read_again(redis))  # with the only slot
        servers.set_room("a", 1)
        began = time.monotonic()
        await has_started(one, waiting)
        assert time.monotonic() - began < 20
        (late,) = await add(redis, "b")
        await has_parked(redis, 1)  # the reader has no slot for it any more
        one.finish(waiting)
        await has_started(one, late)


async def test_with_few_slots_parked_jobs_come_before_a_flood_of_new_ones(redis_url: str, redis: Redis) -> None:
    waiting = await add(redis, "a", count=3)
    servers = FakeServers(a=0, b=1000)
    async with intake(redis_url, servers, slots=1) as one:
        await has_parked(redis, 3)
        flood = await add(redis, "b", count=40)
        await has_started(one, flood[0])
        servers.set_room("a", 1000)
        for done in range(12):
            await eventually(lambda done=done: started_count(one, done + 1))  # type: ignore[misc]
            one.finish(one.started[done])
        await has_started(one, *waiting)


async def test_a_flood_of_one_tenant_does_not_hide_the_others(redis_url: str, redis: Redis) -> None:
    flood = await add(redis, count=200, tenant="flood")
    (other,) = await add(redis, tenant="other")
    async with intake(redis_url, FakeServers(a=1)) as one:
        await knows_parked(one, 200)
        assert one.started == flood[:1]
        for done in range(2):
            one.finish(one.started[done])
            await eventually(lambda done=done: started_count(one, done + 2))  # type: ignore[misc]
        assert other in one.started


async def test_without_tenants_a_full_queue_is_not_read_ahead(redis_url: str, redis: Redis) -> None:
    await add(redis, count=20)
    async with intake(redis_url, FakeServers(a=1)) as one:
        await eventually(lambda: is_paused(one, VLLM_FULL))
        searches = await searches_for_lines(redis)

        async def looked_again() -> bool:
            return await searches_for_lines(redis) >= searches + 3

        await eventually(looked_again)
        assert not await parked(redis)
        assert await unread(redis) == 19


async def test_a_new_job_of_a_more_important_queue_comes_before_parked_jobs(redis_url: str, redis: Redis) -> None:
    waiting = await add(redis, "a", queue="low", count=20)
    servers = FakeServers(a=0, b=1)
    # A listing of the lines that is late has fewer jobs than there are by then, until the next listing.
    async with intake(redis_url, servers, queues="high,low", pace=Pace(scan_every=120)) as one:
        await has_parked(redis, 20, "chat:jobs:low")
        (other,) = await add(redis, "b", queue="low")
        await has_started(one, other)
        urgent = await add(redis, "a", queue="high", count=3)
        await has_parked(redis, 3, "chat:jobs:high")
        await knows_parked(one, 23)
        for done in range(4):
            servers.set_room("a", 1)
            await eventually(lambda done=done: started_count(one, done + 2))  # type: ignore[misc]
        assert set(one.started[1:]) == {*urgent, waiting[0]}


async def test_an_overdue_job_is_taken_though_no_server_has_room(redis_url: str, redis: Redis) -> None:
    servers = FakeServers(a=0, b=1)
    async with intake(redis_url, servers, pace=Pace(scan_every=0.1, overdue_every=0.2)) as one:
        due = one.clock.now() + 5000
        (overdue,) = await add(redis, "a", deadline=str(due))
        (waiting,) = await add(redis, "a", deadline=str(due + 3_600_000))
        await has_parked(redis, 2)
        await has_started(one, overdue)
        assert one.clock.now() >= due
        assert waiting not in one.started
        assert await parked(redis) == 1


async def test_overdue_jobs_are_found_in_any_number_of_lines(redis_url: str, redis: Redis) -> None:
    models = [f"m{number}" for number in range(80)]
    servers = FakeServers(**dict.fromkeys(models, 0), b=1)
    async with intake(redis_url, servers, slots=100, pace=Pace(scan_every=0.1, overdue_every=0.2)) as one:
        due = one.clock.now() + 2000
        ids = [request for model in models for request in await add(redis, model, deadline=str(due))]

        async def all_started() -> bool:
            return set(ids) <= set(one.started)

        await eventually(all_started)


async def test_a_job_that_must_wait_goes_back_and_gives_its_slot_back(redis_url: str, redis: Redis) -> None:
    (waiting,) = await add(redis)
    async with intake(redis_url, FakeServers(a=1), slots=1) as one:
        one.must_wait = lambda request: one.parks[request] < 3
        await has_started(one, waiting)

        async def runs() -> bool:
            return len(one.started) == 4 and one.running.with_slot == 1

        await eventually(runs)
        assert [delivery.count for delivery in one.deliveries] == [1, 1, 1, 1]
        assert [delivery.redelivered for delivery in one.deliveries] == [False, True, True, True]
        assert sum(isinstance(event, JobParked) for event in one.events) == 3


async def test_jobs_that_always_come_back_do_not_spin(redis_url: str, redis: Redis) -> None:
    ids = await add(redis, count=50)
    async with intake(redis_url, FakeServers(a=4), slots=16) as one:
        refuses_until = time.monotonic() + 3
        one.must_wait = lambda _: time.monotonic() < refuses_until
        await has_started(one, *ids[:4])
        await asyncio.sleep(3)
        assert sum(one.parks.values()) <= 60
        assert max(one.parks.values()) <= 12

        async def four_run() -> bool:
            return one.running.with_slot == 4

        await eventually(four_run)


@pytest.mark.parametrize("command", ["xclaim", "xpending"])
async def test_without_the_right_to_park_jobs_wait_in_slots_and_none_is_lost(
    command: str, redis_url: str, redis: Redis
) -> None:
    await redis.xgroup_create("chat:jobs", GROUP, id="0", mkstream=True)
    await redis.acl_setuser("default", commands=[f"-{command}"], enabled=True)
    try:
        async with intake(redis_url, FakeServers(a=0, b=2)) as one:

            async def is_refused() -> bool:
                return not one.parking.is_possible or command == "xclaim"  # which the first park shows

            await eventually(is_refused)
            full = await add(redis, "a", count=3)
            free = await add(redis, "b", count=2)
            one.must_wait = lambda request: request in full
            await has_started(one, *full, *free)
            consumers = await redis.xinfo_consumers("chat:jobs", GROUP)
            assert [(consumer["name"], consumer["pending"]) for consumer in consumers] == [(b"one", 5)]
            await asyncio.sleep(0.3)
            assert not one.may_park[-1]
            one.finish(*full, *free)
            await eventually(lambda: nothing_pending(redis))
    finally:
        await redis.acl_setuser("default", commands=[f"+{command}"], enabled=True)


async def test_lines_of_other_processes_are_served_without_the_right_to_see_idle_times(
    redis_url: str, redis: Redis
) -> None:
    waiting = await add(redis, "a", count=3)
    async with intake(redis_url, FakeServers(a=0, b=1)):
        await has_parked(redis, 3)
    await redis.acl_setuser("default", commands=["-xinfo"], enabled=True)
    try:
        async with intake(redis_url, FakeServers(a=3)) as two:
            await has_started(two, *waiting)
    finally:
        await redis.acl_setuser("default", commands=["+xinfo"], enabled=True)


async def nothing_pending(redis: Redis) -> bool:
    consumers = await redis.xinfo_consumers("chat:jobs", GROUP)
    return not any(consumer["pending"] for consumer in consumers)


async def test_a_job_that_must_wait_is_not_lost_while_redis_is_away(redis_proxy: Proxy, redis: Redis) -> None:
    (waiting,) = await add(redis)
    async with intake(redis_proxy.redis_url, FakeServers(a=1)) as one:
        one.must_wait = lambda request: one.parks[request] < 1
        parking = redis_proxy.hold(rb"XPENDING chat:jobs workers \d")  # of the job, and not of the consumers
        await has_started(one, waiting)
        await parking.met.wait()
        assert len(one.running) == 1
        await redis_proxy.cut()

        async def runs_again() -> bool:
            return len(one.started) == 2

        await eventually(runs_again)
        one.finish(waiting)
        await eventually(lambda: nothing_pending(redis))


async def test_several_workers_take_each_parked_job_once(redis_url: str, redis: Redis) -> None:
    ids = await add(redis, "a", count=60, tenant="t")
    async with (
        intake(redis_url, FakeServers(a=0, b=1), name="one") as one,
        intake(redis_url, FakeServers(a=0, b=1), name="two") as two,
    ):
        await has_parked(redis, 60)
        for process in (one, two):
            process.servers.set_room("a", 30)

        async def all_started() -> bool:
            return len(one.started) + len(two.started) >= 60

        await eventually(all_started)
        assert Counter(one.started + two.started) == Counter(ids)
        assert one.started
        assert two.started


async def test_invalid_jobs_and_possible_poison_are_started_though_no_server_has_room(
    redis_url: str, redis: Redis
) -> None:
    await redis.xadd("chat:jobs", {"id": "not-json", "request": "{"})
    await redis.xadd("chat:jobs", {"id": "no-messages", "request": '{"model": "a"}'})
    await add(redis, "a")
    async with intake(redis_url, FakeServers(a=0, b=9)) as one:
        await has_started(one, "not-json", "no-messages")
        await has_parked(redis, 1)
        assert len(one.started) == 2


async def test_after_the_stop_parked_jobs_stay_parked(redis_url: str, redis: Redis) -> None:
    await add(redis, "a", count=3)
    async with intake(redis_url, FakeServers(a=0, b=1)) as one:
        await has_parked(redis, 3)
        await one.stop()
        one.servers.set_room("a", 3)
        await asyncio.sleep(0.3)
        assert one.started == []
        assert await parked(redis) == 3


async def test_the_lines_survive_a_group_that_vanishes(redis_url: str, redis: Redis) -> None:
    await add(redis, "a", count=3)
    async with intake(redis_url, FakeServers(a=0, b=1)) as one:
        await has_parked(redis, 3)
        await redis.delete("chat:jobs")
        one.servers.set_room("a", 3)
        fresh = await add(redis, "a", count=2)
        await has_started(one, *fresh)


async def test_a_line_whose_name_is_a_hash_is_served_by_a_process_that_does_not_know_it(
    redis_url: str, redis: Redis
) -> None:
    model, fallbacks = "m" * 200, ["f" * 100]
    ids = await add(redis, model, count=3, fallbacks=json.dumps(fallbacks))
    async with intake(redis_url, FakeServers(**{model: 0, "b": 1}), name="one"):
        await has_parked(redis, 3)
    async with intake(redis_url, FakeServers(**{model: 0, "b": 1}), name="two") as two:

        async def has_learnt() -> bool:
            lines = [line for line in two.lines.all() if line.model.startswith("#")]
            return bool(lines) and two.lines.models_of(lines[0]) is not None

        await eventually(has_learnt)
        assert two.started == []
        await has_parked(redis, 3)
        two.servers.set_room(model, 3)
        await has_started(two, *ids)


async def test_jobs_with_a_place_cost_no_command_of_their_own(redis_url: str, redis: Redis) -> None:
    async with intake(redis_url, FakeServers(a=1000), pace=Pace(scan_every=30)) as one:
        await eventually(lambda: is_read_again(redis))
        await eventually(lambda: has_searched_for_lines(redis))  # the only time within this test
        await redis.config_resetstat()
        ids = await add(redis, count=50)
        await has_started(one, *ids)
        stats = await redis.info("commandstats")
        for command in ("xclaim", "xpending", "xinfo", "xautoclaim"):
            assert not any(name.startswith(f"cmdstat_{command}") for name in stats), command
        one.finish(*ids)


async def test_a_full_vllm_is_a_reason_that_comes_and_goes(redis_url: str, redis: Redis) -> None:
    (only,) = await add(redis)
    async with intake(redis_url, FakeServers(a=1)) as one:
        await has_started(one, only)
        await eventually(lambda: is_paused(one, VLLM_FULL))
        one.finish(only)
        await eventually(lambda: is_paused(one, ""))
        changes = [(event.reason, event.on) for event in one.events if isinstance(event, IntakePaused)]
        assert changes == [(VLLM_FULL, True), (VLLM_FULL, False)]


async def test_of_a_paused_queue_only_jobs_that_have_begun_are_taken(redis_url: str, redis: Redis) -> None:
    (fresh,) = await add(redis, "a")
    servers = FakeServers(a=0, b=9)
    async with intake(redis_url, servers) as one:
        await has_parked(redis, 1)

        def fill(_request: str) -> bool:
            servers.set_room("b", 0)
            return True

        one.must_wait, one.tries = fill, 1
        (begun,) = await add(redis, "b")
        await has_parked(redis, 2)
        one.pauses.replace({"default": ControlEntry(by="ops")})

        async def is_in_effect() -> bool:
            return one.pauses.in_effect == ("default",)

        await eventually(is_in_effect)
        late = await add(redis, "b", count=2)
        one.must_wait = lambda _: False
        servers.set_room("a", 5)
        servers.set_room("b", 5)
        await eventually(lambda: started_count(one, 2))
        assert one.started == [begun, begun]
        assert (await parked(redis), await unread(redis)) == (1, 2)
        one.pauses.replace({})
        await has_started(one, fresh, *late)


async def test_a_pause_is_in_effect_only_after_the_reads_in_flight(redis_url: str, redis: Redis) -> None:
    async with intake(redis_url, FakeServers(a=9), block=40) as one:
        await eventually(lambda: is_read_again(redis))
        one.pauses.replace({"default": ControlEntry(by="ops")})
        assert one.pauses.is_paused("default")
        assert not one.pauses.in_effect
        (job,) = await add(redis)  # the read gets it
        await has_started(one, job)

        async def is_in_effect() -> bool:
            return one.pauses.in_effect == ("default",)

        await eventually(is_in_effect)
        await add(redis)
        assert await unread(redis) == 1
