"""The circuit of a server, as pure state with a clock of the test."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.vllm.servers.circuit import (
    FAILURES,
    Caller,
    Circuit,
    CircuitState,
    ServerRequest,
)
from worker.vllm.servers.pace import ServerPace

PACE = ServerPace()

Change = tuple[CircuitState, CircuitState, str]


class Clock:
    """Monotonic seconds that pass only when the test adds some."""

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
    circuit.on_probe("")
    changes.clear()
    return circuit


def begin(circuit: Circuit) -> ServerRequest:
    """A request of a job of its own."""
    return circuit.begin(Caller())


def admits(circuit: Circuit) -> bool:
    """Whether the circuit admits a job that has not been here."""
    return circuit.admits(Caller())


def fail(circuit: Circuit, times: int = 1, reason: str = "broken") -> None:
    """Let this many jobs fail."""
    for _ in range(times):
        circuit.on_failure(begin(circuit), reason)


def opened(circuit: Circuit) -> Circuit:
    circuit.on_failure(begin(circuit), "gone", at_once=True)
    return circuit


def half_open(circuit: Circuit) -> Circuit:
    opened(circuit).on_probe("")
    return circuit


def failed_here(circuit: Circuit) -> Caller:
    """A job that has failed at the server, as others have."""
    caller = Caller()
    circuit.on_failure(circuit.begin(caller), "broken")
    fail(circuit, FAILURES - 1)
    circuit.on_probe("")
    return caller


# Opening


@pytest.mark.parametrize(("trouble", "state"), [("", CircuitState.CLOSED), ("upstream_unreachable", CircuitState.OPEN)])
def test_a_server_gets_no_request_before_its_first_probe(clock: Clock, trouble: str, state: CircuitState) -> None:
    circuit = Circuit(clock, lambda *_: None)
    assert (circuit.state, admits(circuit), circuit.wants_probe) == (CircuitState.UNKNOWN, False, True)
    circuit.on_probe(trouble)
    assert (circuit.state, admits(circuit)) == (state, not trouble)


def test_one_failure_to_connect_opens_the_circuit(circuit: Circuit) -> None:
    opened(circuit)
    assert (circuit.state, admits(circuit), circuit.wants_probe) == (CircuitState.OPEN, False, True)


def test_failures_in_a_row_open_the_circuit(circuit: Circuit) -> None:
    fail(circuit, FAILURES - 1)
    assert admits(circuit)
    fail(circuit)
    assert circuit.state is CircuitState.OPEN


def test_a_whole_stream_resets_the_count_of_failures(circuit: Circuit) -> None:
    for _ in range(3):
        fail(circuit, FAILURES - 1)
        circuit.on_success(begin(circuit))
    assert admits(circuit)


def test_streams_that_only_begin_do_not_reset_the_count_of_failures(circuit: Circuit) -> None:
    for _ in range(FAILURES):
        run = begin(circuit)
        circuit.on_first_event(run)
        circuit.on_failure(run, "frozen")
    assert circuit.state is CircuitState.OPEN


# Whose failures count


def test_one_job_cannot_open_the_circuit_however_often_it_fails(circuit: Circuit) -> None:
    caller = Caller()
    for _ in range(10 * FAILURES):
        circuit.on_failure(circuit.begin(caller), "broken")
    assert admits(circuit)
    fail(circuit, FAILURES - 2)
    assert admits(circuit)
    fail(circuit)
    assert circuit.state is CircuitState.OPEN


def test_an_answer_that_begins_outweighs_only_failures_before_an_answer(circuit: Circuit) -> None:
    """Good answers may take minutes, and bad jobs fail within a moment."""
    for _ in range(FAILURES):
        fail(circuit, FAILURES - 1)
        circuit.on_first_event(begin(circuit))
    assert admits(circuit)
    for _ in range(FAILURES - 1):
        run = begin(circuit)
        circuit.on_first_event(run)
        circuit.on_failure(run, "broke off")
    fail(circuit)
    assert circuit.state is CircuitState.OPEN


def test_a_job_that_has_failed_is_not_a_trial(circuit: Circuit) -> None:
    """The job waits for the trial of another."""
    bad = failed_here(circuit)
    assert (circuit.state, circuit.admits(bad, last_resort=True), admits(circuit)) == (
        CircuitState.HALF_OPEN,
        False,
        True,
    )
    circuit.on_first_event(begin(circuit))
    assert circuit.admits(bad)


def test_a_job_that_had_failed_and_breaks_off_again_does_not_end_the_probation(circuit: Circuit) -> None:
    bad = failed_here(circuit)
    circuit.on_first_event(begin(circuit))
    run = circuit.begin(bad)
    circuit.on_first_event(run)
    circuit.on_failure(run, "broke off")
    assert admits(circuit)
    run = begin(circuit)
    circuit.on_first_event(run)
    circuit.on_failure(run, "broke off")
    assert circuit.state is CircuitState.OPEN


def test_a_job_whose_request_was_not_let_in_has_not_failed(circuit: Circuit) -> None:
    """Every job that waits for a server that was away may be the trial."""
    caller = Caller()
    circuit.on_failure(circuit.begin(caller), "refused", at_once=True)
    circuit.on_probe("")
    assert circuit.admits(caller)


def test_a_job_that_fails_after_the_circuit_opened_counts_as_failed(circuit: Circuit) -> None:
    """Bad jobs that come together fail together."""
    caller = Caller()
    run = circuit.begin(caller)
    half_open(circuit)
    circuit.on_failure(run, "broken")
    assert (circuit.admits(caller), admits(circuit)) == (False, True)


def test_after_a_failure_the_server_is_probed_which_may_open_the_circuit(circuit: Circuit) -> None:
    """A server that reports itself away gets no requests before `FAILURES` jobs have failed."""
    wanted = [circuit.wants_probe]
    fail(circuit)
    wanted.append(circuit.wants_probe)
    circuit.on_probe("")
    wanted.append(circuit.wants_probe)
    assert wanted == [False, True, False]
    fail(circuit)
    circuit.on_probe("health_503")
    assert (circuit.state, circuit.reason) == (CircuitState.OPEN, "health_503")


# Half open


def test_after_a_good_probe_one_request_at_a_time_goes_through(circuit: Circuit) -> None:
    admitted = []
    steps: list[Callable[[], object]] = [
        lambda: opened(circuit).on_probe("upstream_unreachable"),
        lambda: circuit.on_probe(""),
        circuit.reserve_trial,
        lambda: begin(circuit),
    ]
    for step in steps:
        step()
        admitted.append(admits(circuit))
    assert admitted == [False, True, False, False], "what is chosen, and not sent yet, counts too"


def test_the_first_event_of_a_trial_closes_the_circuit_on_probation(circuit: Circuit) -> None:
    run = begin(half_open(circuit))
    circuit.on_first_event(run)
    assert admits(circuit)
    circuit.on_failure(run, "frozen")
    assert circuit.state is CircuitState.OPEN, "it begins answers and does not end them"


def test_a_whole_stream_ends_the_probation(circuit: Circuit) -> None:
    run = begin(half_open(circuit))
    circuit.on_first_event(run)
    circuit.on_success(run)
    fail(circuit, FAILURES - 1)
    assert admits(circuit)


def pauses_of(clock: Clock, is_over: Callable[[], bool], then: Callable[[], object]) -> list[float]:
    """The lengths of seven pauses."""
    pauses = []
    for _ in range(7):
        began = clock.now
        while not is_over():
            clock.now += 1
        pauses.append(clock.now - began)
        then()
    return pauses


PAUSES = [0, 2, 4, 8, 16, PACE.longest_pause, PACE.longest_pause]


def whole(circuit: Circuit) -> None:
    run = begin(circuit)
    circuit.on_first_event(run)
    circuit.on_success(run)


def test_each_failure_to_connect_makes_the_pause_before_a_probe_longer(circuit: Circuit, clock: Clock) -> None:
    def again() -> None:
        circuit.on_probe("")
        opened(circuit)

    assert pauses_of(clock, lambda: opened(circuit).wants_probe, again) == PAUSES
    clock.now += PACE.longest_pause
    circuit.on_probe("")
    whole(circuit)
    assert opened(circuit).wants_probe, "all is forgiven"


def test_each_failed_trial_makes_the_pause_longer_for_jobs_that_can_go_elsewhere(
    circuit: Circuit, clock: Clock
) -> None:
    """A job that can go nowhere else does not wait for the pause."""
    fail(circuit, FAILURES)
    assert circuit.wants_probe
    circuit.on_probe("")

    def trial() -> None:
        assert circuit.admits(Caller(), last_resort=True)
        run = begin(circuit)
        circuit.on_failure(run, "broken")
        circuit.on_end(run)
        assert circuit.admits(Caller(), last_resort=True)

    assert pauses_of(clock, lambda: admits(circuit), trial) == PAUSES
    assert (circuit.state, admits(circuit)) == (CircuitState.HALF_OPEN, False)
    whole(circuit)
    fail(circuit, FAILURES)
    circuit.on_probe("")
    assert admits(circuit), "all is forgiven"


def test_each_failed_trial_of_the_worker_itself_makes_its_pause_longer(circuit: Circuit, clock: Clock) -> None:
    """The worker makes the trial while a job waits that has failed at the server."""
    waiting = failed_here(circuit)

    def trial() -> None:
        run = circuit.begin(Caller(is_job=False))
        assert not circuit.wants_trial(waiting), "one at a time"
        circuit.on_failure(run, "broken")
        circuit.on_end(run)

    assert not circuit.wants_trial(Caller()), "such a job is a trial itself"
    assert pauses_of(clock, lambda: circuit.wants_trial(waiting), trial) == PAUSES
    clock.now += PACE.longest_pause
    run = circuit.begin(Caller(is_job=False))
    circuit.on_first_event(run)
    assert circuit.state is CircuitState.HALF_OPEN, "it is short, and must come whole"
    circuit.on_success(run)
    assert circuit.admits(waiting)


def test_a_trial_without_a_result_lets_another_request_be_the_trial(circuit: Circuit) -> None:
    run = begin(half_open(circuit))
    circuit.on_end(run)
    assert (circuit.state, admits(circuit)) == (CircuitState.HALF_OPEN, True)


@pytest.mark.parametrize("take", [Circuit.reserve_trial, begin])
def test_a_silent_trial_keeps_other_requests_away_for_a_limited_time(
    circuit: Circuit, clock: Clock, take: Callable[[Circuit], object]
) -> None:
    take(half_open(circuit))
    clock.now += PACE.trial - 0.1
    assert not admits(circuit)
    clock.now += 0.1
    assert admits(circuit)


def test_streams_from_before_the_circuit_opened_do_not_count(circuit: Circuit) -> None:
    frozen = [begin(circuit) for _ in range(20)]
    half_open(circuit)
    trial = begin(circuit)
    for run in frozen[:10]:
        circuit.on_failure(run, "gap_timeout")
        circuit.on_end(run)
    circuit.on_success(frozen[10])
    assert (circuit.state, admits(circuit)) == (CircuitState.HALF_OPEN, False), "the trial goes on"
    circuit.on_first_event(trial)
    for run in frozen[11:]:
        circuit.on_failure(run, "gap_timeout")
    assert circuit.state is CircuitState.CLOSED


def test_a_server_whose_first_probe_is_late_is_tried_and_probed_again(clock: Clock) -> None:
    """One request tries it, until its first event or a good probe."""
    circuit = Circuit(clock, lambda *_: None)
    circuit.on_late_probe()
    assert (admits(circuit), circuit.wants_probe) == (True, True)
    run = begin(circuit)
    clock.now += PACE.trial
    assert not admits(circuit), "its queue is long"
    circuit.on_first_event(run)
    assert (admits(circuit), circuit.state, circuit.wants_probe) == (True, CircuitState.CLOSED, False)


@pytest.mark.parametrize(("trouble", "state"), [("", CircuitState.CLOSED), ("health_503", CircuitState.OPEN)])
@pytest.mark.parametrize("late", [1, 2])
def test_a_good_probe_after_a_late_one_counts_like_a_good_first_probe(
    clock: Clock, trouble: str, state: CircuitState, late: int
) -> None:
    """A new server whose health took five seconds got one request at a time for up to a minute."""
    circuit = Circuit(clock, lambda *_: None)
    for _ in range(late):
        circuit.on_late_probe()
        begin(circuit)
    circuit.on_probe(trouble)
    assert (circuit.state, admits(circuit)) == (state, not trouble)
    assert circuit.wants_probe is bool(trouble)


@pytest.mark.parametrize("open_it", [opened, lambda circuit: fail(circuit, FAILURES)])
def test_a_server_that_is_away_is_tried_once_a_probe_is_late(
    circuit: Circuit, open_it: Callable[[Circuit], object]
) -> None:
    """An accepted connection is enough for a trial. A frozen server costs no more than the one request."""
    open_it(circuit)
    circuit.on_late_probe()
    assert (admits(circuit), circuit.wants_probe) == (True, True)
    fail(circuit)
    assert circuit.state is CircuitState.OPEN


def test_a_good_probe_after_a_late_one_shortens_the_trial_of_a_server_that_was_away(
    circuit: Circuit, clock: Clock
) -> None:
    """The trial keeps others away for the usual time. Without the good probe, the server's queue may be long."""
    opened(circuit).on_late_probe()
    begin(circuit)
    clock.now += PACE.trial - 0.1
    circuit.on_probe("")
    assert (circuit.state, admits(circuit)) == (CircuitState.HALF_OPEN, False)
    clock.now += 0.1
    assert admits(circuit)


