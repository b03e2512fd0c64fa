"""Every order of events that hypothesis generates, on a real Redis: the promise holds after each step.

Up to three workers run the real relay, log and queue code; a canceller, duplicate jobs, crashes, pauses past the
lease, hand-overs, parking, lost replies, commands that arrive late, a full Redis, broken streams of vLLM and a failover
that loses the newest entries come between any two of their exchanges with Redis. A worker does nothing but what it is
let do, so a worker that is paused is one that has no turn.

A run that fails prints how to repeat it. To search for longer than CI does (here about ten minutes), and from a seed:

    CHAOS_EXAMPLES=2000 pytest tests/chaos/test_state_machine.py --hypothesis-seed=1
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, ClassVar, TypeVar, cast

import pytest
from faults import Fate, Network
from fleet import LEASE, FleetWorker, World
from follower import FleetFollower, Raw
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from redis import Redis as BlockingRedis
from redis.exceptions import ResponseError

from worker import Client
from worker.contract.answer import Answer
from worker.contract.entries import Cancelled, Started, parse
from worker.contract.ids import SEAL
from worker.contract.keys import GROUP, Keys

_T = TypeVar("_T")
_KEYS = Keys()
_EXAMPLES = int(os.environ.get("CHAOS_EXAMPLES", "30"))
_STAY = (b"queued", b"started", b"claimed")

workers = st.integers(0, 2)
places = st.integers(0, 3)
requests = st.integers(0, 2)
steps = st.integers(0, 24)


def _one_of(places: Sequence[int], which: int) -> int:
    return places[which % len(places)]


class Machine(RuleBasedStateMachine):
    """The workers, what happens to them, and what must stay true."""

    url: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._admin = BlockingRedis.from_url(self.url, protocol=2)
        self._admin.flushall()
        self._admin.xgroup_create(_KEYS.jobs(), GROUP, id="0", mkstream=True)
        self._feed = self._admin.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]  # redis-py 8.1
        self._feed.psubscribe(_KEYS.feed("*"))
        self._world = World(self.url, Network(self._admin))
        self._names = (f"worker-{number}" for number in range(1000))
        self._workers = [self._do(self._new_worker()) for _ in range(3)]
        self._followers: list[FleetFollower] = []
        self._holds = True

    def _do(self, work: Coroutine[Any, Any, _T]) -> _T:
        return self._runner.run(work)

    async def _new_worker(self) -> FleetWorker:
        return FleetWorker(self._world, next(self._names))

    async def _replace(self, place: int) -> None:
        await self._workers[place].die()
        self._workers[place] = await self._new_worker()

    def _go_on(self, which: int, steps: int, place: int = 0) -> None:
        for _ in range(steps):
            self._do(self._workers[which].gate.let_through(Fate.FINE, place))

    def _busy(self) -> list[int]:
        """The workers that have a job."""
        return [place for place, worker in enumerate(self._workers) if worker.running]

    def _waiting(self) -> list[int]:
        """The workers that have something to do."""
        return [place for place, worker in enumerate(self._workers) if worker.gate.waiting]

    def _parked_jobs(self) -> int:
        consumers = self._admin.xinfo_consumers(_KEYS.jobs(), GROUP)
        return sum(consumer["pending"] for consumer in consumers if consumer["name"].startswith(b"waiting:"))

    @initialize(length=st.integers(1, 4), by_hand=st.booleans(), steps=steps)
    def begin(self, length: int, by_hand: bool, steps: int) -> None:  # noqa: FBT001 - drawn
        self.enqueue(length, by_hand)
        self.claim(0, steps)

    # What users do.

    @precondition(lambda self: len(self._followers) < 3)
    @rule(length=st.integers(1, 4), by_hand=st.booleans())
    def enqueue(self, length: int, by_hand: bool) -> None:  # noqa: FBT001 - drawn
        follower = FleetFollower(f"r{len(self._followers)}", length)
        self._followers.append(follower)
        if by_hand:
            self._add(follower)
        else:
            self._do(self._with_client(lambda client: client.enqueue(_request(follower), id=follower.id)))

    @precondition(lambda self: self._followers)
    @rule(which=requests)
    def duplicate(self, which: int) -> None:
        follower = self._followers[which % len(self._followers)]
        if not follower.lost_its_log:
            self._add(follower)

    @precondition(lambda self: self._followers)
    @rule(which=requests, by_hand=st.booleans())
    def cancel(self, which: int, by_hand: bool) -> None:  # noqa: FBT001 - drawn
        follower = self._followers[which % len(self._followers)]
        if follower.lost_its_log:
            return
        follower.was_cancelled = True
        if not by_hand:
            self._do(self._with_client(lambda client: client.cancel(follower.id)))
            return
        try:
            self._admin.xadd(_KEYS.tokens(follower.id), {"type": "cancelled"}, id=str(SEAL))
        except ResponseError as refusal:
            assert "exhausted the last possible ID" in str(refusal)  # noqa: PT017 - by hand it is an error

    # What workers do, and how far they come.

    @precondition(lambda self: self._followers)
    @rule(which=workers, steps=steps)
    def claim(self, which: int, steps: int) -> None:
        self._do(self._workers[which].claim())
        self._go_on(which, steps)

    @precondition(lambda self: self._world.clock)
    @rule(which=workers, steps=steps)
    def take_over(self, which: int, steps: int) -> None:
        self._do(self._workers[which].take_over())
        self._go_on(which, steps)

    @precondition(lambda self: self._busy())
    @rule(which=workers, steps=steps)
    def be_overtaken(self, which: int, steps: int) -> None:
        """A worker is paused past its lease, and another takes its job."""
        self._world.pass_time(1.5 * LEASE)
        self.take_over((_one_of(self._busy(), which) + 1) % 3, steps)

    @precondition(lambda self: self._busy())
    @rule(which=workers, steps=steps)
    def keep(self, which: int, steps: int) -> None:
        place = _one_of(self._busy(), which)
        self._do(self._workers[place].keep())
        self._go_on(place, steps)

    @precondition(lambda self: self._busy())
    @rule(which=workers, steps=steps)
    def leave(self, which: int, steps: int) -> None:
        place = _one_of(self._busy(), which)
        self._do(self._workers[place].leave())
        self._go_on(place, steps)

    @precondition(lambda self: self._busy())
    @rule(which=workers, steps=steps)
    def park(self, which: int, steps: int) -> None:
        """No server has room for a job: it goes back to its queue."""
        place = _one_of(self._busy(), which)
        self._do(self._workers[place].park())
        self._go_on(place, steps)

    @precondition(lambda self: self._parked_jobs())
    @rule(which=workers, steps=steps)
    def take_parked(self, which: int, steps: int) -> None:
        self._do(self._workers[which].take_parked())
        self._go_on(which, steps)

    @precondition(lambda self: self._waiting())
    @rule(which=workers, steps=steps, place=places)
    def go_on(self, which: int, steps: int, place: int) -> None:
        self._go_on(_one_of(self._waiting(), which), steps + 1, place)

    @precondition(lambda self: self._waiting())
    @rule(which=workers)
    def come_to_rest(self, which: int) -> None:
        self._do(self._workers[_one_of(self._waiting(), which)].run())

    # What happens to them.

    @precondition(lambda self: self._waiting())
    @rule(which=workers, fate=st.sampled_from(list(Fate)[1:]), place=places, times=st.integers(1, 3), steps=steps)
    def fault(self, which: int, fate: Fate, place: int, times: int, steps: int) -> None:
        number = _one_of(self._waiting(), which)
        for _ in range(times):
            self._do(self._workers[number].gate.let_through(fate, place))
        self._go_on(number, steps)

    @precondition(lambda self: self._world.network.late)
    @rule(place=places)
    def arrive(self, place: int) -> None:
        self._do(self._world.network.deliver(place))

    @precondition(lambda self: self._busy())
    @rule(which=workers)
    def kill(self, which: int) -> None:
        self._do(self._replace(_one_of(self._busy(), which)))

    @precondition(lambda self: self._followers)
    @rule(leases=st.sampled_from([0.5, 1.5]))
    def time_passes(self, leases: float) -> None:
        self._world.pass_time(leases * LEASE)

    @precondition(lambda self: self._followers)
    @rule(which=requests, entries=st.integers(1, 3))
    def fail_over(self, which: int, entries: int) -> None:
        """All connections are lost, and with them the newest entries of an attempt that has no seal yet."""
        follower = self._followers[which % len(self._followers)]
        self._world.network.fail_over()
        if follower.lost_its_log or follower.answer.end is not None:
            return
        key = _KEYS.tokens(follower.id)
        kept = list(follower.seen)
        while entries and kept and kept[-1][1][b"type"] not in _STAY:
            kept.pop()
            entries -= 1
        expiry = self._admin.pttl(key)
        with self._admin.pipeline() as pipe:
            pipe.delete(key)
            for entry_id, fields in kept:
                pipe.xadd(key, cast("Any", fields), id=entry_id)
            if expiry > 0:
                pipe.pexpire(key, expiry)
            pipe.execute()
        follower.seen = kept
        # A reader would keep what is lost, and a new owner that finds no delta writes no `restarted`.
        follower.answer = Answer(parse(*entry) for entry in kept)

    @precondition(lambda self: self._followers)
    @rule(which=requests)
    def log_goes(self, which: int) -> None:
        """The log expires, or somebody deletes it."""
        follower = self._followers[which % len(self._followers)]
        self._admin.delete(_KEYS.tokens(follower.id))
        follower.lost_its_log = True

    # What must be true.

    @invariant()
    def holds(self) -> None:
        self._holds = False  # until it is checked again
        assert self._world.faults == []
        for follower in self._followers:
            raw = cast("Raw", self._admin.xrange(_KEYS.tokens(follower.id)))
            if not follower.lost_its_log:
                follower.read(raw)
            elif raw:
                begun = parse(*raw[0])
                assert isinstance(begun, Started | Cancelled), f"a log that was gone goes on with {begun}"
        self._check_feed()
        self._holds = True

    def _check_feed(self) -> None:
        """Every entry that the feed has published is in the log."""
        self._feed.ping()
        followers = {_KEYS.feed(follower.id).encode(): follower for follower in self._followers}
        while (message := self._feed.get_message(timeout=60)) is None or message["type"] != "pong":
            if message is None or (follower := followers[message["channel"]]).lost_its_log:
                continue
            for entry_id, fields in json.loads(message["data"]):
                published = {name.encode(): value.encode() for name, value in fields.items()}
                assert follower.ever.get(entry_id.encode()) == published or entry_id == str(SEAL), (
                    f"{entry_id} was refused"
                )

    def teardown(self) -> None:
        try:
            if self._holds:
                self._do(self._settle())
                self._check_end()
        finally:
            self._do(self._end())
            self._runner.close()
            self._feed.close()
            self._admin.flushall()
            self._admin.close()

    async def _settle(self) -> None:
        """All faults end: the rest is done within a few leases."""
        for _ in range(12):
            for worker in self._workers:
                await worker.run()
                assert worker.is_idle, f"{worker.name} is stuck with {list(worker._tasks)}"
            self.holds()
            if self._settled():
                break
            self._world.pass_time(2 * LEASE)
            for place in range(len(self._workers)):
                if self._workers[place].left:
                    await self._replace(place)
                worker = self._workers[place]
                for work in (worker.take_over, worker.take_parked, worker.claim, worker.keep):
                    await work()
                    await worker.run()
        else:
            raise AssertionError("jobs are left over")
        while self._world.network.late:
            await self._world.network.deliver(0)
            self.holds()

    def _check_end(self) -> None:
        finished = [fields for _, fields in cast("Raw", self._admin.xrange(_KEYS.lifecycle))]
        for follower in self._followers:
            if follower.lost_its_log:
                continue
            outcome = Answer(parse(*entry) for entry in follower.seen).outcome
            assert outcome, f"{follower.id} has no end"
            assert follower.answer.outcome
            assert self._admin.ttl(_KEYS.tokens(follower.id)) > 0
            assert json.loads(cast("bytes", self._admin.get(_KEYS.ended(follower.id))))["outcome"] == outcome
            assert any(
                (line[b"type"], line[b"id"], line.get(b"outcome"))
                == (b"finished", follower.id.encode(), outcome.encode())
                for line in finished
            ), f"the lifecycle does not have {follower.id}"

    async def _end(self) -> None:
        for worker in self._workers:
            await worker.die()
        self._world.network.fail_over()

    def _settled(self) -> bool:
        """Whether no job is pending or unread."""
        (group,) = self._admin.xinfo_groups(_KEYS.jobs())
        last = cast("Raw", self._admin.xrevrange(_KEYS.jobs(), count=1))
        return not group["pending"] and (not last or last[0][0] == group["last-delivered-id"])

    def _add(self, follower: FleetFollower) -> None:
        self._admin.xadd(_KEYS.jobs(), {"id": follower.id, "request": json.dumps(_request(follower))})

    async def _with_client(self, work: Callable[[Client], Awaitable[object]]) -> None:
        async with Client(self.url) as client:
            await work(client)


def _request(follower: FleetFollower) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": follower.id}], "max_tokens": follower.length}


@pytest.mark.timeout(300 + 2 * _EXAMPLES)  # after a failure, hypothesis searches for the shortest example
class TestNothingIsLostOrTwiceOrStuck(Machine.TestCase):  # type: ignore[misc, valid-type]  # made by hypothesis
    settings = settings(
        max_examples=_EXAMPLES,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    @pytest.fixture(autouse=True)
    def _on_a_redis(self, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        Machine.url = redis_url
        # Each pause is followed by a gate anyway.
        monkeypatch.setattr("worker.redisio.retry.Backoff.wait", _no_pause)


async def _no_pause(*_: object) -> None:
    await asyncio.sleep(0)
