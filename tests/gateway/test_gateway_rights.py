"""A gateway whose user of Redis lacks a right."""

from collections.abc import AsyncIterator

import httpx
import pytest
from acl import PASSWORD, acl
from gateway_fixtures import StartGateway
from redis.asyncio import Redis
from written_log import let_deadline_pass

from worker.telemetry.logging import configure_logging

MESSAGES = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
async def user_url(redis: Redis, redis_url: str) -> AsyncIterator[str]:
    """The URL of the user `gateway` of deploy/redis/users.acl."""
    await redis.execute_command("ACL SETUSER", *acl("gateway"))  # type: ignore[no-untyped-call]  # so in redis-py 8.1
    yield redis_url.replace("//", f"//gateway:{PASSWORD}@")
    await redis.acl_deluser("gateway")


async def test_a_missing_right_is_a_500_without_its_reason_which_is_in_the_log(
    redis: Redis,
    user_url: str,
    http: httpx.AsyncClient,
    start_gateway: StartGateway,
    capfd: pytest.CaptureFixture[str],
) -> None:
    await redis.execute_command("ACL SETUSER", "gateway", "-evalsha")  # type: ignore[no-untyped-call]
    served = await start_gateway(redis_url=user_url)
    configure_logging("json", "warning")
    response = await http.post(f"{served.url}/requests", json={"messages": MESSAGES})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert "eval" not in response.text
    logged = capfd.readouterr().err
    assert "request_failed" in logged
    assert "eval" in logged


@pytest.mark.parametrize("path", ["/requests/{id}/events", "/events?ids={id}"])
async def test_a_missing_right_ends_a_stream_with_an_event_without_its_reason_which_is_in_the_log(
    path: str,
    redis: Redis,
    user_url: str,
    http: httpx.AsyncClient,
    start_gateway: StartGateway,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A gateway without `+ttl` cannot end a request whose deadline has passed."""
    await redis.execute_command("ACL SETUSER", "gateway", "-ttl")  # type: ignore[no-untyped-call]
    served = await start_gateway(redis_url=user_url)
    configure_logging("json", "warning")
    request_id = (await http.post(f"{served.url}/requests", json={"messages": MESSAGES, "timeout": 60})).json()["id"]
    await let_deadline_pass(redis, request_id)
    response = await http.get(served.url + path.format(id=request_id), headers={"Accept": "text/event-stream"})
    assert "event: problem" in response.text
    assert "ttl" not in response.text
    logged = capfd.readouterr().err
    assert "request_failed" in logged
    assert "'ttl'" in logged
    assert "ttl" in {entry["object"] for entry in await redis.acl_log()}


async def test_the_rights_suffice_for_what_is_read_of_the_lifecycle(
    user_url: str, http: httpx.AsyncClient, start_gateway: StartGateway
) -> None:
    """Operators list what runs."""
    served = await start_gateway(redis_url=user_url)
    assert (await http.get(f"{served.url}/requests")).status_code == 200
