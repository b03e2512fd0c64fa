"""The containers of deploy/compose.yaml in a real Docker."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from manifests import DEPLOY, commands_that_make_the_secrets
from waits import eventually

from worker.sandbox.simulator.requests import answer_to

PROJECT = f"vllm-relay-test-{os.getpid()}"
MESSAGES: list[Any] = [{"role": "user", "content": "Who are you?"}]
TARGETS = "import urllib.request as r; print(r.urlopen('http://prometheus:9090/api/v1/targets').read().decode())"


class Containers:
    """The services, built from a copy of what the image needs, with a name, an image and ports of their own."""

    def __init__(self, docker: str, folder: Path) -> None:
        self._docker, self._folder = docker, folder
        top = DEPLOY.parent
        for name in ("worker", "deploy"):
            shutil.copytree(top / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(top / name, folder)
        file = folder / "deploy/compose.yaml"
        text = file.read_text().replace("image: vllm-relay\n", f"image: {PROJECT}\n")
        text = text.replace("timeout: 5s", "timeout: 60s")  # a busy machine is not an unhealthy container
        file.write_text(re.sub(r'"127\.0\.0\.1:\d+:(\d+)"', r'"127.0.0.1::\1"', text))
        self.api_key = subprocess.run(
            ["/bin/sh", "-eu", "-c", commands_that_make_the_secrets()], cwd=folder, check=True, capture_output=True,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}, text=True,
        ).stderr.split()[-1]  # fmt: skip

    async def docker(self, *words: str) -> str:
        """What a command of Docker prints. It must end with status 0."""
        process = await asyncio.create_subprocess_exec(self._docker, *words, cwd=self._folder, stdout=PIPE, stderr=PIPE)
        output, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        return output.decode()

    async def compose(self, *words: str) -> str:
        return await self.docker("compose", "-p", PROJECT, "-f", "deploy/compose.yaml", "--profile", "cpu", *words)

    async def states(self, service: str) -> list[dict[str, Any]]:
        """The state of each container of a service, running or not."""
        return [json.loads(line) for line in (await self.compose("ps", "-a", "--format=json", service)).splitlines()]


@pytest.fixture
def docker() -> str:
    """The path of Docker. Without its server or the images the test is skipped, except where DOCKER_REQUIRED is set."""
    found = shutil.which("docker") or "docker"
    pull = ["--profile=cpu", "pull", "--quiet", "--policy=missing", "--ignore-buildable"]
    try:
        for words in (["info"], ["compose", "-f", DEPLOY / "compose.yaml", *pull]):
            subprocess.run([found, *words], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        if os.environ.get("DOCKER_REQUIRED"):
            pytest.fail(f"DOCKER_REQUIRED is set, and {error}")
        pytest.skip(str(error))
    return found


@pytest.fixture
async def containers(docker: str, tmp_path: Path) -> AsyncIterator[Containers]:
    containers = Containers(docker, tmp_path)
    try:
        yield containers
    finally:
        await containers.compose("down", "--volumes", "--timeout", "0")
        await containers.docker("image", "rm", "--force", PROJECT)
        # Compose builds the image once for each service, and only the last one keeps the name.
        await containers.docker("image", "prune", "--force", f"--filter=label=com.docker.compose.project={PROJECT}")


@pytest.mark.timeout(1200)
async def test_the_containers_answer_are_scraped_and_drain(containers: Containers) -> None:
    await containers.compose("up", "--build", "--detach", "--wait")
    base = f"http://{(await containers.compose('port', 'web', '8080')).strip()}"
    async with httpx.AsyncClient(base_url=base) as http:

        async def is_ready() -> bool:
            return (await http.get("/readyz")).status_code == 200

        await eventually(is_ready)
        for path in ("/", "/client.js"):
            assert (await http.get(path)).status_code == 200
    await containers.compose("exec", "-T", "worker", "worker", "check")

    async def are_scraped() -> bool:
        found = json.loads(await containers.compose("exec", "-T", "worker", "python", "-c", TARGETS))
        return [each["health"] for each in found["data"]["activeTargets"]] == ["up"] * 3

    await eventually(are_scraped, every=1)

    # A stuck worker becomes unhealthy, and healthy when it runs again.
    stuck = (await containers.states("worker"))[0]["Name"]
    for signal, health in (("STOP", "unhealthy"), ("CONT", "healthy")):
        await containers.docker("kill", "--signal", signal, stuck)

        async def is_seen(health: str = health) -> bool:
            return (stuck, health) in {(each["Name"], each["Health"]) for each in await containers.states("worker")}

        await eventually(is_seen, every=1)

    # All processes of the product are stopped under running streams, which end with their whole text.
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=containers.api_key, max_retries=0) as client:
        begun = [asyncio.Event() for _ in range(20)]

        async def text_of(stream_begins: asyncio.Event) -> str:
            text = ""
            async for chunk in await client.chat.completions.create(
                model="reciter", messages=MESSAGES, stream=True, extra_body={"simulate": {"rate": 2}}
            ):
                text += chunk.choices[0].delta.content or ""
                stream_begins.set()
            return text

        async with asyncio.TaskGroup() as streams:
            texts = [streams.create_task(text_of(each)) for each in begun]
            for each in begun:
                await each.wait()
            await containers.compose("stop", "worker", "web")
    assert {task.result() for task in texts} == {answer_to(MESSAGES)}
    ended = [*await containers.states("worker"), *await containers.states("web")]
    assert [(each["State"], each["ExitCode"]) for each in ended] == [("exited", 0)] * 3
