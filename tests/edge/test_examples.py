"""The examples of worker/gateway/README.md run as they stand, with the URL and the key of the test's own gateway."""

import asyncio
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import httpx
import pytest
from documents import GATEWAY
from replicas import Replica

from worker import Client
from worker.sandbox.simulator.requests import answer_to

QUESTION = [{"role": "user", "content": "Who are you?"}]
PATIENCE = 300.0


async def printed_by(*command: str | Path, cwd: Path) -> str:
    """What a program prints; fails the test if the program fails or does not end."""
    process = await asyncio.create_subprocess_exec(*command, cwd=cwd, stdout=PIPE, stderr=PIPE)
    try:
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, out.decode() + err.decode()
    return out.decode()


@pytest.mark.usefixtures("worker")
async def test_the_example_for_openai_prints_the_answer(replica: Replica, tmp_path: Path) -> None:
    code = GATEWAY.example("openai")
    assert "http://127.0.0.1:8080" in code
    (tmp_path / "example.py").write_text(code.replace("http://127.0.0.1:8080", replica.url))
    assert await printed_by(sys.executable, "example.py", cwd=tmp_path) == answer_to(QUESTION)


@pytest.mark.usefixtures("worker")
async def test_the_example_for_sdks_prints_the_answer_of_each(
    replica: Replica, http: httpx.AsyncClient, drivers: Path, tmp_path: Path
) -> None:
    (tmp_path / "node_modules").symlink_to(drivers / "node_modules")
    (tmp_path / "client.mjs").write_bytes((await http.get(f"{replica.url}/client.js")).content)
    (tmp_path / "example.mjs").write_text(GATEWAY.example("sdks").replace("http://127.0.0.1:8080", replica.url))
    assert await printed_by("node", "example.mjs", cwd=tmp_path) == 2 * answer_to(QUESTION)


@pytest.mark.usefixtures("worker")
async def test_the_lines_of_javascript_show_the_answer_and_end(
    replica: Replica, client: Client, drivers: Path, tmp_path: Path
) -> None:
    request_id = await client.enqueue({"messages": QUESTION})
    (tmp_path / "node_modules").symlink_to(drivers / "node_modules")
    (tmp_path / "page.mjs").write_text(f"""
        import {{ EventSource }} from "eventsource";
        {GATEWAY.example("follow")}
        let shown;
        follow("{replica.url}/requests/{request_id}/events", (text, end) => {{
          shown = text;
          if (end) process.stdout.write(`${{end.type}}: ${{shown}}`); // the process ends, since the source is closed
        }});
    """)
    assert await printed_by("node", "page.mjs", cwd=tmp_path) == f"done: {answer_to(QUESTION)}"
