"""The README says what is so: its examples run as they stand, its tables are complete, CI runs its test command."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import eventually
from redis.asyncio import Redis

from worker.contract.entries import Cancelled, Claimed, Delta, Done, Failed, Opened, Queued, Restarted, Resumed, Started
from worker.contract.job import digest
from worker.contract.keys import Keys
from worker.sandbox.embedded_redis import find_servers
from worker.sandbox.simulator.requests import answer_to
from worker.settings import Settings, variable

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TEXT = answer_to([{"role": "user", "content": "Who are you?"}])


def example(language: str) -> str:
    found = re.search(rf"<!-- example: {language} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found
    return found[1]


def redis_cli() -> str:
    beside = [str(server.parent / "redis-cli") for server in find_servers()]
    found = next(filter(None, map(shutil.which, ["redis-cli", *beside])), None)
    if found is None:
        pytest.skip("no redis-cli at hand")
    return found


@pytest.mark.usefixtures("worker")
async def test_the_python_example_prints_the_answer(redis_url: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example("python").replace("redis://127.0.0.1:6379", redis_url))
    process = await asyncio.create_subprocess_exec(
        sys.executable, script, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0
    assert TEXT in printed.decode()
    assert "done" in printed.decode()


@pytest.mark.usefixtures("worker")
async def test_the_redis_cli_lines_enqueue_follow_and_cancel(redis_url: str, redis: Redis) -> None:
    enqueue, follow, cancel = re.split(r"(?:^#.*\n)+", example("redis-cli"), flags=re.MULTILINE)[1:]

    async def run(lines: str) -> str:
        command = lines.replace("redis-cli", f"{redis_cli()} -p {urlsplit(redis_url).port}", 1)
        process = await asyncio.create_subprocess_shell(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        printed, _ = await process.communicate()
        return printed.decode()

    assert re.fullmatch(r"OK\n(QUEUED\n){3}0-1\n1\n\d+-\d+\n", await run(enqueue))
    assert "chat:tokens:{demo-1}\n0-1\ntype\nqueued\nv\n1" in await run(follow)
    assert "\n1-0\ntype\nstarted" in await run(follow.replace("' 0", "' 0-1"))
    await eventually(lambda: redis.exists("chat:ended:{demo-1}"))
    assert "exhausted the last possible ID" in await run(cancel), "it had ended before"

    await redis.delete("chat:tokens:{demo-1}", "chat:ended:{demo-1}")
    assert await run(cancel) == "18446744073709551615-18446744073709551615\n"
    await run(enqueue)

    async def remembered() -> object:
        return b"cancelled" in (await redis.get("chat:ended:{demo-1}") or b"")

    await eventually(remembered)


def test_every_setting_is_in_the_table_with_its_default() -> None:
    for name, field in Settings.model_fields.items():
        row = re.search(rf"^\| `{variable(name)}` \| ?(.*?) ?\|", README, re.MULTILINE)
        assert row, f"{variable(name)} is not in the README"
        default = field.get_default()
        secret = getattr(default, "get_secret_value", None)
        shown = secret() if secret else ",".join(default) if isinstance(default, tuple) else str(default)
        assert row[1].strip("`") == shown, f"{variable(name)} has another default"


@pytest.mark.parametrize("name", ["WORKER_" + word for word in re.findall(r"`WORKER_([A-Z_]+)`", README)])
def test_every_setting_that_is_named_exists(name: str) -> None:
    assert name in {variable(field) for field in Settings.model_fields}


def test_every_key_entry_type_and_field_of_the_contract_is_described() -> None:
    keys = Keys()
    fixed = [keys.jobs(), keys.lifecycle, keys.dead, keys.workers, keys.cancel]
    for key in [*fixed, keys.tokens("<id>"), keys.ended("<id>"), keys.feed("<id>")]:
        assert f"| `{key}`" in README
    for kind in (Queued, Started, Claimed, Resumed, Restarted, Opened, Delta, Done, Failed, Cancelled):
        row = re.search(rf"^\| `{kind.type}` \|.*$", README, re.MULTILINE)
        assert row, f"{kind.type} is not in the README"
        if kind not in (Failed, Cancelled, Queued):
            missing = [name for name in kind.__struct_fields__ if name != "id" and f"`{name}`" not in row[0]]
            assert not missing, f"{kind.type}: {missing}"


def test_every_error_code_is_in_the_table() -> None:
    named = {code for row in re.findall(r"^\| (`.*?) \|", README, re.MULTILINE) for code in re.findall(r"`(\w+)`", row)}
    sources = [
        *(ROOT / "worker/vllm").glob("*.py"),
        ROOT / "worker/engine/generation.py",
        ROOT / "worker/engine/job_runner.py",
        ROOT / "worker/engine/settlement.py",
    ]
    text = "".join(path.read_text() for path in sources)
    used = set(re.findall(r'UpstreamError\(\s*"(\w+)"', text)) | set(re.findall(r'_failed\("(\w+)"', text))
    used |= set(re.findall(r'code(?:, retryable)? = "(\w+)"', text)) | set(re.findall(r'code="(\w+)"', text))
    assert len(used) > 10
    assert used <= named


def test_b10_the_digests_of_the_readme_are_those_that_clients_and_workers_write() -> None:
    asked = {"model": "m", "temperature": 1.0}
    assert f"has the digest `{digest(asked)}`" in README
    assert f"it is `{digest(asked, ['s'])}`" in README


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = re.search(r"## Pass the tests\n\n```sh\n(.*?)\n```", README)
    assert command
    assert command[1] in (ROOT / ".ci/run").read_text()