def test_a_late_probe_does_not_open_the_circuit(circuit: Circuit) -> None:
    """Not after a failure either, which alone shows nothing."""
    fail(circuit)
    circuit.on_late_probe()
    assert (circuit.state, circuit.wants_probe) == (CircuitState.CLOSED, False)


def test_an_answer_to_an_old_request_that_begins_now_counts_as_a_trial(circuit: Circuit) -> None:
    """Good jobs are running while bad ones fail. A server that shuts down may end its answers, too."""
    runs = [begin(circuit) for _ in range(3)]
    opened(circuit)
    circuit.on_first_event(runs[0])
    assert circuit.state is CircuitState.OPEN
    circuit.on_probe("")
    circuit.on_first_event(runs[1])
    assert admits(circuit)
    circuit.on_failure(runs[1], "broke off")
    assert admits(circuit)


def test_an_answer_of_a_server_that_counts_as_away_closes_the_circuit(circuit: Circuit) -> None:
    circuit.on_first_event(begin(opened(circuit)))
    assert admits(circuit)


def test_every_change_is_reported_once_with_its_reason(circuit: Circuit, changes: list[Change]) -> None:
    runs = [begin(circuit) for _ in range(3 * FAILURES)]
    for run in runs:
        circuit.on_failure(run, "upstream_truncated")
    for trouble in ("upstream_unreachable", "", ""):
        circuit.on_probe(trouble)
    run = begin(circuit)
    circuit.on_first_event(run)
    circuit.on_first_event(run)
    circuit.on_success(run)
    assert changes == [
        (CircuitState.CLOSED, CircuitState.OPEN, "upstream_truncated"),
        (CircuitState.OPEN, CircuitState.HALF_OPEN, ""),
        (CircuitState.HALF_OPEN, CircuitState.CLOSED, ""),
    ]


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 20), st.floats(0, 20)), max_size=60))
def test_a_server_that_answers_gets_requests_again_whatever_happened(steps: list[tuple[int, int, float]]) -> None:
    clock = Clock()
    circuit = Circuit(clock, lambda *_: None)
    callers = [Caller() for _ in range(4)]
    runs = [circuit.begin(callers[0])]
    for step, which, passed in steps:
        clock.now += passed
        run = runs[which % len(runs)]
        match step:
            case 0:
                runs.append(circuit.begin(callers[which % 4]))
            case 1:
                circuit.on_first_event(run)
            case 2:
                circuit.on_success(run)
            case 3:
                circuit.on_failure(run, "x", at_once=which % 2 == 0)
            case 4:
                circuit.on_end(run)
            case 5:
                circuit.reserve_trial()
            case 6:
                circuit.on_late_probe()
            case _:
                circuit.on_probe("" if which % 2 else "x")
    clock.now += PACE.longest_pause + PACE.late_trial
    if circuit.wants_probe:
        circuit.on_probe("")
    assert admits(circuit)
    assert all(circuit.admits(caller) or circuit.wants_trial(caller) for caller in callers)
