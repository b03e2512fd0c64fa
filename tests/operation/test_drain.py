"""Drain and replacement of worker processes under streams, which go on at other workers: no reader loses text."""

from pathlib import Path

from click.testing import CliRunner
from drained_streams import Reader, Result, drain_under_streams, main, replace_under_streams, summary


async def test_the_streams_of_a_drained_worker_go_on_without_a_lost_word(redis_binary: Path) -> None:
    result = await drain_under_streams(60, redis_server=redis_binary)
    assert all(reader.is_whole for reader in result.readers)
    assert result.statuses == [0]
    gone = result.states[-1]
    assert gone["state"] == "gone"
    assert gone["handed_over"] == sum(reader.was_claimed for reader in result.readers) > 0
    assert all(reader.was_resumed == reader.was_claimed_unfinished for reader in result.readers)


async def test_a_rolling_restart_of_all_workers_loses_no_stream_and_no_word(redis_binary: Path) -> None:
    result = await replace_under_streams(60, redis_binary)
    print(f"longest wait of a reader {result.longest_wait:.2f} s")  # noqa: T201 - for `pytest -rP`
    assert len(result.readers) >= 60
    assert all(reader.is_whole for reader in result.readers)
    assert result.statuses == [0, 0, 0]
    assert any(reader.was_resumed for reader in result.readers)
    assert all(reader.was_resumed == reader.was_claimed_unfinished for reader in result.readers)


def test_the_measurement_refuses_a_rolling_replacement_by_the_command() -> None:
    ended = CliRunner().invoke(main, ["--rolling", "--by", "command"])
    assert ended.exit_code == 2
    assert "leave out --by command" in ended.output


def test_the_measurement_names_a_stream_that_stayed_only_if_one_did() -> None:
    moved, stayed = Reader({"messages": []}, wait=0.5, was_claimed=True), Reader({"messages": []}, wait=0.25)
    assert summary("by SIGTERM", Result([moved], [], [])).endswith("longest wait of a reader 0.50 s")
    assert summary("by SIGTERM", Result([moved, stayed], [], [])).endswith("0.50 s; of one that stayed 0.25 s")
