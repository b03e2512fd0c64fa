"""How a request continues after a failed try, as a table of decisions."""

from typing import Any

import pytest

from worker.engine.pace import Pace
from worker.engine.tries import FailedTry, Raise, Retry, Tries, after_failure
from worker.vllm.errors import UNAUTHORIZED, NoConnection, UpstreamError, classify

TRIES: dict[str, Any] = {"made": 1, "limit": 3, "next_pause": 0.5}
PACE = Pace(first_retry=0.25, longest_retry=10.0, longest_wait_here=1.0)
BROKEN = UpstreamError("upstream_truncated", "the stream ended", retryable=True)
BAD_REQUEST = UpstreamError("invalid_request", "no", status=400, retryable=False)
NO_MODEL = UpstreamError("model_not_found", "no", status=404, retryable=False, elsewhere=True)
BUSY = classify(429, "later", retry_after=7.0)
DRAINING = classify(500, "cannot schedule new futures after shutdown")
AWAY = NoConnection("upstream_unreachable", "refused", retryable=True)
KEY_REFUSED = UpstreamError(UNAUTHORIZED, "no", status=401, retryable=True)
FORBIDDEN = UpstreamError(UNAUTHORIZED, "no", status=403, retryable=True)


def decide(error: UpstreamError, facts: dict[str, Any]) -> Raise | Retry:
    """The decision on these facts. `made`, `limit` and `next_pause` are those of the tries so far."""
    tries: dict[str, Any] = {name: facts[name] for name in ("made", "limit", "next_pause") if name in facts}
    others = {name: value for name, value in facts.items() if name not in tries}
    return after_failure(FailedTry(error=error, tries=Tries(**TRIES | tries), **others), PACE)


def retry(pause: float, made: int, next_pause: float, *, limit: int = 3, needs_next_attempt: bool = False) -> Retry:
    return Retry(pause, Tries(limit, next_pause, made), needs_next_attempt)


COUNTED = retry(0.5, 1, 1.0)
NOT_COUNTED = retry(0.5, 0, 1.0)


@pytest.mark.parametrize(
    ("error", "facts", "decision"),
    [
        pytest.param(BROKEN, {}, COUNTED, id="a retryable error"),
        pytest.param(BROKEN, {"made": 3}, Raise(), id="the last try"),
        pytest.param(BAD_REQUEST, {}, Raise(), id="an error that is not retryable"),
        pytest.param(BAD_REQUEST, {"another_server_may_answer": True}, Raise(), id="the request is at fault"),
        pytest.param(NO_MODEL, {"another_server_may_answer": True}, NOT_COUNTED, id="another server may answer"),
        pytest.param(
            NO_MODEL, {"another_server_may_answer": True, "made": 3}, retry(0.5, 2, 1.0),
            id="another server may answer after the last try",
        ),
        pytest.param(NO_MODEL, {}, Raise(), id="no other server may answer"),
        pytest.param(AWAY, {"made": 3}, retry(0.5, 2, 1.0), id="no connection"),
        pytest.param(BROKEN, {"was_failed_trial": True, "made": 3}, retry(0.5, 2, 1.0), id="a failed trial"),
        pytest.param(
            BAD_REQUEST, {"was_failed_trial": True}, Raise(), id="a failed trial with an error that is not retryable"
        ),
        pytest.param(KEY_REFUSED, {"made": 3}, retry(0.5, 2, 1.0), id="the worker's key is refused"),
        pytest.param(FORBIDDEN, {}, COUNTED, id="a 403"),
        pytest.param(FORBIDDEN, {"made": 3}, Raise(), id="a 403 at the last try"),
        pytest.param(FORBIDDEN, {"made": 3, "was_allowed": True}, retry(0.5, 2, 1.0), id="a 403 after an answer began"),
        pytest.param(BROKEN, {"made": 3, "was_allowed": True}, Raise(), id="another error after an answer began"),
        pytest.param(FORBIDDEN, {"another_model_should_answer": True}, Raise(), id="a 403 with a fallback"),
        pytest.param(
            KEY_REFUSED, {"another_model_should_answer": True, "was_allowed": True}, Raise(), id="a 401 with a fallback"
        ),
        pytest.param(BROKEN, {"another_model_should_answer": True}, COUNTED, id="another error with a fallback"),
        pytest.param(BUSY, {"made": 3}, retry(0.5, 2, 1.0), id="a full server"),
        pytest.param(BUSY, {"made": 1, "limit": 1}, retry(0.5, 0, 1.0, limit=1), id="a full server at the only try"),
        pytest.param(DRAINING, {"made": 3}, retry(0.5, 2, 1.0), id="a server that is shutting down"),
        pytest.param(BUSY, {"another_model_should_answer": True}, Raise(), id="a full server with a fallback"),
    ],
)  # fmt: skip
def test_whether_a_request_is_tried_again_and_whether_the_failed_try_counts(
    error: UpstreamError, facts: dict[str, Any], decision: Raise | Retry
) -> None:
    assert decide(error, facts) == decision


