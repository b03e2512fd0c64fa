"""`worker drill`: each of its four faults is seen by readers and fires its alerts."""

import asyncio
import json
from typing import cast

from command import started
from prometheus_server import find_program

from worker.contract.entries import Object


async def test_each_fault_fires_its_alerts_and_no_reader_loses_text() -> None:
    find_program("prometheus")
    async with started("drill", "--json") as process, asyncio.timeout(500):
        out, err = await process.communicate()
    assert (process.returncode, err.decode()) == (0, ""), out.decode()
    lines: list[Object] = [json.loads(line) for line in out.decode().splitlines()]
    outcomes = {str(line["fault"]): line for line in lines if "texts_equal" in line}
    assert list(outcomes) == ["worker killed", "vLLM frozen", "Redis stalled", "Redis full"]
    for outcome in outcomes.values():
        assert (outcome["readers"], outcome["texts_equal"], outcome["errors"]) == (12, 12, [])
        assert outcome["missing_alerts"] == []
    alerts = {name: set(cast("list[str]", outcome["alerts"])) for name, outcome in outcomes.items()}
    assert "ProcessIsAway" in alerts["worker killed"]
    assert "ServerIsSilent" in alerts["vLLM frozen"]
    assert "WorkerTakesNoJobs" in alerts["Redis stalled"] & alerts["Redis full"]
    assert "RedisIsNearlyFull" in alerts["Redis full"]
    assert cast("int", outcomes["worker killed"]["resumed"]) > 0
    assert cast("int", outcomes["vLLM frozen"]["resumed"]) > 0
    shown = {line["summary"] for line in lines if line.get("alert") == "WorkerTakesNoJobs"}
    assert {str(summary).rpartition(" ")[2] for summary in shown} == {"redis_away.", "redis_full."}
