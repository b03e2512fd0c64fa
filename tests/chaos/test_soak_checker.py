"""The soak's checker recognizes each kind of doctored log."""

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from soak_checker import OWN_TRIAL, SEAL, Evidence, Tally, check, had_no_result, is_own_trial
from soak_jobs import Plan, plan

from worker.sandbox.simulator.record import Served
from worker.sandbox.simulator.server import Simulator
from worker.vllm.servers.circuit import Caller
from worker.vllm.servers.pool import ServerPool
from worker.vllm.stream.watchdog import StreamTimeouts

Log = list[tuple[str, dict[str, str]]]


def planned(kind: str = "chinese") -> Plan:
    dice = random.Random(1)  # noqa: S311 - no secret
    return next(made for number in range(10_000) if (made := plan(dice, number, "t")).kind == kind)


def deltas(made: Plan, attempt: int, first: int = 2) -> Log:
    """Each token of the first choice as a delta; the text is with the first and the last, as far as this test cares."""
    (expected,) = made.choices
    fields = [{"type": "delta", "token_ids": f"[{number}]"} for number in expected.token_ids]
    half = len(expected.content) // 2
    fields[0]["content"], fields[5]["content"] = expected.content[:half], expected.content[half:]
    fields[-1] |= {"finish_reason": expected.finish_reason}
    return [(f"{attempt}-{first + place}", delta) for place, delta in enumerate(fields)]


def opened(made: Plan, attempt: int, n: int = 1) -> tuple[str, dict[str, str]]:
    return f"{attempt}-{n}", {"type": "opened", "prompt_tokens": str(made.prompt_tokens)}


def usage_of(made: Plan) -> str:
    completion = sum(len(choice.token_ids) for choice in made.choices)
    counts = {"prompt_tokens": made.prompt_tokens, "completion_tokens": completion}
    return msgspec.json.encode(counts | {"total_tokens": sum(counts.values())}).decode()


def sealed(made: Plan, *entries: tuple[str, dict[str, str]]) -> Log:
    attempt = entries[-1][0].partition("-")[0]
    return [*entries, (SEAL, {"type": "done", "attempt": attempt, "usage": usage_of(made)})]


def whole(made: Plan) -> Log:
    return sealed(made, ("0-1", {"type": "queued"}), ("1-0", {"type": "started"}), opened(made, 1), *deltas(made, 1))


def evidence_of(made: Plan, log: Log, **other: Any) -> Evidence:  # noqa: ANN401, any field of it
    line = {"attempt": log[-1][1].get("attempt", "1"), "outcome": log[-1][1]["type"], "usage": usage_of(made)}
    sound: dict[str, Any] = {
        "log_expiry": 1,
        "tombstone": '{"outcome": "done"}',
        "tombstone_expiry": 1,
        "finished": [line],
        "starts": [start()],
    }
    return Evidence(log=log, **(sound | other))


def start(**fields: Any) -> Served:  # noqa: ANN401, any field of it
    sound: dict[str, Any] = {"order": 1, "route": "", "request": {}, "started": 0, "status": 200, "ended": 1}
    return Served(**(sound | fields))


def found(made: Plan, log: Log, **other: object) -> set[str]:
    tally = Tally()
    check(made, evidence_of(made, log, **other), tally)
    return {violation.what for violation in tally.violations}


def test_a_sound_log_passes() -> None:
    made = planned()
    assert not found(made, whole(made))


def without(place: int) -> Callable[[Log], Log]:
    return lambda log: [*log[:place], *log[place + 1 :]]


def renumbered(log: Log) -> Log:
    """Ids made consecutive, so that only the text is wrong."""
    return [
        (f"1-{n}" if n >= 0 and entry_id != SEAL else entry_id, fields) for n, (entry_id, fields) in enumerate(log, -1)
    ]


