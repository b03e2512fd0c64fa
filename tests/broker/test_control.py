"""The control hash: pauses and drains are written, read, end by themselves, and are never lost to a bad value."""

import asyncio
import json
from typing import cast

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from worker.broker.control import Control
from worker.contract.keys import Keys
from worker.contract.records import ControlEntry


class _Time:
    """Redis's time, which a test sets. Unix ms."""

    now = 1_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def time() -> _Time:
    return _Time()


@pytest.fixture
def control(redis: Redis, time: _Time) -> Control:
    return Control(redis, Keys(), time)


async def test_a_pause_holds_until_it_is_resumed(control: Control, redis: Redis) -> None:
    pause = await control.pause("bulk", by="ops@host", why="upgrade")
    assert pause == ControlEntry(by="ops@host", why="upgrade", since=1_000_000, until=0)
    assert (await control.read()).pauses == {"bulk": pause}
    stored = json.loads(cast("bytes", await redis.hget("chat:control", "pause:bulk")))
    assert stored == {"by": "ops@host", "why": "upgrade", "since": 1_000_000, "until": 0}
    assert await control.resume("bulk") == pause
    assert not (await control.read()).pauses
    assert await control.resume("bulk") is None


async def test_a_pause_with_an_end_is_over_at_its_end_and_is_then_removed(
    control: Control, time: _Time, redis: Redis
) -> None:
    await control.pause("bulk", by="ops", seconds=1.5)
    time.now += 1_499
    assert "bulk" in (await control.read()).pauses
    time.now += 1
    state = await control.read()
    assert not state.pauses
    await control.remove_ended(state)
    assert not await redis.exists("chat:control")


async def test_an_ended_pause_that_was_renewed_meanwhile_is_not_removed(control: Control, time: _Time) -> None:
    await control.pause("bulk", by="ops", seconds=1)
    time.now += 1_000
    ended = await control.read()
    renewed = await control.pause("bulk", by="ops", seconds=1)
    await control.remove_ended(ended)
    assert (await control.read()).pauses == {"bulk": renewed}


async def test_each_change_is_published_as_a_hint(control: Control, redis: Redis) -> None:
    async with redis.pubsub() as listener:
        await listener.subscribe("chat:control")
        await control.pause("bulk", by="ops")
        await control.resume("bulk")
        await control.drain("w1", by="ops")
        await control.end_drain("w1")
        hints: list[bytes] = []
        async with asyncio.timeout(60):
            async for message in listener.listen():
                if message["type"] == "message":
                    hints.append(message["data"])
                    if len(hints) == 4:
                        break
    assert hints == [b"pause:bulk", b"pause:bulk", b"drain:w1", b"drain:w1"]


@pytest.mark.parametrize(
    "odd", [b"1", b"", b"not JSON", b"[" * 5000, b'"\xff"', b'{"by": 5, "until": "tomorrow"}', b'{"until": -1}']
)
async def test_a_value_that_cannot_be_read_pauses_without_an_end(odd: bytes, control: Control, redis: Redis) -> None:
    await redis.hset("chat:control", mapping={b"pause:bulk": odd, b"drain:w1": odd, b"later:x": odd, b"\xff": odd})
    state = await control.read()
    assert list(state.pauses) == ["bulk"]
    assert not state.pauses["bulk"].has_ended(2**60)
    assert state.drains["w1"].since == 0  # before the start of every worker, so none drains
    assert not state.ended


async def test_long_texts_are_shortened(control: Control) -> None:
    await control.pause("bulk", by="o" * 9_000, why="w" * 9_000)
    pause = (await control.read()).pauses["bulk"]
    assert (len(pause.by), len(pause.why)) == (500, 500)


async def test_a_key_of_another_type_is_an_error_and_no_pause(control: Control, redis: Redis) -> None:
    await redis.set("chat:control", "x", ex=60)
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await control.read()
