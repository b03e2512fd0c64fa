"""Processes of the package that start without importing it: they are forked from a process that has it loaded.

The imports take 0.7 s of CPU, and the suite starts a hundred workers and gateways. A forked process runs the program
from its first line on, with its own environment, folder and standard error. It is a child of the tests, as every other
`subprocess.Popen` is. `tests/operation/test_commands.py` starts the same programs in the plain way.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from io import BufferedWriter
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_PR_SET_CHILD_SUBREAPER = 36
_HEAD = 8
"""Bytes of a number before a request, which is its size, and of the answer, which is a pid."""


class LoadedPython:
    """A process that has the package loaded. It ends with `close`, or when this process has ended."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": str(_ROOT)},
            )

    def start(
        self, program: Sequence[str], env: Mapping[str, str], stderr: BufferedWriter
    ) -> "subprocess.Popen[bytes]":
        """Start `python <program>`. The program is `-m` and a module, or a script, and then arguments."""
        return _Forked(self._socket, program, env, stderr)

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        self._process.wait()


class _Forked(subprocess.Popen[bytes]):
    """A process that `LoadedPython` has forked. `Popen` waits for it and sends it signals."""

    def __init__(
        self, loaded: socket.socket, program: Sequence[str], env: Mapping[str, str], stderr: BufferedWriter
    ) -> None:
        self._loaded = loaded
        super().__init__([sys.executable, *program], env=env, stderr=stderr)

    def _execute_child(self, args: list[str], *others: Any) -> None:  # noqa: ANN401 - of Popen, which calls it
        env, stderr = others[5], others[14]
        request = json.dumps({"program": args[1:], "env": dict(env), "folder": str(Path.cwd())}).encode()
        _adopt_orphans(True)
        try:
            socket.send_fds(self._loaded, [b"%8d" % len(request)], [stderr])
            self._loaded.sendall(request)
            self.pid = int(self._loaded.recv(_HEAD))
        finally:
            _adopt_orphans(False)
        self._child_created = True


def _adopt_orphans(is_on: bool) -> None:  # noqa: FBT001 - of prctl
    """Whether this process becomes the parent of processes below it whose parent has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(is_on), 0, 0, 0)


def _serve(requests: socket.socket) -> None:
    """Fork a process for each request, until the other end is closed."""
    while True:
        head, fds, _, _ = socket.recv_fds(requests, _HEAD, 1)
        if not head:
            return
        text = b""
        while len(text) < int(head):
            text += requests.recv(int(head) - len(text))
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid:
                os.write(writing, b"%8d" % pid)
                os._exit(0)
            os.dup2(fds[0], 2)
            for each in (fds[0], reading, writing):
                os.close(each)
            requests.close()
            _run(**json.loads(text))
            return
        os.waitpid(between, 0)  # from now on the tests are the parent of the process
        requests.sendall(os.read(reading, _HEAD))
        for each in (fds[0], reading, writing):
            os.close(each)


def _run(program: list[str], env: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if program[0] == "-m":
        sys.argv = program[1:]
        sys.path[0] = folder
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path[0] = str(Path(program[0]).parent)
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    import worker.cli.main
    import worker.engine.application
    import worker.gateway.serving  # noqa: F401

    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
