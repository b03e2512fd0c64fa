"""Logs: JSON or readable, with the context, and without the values of variables."""

import json

import pytest
import structlog

from worker.telemetry.logs import Format, configure_logging


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
