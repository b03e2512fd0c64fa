"""Several gateway processes at one address: a parent that starts them, starts them again, and passes signals on.

The parent opens the listening socket, which the children inherit. Each child also has the reading end of a pipe that
only the parent can write to. It ends when the parent has ended, even by SIGKILL, and then the child drains and ends.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

from ..telemetry.events import Telemetry
from ..telemetry.gateway_events import GatewayProcessEnded

RunChild = Callable[[int, int], int]
"""Runs a child, with its number from 0 and the file descriptor that ends with the parent; returns the exit status."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_YOUNG = 2.0
"""Seconds. A child that lived no longer is started again after a pause of as many."""


class Supervisor:
    """Runs children until SIGTERM or SIGINT. The process must have no threads, since it forks.

    Args:
        count: the number of children.
        run_child: runs one.
        listening: the socket that the children inherit. The parent closes its own copy when it must stop: as long as
            any process has it, the kernel accepts connections.
        telemetry: receives `GatewayProcessEnded`.
        limit: seconds after the signal until children that have not ended are killed.
    """

    def __init__(
        self, count: int, run_child: RunChild, listening: socket.socket, telemetry: Telemetry, limit: float
    ) -> None:
        self._count = count
        self._run_child = run_child
        self._listening = listening
        self._telemetry = telemetry
        self._limit = limit
        self._is_stopping = False
        self._children: dict[int, tuple[int, float]] = {}
        """The number of each child and when it was started, by its pid."""
        self._read_end, self._write_end = os.pipe()

    def run(self) -> int:
        """Run until all children have ended after a signal; returns the exit status."""
        for signum in _SIGNALS:
            signal.signal(signum, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_limit)
        for number in range(self._count):
            self._start(number)
        failed = 0
        while self._children:
            pid, status = os.wait()  # Python calls it again after a signal
            number, started = self._children.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if self._is_stopping:
                failed += code != 0
                continue
            self._telemetry.emit(GatewayProcessEnded(pid, code))
            if time.monotonic() - started < _YOUNG:
                time.sleep(_YOUNG)
            self._start(number)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return 1 if failed else 0

    def _start(self, number: int) -> None:
        # A signal in between would not reach the new child: it waits until the child is known.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            if self._is_stopping:
                return
            pid = os.fork()
            if pid == 0:
                self._become_child(number)
            self._children[pid] = number, time.monotonic()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _become_child(self, number: int) -> None:
        status = 1
        try:
            os.setpgid(0, 0)  # Ctrl-C in a terminal is for the parent, which passes it on once
            os.close(self._write_end)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            for signum in _SIGNALS:  # until the child serves, which sets its own
                signal.signal(signum, lambda *_: os._exit(0))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            status = self._run_child(number, self._read_end)
        except BaseException:  # noqa: BLE001 - nothing of the parent may run in the child
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._listening.close()
            signal.setitimer(signal.ITIMER_REAL, self._limit)
        for pid in self._children:
            os.kill(pid, signum)  # a child that has ended is a zombie until `run` has its status

    def _on_limit(self, _signum: int, _frame: FrameType | None) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
