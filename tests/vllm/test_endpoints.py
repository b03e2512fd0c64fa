"""The circuit of a server and the choice among several, as pure state: the clock is the test's own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.vllm import endpoints
from worker.vllm.endpoints import FAILURES, LONGEST_PAUSE, TRIAL, Circuit, Endpoint, State, best_of
from worker.vllm.errors import NoConnection, UpstreamError, classify, truncated

Burden = Callable[[Endpoint, int], None]
Change = tuple[State, State, str]


class Clock:
    """Monotonic seconds that pass when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def changes() -> list[Change]:
    return []


@pytest.fixture
def circuit(clock: Clock, changes: list[Change]) -> Circuit:
    circuit = Circuit(clock, lambda *change: changes.append(change))
    circuit.probed("")
    changes.clear()
    return circuit


@pytest.fixture
def endpoint(clock: Clock) -> Endpoint:
    endpoint = Endpoint("http://a:1", clock=clock)
    endpoint.circuit.probed("")
    return endpoint


@pytest.fixture
def burden() -> Iterator[Burden]:
    """Let so many requests be for a server."""
    with ExitStack() as requests:

        def add(endpoint: Endpoint, count: int) -> None:
            for _ in range(count):
                requests.enter_context(endpoint.in_use())

        yield add


def fail(circuit: Circuit, times: int = 1, reason: str = "broken") -> None:
    for _ in range(times):
        circuit.failed(circuit.begin(), reason)


def opened(circuit: Circuit) -> Circuit:
    circuit.failed(circuit.begin(), "gone", at_once=True)
    return circuit


def half_open(circuit: Circuit) -> Circuit:
    opened(circuit).probed("")
    return circuit


# Opening


@pytest.mark.parametrize(("trouble", "state"), [("", State.CLOSED), ("upstream_unreachable", State.OPEN)])
def test_a_server_gets_nothing_before_its_first_probe_which_decides(clock: Clock, trouble: str, state: State) -> None:
    circuit = Circuit(clock, lambda *_: None)
    assert (circuit.state, circuit.admits, circuit.wants_probe) == (State.UNKNOWN, False, True)
    circuit.probed(trouble)
    assert (circuit.state, circuit.admits) == (state, not trouble)


def test_one_missing_connection_opens_the_circuit(circuit: Circuit) -> None:
    opened(circuit)
    assert (circuit.state, circuit.admits, circuit.wants_probe) == (State.OPEN, False, True)


def test_failures_in_a_row_open_the_circuit(circuit: Circuit) -> None:
    fail(circuit, FAILURES - 1)
    assert circuit.admits
    fail(circuit)
    assert circuit.state is State.OPEN


def test_a_whole_stream_in_between_starts_the_row_anew(circuit: Circuit) -> None:
    for _ in range(3):
        fail(circuit, FAILURES - 1)
        circuit.succeeded(circuit.begin())
    assert circuit.admits


def test_streams_that_only_begin_do_not_start_the_row_anew(circuit: Circuit) -> None:
    for _ in range(FAILURES):
        run = circuit.begin()
        circuit.began(run)
        circuit.failed(run, "frozen")
    assert circuit.state is State.OPEN


@pytest.mark.parametrize("status", [400, 404, 408, 409, 413, 422, 425, 429])
def test_refusals_are_no_failures(endpoint: Endpoint, status: int) -> None:
    for _ in range(10 * FAILURES):
        endpoint.failed(endpoint.circuit.begin(), classify(status, "no"))
    assert endpoint.circuit.admits


@pytest.mark.parametrize(
    "error",
    [classify(500, "dead"), classify(503, "busy"), truncated("cut"), UpstreamError("gap_timeout", "", retryable=True)],
)
def test_what_is_the_fault_of_the_server_is_a_failure(endpoint: Endpoint, error: UpstreamError) -> None:
    for count in range(FAILURES):
        assert endpoint.circuit.admits, count
        endpoint.failed(endpoint.circuit.begin(), error)
    assert endpoint.away


def test_no_connection_is_enough_where_a_broken_one_is_not(endpoint: Endpoint) -> None:
    endpoint.failed(endpoint.circuit.begin(), UpstreamError("upstream_unreachable", "hung up", retryable=True))
    assert endpoint.circuit.admits
    endpoint.failed(endpoint.circuit.begin(), NoConnection("upstream_unreachable", "refused", retryable=True))
    assert endpoint.away


