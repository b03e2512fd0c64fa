"""What a type checker knows about entries and answers. Only mypy reads this: nothing here is called."""

from typing import assert_never, assert_type

from worker import (
    Answer,
    AnyEntry,
    Cancelled,
    Claimed,
    Client,
    Delta,
    Done,
    Failed,
    Idle,
    Opened,
    Queued,
    Restarted,
    Resumed,
    Started,
    SyncClient,
    Unknown,
    Usage,
)


def a_comparison_of_the_type_tells_which_entry_it_is(entry: AnyEntry) -> str:
    if entry.type == "delta":
        assert_type(entry, Delta)
        return entry.content
    if entry.type == "done" or entry.type == "error":  # noqa: PLR1714 - what is compared here
        assert_type(entry, Done | Failed)
        return entry.model
    return ""


def a_match_on_the_type_may_be_exhaustive(entry: AnyEntry) -> None:  # noqa: C901, PLR0912 - one case for each type
    match entry.type:
        case "queued":
            assert_type(entry, Queued)
        case "started":
            assert_type(entry, Started)
        case "claimed":
            assert_type(entry, Claimed)
        case "resumed":
            assert_type(entry, Resumed)
        case "restarted":
            assert_type(entry, Restarted)
        case "opened":
            assert_type(entry, Opened)
        case "delta":
            assert_type(entry, Delta)
        case "done":
            assert_type(entry, Done)
        case "error":
            assert_type(entry, Failed)
        case "cancelled":
            assert_type(entry, Cancelled)
        case "idle":
            assert_type(entry, Idle)
        case "":
            assert_type(entry, Unknown)
        case _:
            assert_never(entry)


def a_match_on_the_class_may_be_exhaustive(entry: AnyEntry) -> None:
    match entry:
        case Queued() | Started() | Claimed() | Resumed() | Restarted() | Opened() | Delta():
            pass
        case Done() | Failed() | Cancelled():
            assert_type(entry.usage, Usage)
        case Idle():
            pass
        case Unknown():
            assert_type(entry.name, str)
        case _:
            assert_never(entry)


def usage_is_typed(answer: Answer) -> int:
    assert_type(answer.usage, Usage)
    assert_type(answer.usage.get("completion_tokens"), int | None)
    return answer.usage["prompt_tokens"]


async def followers_get_entries_of_all_types(client: Client, sync_client: SyncClient) -> None:
    async for entry in client.follow("r"):
        assert_type(entry, AnyEntry)
    async for entry in client.generate({}):
        assert_type(entry, AnyEntry)
    for entry in sync_client.follow("r"):
        assert_type(entry, AnyEntry)