@pytest.mark.parametrize(
    ("doctor", "what"),
    [
        (lambda log: renumbered([*log[:6], log[5], *log[6:]]), {"duplicated"}),
        (lambda log: renumbered(without(5)(log)), {"lost"}),
        (lambda log: renumbered([*log[:5], log[6], log[5], *log[7:]]), {"different"}),
        (lambda log: [*log[:6], log[5], *log[6:]], {"duplicated", "ids"}),
        (without(5), {"lost", "ids"}),
        (lambda log: log[:-1], {"no seal", "lost"}),
        (lambda log: [*log, log[-1]], {"no seal", "lost"}),
        (lambda log: [*log[:-1], (f"1-{len(log) - 2}", {"type": "done"}), log[-1]], {"second end"}),
        (
            lambda log: [*log[:-1], (SEAL, log[-1][1] | {"type": "error", "code": "internal"})],
            {"outcome", "lifecycle", "tombstone"},
        ),
        (lambda log: [*log[:-1], (SEAL, log[-1][1] | {"attempt": "2"})], {"seal"}),
        (lambda log: [*log[:-1], (SEAL, log[-1][1] | {"usage": '{"prompt_tokens": 1}'})], {"usage"}),
        (lambda log: [log[0], ("1-0", {"type": "claimed"}), *log[2:]], {"ids"}),
    ],
)  # fmt: skip
def test_a_doctored_log_is_caught(doctor: Callable[[Log], Log], what: set[str]) -> None:
    made = planned()
    log = doctor(whole(made))
    finished = evidence_of(made, whole(made)).finished
    assert found(made, log, finished=finished) == what


def test_after_a_restart_only_the_last_attempt_counts() -> None:
    made = planned()
    before = [("1-0", {"type": "started"}), opened(made, 1), *deltas(made, 1)[:9]]
    after = [("2-0", {"type": "claimed"}), ("2-1", {"type": "restarted"}), opened(made, 2, 2), *deltas(made, 2, 3)]
    assert not found(made, sealed(made, *before, *after))
    assert found(made, sealed(made, *before, after[0], ("2-1", opened(made, 2)[1]), *deltas(made, 2))) == {"duplicated"}


@pytest.mark.parametrize(
    ("kept", "again", "what"),
    [(6, 6, set()), (6, 5, {"duplicated"}), (6, 7, {"lost"}), (5, 5, {"duplicated"})],
)
def test_after_a_resume_the_text_is_joined_at_the_entry_named(kept: int, again: int, what: set[str]) -> None:
    """Of nine deltas written six carry all the text: the rest may be dropped, and the sixth may not."""
    made = planned()
    before = [("1-0", {"type": "started"}), opened(made, 1), *deltas(made, 1)[:9]]
    resumed = ("2-1", {"type": "resumed", "after": before[1 + kept][0]})
    rest = [(f"2-{n}", fields) for n, (_, fields) in enumerate(deltas(made, 2)[again:], 2)]
    assert found(made, sealed(made, *before, ("2-0", {"type": "claimed"}), resumed, *rest)) == what


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"log_expiry": -1}, {"expiry"}),
        ({"tombstone_expiry": -2}, {"expiry"}),
        ({"tombstone": '{"outcome": "cancelled"}'}, {"tombstone"}),
        ({"finished": []}, {"lifecycle"}),
        ({"finished": [{"attempt": "1", "outcome": "done"}]}, {"usage"}),
        ({"letters": [{"queue": "default", "job": "1-0"}]}, {"dead letters"}),
        ({"starts": [start(chunks=3), start(chunks=3)]}, {"starts"}),
        ({"starts": [start(finished=True, chunks=3, texts=["no"], reasonings=[""], arguments=[""])]}, {"simulator"}),
    ],
)
def test_what_is_left_beside_the_log_is_checked(other: dict[str, object], what: set[str]) -> None:
    made = planned()
    assert found(made, whole(made), **other) == what


def test_a_further_start_shows_as_a_further_opening() -> None:
    made = planned()
    log = sealed(made, ("1-0", {"type": "started"}), opened(made, 1), opened(made, 1, 2), *deltas(made, 1, 3))
    tally = Tally()
    check(made, evidence_of(made, log, starts=[start(chunks=3), start(chunks=3, started=2, ended=3)]), tally)
    assert (tally.violations, tally.given_up) == ([], 0)


