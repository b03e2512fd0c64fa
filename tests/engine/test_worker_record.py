"""A worker's record: the models that its servers list, within limits, and how often it is renewed."""

from itertools import pairwise

from conftest import StartSimulator, StartWorker
from redis.asyncio import Redis
from waits import eventually

from worker.broker.worker_registry import WorkerRegistry
from worker.contract.keys import Keys
from worker.engine.worker_record import model_names, models_away
from worker.sandbox.simulator.server import Options
from worker.vllm.servers.server import Server


def server(*models: str) -> Server:
    it = Server("http://127.0.0.1:1")
    it.record_models(models)
    return it


def test_the_models_of_all_servers_are_listed_once_and_in_order() -> None:
    assert model_names([server("b", "a"), server(), server("c", "a")]) == ("a", "b", "c")


def test_names_that_do_not_fit_into_the_record_are_left_out() -> None:
    assert model_names([server("x" * 257, "a")]) == ("a",)
    assert len(model_names([server(*map(str, range(5000)))])) == 100
    assert sum(map(len, model_names([server(*(f"{n:0200}" for n in range(90)))]))) <= 4000


def test_a_model_is_away_if_all_of_its_servers_are() -> None:
    one, other, only = server("a", "b"), server("a"), server("c")
    assert models_away([one, other, only]) == ()
    for away in (one, only):
        away.circuit.on_probe("upstream_unreachable")
    assert models_away([one, other, only]) == ("b", "c")
    assert models_away([one, server(), only]) == (), "a server that lists nothing may have any model"


async def test_a_worker_publishes_the_models_of_its_servers(
    redis: Redis, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    await start_worker(await start_simulator(Options(model="small")), await start_simulator(Options(model="large")))

    async def shown() -> bool:
        records = await WorkerRegistry(redis, Keys()).records()
        return [record.models for record in records.values()] == [("large", "small")]

    await eventually(shown)


async def test_an_idle_worker_renews_its_record_six_times_a_lease(
    redis: Redis, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    await start_worker(await start_simulator(), lease=6)
    beats = set[int]()

    async def renewed() -> bool:
        beats.update(record.beat for record in (await WorkerRegistry(redis, Keys()).records()).values())
        gaps = [later - earlier for earlier, later in pairwise(sorted(beats))]
        return any(gap < 1500 for gap in gaps[2:])  # the heartbeat alone comes every 2 s

    await eventually(renewed)