@pytest.mark.parametrize(
    ("facts", "decision"),
    [
        pytest.param({"needs_next_attempt": True}, retry(0.5, 1, 1.0, needs_next_attempt=True), id="it wrote"),
        pytest.param({"needs_next_attempt": True, "fails_on_interrupt": True}, Raise(), id="it wrote and must end"),
        pytest.param({"fails_on_interrupt": True}, COUNTED, id="it wrote nothing and must end"),
        pytest.param(
            {"needs_next_attempt": True, "has_extended_answer": True, "made": 3, "next_pause": 8.0},
            retry(0.25, 1, 0.5, needs_next_attempt=True),
            id="it added to the answer at the last try",
        ),
        pytest.param({"has_extended_answer": True, "limit": 1}, Raise(), id="it added to the answer at the only try"),
    ],
)  # fmt: skip
def test_what_the_attempt_has_written_decides_whether_and_how_it_continues(
    facts: dict[str, Any], decision: Raise | Retry
) -> None:
    assert decide(BROKEN, facts) == decision


@pytest.mark.parametrize("error", [AWAY, NO_MODEL])
def test_a_try_that_added_to_the_answer_is_the_first_of_a_new_row_even_if_it_would_not_count(
    error: UpstreamError,
) -> None:
    facts: dict[str, Any] = {"another_server_may_answer": True, "has_extended_answer": True}

    assert decide(error, facts | {"made": 3}) == retry(0.25, 1, 0.5)
    assert decide(error, facts | {"limit": 1}) == Raise()


@pytest.mark.parametrize(
    ("error", "facts", "pause", "next_pause"),
    [
        pytest.param(BROKEN, {"next_pause": 0.25}, 0.25, 0.5, id="the first"),
        pytest.param(BROKEN, {"next_pause": 8.0}, 8.0, 10.0, id="up to the longest"),
        pytest.param(BROKEN, {"next_pause": 16.0}, 10.0, 10.0, id="the longest"),
        pytest.param(BROKEN, {"has_room_elsewhere": True}, 0.5, 1.0, id="another server has room"),
    ],
)
def test_each_pause_is_twice_as_long_as_the_last(
    error: UpstreamError, facts: dict[str, Any], pause: float, next_pause: float
) -> None:
    assert decide(error, facts) == retry(pause, 1, next_pause)


@pytest.mark.parametrize(
    ("facts", "pause", "next_pause"),
    [
        pytest.param({"next_pause": 8.0}, 1.0, 10.0, id="up to the longest wait in the process"),
        pytest.param({"has_room_elsewhere": True}, 0.0, 1.0, id="none if another server has room"),
    ],
)
def test_the_pause_after_a_full_server_is_short_since_its_limit_states_when_it_has_room(
    facts: dict[str, Any], pause: float, next_pause: float
) -> None:
    assert decide(BUSY, facts) == retry(pause, 0, next_pause)


def test_the_jitter_is_a_factor_of_the_pause() -> None:
    failed = FailedTry(error=BROKEN, tries=Tries(3, 20.0, 1))

    assert after_failure(failed, PACE, jitter=0.75) == retry(7.5, 1, 10.0)
