"""What `worker follow` prints of an answer that broke off: the whole text, and notes about it elsewhere."""

from collections.abc import AsyncIterator, Sequence

import pytest
from click.testing import CliRunner
from command import run
from redis.asyncio import Redis

from worker import Client, Unavailable
from worker.cli.main import main
from worker.cli.printer import Printer
from worker.contract.entries import Delta, parse
from worker.contract.ids import SEAL, EntryId

BROKEN_OFF: Sequence[tuple[str, dict[str, str]]] = (
    ("1-0", {"type": "started", "worker": "w1"}),
    ("1-1", {"type": "delta", "content": "One, "}),
)
RESUMED = {"type": "resumed", "after": "1-1"}
RESTARTED = {"type": "restarted"}


@pytest.mark.parametrize(
    ("reason", "how", "printed", "notes"),
    [
        ("takeover", RESUMED, "One, two\n", "· taken by w1\n· taken over by w2\n· the answer continues\n· done\n"),
        ("upstream_truncated", RESUMED, "One, two\n", "· upstream_truncated: tried again by w2\n"),
        ("takeover", RESTARTED, "One, \ntwo\n", "· the answer starts again: the text above is void\n"),
    ],
)
async def test_a_resumed_text_has_no_line_breaks_added_in_a_file_or_pipe(
    reason: str, how: dict[str, str], printed: str, notes: str, redis: Redis, redis_url: str
) -> None:
    rest = (
        ("2-0", {"type": "claimed", "worker": "w2", "reason": reason}),
        ("2-1", how),
        ("2-2", {"type": "delta", "content": "two"}),
        (str(SEAL), {"type": "done"}),
    )
    for entry_id, fields in (*BROKEN_OFF, *rest):
        await redis.xadd("chat:tokens:{r}", fields, id=entry_id)  # type: ignore[arg-type]  # dict is invariant
    await redis.expire("chat:tokens:{r}", 60)
    ended = await run("follow", "r", REDIS_URL=redis_url)
    assert (ended.status, ended.out) == (0, printed)
    assert notes in ended.err


PRINTED: list[tuple[str, list[dict[str, str]], str]] = [
    # a name, the deltas, and what is printed of them
    (
        "a refusal in pieces",
        [{"extra": '{"delta":{"refusal":"I can"}}'}, {"extra": '{"delta":{"refusal":"not."}}'}],
        "I cannot.\n",
    ),
    (
        "a refusal after text, and that of another choice",
        [
            {"content": "Well: "},
            {"extra": '{"delta":{"refusal":"no"}}'},
            {"index": "1", "extra": '{"delta":{"refusal":"No."}}'},
        ],
        "Well: no\n[1] No.\n",
    ),
    (
        "two calls at one index",
        [
            {"tool_calls": '[{"index":0,"id":"c","function":{"name":"f","arguments":"{"}}]'},
            {"tool_calls": '[{"index":0,"id":"","function":{"name":"","arguments":"}"}}]'},
            {"tool_calls": '[{"index":0,"id":"d","function":{"name":"g","arguments":"[]"}},{}]'},
        ],
        (
            '{"index":0,"id":"c","function":{"name":"f","arguments":"{}"}}\n'
            '{"index":0,"id":"d","function":{"name":"g","arguments":"[]"}}\n'
        ),
    ),
    (
        "a function call",
        [
            {"extra": '{"delta":{"function_call":{"name":"f","arguments":""}}}'},
            {"extra": '{"delta":{"function_call":{"arguments":"{}"}}}'},
        ],
        '{"name":"f","arguments":"{}"}\n',
    ),
    (
        "content in parts, and then as text",
        [
            {"extra": '{"delta":{"content":[{"type":"text","text":"hello "},{"type":"thinking","thinking":[]}]}}'},
            {"content": "parts"},
            {"index": "1", "extra": '{"delta":{"content":[{"type":"text","text":"b"}]}}'},
        ],
        "hello parts\n[1] b\n",
    ),
    ("what is spoken", [{"extra": '{"delta":{"audio":{"id":"a","transcript":"Hi"}}}'}], "Hi\n"),
]


@pytest.mark.parametrize(("deltas", "printed"), [case[1:] for case in PRINTED], ids=[case[0] for case in PRINTED])
def test_every_form_of_text_is_printed(
    deltas: list[dict[str, str]], printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printer = Printer(as_json=False)
    for n, fields in enumerate(deltas, 1):
        printer.show(parse(f"1-{n}", {"type": "delta"} | fields))
    printer.show(parse(str(SEAL), {"type": "done"}))
    assert capsys.readouterr().out == printed


def test_when_redis_is_lost_mid_answer_follow_prints_how_to_go_on(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose(_: Client, request_id: str, **_more: object) -> AsyncIterator[Delta]:
        yield Delta(id=EntryId(1, 7), content=f"As {request_id}")
        raise Unavailable("Redis does not answer: gone")

    monkeypatch.setattr(Client, "follow", lose)
    result = CliRunner(env={"REDIS_URL": redis_url}).invoke(main, ["follow", "r"])
    assert (result.exit_code, result.stdout) == (1, "As r\n")
    assert result.stderr == "Error: Redis does not answer: gone\nContinue later with: worker follow r --after 1-7\n"