def test_a_refused_key_is_enough_where_a_forbidden_request_is_not(endpoint: Endpoint) -> None:
    endpoint.failed(endpoint.circuit.begin(), classify(403, "not this"))
    assert (endpoint.away, endpoint.refuses_key) == (False, False)
    endpoint.failed(endpoint.circuit.begin(), classify(401, "not you"))
    assert (endpoint.away, endpoint.refuses_key) == (True, True)


def test_a_server_that_forbids_everything_is_away(endpoint: Endpoint) -> None:
    for _ in range(FAILURES):
        assert endpoint.circuit.admits
        endpoint.failed(endpoint.circuit.begin(), classify(403, "no"))
    assert endpoint.refuses_key


def test_a_server_that_is_away_for_another_reason_does_not_refuse_the_key(endpoint: Endpoint) -> None:
    endpoint.failed(endpoint.circuit.begin(), NoConnection("upstream_unreachable", "refused", retryable=True))
    assert (endpoint.away, endpoint.refuses_key) == (True, False)


# Half open


def test_a_probe_lets_one_request_at_a_time_through(circuit: Circuit) -> None:
    admitted = []
    steps: list[Callable[[], object]] = [
        lambda: opened(circuit).probed("upstream_unreachable"),
        lambda: circuit.probed(""),
        circuit.hold,
        circuit.begin,
    ]
    for step in steps:
        step()
        admitted.append(circuit.admits)
    assert admitted == [False, True, False, False], "what is chosen, and not sent yet, counts too"


def test_the_first_event_of_a_trial_closes_the_circuit_on_probation(circuit: Circuit) -> None:
    run = half_open(circuit).begin()
    circuit.began(run)
    assert circuit.admits
    circuit.failed(run, "frozen")
    assert circuit.state is State.OPEN, "it begins answers and does not end them"


def test_after_a_whole_stream_it_takes_as_many_failures_as_ever(circuit: Circuit) -> None:
    run = half_open(circuit).begin()
    circuit.began(run)
    circuit.succeeded(run)
    fail(circuit, FAILURES - 1)
    assert circuit.admits


def test_every_failed_trial_makes_the_pause_longer_to_a_limit(circuit: Circuit, clock: Clock) -> None:
    pauses = []
    opened(circuit)
    for _ in range(7):
        began = clock.now
        while not circuit.wants_probe:
            clock.now += 1
        pauses.append(clock.now - began)
        circuit.probed("")
        fail(circuit)
    assert pauses == [0, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE]
    clock.now += LONGEST_PAUSE
    circuit.probed("")
    run = circuit.begin()
    circuit.began(run)
    circuit.succeeded(run)
    assert opened(circuit).wants_probe, "all is forgiven"


def test_a_trial_that_says_nothing_gives_its_place_up(circuit: Circuit) -> None:
    run = half_open(circuit).begin()
    circuit.left(run)
    assert (circuit.state, circuit.admits) == (State.HALF_OPEN, True)


@pytest.mark.parametrize("take", [Circuit.hold, Circuit.begin])
def test_a_trial_that_is_not_heard_of_keeps_others_away_for_a_while_only(
    circuit: Circuit, clock: Clock, take: Callable[[Circuit], object]
) -> None:
    take(half_open(circuit))
    clock.now += TRIAL - 0.1
    assert not circuit.admits
    clock.now += 0.1
    assert circuit.admits


def test_the_fate_of_streams_from_before_says_nothing_about_the_server_since(circuit: Circuit) -> None:
    frozen = [circuit.begin() for _ in range(20)]
    half_open(circuit)
    trial = circuit.begin()
    for run in frozen[:10]:
        circuit.failed(run, "gap_timeout")
        circuit.left(run)
    circuit.began(frozen[10])
    circuit.succeeded(frozen[10])
    assert (circuit.state, circuit.admits) == (State.HALF_OPEN, False), "the trial goes on"
    circuit.began(trial)
    for run in frozen[11:]:
        circuit.failed(run, "gap_timeout")
    assert circuit.state is State.CLOSED


def test_a_server_that_answers_while_it_is_held_to_be_away_is_back(circuit: Circuit) -> None:
    circuit.began(opened(circuit).begin())
    assert circuit.admits


def test_every_change_is_told_once_with_its_reason(circuit: Circuit, changes: list[Change]) -> None:
    runs = [circuit.begin() for _ in range(3 * FAILURES)]
    for run in runs:
        circuit.failed(run, "upstream_truncated")
    for trouble in ("upstream_unreachable", "", ""):
        circuit.probed(trouble)
    run = circuit.begin()
    circuit.began(run)
    circuit.began(run)
    circuit.succeeded(run)
    assert changes == [
        (State.CLOSED, State.OPEN, "upstream_truncated"),
        (State.OPEN, State.HALF_OPEN, ""),
        (State.HALF_OPEN, State.CLOSED, ""),
    ]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 20), st.floats(0, 20)), max_size=60))
