"""Many followers, and stuck ones: each reads the whole log with its own cursor, and none delays another."""

import asyncio
import socket
from urllib.parse import urlsplit

from checks import chat_request, has_begun, log_of, promise_kept
from conftest import StartSimulator, StartWorker
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.contract.ids import EntryId
from worker.sandbox.simulator.server import Options, Scenario


async def test_three_hundred_followers_of_one_request_get_the_whole_log(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=40))), lease=15)
    request_id = await client.enqueue(chat_request())

    async def follow() -> list[EntryId]:
        return [entry.id async for entry in client.follow(request_id)]

    seen = await asyncio.gather(*(follow() for _ in range(300)))
    await promise_kept(redis, request_id)
    whole = [line.id for line in await log_of(redis, request_id)]
    assert all(ids == whole for ids in seen)


async def test_a_follower_that_reads_nothing_delays_nobody(
    client: Client, redis: Redis, redis_url: str, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=40))), lease=15)
    request_id = await client.enqueue(chat_request())
    await has_begun(redis, request_id)
    key = f"chat:tokens:{{{request_id}}}"
    parts = urlsplit(redis_url)
    with socket.socket() as reading, socket.socket() as subscribed:
        for stuck, command in ((reading, f"XRANGE {key} - +\r\n" * 2000), (subscribed, f"SUBSCRIBE {key}\r\n")):
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.connect((parts.hostname, parts.port))
            stuck.sendall(command.replace("tokens", "feed").encode() if stuck is subscribed else command.encode())

        async def is_stuck() -> bool:
            return any(int(each["omem"]) for each in await redis.client_list())

        await eventually(is_stuck)
        answer = await client.result(request_id)
        ended = await promise_kept(redis, request_id)
    assert (answer.text, ended.attempts) == (ended.text, 1)
