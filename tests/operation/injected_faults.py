"""Faults for an installation, each with the name by which `worker status` must call it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from installation import REQUEST, Installation, stopped
from waits import eventually

from worker.broker.control import Control
from worker.contract.keys import Keys

_POISONED = str(Path(__file__).parents[1] / "chaos/poisoned_worker.py")
_PASSWORD = "PASSWORD"

Inject = Callable[[Installation], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """A fault. `named` are the names that fit; the first fault that the status names must have one of them."""

    inject: Inject
    named: frozenset[str]


FAULTS: dict[str, InjectedFault] = {}


def _fault(*named: str) -> Callable[[Callable[[Installation], AsyncIterator[None]]], Inject]:
    def add(inject: Callable[[Installation], AsyncIterator[None]]) -> Inject:
        FAULTS[inject.__name__] = InjectedFault(asynccontextmanager(inject), frozenset(named))
        return FAULTS[inject.__name__].inject

    return add


@_fault("worker_dead")
async def worker_dead(it: Installation) -> AsyncIterator[None]:
    """Kill -9."""
    it.workers[0].kill()
    yield


@_fault("worker_blocked")
async def worker_blocked(it: Installation) -> AsyncIterator[None]:
    """SIGSTOP."""
    with stopped(it.workers[0]):
        yield


@_fault("gateway_silent")
async def gateway_stopped(it: Installation) -> AsyncIterator[None]:
    """A gateway is started beside the workers. Then SIGSTOP."""
    settings = {"REDIS_URL": it.url, "GATEWAY_LISTEN": "127.0.0.1:0", "GATEWAY_NO_AUTH": "true"}
    process = it.programs.start_own("gateway", **settings)

    async def has_record() -> bool:
        return bool(await it.redis.exists(Keys().gateway_processes))

    await eventually(has_record)
    with stopped(process):
        yield


@_fault("vllm_away")
async def vllm_away(it: Installation) -> AsyncIterator[None]:
    """A server is killed."""
    await it.vllm[0].simulator.__aexit__(None, None, None)
    yield


@_fault("vllm_silent")
async def vllm_frozen(it: Installation) -> AsyncIterator[None]:
    """A server accepts requests and streams nothing, also of running answers."""
    it.vllm[0].clock.stop()
    yield


@_fault("vllm_silent")
async def vllm_stopped(it: Installation) -> AsyncIterator[None]:
    """As SIGSTOP: a server accepts connections and sends nothing, of its health and of running answers included."""
    it.vllm[0].clock.stop()
    it.vllm[0].simulator.stop()
    yield


@_fault("vllm_full")
async def vllm_full(it: Installation) -> AsyncIterator[None]:
    """More jobs than the servers can answer: each generates one answer at once, and refuses the second that waits."""
    for server in it.vllm:
        server.simulator.change(max_num_seqs=1, max_num_queued_reqs=2)
    for _ in range(40):
        await it.client.enqueue(REQUEST)
    yield


@_fault("redis_full")
async def redis_full(it: Installation) -> AsyncIterator[None]:
    await it.redis.config_set("maxmemory", "1")
    yield


@_fault("redis_silent")
async def redis_stopped(it: Installation) -> AsyncIterator[None]:
    """SIGSTOP."""
    assert it.server.process is not None
    with stopped(it.server.process):
        yield


@_fault("redis_silent")
async def redis_paused(it: Installation) -> AsyncIterator[None]:
    """CLIENT PAUSE of all commands, CLIENT UNPAUSE included."""
    await it.redis.client_pause(60_000)
    yield


@_fault("redis_login")
async def wrong_password_of_a_worker(it: Installation) -> AsyncIterator[None]:
    """A worker with a wrong password is started beside the others."""
    await it.redis.acl_setuser("guarded", enabled=True, passwords=f"+{_PASSWORD}", keys=["*"], categories=["+@all"])
    it.start_worker(REDIS_URL=it.url.replace("//", "//guarded:wrong@"))
    yield


@_fault("vllm_login")
async def wrong_api_key(it: Installation) -> AsyncIterator[None]:
    """A server requires another key."""
    it.vllm[0].simulator.change(api_key="another")
    yield


@_fault("queue_unserved")
async def queue_unserved(it: Installation) -> AsyncIterator[None]:
    await it.redis.xadd("chat:jobs:mistyped", {"id": "lonely", "request": "{}"})
    yield


@_fault("queue_paused")
async def queue_paused(it: Installation) -> AsyncIterator[None]:
    seconds, _ = await it.redis.time()
    control = Control(it.redis, Keys(), lambda: seconds * 1000)
    await control.pause("default", by="somebody@somewhere", why="a test")
    yield


@_fault("leases_differ")
async def unequal_leases(it: Installation) -> AsyncIterator[None]:
    it.start_worker(WORKER_LEASE=str(2 * it.lease))
    yield


@_fault("poison_job")
async def poison_job(it: Installation) -> AsyncIterator[None]:
    """A job that kills every worker which runs it. Others are started in their place."""
    for process in it.workers:
        process.terminate()
    it.workers.clear()
    await it.client.enqueue(REQUEST | {"user": "poison"})

    async def replace_the_dead() -> None:
        while True:
            process = it.start_worker(_POISONED)
            await asyncio.to_thread(process.wait)

    replacing = asyncio.create_task(replace_the_dead())
    yield
    replacing.cancel()
