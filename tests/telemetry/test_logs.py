"""Logs: which line an event becomes, JSON or readable, with the context, and without the values of variables."""

import json
import sys

import pytest
import structlog

from worker.telemetry.events import (
    EntriesAccepted,
    Event,
    Failing,
    KeyFileUnreadable,
    Recovered,
    VllmAway,
    WorkerDraining,
)
from worker.telemetry.job_events import JobTakenElsewhere, LogDisappeared
from worker.telemetry.logging import Format, LogReceiver, configure_logging

LOGGED: list[tuple[Event, dict[str, object]]] = [
    (WorkerDraining(3), {"level": "info", "event": "worker_draining", "running": 3}),
    (LogDisappeared(2), {"level": "warning", "event": "log_gone", "attempt": 2}),
    (JobTakenElsewhere("q", "1-0"), {"level": "info", "event": "job_taken_elsewhere", "queue": "q", "job": "1-0"}),
    (
        VllmAway("http://a", "stalled"),
        {"level": "warning", "event": "vllm_away", "endpoint": "http://a", "reason": "stalled"},
    ),
    (KeyFileUnreadable("why"), {"level": "warning", "event": "key_file_unreadable", "error": "why"}),
    (Failing("claim_failed", "why"), {"level": "warning", "event": "claim_failed", "error": "why"}),
    (
        Failing("claim_failed", "why", "do"),
        {"level": "warning", "event": "claim_failed", "error": "why", "advice": "do"},
    ),
]


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize(("event", "line"), LOGGED)
def test_an_event_becomes_a_line(event: Event, line: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    LogReceiver().emit(event)
    (found,) = logged(capsys)
    assert found.pop("timestamp")
    assert found == line


@pytest.mark.parametrize("name", ["modèle", "a\x9b2Jb", "a\u2028b", "\ud800", 'a"\n\x1b[2Jb'])
def test_names_from_outside_are_escaped_in_a_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    LogReceiver().emit(KeyFileUnreadable(name))
    line = capsys.readouterr().err
    assert line.removesuffix("\n").isascii()
    assert line.removesuffix("\n").isprintable()
    assert json.loads(line)["error"] == name


def test_a_silent_event_is_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    LogReceiver().emit(EntriesAccepted(1))
    assert logged(capsys) == []


@pytest.mark.parametrize(("repeat_after", "lines"), [(60.0, 1), (-1.0, 3)])
def test_trouble_that_lasts_is_repeated_only_after_a_while(
    repeat_after: float, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("json")
    receiver = LogReceiver(repeat_after=repeat_after)
    for _ in range(3):
        receiver.emit(Failing("claim_failed", "why"))
    assert len(logged(capsys)) == lines


def test_the_end_of_trouble_is_logged_once_and_trouble_after_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    receiver = LogReceiver()
    receiver.emit(Recovered("claim_failed"))
    for event in (Failing("claim_failed", "why"), Recovered("claim_failed"), Recovered("claim_failed")):
        receiver.emit(event)
    receiver.emit(Failing("claim_failed", "why"))
    assert [line["event"] for line in logged(capsys)] == ["claim_failed", "recovered", "claim_failed"]


def fail_with(prompt: str) -> None:
    raise RuntimeError(str(len(prompt)))


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_shows_no_values(log_format: Format, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log_format)
    try:
        fail_with("a secret prompt")
    except RuntimeError:
        structlog.get_logger().exception("internal_error")
    logged = capsys.readouterr().err
    assert "fail_with" in logged
    assert "a secret prompt" not in logged.replace('fail_with("a secret prompt")', "")


@pytest.mark.parametrize(("terminal", "no_color", "colors"), [(True, "", True), (True, "1", False), (False, "", False)])
def test_colors_are_for_a_terminal_unless_no_color_is_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, terminal: bool, no_color: str, colors: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    configure_logging("console")
    structlog.get_logger().info("job_finished")
    assert ("\x1b[" in capsys.readouterr().err) == colors


def test_json_lines_carry_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("auto")
    with structlog.contextvars.bound_contextvars(worker="w", request_id="r"):
        structlog.get_logger().info("job_finished", outcome="done")
    line = json.loads(capsys.readouterr().err)
    assert line | {"timestamp": ""} == {
        "event": "job_finished", "outcome": "done", "worker": "w", "request_id": "r", "level": "info", "timestamp": "",
    }  # fmt: skip


def test_a_line_below_the_level_is_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "warning")
    structlog.get_logger().info("quiet")
    assert capsys.readouterr().err == ""
