"""A real vLLM server that a test starts: VLLM_COMMAND does so in the foreground, with `{port}` for its port."""

import os
import re
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx
from waits import eventually

COMMAND = os.environ.get("VLLM_COMMAND", "")


class Vllm:
    """A vLLM server in processes of its own."""

    def __init__(self, port: int, folder: Path, *options: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / f"vllm-{port}.log"
        words = [word.format(port=port) for word in shlex.split(COMMAND)]
        self._words = [*words, *options]
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(self._words, stdout=output, stderr=output, start_new_session=True)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and to its engine."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def drain(self) -> None:
        """Ask the server to shut down when its open streams have ended."""
        self.process.terminate()

    async def ready(self) -> None:
        """Wait until the server answers; it takes a minute or more to start."""
        async with httpx.AsyncClient() as http:

            async def answers() -> bool:
                assert self.process.poll() is None, self._log.read_text(errors="replace")[-2000:]
                with suppress(httpx.HTTPError):
                    return (await http.get(f"{self.url}/health")).is_success
                return False

            await eventually(answers, within=600)

    async def has_ended(self) -> bool:
        return self.process.poll() is not None

    async def sample(self) -> dict[str, float]:
        """The server's own metrics, each summed over its labels."""
        sums: dict[str, float] = {}
        async with httpx.AsyncClient(timeout=60) as http:
            page = (await http.get(f"{self.url}/metrics")).text
        for name, value in re.findall(r"^vllm:(\w+)(?:\{.*\})? (\S+)$", page, re.MULTILINE):
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums
