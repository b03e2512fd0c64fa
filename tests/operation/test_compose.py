"""The services of deploy/compose.yaml, started as processes with the commands, variables and secrets of the file.

Then the secrets are changed as deploy/secrets.md says, in the middle of answers. What containers would have is
replaced: the paths of secrets, the names of hosts, and ports.
"""

import asyncio
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httpx
import pytest
from documents import SECRETS
from manifests import DEPLOY, commands_that_make_the_secrets, documents
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, RedisError
from waits import eventually

from worker import Client, Delta
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Simulator

SERVICES = documents(DEPLOY / "compose.yaml")[0]["services"]
_WORKER = str(Path(sys.executable).with_name("worker"))
MESSAGES = [{"role": "user", "content": "Who are you?"}]
ASKED = {"model": "reciter", "messages": MESSAGES}


class Compose:
    """The services as processes, with the secrets that the commands at the top of the file make."""

    def __init__(self, folder: Path, redis_server: Path, vllm_url: str) -> None:
        self.redis_port, self.gateway_port = free_port(), free_port()
        self.folder = folder
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
        self.api_key = self.shell(commands_that_make_the_secrets()).split()[-1]

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
        return (self.folder / f"secrets/redis-url-{user}").read_text().strip()

    def start_redis(self) -> "subprocess.Popen[bytes]":
        _, *options = shlex.split(self._here(SERVICES["redis"]["command"]))
        return subprocess.Popen(
            [str(self._redis_server), *options, "--port", str(self.redis_port), "--bind", "127.0.0.1"],
            cwd=self.folder, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def is_healthy(self) -> bool:
        """Whether the health check of Redis succeeds."""
        _, command = SERVICES["redis"]["healthcheck"]["test"]
        return subprocess.run(["/bin/sh", "-c", self._here(command)], capture_output=True, check=False).returncode == 0

    def start(self, service: str, **variables: str) -> "subprocess.Popen[bytes]":
        """Start a worker or a gateway, with more variables than the file gives it."""
        given = {name: self._here(str(value)) for name, value in SERVICES[service]["environment"].items()}
        command = [_WORKER, *SERVICES[service].get("command", ["run"])]
        return subprocess.Popen(command, env=self._environment | given | variables, cwd=self.folder)

    def shell(self, commands: str) -> str:
        """Run commands of a document; returns their standard error."""
        ended = subprocess.run(
            ["/bin/sh", "-eu", "-c", self._here(commands)], cwd=self.folder, env=self._environment,
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return ended.stderr


@pytest.fixture
def compose(tmp_path: Path, redis_binary: Path, simulator: Simulator) -> Compose:
    return Compose(tmp_path, redis_binary, simulator.url)


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(compose: Compose) -> Iterator[Start]:
    """Starts a service, which is killed at the end of the test."""
    processes = []

    def start(service: str, **variables: str) -> "subprocess.Popen[bytes]":
        processes.append(compose.start_redis() if service == "redis" else compose.start(service, **variables))
        return processes[-1]

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


@asynccontextmanager
async def gateway_client(compose: Compose) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gateway, once that is ready."""
    headers = {"Authorization": f"Bearer {compose.api_key}"}
    base = f"http://127.0.0.1:{compose.gateway_port}"
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=60) as http:

        async def is_ready() -> bool:
            with suppress(httpx.TransportError):
                return (await http.get("/readyz")).status_code == 200
            return False

        await eventually(is_ready)
        yield http


async def test_the_services_work_together_with_the_secrets_that_the_file_says_how_to_make(
    compose: Compose, admin: Redis, start: Start
) -> None:
    if shutil.which("redis-cli"):
        assert compose.is_healthy()
    start("worker")
    start("web")
    async with gateway_client(compose) as http:
        answer = (await http.post("/v1/chat/completions", json=ASKED)).json()
        assert answer["choices"][0]["message"]["content"] == answer_to(MESSAGES)
        created = await http.post("/requests", json=ASKED)
        assert created.status_code < 300, "a read token is signed with the secret"
    assert [str(entry["object"]) for entry in await admin.acl_log()] == []
    assert (await admin.config_get("maxmemory"))["maxmemory"] == str(4 * 2**30)


async def test_a_password_of_redis_is_changed_in_the_middle_of_answers(
    compose: Compose, admin: Redis, start: Start
) -> None:
    first, old_url = start("worker", WORKER_DRAIN_TIMEOUT="0"), compose.url("worker")
    async with Client(compose.url("default")) as client:
        asked = [[{"role": "user", "content": f"Tell me {number}"}] for number in range(5)]
        stall = {"model": "reciter", "simulate": {"fault": "stall", "after": 3, "times": 1}}
        ids = [await client.enqueue(stall | {"messages": messages}) for messages in asked]
        for request_id in ids:
            await has_begun(client, request_id)
        add, remove = SECRETS.example("new-password"), SECRETS.example("old-password")
        compose.shell(add)
        old, new = (hash_of(url) for url in (old_url, compose.url("worker")))
        assert await passwords_of(admin, "worker") == [old, new]
        start("worker")
        await eventually(lambda: has_workers(admin, 2))
        first.terminate()
        assert await asyncio.to_thread(first.wait) == 0
        user_and_admin = "\n".join(add.splitlines()[:2])
        compose.shell(f"{user_and_admin}\nold={old}\n{remove}")
        assert await passwords_of(admin, "worker") == [new]
        assert f"user worker on #{new} " in (compose.folder / "secrets/users.acl").read_text()
        answers = [await client.result(request_id) for request_id in ids]
    assert [answer.text for answer in answers] == [answer_to(messages) for messages in asked]
    assert all(answer.attempt > 1 for answer in answers), "the second worker went on with answers of the first"
    async with Redis.from_url(old_url, protocol=2) as refused:
        with pytest.raises(AuthenticationError):
            await refused.ping()


@pytest.mark.usefixtures("admin")
async def test_a_key_of_vllm_is_changed_without_a_restart_of_the_worker(compose: Compose, start: Start) -> None:
    port, keys = free_port(), compose.folder / "secrets/vllm-keys"
    keys.write_text("old\n")
    async with Client(compose.url("default")) as client:
        async with Simulator(Options(api_key="old"), port=port) as server:
            start("worker", VLLM_URLS=server.url, VLLM_API_KEY_FILE=str(keys))
            assert (await client.result(await client.enqueue(ASKED))).outcome == "done"
            waits = await client.enqueue(ASKED | {"simulate": {"rate": 10}})
            await has_begun(client, waits)
            keys.write_text("new\nold\n")
        async with Simulator(Options(api_key="new"), port=port):
            for request_id in (waits, await client.enqueue(ASKED)):
                assert (await client.result(request_id)).text == answer_to(MESSAGES)
            keys.write_text("new\n")
            assert (await client.result(await client.enqueue(ASKED))).text == answer_to(MESSAGES)


@pytest.mark.usefixtures("admin")
async def test_a_key_of_the_gateway_is_changed_for_another_of_its_tenant(compose: Compose, start: Start) -> None:
    file = compose.folder / "secrets/keys.toml"
    old_key = compose.shell("worker key app --tenant acme > secrets/keys.toml").split()[-1]
    start("web")
    async with gateway_client(compose) as http:

        async def status(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return (await http.get(f"/requests/{request_id}", headers=headers)).status_code

        def is_refused(key: str) -> Callable[[], Awaitable[bool]]:
            async def refused() -> bool:
                return await status(key) == 401

            return refused

        headers = {"Authorization": f"Bearer {old_key}"}
        request_id = (await http.post("/requests", json=ASKED, headers=headers)).json()["id"]
        old_lines = file.read_text()
        new_key = compose.shell("worker key app-2 --tenant acme >> secrets/keys.toml").split()[-1]

        async def is_accepted() -> bool:
            return await status(new_key) == 200

        await eventually(is_accepted)
        assert await status(old_key) == 200
        file.write_text(file.read_text().removeprefix(old_lines))
        await eventually(is_refused(old_key))
        assert await status(new_key) == 200


async def has_begun(client: Client, request_id: str) -> None:
    """Wait for the first delta of a request."""
    async with aclosing(client.follow(request_id)) as entries:
        async for entry in entries:
            if isinstance(entry, Delta):
                return


async def has_workers(redis: Redis, number: int) -> bool:
    return await redis.hlen("chat:workers") == number


async def passwords_of(redis: Redis, user: str) -> list[str]:
    """The hashes of the passwords of a user of Redis."""
    return cast("dict[str, list[str]]", await redis.acl_getuser(user))["passwords"]


def hash_of(url: str) -> str:
    """The hash of a URL's password."""
    return sha256(str(urlsplit(url).password).encode()).hexdigest()
