"""The errors of the clients: one tree of them, whatever Redis answers and whatever is stored in it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest
from command import run
from proxy import Proxy
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from worker import (
    Client,
    ClientError,
    Conflict,
    InvalidArgument,
    Refused,
    State,
    Unavailable,
    UnknownRequest,
    Unreadable,
)
from worker.client.errors import mapped
from worker.contract.ids import SEAL

ASK: dict[str, Any] = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}]}

Call = Callable[[Client], Awaitable[object]]


async def follow(client: Client, request_id: str = "r", after: str | None = None) -> list[object]:
    return [entry async for entry in client.follow(request_id, after=after)]


CALLS: dict[str, Call] = {
    "ping": lambda client: client.ping(),
    "enqueue": lambda client: client.enqueue(ASK, id="r"),
    "follow": follow,
    "pour": lambda client: client.pour("r", lambda _: None),
    "result": lambda client: client.result("r"),
    "status": lambda client: client.status("r"),
    "cancel": lambda client: client.cancel("r"),
}


@pytest.fixture
async def user(redis: Redis) -> AsyncIterator[str]:
    await redis.acl_setuser(
        "somebody", enabled=True, passwords="+pw", keys=["chat:*"], categories=["+@all"], channels=["chat:*"],
        reset_channels=True,
    )  # fmt: skip
    yield "somebody"
    await redis.acl_deluser("somebody")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_wrong_password_raises_refused(call: Call, redis_url: str, user: str) -> None:
    async with Client(redis_url.replace("//", f"//{user}:wrong@")) as client:
        with pytest.raises(Refused, match=r"Redis refuses: .*(username-password|WRONGPASS).*`worker check`"):
            await call(client)


@pytest.mark.parametrize("name", ["enqueue", "follow", "pour", "result", "status", "cancel"])
async def test_a_missing_right_raises_refused(name: str, redis: Redis, redis_url: str, user: str) -> None:
    await redis.acl_setuser(user, enabled=True, commands=["-xrange", "-xrevrange", "-watch"])
    async with Client(redis_url.replace("//", f"//{user}:pw@")) as client:
        with pytest.raises(Refused, match=r"Redis refuses: .*(permission|user executing the script can't run)"):
            await CALLS[name](client)


async def test_a_cancel_that_redis_refuses_raises(redis: Redis, redis_url: str, user: str) -> None:
    async with Client(redis_url.replace("//", f"//{user}:pw@")) as client:
        await client.enqueue(ASK, id="r")
        await redis.acl_setuser(user, enabled=True, commands=["-xadd"])
        with pytest.raises(Refused, match="permission"):
            await client.cancel("r")
        result = await run("cancel", "r", REDIS_URL=redis_url.replace("//", f"//{user}:pw@"))
        assert (result.status, result.out) == (1, "")
        assert result.err.startswith("Error: Redis refuses: ")
        assert (await client.status("r")).state is State.QUEUED


async def test_cancelling_a_log_that_has_lost_its_seal_raises_nothing(client: Client, redis: Redis) -> None:
    await client.enqueue(ASK, id="r")
    await client.cancel("r")
    await redis.xdel("chat:tokens:{r}", str(SEAL))
    assert (await client.cancel("r")).state is State.QUEUED


@pytest.mark.parametrize("name", ["enqueue", "cancel"])
async def test_a_connection_that_is_lost_in_every_script_is_not_retried_for_ever(
    name: str, client: Client, redis_proxy: Proxy
) -> None:
    if name == "cancel":
        await client.enqueue(ASK, id="r")
    redis_proxy.cut_before(rb"EVALSHA", times=1_000_000)
    async with Client(redis_proxy.redis_url, patience=0.2) as cut, asyncio.timeout(60):
        with pytest.raises(Unavailable, match="Redis does not answer"):
            await CALLS[name](cut)


@pytest.mark.parametrize("name", ["enqueue", "follow", "pour", "result", "status", "cancel"])
async def test_a_key_of_another_type_in_place_of_the_log_raises_refused(
    name: str, client: Client, redis: Redis
) -> None:
    await redis.set("chat:tokens:{r}", "x", ex=60)
    with pytest.raises(Refused, match="WRONGTYPE"):
        await CALLS[name](client)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RedisConnectionError("Connection closed by server."),
         "Redis does not answer: Connection closed by server. `worker check` shows how to fix it"),
        (RedisConnectionError("Connection refused"),
         "Redis does not answer: Connection refused. `worker check` shows how to fix it"),
        (RedisError("Is the configuration correct?"),
         "Redis refuses: Is the configuration correct? `worker check` shows how to fix it"),
        (NoPermissionError("this user has no permissions to run the 'ttl' command"),
         ("Redis refuses: this user has no permissions to run the 'ttl' command. To fix it: give the user the rights "
          "of its line in deploy/redis/users.acl: ACL SETUSER <user> +<command> ~<prefix>:*")),
        (ResponseError("WRONGTYPE Operation against a key"),
         ("Redis refuses: WRONGTYPE Operation against a key. Another program wrote to a key of this request "
          "(<prefix>:tokens:{ID}, <prefix>:ended:{ID}) or to a shared key, which `worker check` reports. "
          "Remove the data of that program, or choose another prefix")),
    ],
)  # fmt: skip
def test_an_error_of_redis_is_a_sentence_with_advice(error: Exception, text: str) -> None:
    """`worker check` looks at no key of a single request, so the advice on one names the keys."""
    assert str(mapped(error)) == text


@pytest.mark.parametrize("tombstone", ["x", "{}", b'{"outcome":"\xff","time":1}', "null"])
@pytest.mark.parametrize("name", ["enqueue", "follow", "pour", "result", "status", "cancel"])
async def test_an_unreadable_tombstone_raises_unreadable(
    name: str, tombstone: str | bytes, client: Client, redis: Redis
) -> None:
    await redis.set("chat:ended:{r}", tombstone, ex=60)
    with pytest.raises(Unreadable, match="the tombstone cannot be read: "):
        await CALLS[name](client)


async def test_an_unreadable_tombstone_stops_nobody_while_the_log_exists(client: Client, redis: Redis) -> None:
    await client.enqueue(ASK, id="r")
    await redis.set("chat:ended:{r}", "x", ex=60)
    assert (await client.status("r")).state is State.QUEUED
    assert await client.enqueue(ASK, id="r") == "r"
    assert (await client.cancel("r")).state is State.QUEUED
    assert (await client.result("r")).outcome == "cancelled"
    assert await redis.get("chat:ended:{r}") == b"x", "a tombstone is not changed"


@pytest.mark.parametrize("name", ["follow", "pour", "result"])
async def test_an_unreadable_entry_raises_unreadable(name: str, client: Client, redis: Redis) -> None:
    await client.enqueue(ASK, id="r")
    await redis.xadd("chat:tokens:{r}", {"type": "started"}, id="1-0")
    await redis.xadd("chat:tokens:{r}", {"type": "delta", "token_ids": "?"}, id="1-1")
    with pytest.raises(Unreadable, match=r"entry 1-1 \(delta\): field token_ids cannot be read"):
        await CALLS[name](client)


async def test_worker_follow_names_an_unreadable_entry(client: Client, redis: Redis, redis_url: str) -> None:
    await client.enqueue(ASK, id="r")
    await redis.xadd("chat:tokens:{r}", {"type": "started"}, id="1-0")
    await redis.xadd("chat:tokens:{r}", {"type": "delta", "token_ids": "?"}, id="1-1")
    result = await run("follow", "r", REDIS_URL=redis_url)
    assert result.status == 1
    assert result.err.splitlines()[-1].startswith("Error: entry 1-1 (delta): field token_ids cannot be read")
    assert "Traceback" not in result.err


async def test_an_unreadable_first_entry_counts_as_another_request(client: Client, redis: Redis) -> None:
    await redis.xadd("chat:tokens:{r}", {"type": "queued", "v": "?"}, id="0-1")
    await redis.expire("chat:tokens:{r}", 60)
    with pytest.raises(Conflict):
        await client.enqueue(ASK, id="r")


async def test_pour_raises_what_its_callback_raises(client: Client) -> None:
    def fail(_: object) -> None:
        raise OSError("mine")

    await client.enqueue(ASK, id="r")
    with pytest.raises(OSError, match="mine"):
        await client.pour("r", fail)


@pytest.mark.parametrize("after", ["x", "", "1-x", "1-2-3", "-1", "18446744073709551616-0", "1" * 5000])
async def test_an_invalid_place_raises_invalid_argument(after: str, client: Client) -> None:
    await client.enqueue(ASK, id="r")
    with pytest.raises(InvalidArgument, match="not the id of a log entry"):
        await follow(client, after=after)
    with pytest.raises(InvalidArgument):
        await client.pour("r", lambda _: None, after=after)


@pytest.mark.parametrize(
    "request_id", ["", "a b", "a/b", "{x}", "é", "x" * 129, "x\n", cast("str", 5), cast("str", None)]
)
async def test_an_invalid_id_is_refused_before_anything_is_sent(request_id: str, client: Client, redis: Redis) -> None:
    for call in (client.result, client.status, client.cancel, lambda it: follow(client, it)):
        with pytest.raises(InvalidArgument, match="1 to 128 characters"):
            await call(request_id)
    assert await redis.dbsize() == 0


async def test_a_cancel_with_must_exist_writes_nothing_for_an_unknown_id(client: Client, redis: Redis) -> None:
    with pytest.raises(UnknownRequest, match="the request nobody is unknown"):
        await client.cancel("nobody", must_exist=True)
    assert await redis.dbsize() == 0
    await client.enqueue(ASK, id="r")
    assert (await client.cancel("r", must_exist=True)).state is State.QUEUED
    assert (await client.cancel("r", must_exist=True)).state is State.ENDED


def test_an_invalid_url_raises_invalid_argument() -> None:
    with pytest.raises(InvalidArgument, match="must be a URL such as"):
        Client("nonsense://x")


def test_all_errors_of_the_client_are_client_errors() -> None:
    for kind in (Refused, Unreadable, InvalidArgument, Conflict):
        assert issubclass(kind, ClientError)
