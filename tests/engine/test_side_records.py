"""Redis may refuse the records beside the logs: that ends no job, and it is reported."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from checks import begun_by_a_dead_worker
from conftest import StartWorker, stream
from redis.asyncio import Redis
from redis.exceptions import ExecAbortError, NoPermissionError, ResponseError
from waits import eventually

from worker import Client
from worker.contract.ids import SEAL
from worker.engine.application import Worker
from worker.redisio.errors import redacted_message
from worker.sandbox.embedded_redis import EmbeddedRedis, start_redis
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator
from worker.telemetry.logging import configure_logging

REQUEST = {"messages": [{"role": "user", "content": "Who are you?"}]}


def refused(worker: Worker, record: str) -> float:
    """How many of these records Redis has refused."""
    labels = {"record": record}
    return worker.metrics.registry.get_sample_value("vllm_relay_records_refused_total", labels) or 0


async def settled(redis: Redis) -> None:
    """Wait until every job is acknowledged."""

    async def nothing_pending() -> bool:
        return not (await redis.xpending("chat:jobs", "workers"))["pending"]

    await eventually(nothing_pending)


@pytest.fixture
async def user_url(redis: Redis, redis_url: str) -> AsyncIterator[str]:
    """The Redis, for a user without permission to write any record beside the logs."""
    keys = ["chat:jobs", "chat:tokens:*", "chat:ended:*", "chat:probe"]
    await redis.acl_setuser("narrow", enabled=True, passwords="+pw", keys=keys, channels=["*"], categories=["+@all"])
    yield redis_url.replace("//", "//narrow:pw@")
    await redis.acl_deluser("narrow")


@pytest.mark.parametrize("record", ["lifecycle", "workers"])
async def test_a_key_of_another_type_in_place_of_a_side_record_ends_no_job(
    record: str,
    client: Client,
    redis: Redis,
    start_worker: StartWorker,
    simulator: Simulator,
    capfd: pytest.CaptureFixture[str],
) -> None:
    configure_logging("json", "warning")
    await redis.set(f"chat:{record}", "in the way")
    worker = await start_worker(simulator)
    for _ in range(3):
        answer = await client.result(await client.enqueue(REQUEST))
        assert answer.text == answer_to(REQUEST["messages"])
    await settled(redis)

    async def counted() -> bool:
        return refused(worker, record) > 0

    await eventually(counted)
    assert not await redis.exists("chat:dead")
    logged = capfd.readouterr().err
    assert logged.count({"lifecycle": "lifecycle_refused", "workers": "beat_failed"}[record]) == 1
    assert "job_left" not in logged
    assert await redis.get(f"chat:{record}") == b"in the way"


async def test_answers_are_whole_without_permission_to_write_side_records(
    redis: Redis, user_url: str, client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    worker = await start_worker(simulator, redis_url=user_url)
    answer = await client.result(await client.enqueue(REQUEST))
    assert answer.text == answer_to(REQUEST["messages"])
    await settled(redis)

    async def counted() -> bool:
        return refused(worker, "lifecycle") == 2  # the lines of its start and of its end

    await eventually(counted)  # the worker counts a moment after Redis has acknowledged the job
    assert not await redis.exists("chat:dead")


async def test_a_worker_that_finds_a_seal_without_its_lifecycle_lines_writes_both(
    redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    """The worker died after the seal. Its `started` line is written beside the answer, so it may be missing too."""
    await redis.xadd("chat:jobs", {"id": "r", "request": "{}"})
    await begun_by_a_dead_worker(redis, "r")
    await redis.xadd("chat:tokens:{r}", {"type": "done", "attempt": "1"}, id=str(SEAL))
    await start_worker(simulator)

    async def acknowledged() -> bool:
        return bool(
            await redis.exists("chat:ended:{r}") and not (await redis.xpending("chat:jobs", "workers"))["pending"]
        )

    await eventually(acknowledged)
    lines = [(fields[b"type"], fields[b"attempt"]) for _, fields in await stream(redis, "chat:lifecycle")]
    assert lines == [(b"started", b"1"), (b"finished", b"1")]


async def test_a_job_whose_dead_letter_is_refused_is_kept_until_it_can_be_written(
    redis: Redis,
    user_url: str,
    client: Client,
    start_worker: StartWorker,
    simulator: Simulator,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The letter is all that is left of such a job: without one the job is not acknowledged, and it keeps no slot."""
    configure_logging("json", "warning")
    worker = await start_worker(simulator, redis_url=user_url, slots=1, lease=0.5)
    await redis.xadd("chat:jobs", {"id": "no/id", "request": "{}"})

    logged = ""

    async def refused_again() -> bool:
        nonlocal logged
        logged += capfd.readouterr().err
        return "job_left" in logged and refused(worker, "dead") > 2

    await eventually(refused_again)
    answer = await client.result(await client.enqueue(REQUEST))
    assert answer.text == answer_to(REQUEST["messages"])

    async def is_the_only_one_left() -> bool:
        return bool((await redis.xpending("chat:jobs", "workers"))["pending"] == 1)

    await eventually(is_the_only_one_left)
    await redis.acl_setuser("narrow", enabled=True, keys=["*"])
    await settled(redis)
    ((_, letter),) = await stream(redis, "chat:dead")
    assert b"no/id" in letter[b"fields"]


async def test_a_redis_without_publish_gets_no_feed_and_the_log_quotes_no_answer(
    redis_server: EmbeddedRedis,
    start_worker: StartWorker,
    simulator: Simulator,
    capfd: pytest.CaptureFixture[str],
) -> None:
    configure_logging("json", "debug")
    assert redis_server.process is not None
    binary = Path(str(redis_server.process.args[0]))  # type: ignore[index]  # a list, as started
    with start_redis(binary, "--rename-command", "PUBLISH", "") as other:
        worker = await start_worker(simulator, redis_url=other.url, drain_timeout=0.1)
        async with Client(other.url) as client:
            answers = [await client.result(await client.enqueue(REQUEST)) for _ in range(3)]
        text = answer_to(REQUEST["messages"])
        assert [answer.text for answer in answers] == [text] * 3
        assert refused(worker, "feed") == 1
        worker.stop()

        async def left() -> bool:
            return "worker_stopped" in capfd.readouterr().err

        logged = capfd.readouterr().err
        assert logged.count("feed_refused") == 1
        assert "unknown command" in logged
        assert not [word for word in text.split() if len(word) > 6 and word in logged]
        await eventually(left)


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (
            ResponseError('unknown command `PUBLISH`, with args beginning with: `chat:feed:{r}` `[["1-1",{"type`, '),
            "unknown command `PUBLISH`",
        ),
        (
            ResponseError("unknown command 'XADD', with args beginning with: 'chat:tokens:{r}' 'secret \ntold' "),
            "unknown command 'XADD'",
        ),
        (
            ResponseError("Command # 1 (XADD chat:dead * fields secret) of pipeline caused error: OOM command not"),
            "OOM command not",
        ),
        (NoPermissionError("this user has no permissions to run the 'publish' command"), None),
        (ExecAbortError("Transaction discarded because of previous errors."), None),
    ],
)
def test_what_redis_quotes_of_a_command_is_redacted(error: Exception, logged: str | None) -> None:
    assert redacted_message(error) == (str(error) if logged is None else logged)
