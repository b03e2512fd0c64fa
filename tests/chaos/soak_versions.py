"""Clients of two versions of the package in the soak. Workers of either version may answer their requests."""

import asyncio
import os
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec
from soak_jobs import Plan

from worker.contract.entries import Object

_SCRIPT = Path(__file__).with_name("soak_client.py")


class VersionedClients:
    """A client process for each version, which take turns. `trees` are the folders that have the package `worker`."""

    def __init__(self, redis_url: str, trees: list[Path], folder: Path) -> None:
        self._clients = [_ClientProcess(redis_url, tree, folder) for tree in trees]
        self._turns = cycle(self._clients)

    async def enqueue(self, request: Object, *, id: str) -> str:  # noqa: A002 - as `Client` has it
        """Add a request by the next client, which then follows it."""
        await next(self._turns).enqueue(id, request)
        return id

    async def wrong(self, plans: list[Plan], patience: float) -> list[str]:
        """What is wrong with the answers that the clients have read to the end, for requests that have ended."""
        found = []
        for client in self._clients:
            for plan in plans:
                if (answer := client.answers.pop(plan.id, None)) is None:
                    continue
                try:
                    outcome, texts = await asyncio.wait_for(answer, patience)
                except (TimeoutError, EOFError) as error:
                    found.append(f"{client.tree}: {plan.id} was not read to its end: {type(error).__name__}")
                    continue
                if outcome == "done" and texts != [choice.content for choice in plan.choices]:
                    found.append(f"{client.tree}: {plan.id} ({plan.kind}) was read as {texts}")
        return found

    async def aclose(self) -> None:
        """End the clients."""
        for client in self._clients:
            await client.aclose()


class _ClientProcess:
    """A client of one version. `answers` has the answer of each of its requests, as outcome and texts."""

    def __init__(self, redis_url: str, tree: Path, folder: Path) -> None:
        self.tree = tree
        self.answers: dict[str, asyncio.Future[tuple[str, list[str]]]] = {}
        self._url = redis_url
        self._folder = folder
        self._added: dict[str, asyncio.Future[None]] = {}
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def enqueue(self, request_id: str, request: Object) -> None:
        async with self._lock:
            self._process = self._process or await self._start()
        loop = asyncio.get_running_loop()
        self._added[request_id], self.answers[request_id] = loop.create_future(), loop.create_future()
        assert self._process.stdin
        self._process.stdin.write(msgspec.json.encode([request_id, request]) + b"\n")
        await self._added[request_id]

    async def aclose(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            await self._reading

    async def _start(self) -> asyncio.subprocess.Process:
        with (self._folder / f"client-{self.tree.name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, str(_SCRIPT), self._url, cwd=self._folder,
                env=os.environ | {"PYTHONPATH": str(self.tree)},
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log, limit=2**24,
            )  # fmt: skip
        self._reading = asyncio.create_task(self._read(process))
        return process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout
        while line := await process.stdout.readline():
            request_id, answer = msgspec.json.decode(line, type=tuple[str, tuple[str, list[str]] | None])
            if answer is None:
                self._added[request_id].set_result(None)
            else:
                self.answers[request_id].set_result(answer)
        unanswered: list[asyncio.Future[Any]] = [*self._added.values(), *self.answers.values()]
        for waiting in unanswered:
            if not waiting.done():
                waiting.set_exception(EOFError(f"a client of {self.tree} has ended"))
                waiting.exception()  # nobody may wait for it
