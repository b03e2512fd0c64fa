"""A Redis user without the right to some channels: the logs are whole, and it is said what is missing."""

from collections.abc import AsyncIterator

import pytest
from conftest import StartWorker, eventually
from redis.asyncio import Redis

from worker import Client
from worker.checks import check
from worker.sandbox.requests import answer_to
from worker.sandbox.simulator import Simulator
from worker.telemetry.logs import configure_logging

REQUEST = {"messages": [{"role": "user", "content": "Who are you?"}]}


@pytest.fixture
async def user_url(redis: Redis, redis_url: str) -> AsyncIterator[str]:
    """The Redis, as a user that may use every command and key of ours, and no channel."""
    await redis.acl_setuser(
        "mute", enabled=True, passwords="+pw", keys=["chat:*"], categories=["+@all"], reset_channels=True
    )
    yield redis_url.replace("//", "//mute:pw@")
    await redis.acl_deluser("mute")


async def test_without_the_right_to_channels_answers_are_whole_and_cancels_work(
    user_url: str, start_worker: StartWorker, simulator: Simulator, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging("json", "warning")
    await start_worker(simulator, redis_url=user_url)
    async with Client(user_url) as client:
        for _ in range(3):
            answer = await client.result(await client.enqueue(REQUEST))
            assert answer.text == answer_to(REQUEST["messages"])
        assert (await client.cancel("never")).state.value == "unknown"
        assert (await client.status("never")).outcome == "cancelled"
    said = capfd.readouterr().err
    assert said.count("feed_refused") == said.count("cancel_hints_refused") == 1


async def test_a_right_to_channels_that_is_given_later_is_used(
    redis: Redis,
    user_url: str,
    start_worker: StartWorker,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """D13: one refused subscription, as with a password that was changed, is not the end of the hints."""
    monkeypatch.setattr("worker.broker.cancels._ASK_AGAIN", 0.05)
    configure_logging("json", "warning")
    said = ""

    async def refused() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "cancel_hints_refused" in said

    async def subscribed() -> bool:
        return [count for _, count in await redis.pubsub_numsub("chat:cancel")] == [1]

    await start_worker(simulator, redis_url=user_url)
    await eventually(refused)
    await redis.acl_setuser("mute", enabled=True, channels=["chat:*"])
    await eventually(subscribed)
    assert (said + capfd.readouterr().err).count("cancel_hints_refused") == 1


async def test_the_check_says_what_is_missing_and_how_to_give_it(user_url: str, simulator: Simulator) -> None:
    findings = [finding async for finding in check({"redis_url": user_url, "vllm_urls": simulator.url})]
    (told,) = [finding for finding in findings if "lacks a right" in finding.text]
    assert told.level == "warning"
    assert "&chat:*" in told.mend


async def test_without_the_right_to_info_all_else_is_looked_at(
    redis: Redis, user_url: str, simulator: Simulator
) -> None:
    await redis.acl_setuser("mute", enabled=True, commands=["-info"], channels=["chat:*"])
    findings = [finding async for finding in check({"redis_url": user_url, "vllm_urls": simulator.url})]
    (told,) = [finding for finding in findings if finding.level != "ok"]
    assert (told.level, told.mend) == ("warning", "ACL SETUSER <user> +info")
    assert [finding.text for finding in findings if finding.subject.startswith("vLLM")] == ["serves reciter"]
    assert [finding.text for finding in findings if finding.subject.startswith("queue")] == [
        "no job has been added yet"
    ]


async def test_a_right_without_which_nothing_works_is_named(redis: Redis, user_url: str, simulator: Simulator) -> None:
    await redis.acl_setuser("mute", enabled=True, commands=["-type"], channels=["chat:*"])
    findings = [finding async for finding in check({"redis_url": user_url, "vllm_urls": simulator.url})]
    (told,) = [finding for finding in findings if finding.level == "error"]
    assert "'type'" in told.text
    assert told.mend.startswith("give the user that right: ACL SETUSER <user> ~chat:*")
