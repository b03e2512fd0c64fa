"""A Redis for tests that kill it and start it again."""

import subprocess
from contextlib import suppress
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError
from waits import eventually

from worker.sandbox.embedded_redis import free_port


class Durable:
    """A Redis that writes to disk before it answers, and can be killed and restarted."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self._port = free_port()
        self._command = [
            *(str(binary), "--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "always"),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.client = Redis.from_url(self.url, protocol=2)

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def ready(self) -> None:
        async def answers() -> bool:
            with suppress(RedisError):
                return bool(await self.client.ping())
            return False

        await eventually(answers)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
