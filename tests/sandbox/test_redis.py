"""The embedded Redis starts empty, is the binary that was given, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from functools import partial
from importlib.util import find_spec, module_from_spec
from pathlib import Path

import psutil
import pytest
from command import environment
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from worker.sandbox.embedded_redis import NoRedis, find_servers, start_redis, version_of

SERVERS = find_servers()


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("server", SERVERS, ids=str)
def test_each_server_at_hand_starts_empty_and_leaves_nothing(server: Path) -> None:
    with start_redis(server) as embedded, Redis.from_url(embedded.url, protocol=2) as redis:
        assert redis.dbsize() == 0
        assert redis.info()["redis_version"] == version_of(server)
        assert embedded.what == f"redis-server {version_of(server)} ({server})"
        folder = Path(redis.config_get("dir")["dir"])
        assert folder.is_dir()
        redis.set("a", "b")
        assert embedded.process is not None
        assert embedded.process.poll() is None
    assert embedded.process.poll() is not None
    assert not folder.exists()
    with Redis.from_url(embedded.url, protocol=2) as redis, pytest.raises(RedisConnectionError):
        redis.ping()


def test_redis_ends_after_an_error_too() -> None:
    with pytest.raises(KeyError), start_redis() as embedded:  # noqa: PT012 - what happens inside is the point
        process = embedded.process
        raise KeyError
    assert process is not None
    assert process.poll() is not None


def test_options_reach_the_server_and_two_live_side_by_side() -> None:
    with (
        start_redis(None, "--maxmemory", "5mb") as one,
        start_redis() as other,
        Redis.from_url(one.url, protocol=2) as first,
        Redis.from_url(other.url, protocol=2) as second,
    ):
        first.set("a", "b")
        assert first.config_get("maxmemory") == {"maxmemory": str(5 * 1024 * 1024)}
        assert second.dbsize() == 0


@pytest.mark.parametrize("what", ["ends", "is missing", "is no program"])
def test_a_binary_that_does_not_start_is_reported(what: str, tmp_path: Path) -> None:
    binary = tmp_path / "redis-server"
    if what == "ends":
        program(binary, "exit 1")
    elif what == "is no program":
        binary.write_text("text")
    with pytest.raises(NoRedis, match="does not start"), start_redis(binary):
        pass


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'Redis server v=6.2.14 sha=0'", True),
        ("echo 'Redis server v=10.0.0 sha=0'", True),
        ("echo 'Redis server v=6.0.16 sha=0'", False),
        ("echo 'Redis server v=5.0.7 sha=0'", False),
        ("echo hello", False),
        ("exit 1", False),
    ],
)
def test_a_server_that_is_too_old_or_broken_is_left_out(
    script: str,
    found: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = program(tmp_path / "redis-server", script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert (server in find_servers()) is found


def test_without_a_server_fakeredis_takes_its_place() -> None:
    with start_redis(servers=[]) as embedded:
        assert "fakeredis" in embedded.what
        assert embedded.process is None
        with Redis.from_url(embedded.url, protocol=2) as redis:
            assert redis.ping()
            assert redis.xadd("log", {"a": "b"}, id="1-0") == b"1-0"
            began = time.monotonic()
            assert redis.xread({"log": "1-0"}, block=50) == []
            assert time.monotonic() - began >= 0.04, "it blocks for the given time"


def test_the_version_is_the_one_that_the_binary_prints() -> None:
    for server in SERVERS:
        printed = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout
        assert f"v={version_of(server)} " in printed


def test_ctrl_c_does_not_reach_a_server_that_prints_its_version(tmp_path: Path) -> None:
    session = "$(cut -d' ' -f6 /proc/$$/stat)"
    server = program(tmp_path / "redis-server", f'echo "Redis server v={session} sha=0"')
    assert version_of(server) != str(os.getsid(0))


USER = """
import sys, time
from redis import Redis
from worker.sandbox.embedded_redis import start_redis
with start_redis() as embedded, Redis.from_url(embedded.url, protocol=2) as redis:
    print(embedded.process.pid, redis.config_get("dir")["dir"], flush=True)
    time.sleep(60)
"""


def test_redis_and_its_folder_are_gone_when_their_user_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", USER], env=environment(), stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        pid, folder = user.stdout.readline().split()
        server = psutil.Process(int(pid))
        user.kill()
    psutil.wait_procs([server], timeout=60)
    assert not server.is_running()
    end = time.monotonic() + 60
    while Path(folder).exists():
        assert time.monotonic() < end, "the folder is still there"
        time.sleep(0.01)


def test_ctrl_c_during_the_start_ends_the_server(tmp_path: Path) -> None:
    record = tmp_path / "pid"
    server = program(tmp_path / "redis-server", f"echo $$ > {record}.new; mv {record}.new {record}; exec sleep 60")

    starter = threading.main_thread().ident or 0

    def is_being_created() -> bool:
        """Whether `Popen` has not returned: an interrupt in it leaves a process that nobody knows."""
        frames = traceback.extract_stack(sys._current_frames()[starter])
        return any(frame.name == "_execute_child" for frame in frames)

    def interrupt() -> None:
        while not record.exists() or is_being_created():
            time.sleep(0.01)
        signal.pthread_kill(starter, signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt), start_redis(server):
        pass
    other.join()
    assert not psutil.pid_exists(int(record.read_text()))


def test_processes_that_have_the_same_ports_begin_at_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them chose the same port while the server of the first did not listen yet."""
    found = set[int]()
    for pid in range(4_000, 4_000 + 5 * 48, 48):
        spec = find_spec("worker.sandbox.embedded_redis")
        assert spec is not None
        assert spec.loader is not None
        of_another_process = module_from_spec(spec)
        spec.loader.exec_module(of_another_process)
        monkeypatch.setattr(os, "getpid", partial(int, pid))
        found |= {of_another_process.free_port() for _ in range(5)}
    assert len(found) == 5 * 5
