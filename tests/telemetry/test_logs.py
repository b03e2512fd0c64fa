"""Logs: JSON or readable, with the context, and without the values of variables."""

import json
import sys

import pytest
import structlog

from worker.telemetry.logging import Format, configure_logging


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
def test_c9_colors_are_for_a_terminal_and_for_whoever_wants_them(
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


def test_what_is_below_the_level_is_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "warning")
    structlog.get_logger().info("quiet")
    assert capsys.readouterr().err == ""
