"""What errors say of a server, and the choice among several, as pure state: the clock is the test's own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from worker.vllm.errors import NoConnection, UpstreamError, classify, truncated
from worker.vllm.servers.circuit import FAILURES, Caller, ServerRequest
from worker.vllm.servers.server import BUSY, MISSING, Server, best_of

Burden = Callable[[Server, int], None]


class Clock:
    """Monotonic seconds that pass when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def endpoint(clock: Clock) -> Server:
    endpoint = Server("http://a:1", clock=clock)
    endpoint.circuit.on_probe("")
    return endpoint


@pytest.fixture
def burden() -> Iterator[Burden]:
    """Let so many requests be for a server."""
    with ExitStack() as requests:

        def add(endpoint: Server, count: int) -> None:
            for _ in range(count):
                requests.enter_context(endpoint.reserve())

        yield add


def begin(endpoint: Server) -> ServerRequest:
    """A request of a job of its own."""
    return endpoint.circuit.begin(Caller())


def admits(endpoint: Server) -> bool:
    """Whether a job that has not been there is let through."""
    return endpoint.circuit.admits(Caller())


def best(servers: list[Server], other_than: Server | None = None) -> Server:
    """The choice for a job that has not been anywhere."""
    return best_of(servers, Caller(), other_than)


def half_open(endpoint: Server) -> None:
    endpoint.record_failure(begin(endpoint), NoConnection("upstream_unreachable", "refused", retryable=True))
    endpoint.circuit.on_probe("")


# What a failure says


@pytest.mark.parametrize("status", [400, 404, 408, 409, 413, 422, 425, 429])
def test_refusals_are_no_failures(endpoint: Server, status: int) -> None:
    for _ in range(10 * FAILURES):
        endpoint.record_failure(begin(endpoint), classify(status, "no"))
    assert admits(endpoint)


@pytest.mark.parametrize(
    "error",
    [classify(500, "dead"), classify(503, "busy"), truncated("cut"), UpstreamError("gap_timeout", "", retryable=True)],
)
def test_what_is_the_fault_of_the_server_is_a_failure(endpoint: Server, error: UpstreamError) -> None:
    for count in range(FAILURES):
        assert admits(endpoint), count
        endpoint.record_failure(begin(endpoint), error)
    assert endpoint.is_away


def test_no_connection_is_enough_where_a_broken_one_is_not(endpoint: Server) -> None:
    endpoint.record_failure(begin(endpoint), UpstreamError("upstream_unreachable", "hung up", retryable=True))
    assert admits(endpoint)
    endpoint.record_failure(begin(endpoint), NoConnection("upstream_unreachable", "refused", retryable=True))
    assert endpoint.is_away


def test_a_refused_key_is_enough_where_a_refused_request_is_not(endpoint: Server) -> None:
    """C4 and A1."""
    for status in (401, 403):
        endpoint.record_failure(begin(endpoint), classify(status, "not this"))
        assert (endpoint.is_away, endpoint.refuses_key) == (False, False)
    endpoint.record_failure(begin(endpoint), classify(401, "not you"), refuses_key=True)
    assert (endpoint.is_away, endpoint.refuses_key) == (True, True)


def test_a_server_that_forbids_everything_is_away(endpoint: Server) -> None:
    for _ in range(FAILURES):
        assert admits(endpoint)
        endpoint.record_failure(begin(endpoint), classify(403, "no"))
    assert endpoint.refuses_key


def test_a_server_that_is_away_for_another_reason_does_not_refuse_the_key(endpoint: Server) -> None:
    endpoint.record_failure(begin(endpoint), NoConnection("upstream_unreachable", "refused", retryable=True))
    assert (endpoint.is_away, endpoint.refuses_key) == (True, False)


# Being busy, and what is served


def test_a_busy_server_is_passed_over_for_as_long_as_it_asks_while_another_may_do(clock: Clock, burden: Burden) -> None:
    one, other = (Server(url, clock=clock) for url in ("http://a:1", "http://b:1"))
    for endpoint in (one, other):
        endpoint.circuit.on_probe("")
    one.record_failure(begin(one), classify(429, "busy", retry_after=7))
    burden(other, 50)
    assert best([one, other]) is other
    assert best([one, other], other) is other, "even if it was the last"
    assert best([one]) is one
    clock.now += 7
    assert best([one, other]) is one
    one.record_failure(begin(one), classify(429, "busy"))
    assert best([one, other]) is other
    clock.now += BUSY
    assert best([one, other]) is one


def test_a_server_serves_what_it_lists_and_one_that_lists_nothing_may_serve_all(endpoint: Server) -> None:
    assert endpoint.serves("any")
    endpoint.models = frozenset({"small", "large"})
    assert [endpoint.serves(model) for model in ("small", "large", "", "any")] == [True, True, True, False]