def test_whatever_happened_a_server_that_answers_gets_requests_again(steps: list[tuple[int, int, float]]) -> None:
    clock = Clock()
    circuit = Circuit(clock, lambda *_: None)
    runs = [circuit.begin()]
    for step, which, passed in steps:
        clock.now += passed
        run = runs[which % len(runs)]
        match step:
            case 0:
                runs.append(circuit.begin())
            case 1:
                circuit.began(run)
            case 2:
                circuit.succeeded(run)
            case 3:
                circuit.failed(run, "x", at_once=which % 2 == 0)
            case 4:
                circuit.left(run)
            case 5:
                circuit.hold()
            case _:
                circuit.probed("" if which % 2 else "x")
    clock.now += LONGEST_PAUSE + TRIAL
    if circuit.wants_probe:
        circuit.probed("")
    assert circuit.admits


# Being busy, and what is served


def test_a_busy_server_is_passed_over_for_as_long_as_it_asks_while_another_may_do(clock: Clock, burden: Burden) -> None:
    one, other = (Endpoint(url, clock=clock) for url in ("http://a:1", "http://b:1"))
    for endpoint in (one, other):
        endpoint.circuit.probed("")
    one.failed(one.circuit.begin(), classify(429, "busy", retry_after=7))
    burden(other, 50)
    assert best_of([one, other], "") is other
    assert best_of([one, other], "", other) is other, "even if it was the last"
    assert best_of([one], "") is one
    clock.now += 7
    assert best_of([one, other], "") is one
    one.failed(one.circuit.begin(), classify(429, "busy"))
    assert best_of([one, other], "") is other
    clock.now += endpoints.BUSY
    assert best_of([one, other], "") is one


def test_a_server_serves_what_it_lists_and_one_that_lists_nothing_may_serve_all(endpoint: Endpoint) -> None:
    assert endpoint.serves("any")
    endpoint.models = frozenset({"small", "large"})
    assert [endpoint.serves(model) for model in ("small", "large", "", "any")] == [True, True, True, False]


def test_the_choice_is_among_those_that_serve_the_model(clock: Clock, burden: Burden) -> None:
    small, large = (Endpoint(url, clock=clock) for url in ("http://a:1", "http://b:1"))
    small.models, large.models = frozenset({"small", "tiny"}), frozenset({"large"})
    burden(large, 9)
    assert best_of([small, large], "large", other_than=large) is large
    with pytest.raises(
        UpstreamError, match=r"^The model `no` does not exist\. Served are: large, small, tiny\.$"
    ) as caught:
        best_of([small, large], "no")
    assert (caught.value.code, caught.value.retryable) == ("model_not_found", False)
    large.models = frozenset()
    assert best_of([small, large], "no") is large


def test_the_choice_is_another_than_the_last_and_then_the_one_with_the_least_to_do(
    clock: Clock, burden: Burden
) -> None:
    servers = [Endpoint(f"http://{name}:1", clock=clock) for name in "abc"]
    for endpoint, in_flight in zip(servers, (2, 0, 1), strict=True):
        burden(endpoint, in_flight)
        endpoint.circuit.probed("")
    assert best_of(servers, "") is servers[1]
    assert best_of(servers, "", servers[1]) is servers[2]
    assert best_of(servers[:1], "", servers[0]) is servers[0]


def test_the_choice_is_among_those_that_are_let_through(clock: Clock, burden: Burden) -> None:
    away, trial, good = (Endpoint(f"http://{name}:1", clock=clock) for name in "abc")
    for endpoint in (away, trial, good):
        endpoint.circuit.probed("")
    opened(away.circuit)
    half_open(trial.circuit)
    burden(good, 1)
    servers = [away, trial, good]
    assert best_of(servers, "") is trial, "or it would never be tried"
    trial.circuit.begin()
    assert best_of(servers, "") is good
    assert best_of(servers, "", good) is good
    assert best_of([away, trial], "") is trial
    assert [endpoint.takes("") for endpoint in servers] == [False, False, True]
    assert [endpoint.away for endpoint in servers] == [True, False, False]


def test_a_server_that_does_not_know_a_model_that_it_listed_is_asked_for_its_list(
    endpoint: Endpoint, clock: Clock
) -> None:
    endpoint.listed = clock()
    endpoint.failed(endpoint.circuit.begin(), classify(404, "The model `x` does not exist."))
    assert endpoint.listed < 0
