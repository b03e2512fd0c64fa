"""The heartbeat file: which processes it shows as alive, whatever died processes and other users left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waits import eventually

from worker.telemetry.heartbeat import Heartbeat, HeartbeatFile, directories, read_heartbeats

_BEATING = """
import pathlib, sys, time
from worker.telemetry.heartbeat import HeartbeatFile
HeartbeatFile(time.monotonic, [pathlib.Path(sys.argv[1])]).start()
print("started", flush=True)
time.sleep(600)
"""


def beats(*places: Path) -> list[int]:
    return [beat.pid for beat in read_heartbeats(places)]


def files(place: Path) -> list[Path]:
    (directory,) = directories([place])
    return list(directory.iterdir())


def test_a_live_process_is_found_with_the_age_of_its_last_tick_until_it_stops(tmp_path: Path) -> None:
    heartbeat = HeartbeatFile(lambda: time.monotonic() - 7, [tmp_path])
    heartbeat.start()
    (beat,) = read_heartbeats([tmp_path])
    assert isinstance(beat, Heartbeat)
    assert beat.pid == os.getpid()
    assert 7 <= beat.age < 12
    heartbeat.stop()
    assert (beats(tmp_path), files(tmp_path)) == ([], [])


def test_the_file_of_a_killed_process_does_not_count_and_is_removed_by_the_next_start(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", _BEATING, tmp_path], env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        assert beats(tmp_path) == [process.pid]
        process.send_signal(signal.SIGKILL)
    assert beats(tmp_path) == []
    assert len(files(tmp_path)) == 1
    heartbeat = HeartbeatFile(time.monotonic, [tmp_path])
    heartbeat.start()
    assert beats(tmp_path) == [os.getpid()]
    assert len(files(tmp_path)) == 1
    heartbeat.stop()


async def test_a_removed_file_comes_back(tmp_path: Path) -> None:
    heartbeat = HeartbeatFile(time.monotonic, [tmp_path])
    heartbeat.start()
    (file,) = files(tmp_path)
    file.unlink()

    async def is_back() -> bool:
        return beats(tmp_path) == [os.getpid()]

    await eventually(is_back)
    heartbeat.stop()


def test_the_second_place_is_used_if_the_first_cannot_be_written(tmp_path: Path) -> None:
    places = [tmp_path / "missing", tmp_path]
    heartbeat = HeartbeatFile(time.monotonic, places)
    heartbeat.start()
    assert beats(*places) == [os.getpid()]
    heartbeat.stop()


async def test_without_a_place_the_start_fails_and_a_later_place_is_found(tmp_path: Path) -> None:
    place = tmp_path / "missing"
    heartbeat = HeartbeatFile(time.monotonic, [place])
    with pytest.raises(FileNotFoundError):
        heartbeat.start()
    place.mkdir()

    async def is_there() -> bool:
        return beats(place) == [os.getpid()]

    await eventually(is_there)
    heartbeat.stop()


def test_a_link_that_somebody_else_made_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (directory,) = directories([tmp_path])
    directory.symlink_to(elsewhere)
    with pytest.raises(PermissionError):
        HeartbeatFile(time.monotonic, [tmp_path]).start()
    assert not list(elsewhere.iterdir())


def test_a_process_of_another_container_does_not_count(tmp_path: Path) -> None:
    """Containers may share `/dev/shm`, and their processes the number 1."""
    heartbeat = HeartbeatFile(time.monotonic, [tmp_path])
    heartbeat.start()
    (file,) = files(tmp_path)
    content = json.loads(file.read_bytes())
    file.write_text(json.dumps(content | {"pid_namespace": "pid:[1]"}))
    assert beats(tmp_path) == []
    heartbeat.stop()
