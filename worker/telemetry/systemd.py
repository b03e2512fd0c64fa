"""Notifies systemd of the state of a service with `Type=notify`, by the protocol of sd_notify(3)."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping


class SystemdNotifier:
    """Reports to systemd what the process does; does nothing if systemd has not started the process.

    The event loop feeds the watchdog (`WatchdogSec=`), so systemd restarts a process whose event loop is stuck.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address  # an @ stands for an abstract socket
        own = str(os.getpid())
        is_watched = environment.get("WATCHDOG_PID", own) == own  # a child process inherits its parent's environment
        self._interval = int(environment.get("WATCHDOG_USEC", "0")) / 2_000_000 if is_watched else 0.0

    def ready(self) -> None:
        """Report that the start is complete, and feed the watchdog as long as the event loop runs."""
        self._notify("READY=1")
        if self._interval:
            self._feed()

    def stopping(self) -> None:
        """Report that the process drains."""
        self._notify("STOPPING=1")

    def _feed(self) -> None:
        self._notify("WATCHDOG=1")
        asyncio.get_running_loop().call_later(self._interval, self._feed)

    def _notify(self, state: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)  # the event loop does not wait for systemd
            sender.sendto(state.encode(), self._address)