def test_what_a_server_does_not_know_is_remembered_for_a_minute_or_until_it_lists_it(
    endpoint: Server, clock: Clock
) -> None:
    """A11."""
    serves = []
    steps: list[Callable[[], object]] = [
        lambda: endpoint.record_missing("x", Caller()),
        lambda: setattr(clock, "now", clock.now + MISSING),
        lambda: endpoint.record_missing("x", Caller()),
        lambda: endpoint.record_models(["x"]),
    ]
    for step in steps:
        step()
        serves.append(endpoint.serves("x"))
    assert serves == [False, True, False, True]
    assert endpoint.serves("")


def test_a_model_that_a_server_lists_is_not_taken_away_by_one_job(endpoint: Server, clock: Clock) -> None:
    """A1 and A11. Its 404 may be about an image; the list is asked for again, and decides."""
    endpoint.record_models(["x"])
    endpoint.listed_at = clock()
    caller = Caller()
    for _ in range(2 * FAILURES):
        endpoint.record_missing("x", caller)
    assert endpoint.listed_at < 0
    assert endpoint.serves("x")
    endpoint.record_models(["y"])
    assert not endpoint.serves("x")


@pytest.mark.parametrize("between", [lambda it: it.record_answer("x"), lambda it: it.record_models(["x"])])
def test_a_model_that_a_server_lists_is_taken_away_by_many_jobs_in_a_row(
    endpoint: Server, between: Callable[[Server], None]
) -> None:
    """A1 and A11."""
    endpoint.record_models(["x"])
    for _ in range(3):
        for _ in range(FAILURES - 1):
            endpoint.record_missing("x", Caller())
        between(endpoint)
    assert endpoint.serves("x")
    for _ in range(FAILURES):
        endpoint.record_missing("x", Caller())
    assert not endpoint.serves("x")


def test_a_name_that_a_server_answers_to_though_it_does_not_list_it_is_served(endpoint: Server, clock: Clock) -> None:
    """A11. Such as `llama3` for `llama3:latest`."""
    endpoint.record_models(["llama3:latest"])
    assert not endpoint.serves("llama3")
    endpoint.record_answer("llama3")
    clock.now += 1e6
    endpoint.record_models(["llama3:latest"])
    assert endpoint.serves("llama3")
    endpoint.record_missing("llama3", Caller())
    assert not endpoint.serves("llama3")


def test_a_server_that_lists_nothing_is_asked_for_any_model_whatever_it_has_answered() -> None:
    """A11. Or the first of several to be asked would get all requests."""
    endpoint = Server("http://a:1")
    endpoint.record_answer("x")
    assert "x" not in endpoint.unlisted_models
    assert endpoint.serves("y")


def test_the_choice_is_another_than_the_last_and_then_the_one_with_the_least_to_do(
    clock: Clock, burden: Burden
) -> None:
    servers = [Server(f"http://{name}:1", clock=clock) for name in "abc"]
    for endpoint, in_flight in zip(servers, (2, 0, 1), strict=True):
        burden(endpoint, in_flight)
        endpoint.circuit.on_probe("")
    assert best(servers) is servers[1]
    assert best(servers, servers[1]) is servers[2]
    assert best(servers[:1], servers[0]) is servers[0]


def test_the_choice_is_another_than_those_where_the_job_has_failed(clock: Clock, burden: Burden) -> None:
    """A1."""
    servers = [Server(f"http://{name}:1", clock=clock) for name in "abc"]
    caller = Caller()
    for endpoint in servers:
        endpoint.circuit.on_probe("")
    for endpoint in servers[:2]:
        endpoint.record_failure(endpoint.circuit.begin(caller), classify(500, "no"))
    burden(servers[2], 9)
    assert best_of(servers, caller, servers[1]) is servers[2]
    servers[2].record_failure(endpoint.circuit.begin(caller), classify(500, "no"))
    assert best_of(servers, caller, servers[1]) is servers[0]


def test_a_pause_between_trials_is_for_jobs_that_can_go_elsewhere(clock: Clock) -> None:
    """A1."""
    resting, other = (Server(f"http://{name}:1", clock=clock) for name in "ab")
    for endpoint in (resting, other):
        endpoint.circuit.on_probe("")
    for _ in range(2):
        half_open(resting)
    other.record_failure(begin(other), classify(429, "busy"))
    assert best([resting, other]) is other
    assert resting.circuit.admits(Caller(), last_resort=True)
    half_open(other)
    other.circuit.reserve_trial()
    assert best([resting, other]) is resting


def test_the_choice_is_among_those_that_are_let_through(clock: Clock, burden: Burden) -> None:
    away, trial, good = (Server(f"http://{name}:1", clock=clock) for name in "abc")
    for endpoint in (away, trial, good):
        endpoint.circuit.on_probe("")
    away.record_failure(begin(away), NoConnection("upstream_unreachable", "refused", retryable=True))
    half_open(trial)
    burden(good, 1)
    servers = [away, trial, good]
    assert best(servers) is trial, "or it would never be tried"
    begin(trial)
    assert best(servers) is good
    assert best(servers, good) is good
    assert best([away, trial]) is trial
    assert [endpoint.circuit.admits(Caller()) for endpoint in servers] == [False, False, True]
    assert [endpoint.is_away for endpoint in servers] == [True, False, False]