@pytest.mark.parametrize(
    ("second", "wrong", "given_up"),
    [
        ({"started": 1, "ended": 2}, set(), 1),
        ({"started": 0.5, "ended": 2}, {"starts"}, 1),
        ({"started": 0.5, "ended": 2, "status": 503}, set(), 0),
        ({"started": 0.5, "ended": None}, set(), 0),
        ({"started": 0.5, "ended": 2, "fault": "cut"}, set(), 0),
        ({"started": 0.5, "ended": 2, "chunks": 0}, set(), 0),
    ],
)
def test_two_starts_at_once_need_two_attempts_and_one_after_the_other_is_counted(
    second: dict[str, object], wrong: set[str], given_up: int
) -> None:
    made, tally = planned(), Tally()
    starts = [start(chunks=3), start(**({"chunks": 3} | second))]
    check(made, evidence_of(made, whole(made), starts=starts), tally)
    assert ({violation.what for violation in tally.violations}, tally.given_up) == (wrong, given_up)


def test_two_different_ends_in_the_lifecycle_are_caught() -> None:
    made = planned()
    (line,) = evidence_of(made, whole(made)).finished
    assert not found(made, whole(made), finished=[line, line])
    assert found(made, whole(made), finished=[line, {**line, "outcome": "error"}]) == {"lifecycle"}


def test_a_start_that_sent_a_delta_counts_and_one_that_was_refused_does_not() -> None:
    assert not had_no_result(start(closed_early=True, chunks=1))
    assert had_no_result(start(closed_early=True, chunks=0))
    assert had_no_result(start(request={"kv_transfer_params": {}}, after=0, chunks=3))
    assert not had_no_result(start(fault="no_done", chunks=3))


def test_a_bad_job_is_buried_once() -> None:
    made = planned("no JSON")
    log = [("1-0", {"type": "started"}), (SEAL, {"type": "error", "code": "invalid_job", "attempt": "1"})]
    letter = {"queue": "default", "job": "1-0"}
    left: dict[str, object] = {
        "tombstone": '{"outcome": "error"}',
        "finished": [{"attempt": "1", "outcome": "error"}],
        "starts": [],
    }
    assert not found(made, log, letters=[letter], **left)
    assert found(made, log, letters=[], **left) == {"dead letters"}
    assert found(made, log, letters=[letter, letter], **left) == {"dead letters"}


def test_a_cancelled_answer_may_be_short_but_not_wrong() -> None:
    made = planned("cancelled")
    (expected,) = made.choices
    begun = {"type": "delta", "content": expected.content[:8], "token_ids": "[]"}
    left: dict[str, object] = {
        "tombstone": '{"outcome": "cancelled"}',
        "finished": [{"attempt": "1", "outcome": "cancelled"}],
    }
    log: Log = [("1-0", {"type": "started"}), ("1-1", begun), (SEAL, {"type": "cancelled"})]
    assert not found(made, log, **left)
    log[1] = ("1-1", begun | {"content": "x" + expected.content[:8]})
    assert found(made, log, **left) == {"different"}


async def test_the_request_by_which_a_worker_tries_a_server_out_is_known_as_such() -> None:
    async with Simulator() as simulator:
        upstream = ServerPool([simulator.url], limits=StreamTimeouts(connect=5, first_token=10, gap=10))
        (circuit,) = (endpoint.circuit for endpoint in upstream.servers)
        circuit.on_late_probe()
        await upstream.wait_available("reciter", caller=Caller(failed_at={circuit}))
        await upstream.aclose()
        assert [is_own_trial(served) for served in simulator.served] == [True]


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [{"role": "user", "content": "Who are you?"}]},
        {"messages": [{"role": "user", "content": "Hi"}] * 2},
        {"max_tokens": 2},
        {"model": "nope"},
        {"temperature": 0},
        {"kv_transfer_params": {"prompt_token_ids": [1]}},
        {"stream_options": None},
    ],
)
def test_no_other_request_is_taken_for_the_workers_own(other: dict[str, object]) -> None:
    assert is_own_trial(start(route="/v1/chat/completions", request=OWN_TRIAL))
    assert not is_own_trial(start(route="/v1/chat/completions", request=OWN_TRIAL | other))
    assert not is_own_trial(start(route="/v1/completions", request=OWN_TRIAL))


def test_no_job_of_the_soak_has_the_workers_own_request() -> None:
    dice = random.Random(1)  # noqa: S311 - no secret
    for number in range(2000):
        assert plan(dice, number, "t").request.get("temperature") is not None
