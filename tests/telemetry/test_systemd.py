"""What a process reports to systemd: that it is ready, that it drains, and that its event loop runs."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import StartProcess
from gateway_fixtures import StartGatewayProcess
from waits import eventually

from worker.sandbox.embedded_redis import free_port
from worker.telemetry.systemd import SystemdNotifier

BLOCKING = str(Path(__file__).with_name("blocking_worker.py"))


class Systemd:
    """The socket at which systemd receives what services report."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(60)

    def next(self) -> str:
        return self._socket.recv(1024).decode()

    def waiting(self) -> list[str]:
        """The messages that have arrived and were not read."""
        found = []
        self._socket.setblocking(False)
        try:
            while True:
                found.append(self._socket.recv(1024).decode())
        except BlockingIOError:
            return found
        finally:
            self._socket.settimeout(60)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    it = Systemd(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield it
    it.close()


async def next_of(systemd: Systemd) -> str:
    return await asyncio.to_thread(systemd.next)


async def test_a_worker_is_ready_without_redis_and_reports_its_drain(
    systemd: Systemd, start_process: StartProcess
) -> None:
    worker = start_process(redis_url=f"redis://127.0.0.1:{free_port()}/0")
    assert await next_of(systemd) == "READY=1"
    worker.terminate()
    assert await next_of(systemd) == "STOPPING=1"
    assert await asyncio.to_thread(worker.wait, 60) == 0


async def test_a_gateway_is_ready_once_it_serves_and_reports_its_drain(
    systemd: Systemd, start_gateway_process: StartGatewayProcess
) -> None:
    gateway = await start_gateway_process()
    assert await next_of(systemd) == "READY=1"
    gateway.process.terminate()
    assert await next_of(systemd) == "STOPPING=1"
    assert await gateway.ended() == 0


async def test_a_worker_feeds_the_watchdog_only_while_its_event_loop_runs(
    systemd: Systemd, start_process: StartProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    released = tmp_path / "released"
    worker = start_process(program=[BLOCKING, str(released)])
    assert await next_of(systemd) == "READY=1"
    for _ in range(3):
        assert await next_of(systemd) == "WATCHDOG=1"
    worker.send_signal(signal.SIGUSR1)
    await eventually(lambda: is_silent(systemd, seconds=3))
    released.touch()
    assert await next_of(systemd) == "WATCHDOG=1", "the loop runs again"


async def is_silent(systemd: Systemd, seconds: float) -> bool:
    """Whether nothing arrives for so long."""
    systemd.waiting()
    await asyncio.sleep(seconds)
    return not systemd.waiting()


@pytest.mark.parametrize("name", ["/run/vllm-relay-nobody", "@vllm-relay-nobody", ""])
async def test_an_absent_systemd_is_no_error(name: str) -> None:
    notifier = SystemdNotifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000"})
    notifier.ready()
    notifier.stopping()


async def test_an_abstract_socket_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("")  # the kernel chooses an abstract name
        name = receiver.getsockname().decode()
        SystemdNotifier({"NOTIFY_SOCKET": name.replace("\0", "@")}).ready()
        receiver.settimeout(60)
        assert receiver.recv(100) == b"READY=1"


async def test_a_child_does_not_feed_the_watchdog_of_its_parent(systemd: Systemd) -> None:
    environment = os.environ | {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    SystemdNotifier(environment).ready()
    await asyncio.sleep(0.05)
    assert systemd.waiting() == ["READY=1"]
