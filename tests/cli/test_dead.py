"""Dead letters: listed, shown, put back as another request, dropped, and removed after their retention."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import cast

import pytest
from click.testing import CliRunner, Result
from conftest import StartWorker, stream
from proxy import Proxy
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.broker.dead_letters import DeadLetters, DeadLetterWriter
from worker.broker.job_queue import Delivery
from worker.cli.dead_letters import put_back
from worker.cli.main import main
from worker.cli.options import Surroundings
from worker.contract.ids import EntryId
from worker.contract.keys import Keys
from worker.redisio.clients import command_client
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator

WHO = [{"role": "user", "content": "Who are you?"}]
REQUEST = json.dumps({"model": "reciter", "messages": WHO})
Bury = Callable[..., Awaitable[str]]


@pytest.fixture
def bury(redis: Redis) -> Bury:
    async def bury(
        number: int = 1, queue: str = "default", reason: str = "why", largest: int = 9999, **more: str
    ) -> str:
        fields = {"id": f"r{number}", "request": REQUEST} | more
        job = Delivery(queue, f"{number}-0", {name.encode(): value.encode() for name, value in fields.items()})
        await DeadLetterWriter(redis, Keys()).bury(job, reason, 1_700_000_000_000, largest)
        return (await stream(redis, "chat:dead"))[-1][0].decode()

    return bury


async def worker(
    redis_url: str, *arguments: str, typed: str | None = None, surroundings: Surroundings | None = None
) -> Result:
    runner = CliRunner(env={"REDIS_URL": redis_url})
    return await asyncio.to_thread(runner.invoke, main, arguments, input=typed, obj=surroundings)


async def letters(redis: Redis) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in await stream(redis, "chat:dead")]


async def jobs(redis: Redis, key: str = "chat:jobs") -> list[dict[str, str]]:
    return [{n.decode(): v.decode() for n, v in fields.items()} for _, fields in await stream(redis, key)]


async def test_every_line_of_the_list_fits_80_columns_and_controls_no_terminal(redis_url: str, bury: Bury) -> None:
    await bury(1, reason="the request is not JSON: \x1b[2J" + "it goes on and on " * 9, queue="q" * 64)
    found = await worker(redis_url, "dead", "list")
    assert "it goes on and on" in found.stdout
    assert "\x1b" not in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 80


async def test_the_list_shows_the_newest_last_up_to_a_limit(redis_url: str, bury: Bury) -> None:
    ids = [await bury(number, reason=f"reason {number}") for number in range(40)]
    plain = await worker(redis_url, "dead", "list", "--limit", "2")
    as_json = await worker(redis_url, "dead", "list", "--json", "--reason", "REASON 3", "--queue", "default")
    lines = plain.stdout.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == ids[-2:]
    assert lines[3].startswith(f"{ids[-1]}  2023-11-14 22:13:20Z  queue default  ")
    assert lines[4:] == ["    request r39", "    reason 39"]
    assert "Who are you?" not in plain.stdout, "prompts only when one letter is shown"
    found = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [letter["id"] for letter in found] == [ids[3], *ids[30:]]
    assert found[0] | {"size": 0} == {
        "id": ids[3], "time": 1_700_000_000_000, "queue": "default", "job": "3-0", "request": "r3", "size": 0,
        "retried_as": "", "reason": "reason 3",
    }  # fmt: skip
    assert found[0]["size"] > len(REQUEST)


async def test_show_prints_a_whole_letter(redis_url: str, bury: Bury) -> None:
    letter = await bury()
    for options in ([], ["--json"]):
        shown = json.loads((await worker(redis_url, "dead", "show", letter, *options)).stdout)
        assert shown["fields"] == {"id": "r1", "request": REQUEST}
    missing = await worker(redis_url, "dead", "show", "1-1")
    assert missing.exit_code == 1
    assert "1-1: there is no such letter: worker dead list shows all letters" in missing.stderr
    wrong = await worker(redis_url, "dead", "show", "r1")
    assert wrong.exit_code == 2
    assert "'r1' is not the id of a dead letter" in wrong.stderr


async def test_a_retry_is_another_request_and_the_two_name_each_other(
    redis_url: str, redis: Redis, client: Client, bury: Bury, start_worker: StartWorker, simulator: Simulator
) -> None:
    letter = await bury(tenant="acme", deadline="5", retention="60")
    done = await worker(redis_url, "dead", "retry", letter, "--json")
    assert done.exit_code == 0
    new = json.loads(done.stdout)["retried_as"]
    (after,) = await letters(redis)
    assert after[b"retried_as"].decode() == new
    (job,) = await jobs(redis)
    assert job == {
        "v": "1", "id": new, "request": job["request"], "retention": "60", "tenant": "acme", "retry_of": "r1",
    }, "all of it but the deadline, which was that of the first try"  # fmt: skip

    await start_worker(simulator)
    assert (await client.result(new)).text == answer_to(WHO)

    async def is_in_lifecycle() -> bool:
        lines = [fields for _, fields in await stream(redis, "chat:lifecycle")]
        return [line[b"retry_of"] for line in lines if line[b"id"] == new.encode()] == [b"r1", b"r1"]

    await eventually(is_in_lifecycle)


async def test_a_letter_that_was_retried_is_not_retried_again(redis_url: str, redis: Redis, bury: Bury) -> None:
    before = await bury()
    first = await worker(redis_url, "dead", "retry", before, "--json")
    ((letter, _),) = await stream(redis, "chat:dead")
    assert json.loads(first.stdout)["letter"] == letter.decode() != before, "the output has the new id of the letter"
    gone = await worker(redis_url, "dead", "retry", before)
    assert "one that is retried gets a new id" in gone.stderr
    again = await worker(redis_url, "dead", "retry", letter.decode())
    assert again.exit_code == 1
    assert "it was retried already, as " in again.stderr
    assert (await worker(redis_url, "dead", "retry", "--all")).exit_code == 0
    assert len(await jobs(redis)) == 1


async def test_a_retry_that_broke_off_can_be_made_again_and_is_one_job(
    redis_url: str, redis: Redis, bury: Bury, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await bury()

    async def crash(*_: object) -> None:
        raise OSError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(DeadLetters, "mark_retried", crash)
        assert (await worker(redis_url, "dead", "retry", letter)).exit_code == 1
    assert b"retried_as" not in (await letters(redis))[0]
    assert (await worker(redis_url, "dead", "retry", letter)).exit_code == 0
    (job,) = await jobs(redis)
    (after,) = await letters(redis)
    assert after[b"retried_as"].decode() == job["id"]


async def test_of_two_retries_at_once_there_is_one_job_and_one_letter(redis: Redis, client: Client, bury: Bury) -> None:
    letters_ = DeadLetters(redis, Keys())
    stored = await letters_.get(EntryId.parse(await bury()))
    assert stored
    await asyncio.gather(*(put_back(client, letters_, stored) for _ in range(5)))
    assert len(await jobs(redis)) == len(await letters(redis)) == 1


async def test_two_workers_that_bury_a_job_at_once_leave_one_letter(
    redis: Redis, redis_proxy: Proxy, redis_url: str
) -> None:
    job = Delivery("default", "1-0", {b"id": b"no/id"})
    async with command_client(redis_proxy.redis_url) as first, command_client(redis_url) as second:
        writing = redis_proxy.hold(rb"^EVALSHA \S+ 1 chat:dead ")
        paused = asyncio.create_task(DeadLetterWriter(first, Keys()).bury(job, "why", 7, 9999))
        await writing.met.wait()
        await DeadLetterWriter(second, Keys()).bury(replace(job, redelivered=True), "why", 7, 9999)
        await DeadLetterWriter(second, Keys()).bury(replace(job, id="2-0"), "another", 7, 9999)
        writing.release()
        await paused
    assert [letter[b"job"] for letter in await letters(redis)] == [b"1-0", b"2-0"]


async def test_a_burst_of_burials_by_several_workers_leaves_a_letter_of_each_job(redis: Redis, redis_url: str) -> None:
    ids = [f"{number}-0" for number in range(30)]
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(command_client(redis_url)) for _ in range(3)]
        writers = [DeadLetterWriter(each, Keys()) for each in clients]
        burials = (
            writer.bury(Delivery("default", i, {}, redelivered=True), "why", 7, 9999) for i in ids for writer in writers
        )
        await asyncio.gather(*burials)
    assert sorted(letter[b"job"].decode() for letter in await letters(redis)) == sorted(ids)


@pytest.mark.parametrize(
    ("more", "largest", "message"),
    [
        ({}, 20, "its request was over the size limit, and only the beginning was kept"),
        ({"request": "{}"}, 9999, "does not validate: the request has no messages"),
        ({"queue": "no/queue"}, 9999, "the queue 'no/queue' has an invalid name"),
    ],
)
async def test_letters_that_cannot_be_put_back_are_reported_and_the_others_are_put_back(
    more: dict[str, str], largest: int, message: str, redis_url: str, redis: Redis, bury: Bury
) -> None:
    bad = await bury(1, largest=largest, **more)
    await bury(2)
    done = await worker(redis_url, "dead", "retry", "--all")
    assert done.exit_code == 1
    assert f"{bad}: " in done.stderr
    assert message in done.stderr
    assert "1 of 2 letters were not changed" in done.stderr
    assert [job["retry_of"] for job in await jobs(redis)] == ["r2"]
    assert sorted(b"retried_as" in letter for letter in await letters(redis)) == [False, True]


async def test_a_job_without_a_usable_id_gets_one(redis_url: str, redis: Redis, bury: Bury) -> None:
    await bury(id="no/id")
    assert (await worker(redis_url, "dead", "retry", "--all")).exit_code == 0
    (job,) = await jobs(redis)
    assert len(job["id"]) == 32
    assert "retry_of" not in job


async def test_a_retry_goes_to_the_queue_that_its_job_was_in(redis_url: str, redis: Redis, bury: Bury) -> None:
    for number, queue in enumerate(("default", "low", "low")):
        await bury(number, queue=queue, reason=f"reason {number}")
    done = await worker(redis_url, "dead", "retry", "--all", "--queue", "low", "--reason", "2")
    assert done.exit_code == 0
    assert [job["retry_of"] for job in await jobs(redis, "chat:jobs:low")] == ["r2"]
    assert await jobs(redis) == []


async def test_letters_are_dropped_by_id_or_by_selection(redis_url: str, redis: Redis, bury: Bury) -> None:
    ids = [await bury(number, reason=f"reason {number % 2}") for number in range(6)]
    one = await worker(redis_url, "dead", "drop", ids[0], ids[1], "9-9")
    assert one.exit_code == 1
    assert one.stdout == f"{ids[0]}: dropped\n{ids[1]}: dropped\n"
    assert "9-9: there is no such letter" in one.stderr
    assert (await worker(redis_url, "dead", "drop", "--all", "--reason", "reason 1")).exit_code == 0
    other = [await worker(redis_url, "dead", *words, "--queue", "other") for words in (("drop", "--all"), ("list",))]
    assert {result.stderr for result in other} == {"· no dead letter matches --queue and --reason\n"}
    assert [letter[b"job"] for letter in await letters(redis)] == [b"2-0", b"4-0"]
    assert (await worker(redis_url, "dead", "drop", "--all")).exit_code == 0
    assert await letters(redis) == []
    none = await worker(redis_url, "dead", "drop", "--all")
    assert (none.exit_code, none.stderr) == (0, "· no dead letters\n")


async def test_on_a_terminal_dropping_all_has_to_be_confirmed(redis_url: str, redis: Redis, bury: Bury) -> None:
    await bury()
    terminal = Surroundings(can_confirm=True)
    refused = await worker(redis_url, "dead", "drop", "--all", typed="n\n", surroundings=terminal)
    assert refused.exit_code == 1
    assert "Drop 1 dead letters for good?" in refused.stderr
    assert len(await letters(redis)) == 1
    await worker(redis_url, "dead", "drop", "--all", "--yes", surroundings=terminal)
    assert await letters(redis) == []


@pytest.mark.parametrize("arguments", [[], ["1-0", "--all"], ["1-0", "--queue", "low"]])
async def test_ids_and_all_exclude_each_other(arguments: list[str], redis_url: str) -> None:
    assert (await worker(redis_url, "dead", "drop", *arguments)).exit_code == 2


async def test_a_malformed_letter_is_shown_as_far_as_it_can_be_read(redis_url: str, redis: Redis) -> None:
    letter = cast("bytes", await redis.xadd("chat:dead", {b"\xff": b"\xff", "time": "soon", "fields": "{", "cut": "1"}))
    assert "an unknown time" in (await worker(redis_url, "dead", "list")).stdout
    assert json.loads((await worker(redis_url, "dead", "show", letter.decode())).stdout)["fields"] == {}
    assert (await worker(redis_url, "dead", "retry", letter.decode())).exit_code == 1


async def test_workers_drop_letters_after_their_retention(
    redis: Redis, bury: Bury, start_worker: StartWorker, simulator: Simulator
) -> None:
    await redis.xadd("chat:dead", {"reason": "old"}, id="1-0")
    recent = await bury()
    await start_worker(simulator, lease=0.5)

    async def forgotten() -> bool:
        return [letter.decode() for letter, _ in await stream(redis, "chat:dead")] == [recent]

    await eventually(forgotten)


@pytest.mark.parametrize("name", ["list", "show", "retry", "drop"])
def test_the_help_of_each_has_an_example(name: str) -> None:
    result = CliRunner().invoke(main, ["dead", name, "--help"])
    assert f"worker dead {name}" in result.stdout.partition("  Example: ")[2]
