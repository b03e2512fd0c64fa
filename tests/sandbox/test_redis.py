"""The Redis of one's own: it starts empty, is the one that was asked for, and leaves nothing behind."""

import subprocess
import time
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from worker.sandbox.embedded_redis import NoRedis, find_servers, start_redis, version_of

SERVERS = find_servers()


def program(path: Path, does: str) -> Path:
    path.write_text(f"#!/bin/sh\n{does}\n")
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


def test_it_is_gone_after_an_error_too() -> None:
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
def test_a_binary_that_does_not_start_is_told(what: str, tmp_path: Path) -> None:
    binary = tmp_path / "redis-server"
    if what == "ends":
        program(binary, "exit 1")
    elif what == "is no program":
        binary.write_text("text")
    with pytest.raises(NoRedis, match="does not start"), start_redis(binary):
        pass


@pytest.mark.parametrize(
    ("says", "taken"),
    [
        ("echo 'Redis server v=6.2.14 sha=0'", True),
        ("echo 'Redis server v=10.0.0 sha=0'", True),
        ("echo 'Redis server v=6.0.16 sha=0'", False),
        ("echo 'Redis server v=5.0.7 sha=0'", False),
        ("echo hello", False),
        ("exit 1", False),
    ],
)
def test_a_server_that_is_too_old_or_broken_is_passed_over(
    says: str,
    taken: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = program(tmp_path / "redis-server", says)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert (server in find_servers()) is taken


def test_without_a_server_fakeredis_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.sandbox.embedded_redis.find_servers", list)
    with start_redis() as embedded:
        assert "fakeredis" in embedded.what
        assert embedded.process is None
        with Redis.from_url(embedded.url, protocol=2) as redis:
            assert redis.ping()
            assert redis.xadd("log", {"a": "b"}, id="1-0") == b"1-0"
            began = time.monotonic()
            assert redis.xread({"log": "1-0"}, block=50) == []
            assert time.monotonic() - began >= 0.04, "it blocks as long as it is told to"


def test_the_version_is_the_binarys_own_word() -> None:
    for server in SERVERS:
        said = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout
        assert f"v={version_of(server)} " in said
