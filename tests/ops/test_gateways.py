"""What `worker status` and `worker check` show of gateways, and the records by which they know."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result
from conftest import StartWorker
from gateway_fixtures import StartGateway, StartGatewayProcess
from redis.asyncio import Redis
from serving import EventReader
from waits import eventually

from worker.broker.gateway_registry import KEPT, GatewayRegistry
from worker.cli.main import main
from worker.contract.entries import to_json
from worker.contract.keys import Keys
from worker.contract.records import GatewayRecord
from worker.ops.findings import faults_among
from worker.ops.gateways import gateway_findings, gateway_states
from worker.sandbox.simulator.server import Simulator
from worker.version import version

KEY = Keys().gateway_processes
JOB = {"messages": [{"role": "user", "content": "Who are you?"}]}


async def command(url: str, *words: str) -> Result:
    return await asyncio.to_thread(CliRunner(env={"REDIS_URL": url}).invoke, main, words)


async def shown(url: str) -> list[dict[str, Any]]:
    """The gateways of `worker status --json`."""
    gateways: list[dict[str, Any]] = json.loads((await command(url, "status", "--json")).output)["gateways"]
    return gateways


async def test_status_shows_each_gateway_with_its_version_address_and_open_streams(
    redis_url: str, redis: Redis, start_gateway_process: StartGatewayProcess, http: httpx.AsyncClient
) -> None:
    processes = [await start_gateway_process(drain_delay=60), await start_gateway_process()]
    request_id = (await http.post(f"{processes[0].url}/requests", json=JOB)).json()["id"]
    stream = await EventReader.open(processes[0].port, f"/requests/{request_id}/events")

    async def are_shown() -> bool:
        by_pid = {gateway["pid"]: gateway for gateway in await shown(redis_url)}
        return len(by_pid) == 2 and by_pid[processes[0].process.pid]["streams"] == 1

    await eventually(are_shown)
    (with_stream,) = [one for one in await shown(redis_url) if one["pid"] == processes[0].process.pid]
    assert with_stream["state"] == "serving"
    assert with_stream["version"] == version()
    assert with_stream["address"] == f"127.0.0.1:{processes[0].port}"
    assert f":{processes[0].process.pid}" in with_stream["name"]
    assert with_stream["name"] in (await command(redis_url, "status")).output
    checked = (await command(redis_url, "check")).output
    assert "gateways: alive: 2; open streams: 1" in checked
    assert await redis.ttl(KEY) > 0

    async def is_draining() -> bool:
        pid = processes[0].process.pid
        return any(one["pid"] == pid and one["state"] == "draining" for one in await shown(redis_url))

    processes[0].process.terminate()
    await eventually(is_draining)
    processes[0].process.terminate()
    assert await processes[0].ended() == 0
    stream.close()
    assert [one["pid"] for one in await shown(redis_url)] == [processes[1].process.pid]


async def test_without_a_gateway_nothing_is_said(redis_url: str) -> None:
    assert "ateway" not in (await command(redis_url, "status")).output
    assert "ateway" not in (await command(redis_url, "check")).output
    assert gateway_findings(()) == []


def test_a_gateway_that_does_not_renew_its_record_is_a_fault_while_redis_lets_it() -> None:
    records = [GatewayRecord(host="web-1", pid=7, beat=984_000), GatewayRecord(host="web-2", pid=7, beat=996_000)]
    states = gateway_states(records, 1000.0, renewable_for=100)
    assert [(state.name, state.state, state.age) for state in states] == [
        ("web-1:7", "silent", 16.0), ("web-2:7", "serving", 4.0)
    ]  # fmt: skip
    (fault,) = faults_among(gateway_findings(states))
    assert (fault.level, fault.subject, fault.fault) == ("warning", "gateway web-1:7", "gateway_silent")
    assert "process 7 on web-1" in fault.fix
    assert "stopped or stuck" in fault.fix
    for renewable_for, state in ((10.0, "serving"), (0.0, "unknown"), (None, "unknown")):
        states = gateway_states(records, 1000.0, renewable_for=renewable_for)
        assert {one.state for one in states} == {state}
        assert faults_among(gateway_findings(states)) == []


def test_a_killed_gateway_has_no_row_after_a_while_in_which_redis_let_it_renew_its_record() -> None:
    records = [GatewayRecord(host="web", pid=7, beat=1_000_000)]
    assert gateway_states(records, 1001.0 + KEPT, renewable_for=1000) == ()
    assert gateway_states(records, 1001.0 + KEPT, renewable_for=None) == ()
    for renewable_for, state in ((0.0, "unknown"), (3.0, "serving"), (20.0, "silent")):
        (shown,) = gateway_states(records, 1001.0 + KEPT, renewable_for=renewable_for)
        assert shown.state == state


async def test_the_records_of_gateways_outlive_a_redis_that_is_full_for_long(redis: Redis) -> None:
    await GatewayRegistry(redis, Keys()).write(GatewayRecord(host="web", pid=7))
    assert await redis.ttl(KEY) > 3600


async def test_processes_with_one_name_and_different_addresses_are_two(redis: Redis) -> None:
    """Containers with the network of their host are each process 1 of it."""
    registries = [GatewayRegistry(redis, Keys()) for _ in range(2)]
    for port, registry in enumerate(registries):
        await registry.write(GatewayRecord(host="web", pid=1, address=f"127.0.0.1:{port}", version=str(port)))
    records = await registries[0].records()
    assert [record.address for record in records] == ["127.0.0.1:0", "127.0.0.1:1"]
    serving = gateway_states(records, records[0].beat / 1000, renewable_for=100)
    messages = [each.message for each in gateway_findings(serving)]
    assert messages[1].endswith("(0: web:1 at 127.0.0.1:0; 1: web:1 at 127.0.0.1:1)")
    silent = gateway_states(records, records[0].beat / 1000 + 20, renewable_for=100)
    subjects = [each.subject for each in gateway_findings(silent)]
    assert subjects == ["gateway web:1 at 127.0.0.1:0", "gateway web:1 at 127.0.0.1:1"]


@pytest.mark.parametrize("score", ["inf", "-inf"])
async def test_a_record_whose_time_is_not_finite_is_none(redis: Redis, score: str) -> None:
    await redis.zadd(KEY, {to_json(GatewayRecord(host="web", pid=7)): score})
    await redis.expire(KEY, 60)
    assert await GatewayRegistry(redis, Keys()).records() == []


def test_versions_that_differ_are_named() -> None:
    records = [GatewayRecord(host=host, pid=1, version=of, beat=1000) for host, of in (("a", "1"), ("b", "2"))]
    messages = [each.message for each in gateway_findings(gateway_states(records, 1.0, renewable_for=100))]
    assert messages[1] == "their versions differ, as during a deploy (1: a:1; 2: b:1)"


async def test_a_renewal_replaces_the_record_and_drops_those_that_nobody_renews(redis: Redis) -> None:
    seconds, _ = await redis.time()
    old = GatewayRecord(host="gone", pid=1)
    await redis.zadd(KEY, {to_json(old): (seconds - KEPT - 1) * 1000, "no record": seconds * 1000, "[1]": 0})
    registry = GatewayRegistry(redis, Keys())
    assert [record.host for record in await registry.records()] == ["gone"]
    for streams in (1, 2, 2):
        await registry.write(GatewayRecord(host="here", pid=2, streams=streams))
    (record,) = await registry.records()
    assert (record.name, record.streams) == ("here:2", 2)
    assert abs(record.beat / 1000 - seconds) < 60
    assert sorted(await redis.zrange(KEY, 0, -1)) == sorted([b"no record", b'{"host":"here","pid":2,"streams":2}'])
    await registry.remove()
    assert await registry.records() == []


async def test_a_record_of_a_later_version_is_read_as_far_as_it_goes(redis: Redis) -> None:
    later = {"host": "a", "pid": 1, "streams": "many", "draining": True, "new": {"deep": 1}}
    await redis.zadd(KEY, {to_json(later): 5_000})
    await redis.expire(KEY, 60)
    (record,) = await GatewayRegistry(redis, Keys()).records()
    assert record == GatewayRecord(host="a", pid=1, draining=True, beat=5_000)


async def test_a_gateway_whose_record_redis_refuses_serves_on(
    redis: Redis, start_gateway: StartGateway, start_worker: StartWorker, simulator: Simulator, http: httpx.AsyncClient
) -> None:
    await redis.set(KEY, "of another type", ex=600)
    served = await start_gateway()
    await start_worker(simulator)
    response = await http.post(f"{served.url}/v1/chat/completions", json={"model": "reciter", **JOB})
    assert response.status_code == 200

    async def is_ready() -> bool:
        return (await http.get(f"{served.url}/readyz")).status_code == 200

    await eventually(is_ready)


@pytest.mark.parametrize("right", ["-zrange", "resetkeys"])
async def test_an_operator_without_the_right_learns_that_gateways_are_not_readable(
    redis: Redis, redis_url: str, right: str
) -> None:
    rules = ["reset", "on", "nopass", "~*", "&*", "+@all", right, *(["~chat:workers"] if right == "resetkeys" else [])]
    await redis.execute_command("ACL SETUSER", "early", *rules)  # type: ignore[no-untyped-call]
    printed = (await command(redis_url.replace("//", "//early:x@"), "status", "--json")).output
    await redis.acl_deluser("early")
    assert "gateways" in json.loads(printed)["unread"]
