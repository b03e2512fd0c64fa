"""The drill without Prometheus, and what it leaves behind. `tests/prometheus` runs all of it."""

import signal
from pathlib import Path
from shutil import which

import pytest
from command import end_by_signal

from worker.contract.entries import Object
from worker.sandbox.drill import FAULTS, Outcome, Reader, run_drill


def reader(expected: str, error: str = "") -> Reader:
    return Reader("r", expected, error=error)


@pytest.fixture
def _no_prometheus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("sh", "rm", "redis-server"):
        if found := which(name):
            (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.usefixtures("_no_prometheus")
async def test_without_prometheus_readers_are_compared_and_alerts_are_not_evaluated() -> None:
    printed: list[str] = []
    lines: list[Object] = []

    def report(line: str | None, data: Object) -> None:
        printed.append(line or "")
        lines.append(data)

    killed, _, stalled, _ = FAULTS
    assert await run_drill(report, faults=(killed, stalled))
    assert "Install Debian's package prometheus" in "\n".join(printed)
    outcomes = [line for line in lines if "texts_equal" in line]
    assert [(line["fault"], line["texts_equal"], line["alerts"]) for line in outcomes] == [
        ("worker killed", 12, None),
        ("Redis stalled", 12, None),
    ]
    assert outcomes[0]["resumed"]
    assert outcomes[1]["longest_gap"] > 5  # type: ignore[operator]  # a number of JSON
    assert printed[-1].count("not evaluated") == 2


@pytest.mark.parametrize("wrong", [reader("other"), reader("", error="Redis does not answer")])
def test_a_reader_with_a_wrong_text_or_an_error_fails_the_drill(wrong: Reader) -> None:
    right = reader("")
    assert Outcome(FAULTS[0], [right, right], None).is_right
    assert not Outcome(FAULTS[0], [right, wrong], None).is_right
    assert Outcome(FAULTS[0], [right, wrong], None).as_dict()["texts_equal"] == 1


def test_a_fault_without_its_alert_fails_the_drill() -> None:
    outcome = Outcome(FAULTS[0], [reader("")], ())
    assert not outcome.is_right
    assert outcome.as_dict()["missing_alerts"] == ["ProcessIsAway"]


async def test_ctrl_c_ends_the_drill_and_all_that_it_started() -> None:
    ended, of_drill = await end_by_signal("drill", line="1 of 4", signum=signal.SIGINT)
    assert len(of_drill) >= 6, "a Redis, two servers, at least one worker, and two guards"
    assert ended.status == 130
    assert ended.err == "· interrupted: every process that the drill started has ended\n"
    assert not [child for child in of_drill if child.is_running()]
