"""Kills the child processes of this process when it ends, even if it is killed."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Standard input ends when the process at its other end has ended, even by SIGKILL.
_GUARD = 'while read -r pid; do pids="$pids $pid"; done; kill -9 $pids 2>/dev/null; rm -rf "$1"'


class OrphanGuard:
    """A small process that kills the added child processes and removes their folder once this process has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shell = shutil.which("sh")
        self._process = shell and subprocess.Popen(  # noqa: S603 - a fixed script
            [shell, "-c", _GUARD, "sh", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for this process, which then ends its children in order
        )

    def add(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill this child too when this process ends."""
        if self._process and self._process.stdin:
            self._process.stdin.write(f"{process.pid}\n".encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """End the guard, when this process has ended its children itself."""
        if self._process and self._process.stdin:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()


@contextmanager
def guarded_folder(prefix: str) -> Iterator[OrphanGuard]:
    """A temporary folder for child processes, and their guard."""
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        guard = OrphanGuard(Path(folder))
        try:
            yield guard
        finally:
            guard.close()
