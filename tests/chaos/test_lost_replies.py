"""Connections to Redis that break around one command: before it was sent, or after it was executed, its reply lost."""

import pytest
from checks import begun_by_a_dead_worker, chat_request, expected, promise_kept
from conftest import StartSimulator, StartWorker
from proxy import Order, Proxy
from redis.asyncio import Redis
from stepwise_worker import seal_alone

from worker import Client
from worker.broker.log_scripts import BEGIN, CLAIM, FINALIZE, SEAL_LOG
from worker.broker.ownership import LogOwnership
from worker.sandbox.simulator.server import Options, Scenario

STARTED = rb"^EVALSHA .* type started "
DELTAS = rb"^MULTI\nXADD \S+ NOMKSTREAM 1-\d+ type delta"
END = rb"^EVALSHA .* type done .* type finished "
SEAL = rb"^EVALSHA (?!.* type finished ).* type (done|error) "
CONFIRM = rb"^EVALSHA \S+ 2 chat:tokens:\S+ chat:ended:\S+ \d+ \{\S+ \d+$"
LIFECYCLE = rb"^XADD chat:lifecycle .* finished"
FEED = rb"^MULTI\nPUBLISH"
ACK = rb"^XACK"


@pytest.fixture(autouse=True)
async def _scripts(redis: Redis) -> None:
    """Redis knows the scripts, or the reply that is lost says that it does not."""
    for script in (BEGIN, CLAIM, SEAL_LOG, FINALIZE):
        await redis.script_load(script.source)


def break_at(proxy: Proxy, how: str, command: bytes, times: int = 1) -> Order:
    if how == "reply lost":
        return proxy.drop_reply(command, times=times)
    return proxy.cut_before(command, times=times)


@pytest.mark.parametrize("how", ["reply lost", "not sent"])
@pytest.mark.parametrize(
    "command",
    [STARTED, DELTAS, END, SEAL, CONFIRM, LIFECYCLE, FEED, ACK],
    ids=["started", "deltas", "end", "seal", "confirm", "lifecycle", "feed", "ack"],
)
async def test_a_command_that_is_cut_off_twice_changes_no_result(
    command: bytes,
    how: str,
    client: Client,
    redis: Redis,
    redis_proxy: Proxy,
    start_worker: StartWorker,
    start_simulator: StartSimulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if command not in {STARTED, DELTAS, END}:
        monkeypatch.setattr(LogOwnership, "seal", seal_alone)
    order = break_at(redis_proxy, how, command, times=2)
    simulator = await start_simulator(Options(scenario=Scenario(rate=200)))
    await start_worker(simulator, lease=10, redis_url=redis_proxy.redis_url)
    # Two requests, so that there is still something to cut the second time; one after the other, since the commands of
    # both may be one write, which is cut once.
    questions = ["Who are you?", "你是谁?"]
    for question in questions:
        ended = await promise_kept(redis, await client.enqueue(chat_request(question)), expected(question))
        assert ended.attempts == 1, "the worker lived and had its lease: nothing begins again"
    assert order.done.is_set()
    assert len(simulator.served) == len(questions)


async def test_the_jobs_of_a_read_whose_reply_was_lost_come_with_their_lease(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    order = redis_proxy.drop_reply(rb"^XREADGROUP", reply=rb"messages")
    await start_worker(await start_simulator(), lease=1, redis_url=redis_proxy.redis_url)
    ids = [await client.enqueue(chat_request()) for _ in range(3)]
    for request_id in ids:
        await promise_kept(redis, request_id)
    assert order.done.is_set()


async def test_the_jobs_of_a_take_over_whose_reply_was_lost_come_once_more(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    request_id = await client.enqueue(chat_request())
    await begun_by_a_dead_worker(redis, request_id, {"type": "delta", "content": "The river"})
    order = redis_proxy.drop_reply(rb"^XCLAIM", reply=rb"messages")
    await start_worker(await start_simulator(), lease=1, redis_url=redis_proxy.redis_url)
    assert (await promise_kept(redis, request_id)).attempts > 1
    assert order.done.is_set()


@pytest.mark.parametrize("how", ["reply lost", "not sent"])
async def test_a_claim_that_is_cut_off_is_repeated_at_most_once(
    how: str,
    client: Client,
    redis: Redis,
    redis_proxy: Proxy,
    start_worker: StartWorker,
    start_simulator: StartSimulator,
) -> None:
    request_id = await client.enqueue(chat_request())
    await begun_by_a_dead_worker(redis, request_id, {"type": "delta", "content": "The river"})
    order = break_at(redis_proxy, how, rb"^EVALSHA .* 2-0 type claimed ")
    await start_worker(await start_simulator(), lease=10, redis_url=redis_proxy.redis_url)
    # A lost reply leaves an own claim, which the next one fences: that is safe. A third claim would be a fault.
    assert (await promise_kept(redis, request_id)).attempts <= 3
    assert order.done.is_set()
