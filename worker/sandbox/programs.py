"""Child processes of the demo and the drill, which end with their context or this process, and lines of progress."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias, cast

from ..contract.entries import Object
from .orphans import OrphanGuard, guarded_folder

Report: TypeAlias = Callable[[str | None, Object], None]
"""Receives a line for a person, and the same as JSON. The line is None if another line has the same text."""

_EXIT_TIMEOUT = 8.0
"""Seconds that a process has to end after SIGTERM."""
_SETTINGS = ("WORKER_", "GATEWAY_", "VLLM_URL", "REDIS_URL")
"""How the variables begin that a child process does not inherit. Keys of vLLM are inherited."""


class SandboxFailed(RuntimeError):
    """The demo or the drill failed. The message is the reason."""


def timed(report: Report) -> Report:
    """The same receiver, with the seconds since now before each line."""
    began = time.monotonic()

    def report_timed(line: str | None, data: Object) -> None:
        at = time.monotonic() - began
        report(None if line is None else f"{at:6.2f} s  {line}", {"at": round(at, 3), **data})

    return report_timed


class Programs:
    """Child processes. Their output is in `folder`, which is also their working directory."""

    def __init__(self, guard: OrphanGuard) -> None:
        self.folder = Path(guard.folder)
        self._guard = guard
        self._processes: list[subprocess.Popen[bytes]] = []
        rest = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
        rest["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), rest.get("PYTHONPATH"))))
        self._environment = rest

    def start(self, command: Sequence[str], **variables: str) -> "subprocess.Popen[bytes]":
        """Start any program."""
        with (self.folder / f"{len(self._processes)}.log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - a program of the caller
                command,
                env=self._environment | variables,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal is for this process, which then ends its children
            )
        self._processes.append(process)
        self._guard.add(process)
        return process

    def start_own(self, *arguments: str, **variables: str) -> "subprocess.Popen[bytes]":
        """Start a command of this package, such as `run`."""
        return self.start([sys.executable, "-m", __name__.partition(".")[0], *arguments], **variables)

    def why_ended(self, process: "subprocess.Popen[bytes]") -> str:
        """The command, the exit status and the last line of a process that has ended."""
        lines = (self.folder / f"{self._processes.index(process)}.log").read_text(errors="replace").splitlines()
        command = shlex.join(map(str, cast("list[str]", process.args)))
        return f"{command} ended with {process.returncode}: {lines[-1] if lines else 'it printed nothing'}"

    def end(self) -> None:
        """End all processes."""
        try:
            for process in self._processes:
                process.terminate()
            for process in self._processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_EXIT_TIMEOUT)
        finally:  # also after a second Ctrl-C
            for process in self._processes:
                process.kill()
                process.wait()


@contextmanager
def start_programs(name: str) -> Iterator[Programs]:
    """Child processes that end with the context. `name` is in the name of their folder."""
    with guarded_folder(f"vllm-relay-{name}-") as guard:
        programs = Programs(guard)
        try:
            yield programs
        finally:
            programs.end()
