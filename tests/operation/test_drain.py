"""`worker drain` of one of three worker processes: its streams go on at the others, and no reader loses text."""

from pathlib import Path

from drained_streams import drain_under_streams


async def test_the_streams_of_a_drained_worker_go_on_without_a_lost_word(redis_binary: Path) -> None:
    result = await drain_under_streams(60, redis_server=redis_binary)
    assert all(reader.is_whole for reader in result.readers)
    assert result.status == 0
    gone = result.states[-1]
    assert gone["state"] == "gone"
    assert gone["handed_over"] == sum(reader.was_resumed for reader in result.readers) > 0
    assert all(reader.was_claimed == reader.was_resumed for reader in result.readers)
