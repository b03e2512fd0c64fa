"""The services of deploy/compose.yaml, started as processes with the commands, variables and secrets of the file.

What containers would have is replaced: the paths of secrets, the names of hosts, and ports.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from manifests import DEPLOY, documents
from redis.asyncio import Redis
from redis.exceptions import RedisError
from waits import eventually

from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator

SERVICES = documents(DEPLOY / "compose.yaml")[0]["services"]
_WORKER = str(Path(sys.executable).with_name("worker"))
MESSAGES = [{"role": "user", "content": "Who are you?"}]


class Compose:
    """The services as processes, with the secrets that the commands at the top of the file make."""

    def __init__(self, folder: Path, redis_server: Path, vllm_url: str) -> None:
        self.redis_port, self.gateway_port = free_port(), free_port()
        self._folder = folder
        self._redis_server = redis_server
        self._replaced = {
            r"/run/secrets/([\w-]+)": lambda found: str(folder / "deploy" / self._secret(found[1])),
            r"http://vllm:8000": lambda _: vllm_url,
            r"0\.0\.0\.0:8080": lambda _: f"127.0.0.1:{self.gateway_port}",
            r"0\.0\.0\.0:\d+": lambda _: f"127.0.0.1:{free_port()}",
            r"redis:6379": lambda _: f"127.0.0.1:{self.redis_port}",
            r"\$\{\w+:-(\w+)\}": lambda found: found[1],
            r"\$\$": lambda _: "$",
        }
        shutil.copytree(DEPLOY, folder / "deploy")
        self._environment = os.environ | {"PATH": f"{Path(_WORKER).parent}:{os.environ['PATH']}"}
        head = (DEPLOY / "compose.yaml").read_text().partition("# Without the command")[0]
        commands = "\n".join(re.findall(r"^#   (.*)$", head, re.MULTILINE))
        made = subprocess.run(
            ["/bin/sh", "-eu", "-c", self._here(commands)], cwd=folder, env=self._environment,
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        self.api_key = made.stderr.split()[-1]

    @staticmethod
    def _secret(name: str) -> str:
        (compose,) = documents(DEPLOY / "compose.yaml")
        return str(compose["secrets"][name]["file"])

    def _here(self, text: str) -> str:
        for pattern, replacement in self._replaced.items():
            text = re.sub(pattern, replacement, text)
        return text

    def url(self, user: str) -> str:
        """The URL of Redis for a user."""
        return (self._folder / f"secrets/redis-url-{user}").read_text().strip()

    def start_redis(self) -> "subprocess.Popen[bytes]":
        _, *options = shlex.split(self._here(SERVICES["redis"]["command"]))
        return subprocess.Popen(
            [str(self._redis_server), *options, "--port", str(self.redis_port), "--bind", "127.0.0.1"],
            cwd=self._folder, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def is_healthy(self) -> bool:
        """Whether the health check of Redis succeeds."""
        _, command = SERVICES["redis"]["healthcheck"]["test"]
        return subprocess.run(["/bin/sh", "-c", self._here(command)], capture_output=True, check=False).returncode == 0

    def start(self, service: str) -> "subprocess.Popen[bytes]":
        given = {name: self._here(str(value)) for name, value in SERVICES[service]["environment"].items()}
        command = [_WORKER, *SERVICES[service].get("command", ["run"])]
        return subprocess.Popen(command, env=self._environment | given, cwd=self._folder)


@pytest.fixture
def compose(tmp_path: Path, redis_binary: Path, simulator: Simulator) -> Compose:
    return Compose(tmp_path, redis_binary, simulator.url)


Start = Callable[..., None]


@pytest.fixture
def start(compose: Compose) -> Iterator[Start]:
    """Starts a service, which is killed at the end of the test."""
    processes = []

    def start(service: str) -> None:
        processes.append(compose.start_redis() if service == "redis" else compose.start(service))

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
async def admin(compose: Compose, start: Start) -> AsyncIterator[Redis]:
    start("redis")
    async with Redis.from_url(compose.url("default"), protocol=2) as redis:

        async def answers() -> bool:
            with suppress(RedisError):
                return bool(await redis.ping())
            return False

        await eventually(answers)
        yield redis


async def test_the_services_work_together_with_the_secrets_that_the_file_says_how_to_make(
    compose: Compose, admin: Redis, start: Start
) -> None:
    if shutil.which("redis-cli"):
        assert compose.is_healthy()
    start("worker")
    start("web")
    url = f"http://127.0.0.1:{compose.gateway_port}"
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {compose.api_key}"}, timeout=60) as http:

        async def is_ready() -> bool:
            with suppress(httpx.TransportError):
                return (await http.get(f"{url}/readyz")).status_code == 200
            return False

        await eventually(is_ready)
        asked = {"model": "reciter", "messages": MESSAGES}
        answer = (await http.post(f"{url}/v1/chat/completions", json=asked)).json()
        assert answer["choices"][0]["message"]["content"] == answer_to(MESSAGES)
        created = await http.post(f"{url}/requests", json=asked)
        assert created.status_code < 300, "a read token is signed with the secret"
    refused = {str(entry["object"]) for entry in await admin.acl_log()}
    assert {name for name in refused if not name.startswith("client")} == set()
    assert (await admin.config_get("maxmemory"))["maxmemory"] == str(4 * 2**30)
