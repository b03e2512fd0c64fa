"""Errors that count against a server, and the choice of a server, as pure state with a clock of the test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from worker.telemetry.events import Event, Failing, Recovered
from worker.vllm.errors import NoConnection, UpstreamError, classify, truncated
from worker.vllm.servers.circuit import FAILURES, Caller, ServerRequest
from worker.vllm.servers.reports import CircuitReports
from worker.vllm.servers.server import MISSING, REFUSES_ALL_AFTER, Server, best_server
from worker.vllm.stream.watchdog import StreamTimeouts, StreamWatchdog

Burden = Callable[[Server, int], None]


class Clock:
    """Monotonic seconds that pass when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> Server:
    server = Server("http://a:1", clock=clock)
    server.circuit.on_probe("")
    return server


@pytest.fixture
def burden() -> Iterator[Burden]:
    """Reserve a server for this many requests."""
    with ExitStack() as requests:

        def add(server: Server, count: int) -> None:
            for _ in range(count):
                requests.enter_context(server.reserve())

        yield add


def begin(server: Server) -> ServerRequest:
    """A request of a job of its own."""
    return server.circuit.begin(Caller())


def admits(server: Server) -> bool:
    """Whether the server admits a job that has not been there."""
    return server.circuit.admits(Caller())


def best(servers: list[Server], other_than: Server | None = None) -> Server:
    """The choice for a new job."""
    return best_server(servers, Caller(), other_than)


def half_open(server: Server) -> None:
    server.record_failure(begin(server), NoConnection("upstream_unreachable", "refused", retryable=True))
    server.circuit.on_probe("")


# What a failure says


@pytest.mark.parametrize("status", [400, 404, 408, 409, 413, 422, 425, 429])
def test_refusals_are_not_failures(server: Server, status: int) -> None:
    for _ in range(10 * FAILURES):
        server.record_failure(begin(server), classify(status, "no"))
    assert admits(server)


@pytest.mark.parametrize(
    "error",
    [classify(500, "dead"), classify(504, "slow"), truncated("cut"), UpstreamError("gap_timeout", "", retryable=True)],
)
def test_faults_of_the_server_are_failures(server: Server, error: UpstreamError) -> None:
    for count in range(FAILURES):
        assert admits(server), count
        server.record_failure(begin(server), error)
    assert server.is_away


def test_one_failure_to_connect_is_enough_and_one_broken_connection_is_not(server: Server) -> None:
    server.record_failure(begin(server), UpstreamError("upstream_unreachable", "hung up", retryable=True))
    assert admits(server)
    server.record_failure(begin(server), NoConnection("upstream_unreachable", "refused", retryable=True))
    assert server.is_away


def test_one_refused_key_is_enough_and_one_refused_request_is_not(server: Server) -> None:
    for status in (401, 403):
        server.record_failure(begin(server), classify(status, "not this"))
        assert (server.is_away, server.refuses_key) == (False, False)
    server.record_failure(begin(server), classify(401, "not you"), refuses_key=True)
    assert (server.is_away, server.refuses_key) == (True, True)


def test_a_server_that_forbids_everything_is_away(server: Server) -> None:
    for _ in range(FAILURES):
        assert admits(server)
        server.record_failure(begin(server), classify(403, "no"))
    assert server.refuses_key


def test_a_server_that_is_away_for_another_reason_does_not_refuse_the_key(server: Server) -> None:
    server.record_failure(begin(server), NoConnection("upstream_unreachable", "refused", retryable=True))
    assert (server.is_away, server.refuses_key) == (True, False)


# Being busy, and what is served


@pytest.mark.parametrize(
    "error",
    [
        classify(429, "slow down"),
        classify(503, "The engine is currently busy and cannot accept new requests."),
        classify(500, "Model is overloaded"),
    ],
)
def test_a_full_server_is_never_away_and_its_limit_shrinks(
    server: Server, burden: Burden, error: UpstreamError
) -> None:
    burden(server, 4)
    for _ in range(10 * FAILURES):
        server.record_failure(begin(server), error)
    assert not server.is_away
    assert admits(server)
    assert (server.limit.value < 4, server.room) == (True, 0)


def test_a_server_is_paused_for_the_time_it_asks(clock: Clock) -> None:
    one, other = (Server(url, clock=clock) for url in ("http://a:1", "http://b:1"))
    for server in (one, other):
        server.circuit.on_probe("")
    one.record_failure(begin(one), classify(429, "busy", retry_after=7))
    waits_for_its_reader = Caller(may_exceed_limit=True)
    assert (one.room, one.has_room_for(Caller()), one.has_room_for(waits_for_its_reader)) == (0, False, False)
    assert best([one, other]) is other
    assert best([one, other], other) is other, "even if it was the last"
    assert best([one]) is one
    clock.now += 7
    assert one.room > 0
    assert best([one, other], other) is one


def test_only_an_interrupted_answer_exceeds_the_limit_until_the_server_refuses_it(
    server: Server, burden: Burden
) -> None:
    burden(server, server.room)
    interrupted = Caller(may_exceed_limit=True)
    assert (server.room, server.has_room_for(Caller()), server.has_room_for(interrupted)) == (0, False, True)
    server.record_failure(server.circuit.begin(interrupted), classify(503, "busy"))
    assert not server.has_room_for(interrupted)


def test_a_job_that_failed_at_one_server_waits_for_another_that_is_full(clock: Clock, burden: Burden) -> None:
    """A server that fails at once always has room."""
    failing, full = (Server(url, clock=clock) for url in ("http://a:1", "http://b:1"))
    caller = Caller()
    for server in (failing, full):
        server.circuit.on_probe("")
    failing.record_failure(failing.circuit.begin(caller), classify(500, "no"))
    burden(full, full.room)
    assert best_server([failing, full], caller) is full
    assert best([failing, full]) is failing


def test_jobs_that_failed_at_a_server_leave_one_place_to_the_others(server: Server, burden: Burden) -> None:
    failed = Caller()
    server.record_failure(server.circuit.begin(failed), classify(401, "not this request"))
    burden(server, server.room - 2)
    assert server.has_room_for(failed)
    burden(server, 1)
    assert (server.room, server.has_room_for(failed), server.has_room_for(Caller())) == (1, False, True)


def test_a_503_lets_a_probe_decide_whether_a_server_is_behind_the_gateway(server: Server) -> None:
    server.record_failure(begin(server), classify(429, "slow down"))
    assert not server.circuit.wants_probe
    server.record_failure(begin(server), classify(503, "no healthy upstream"))
    assert (server.is_away, server.circuit.wants_probe) == (False, True)
    server.circuit.on_probe("health_503")
    assert server.is_away


def test_a_half_open_server_has_room_for_one_trial(server: Server) -> None:
    half_open(server)
    assert server.room == 1
    request = begin(server)
    assert server.room == 0
    server.circuit.on_end(request)
    assert server.room == 1


def test_a_server_serves_what_it_lists_and_one_that_lists_nothing_may_serve_all(server: Server) -> None:
    assert server.serves("any")
    server.models = frozenset({"small", "large"})
    assert [server.serves(model) for model in ("small", "large", "", "any")] == [True, True, True, False]


def test_a_missing_model_is_remembered_for_a_minute_or_until_the_server_lists_it(server: Server, clock: Clock) -> None:
    serves = []
    steps: list[Callable[[], object]] = [
        lambda: server.record_missing("x", Caller()),
        lambda: setattr(clock, "now", clock.now + MISSING),
        lambda: server.record_missing("x", Caller()),
        lambda: server.record_models(["x"]),
    ]
    for step in steps:
        step()
        serves.append(server.serves("x"))
    assert serves == [False, True, False, True]
    assert server.serves("")


def test_one_job_cannot_make_a_listed_model_missing(server: Server, clock: Clock) -> None:
    """The 404 may be about an image. The list is fetched again, and decides."""
    server.record_models(["x"])
    server.listed_at = clock()
    caller = Caller()
    for _ in range(2 * FAILURES):
        server.record_missing("x", caller)
    assert server.listed_at < 0
    assert server.serves("x")
    server.record_models(["y"])
    assert not server.serves("x")


@pytest.mark.parametrize("between", [lambda it: it.record_answer("x"), lambda it: it.record_models(["x"])])
def test_many_jobs_in_a_row_make_a_listed_model_missing(server: Server, between: Callable[[Server], None]) -> None:
    server.record_models(["x"])
    for _ in range(3):
        for _ in range(FAILURES - 1):
            server.record_missing("x", Caller())
        between(server)
    assert server.serves("x")
    for _ in range(FAILURES):
        server.record_missing("x", Caller())
    assert not server.serves("x")


def test_an_unlisted_name_that_a_server_answers_to_is_served(server: Server, clock: Clock) -> None:
    """Such as `llama3` for `llama3:latest`."""
    server.record_models(["llama3:latest"])
    assert not server.serves("llama3")
    server.record_answer("llama3")
    clock.now += 1e6
    server.record_models(["llama3:latest"])
    assert server.serves("llama3")
    server.record_missing("llama3", Caller())
    assert not server.serves("llama3")


def test_a_server_without_a_list_gets_requests_for_any_model() -> None:
    """Otherwise the first server to answer would get all requests."""
    server = Server("http://a:1")
    server.record_answer("x")
    assert "x" not in server.unlisted_models
    assert server.serves("y")


def test_the_choice_is_not_the_last_server_and_then_the_one_with_the_fewest_requests(
    clock: Clock, burden: Burden
) -> None:
    servers = [Server(f"http://{name}:1", clock=clock) for name in "abc"]
    for server, in_flight in zip(servers, (2, 0, 1), strict=True):
        burden(server, in_flight)
        server.circuit.on_probe("")
    assert best(servers) is servers[1]
    assert best(servers, servers[1]) is servers[2]
    assert best(servers[:1], servers[0]) is servers[0]


def test_the_choice_is_not_a_server_where_the_job_has_failed(clock: Clock, burden: Burden) -> None:
    servers = [Server(f"http://{name}:1", clock=clock) for name in "abc"]
    caller = Caller()
    for server in servers:
        server.circuit.on_probe("")
    for server in servers[:2]:
        server.record_failure(server.circuit.begin(caller), classify(500, "no"))
    burden(servers[2], 9)
    assert best_server(servers, caller, servers[1]) is servers[2]
    servers[2].record_failure(server.circuit.begin(caller), classify(500, "no"))
    assert best_server(servers, caller, servers[1]) is servers[0]


def test_a_pause_between_trials_is_for_jobs_that_can_go_elsewhere(clock: Clock) -> None:
    resting, other = (Server(f"http://{name}:1", clock=clock) for name in "ab")
    for server in (resting, other):
        server.circuit.on_probe("")
    for _ in range(2):
        half_open(resting)
    other.record_failure(begin(other), classify(429, "busy"))
    assert best([resting, other]) is other, "it has no room now, but works"
    assert resting.circuit.admits(Caller(), last_resort=True)
    half_open(other)
    other.circuit.reserve_trial()
    assert best([resting, other]) is resting


def test_the_choice_is_among_the_servers_that_admit_the_job(clock: Clock, burden: Burden) -> None:
    away, trial, good = (Server(f"http://{name}:1", clock=clock) for name in "abc")
    for server in (away, trial, good):
        server.circuit.on_probe("")
    away.record_failure(begin(away), NoConnection("upstream_unreachable", "refused", retryable=True))
    half_open(trial)
    burden(good, 1)
    servers = [away, trial, good]
    assert best(servers) is trial, "or it would never be tried"
    begin(trial)
    assert best(servers) is good
    assert best(servers, good) is good
    assert best([away, trial]) is trial
    assert [server.circuit.admits(Caller()) for server in servers] == [False, False, True]
    assert [server.is_away for server in servers] == [True, False, False]


def test_a_half_open_server_that_is_full_gets_no_request_beyond_its_limit(
    server: Server, clock: Clock, burden: Burden
) -> None:
    """Its old streams go on. Without the limit, each refusal would let the next request go there at once."""
    burden(server, 10)
    for _ in range(FAILURES):
        server.record_failure(begin(server), truncated("cut"))
    clock.now += 10
    server.circuit.on_probe("")
    caller = Caller()
    sent = server.circuit.begin(caller)
    burden(server, 1)
    server.record_failure(sent, classify(503, "full"))
    server.circuit.on_end(sent)
    assert (server.has_room_for(caller), server.has_room_for(Caller()), server.room) == (False, False, 0)


@pytest.mark.parametrize("error", [classify(503, "full"), classify(500, "dead"), truncated("cut")])
def test_a_draining_server_that_gives_another_error_is_not_asked_more_often(
    server: Server, clock: Clock, error: UpstreamError
) -> None:
    server.record_failure(begin(server), classify(500, "cannot schedule new futures after shutdown"))
    limit = server.limit.value
    pauses = []
    for _ in range(4):
        began = clock.now
        while not server.circuit.wants_drain_trial:
            clock.now += 0.5
        pauses.append(clock.now - began)
        server.record_failure(server.circuit.begin(Caller(is_job=False)), error)
    assert pauses == [1, 2, 4, 8]
    assert (server.circuit.reason, server.limit.value, server.limit.opens_in()) == ("draining", limit, None)


def test_a_server_that_refuses_everything_is_noticed_within_half_a_minute(server: Server, clock: Clock) -> None:
    """Such as a proxy without a server behind it: no job fails there, so nothing else would be seen for a day."""
    events: list[Event] = []

    class Recording:
        def emit(self, event: Event) -> None:
            events.append(event)

    reports = CircuitReports(Recording())
    for _ in range(4):
        assert server.refuses_all is None
        server.record_failure(begin(server), classify(503, "quoted words of the request"))
        reports.on_request_end(server)
        assert not events
        clock.now += REFUSES_ALL_AFTER / 3.9
    server.record_failure(begin(server), classify(503, "quoted words of the request"))
    reports.on_request_end(server)
    (report,) = events
    assert isinstance(report, Failing)
    assert report.error == "http://a:1 refuses every request: upstream_unavailable, HTTP status 503"
    server.on_first_event(begin(server), "m")
    reports.on_request_end(server)
    reports.on_request_end(server)
    assert (server.refuses_all, events[1:]) == (None, [Recovered("vllm_refuses_all")])


def test_a_server_that_refuses_beyond_its_answers_refuses_not_everything(server: Server, clock: Clock) -> None:
    answer = StreamWatchdog(StreamTimeouts())
    answer.on_answer_start()
    server.requests.add(answer)
    for _ in range(10):
        server.record_failure(begin(server), classify(503, "full"))
        clock.now += REFUSES_ALL_AFTER
    assert server.refuses_all is None


def test_one_draining_server_behind_a_load_balancer_hardly_stops_the_others(server: Server) -> None:
    """The drain may last ten minutes, and every request may meet it."""
    drains = classify(500, "cannot schedule new futures after shutdown")
    server.record_failure(begin(server), drains)
    assert server.circuit.is_draining
    server.circuit.on_success(server.circuit.begin(Caller(is_job=False)))
    for _ in range(20):
        server.record_failure(begin(server), drains)
        server.record_failure(begin(server), drains)
        assert admits(server)
        server.on_first_event(begin(server), "m")
    for _ in range(3):
        assert not server.is_away
        server.record_failure(begin(server), drains)
    assert server.circuit.is_draining, "now all of them drain"


class SilentStream(StreamWatchdog):
    """A request that has had no event for some seconds."""

    def __init__(self, seconds: float, *, has_begun: bool) -> None:
        super().__init__(StreamTimeouts())
        self._seconds = seconds
        if has_begun:
            self.on_answer_start()

    def silence(self) -> float:
        return self._seconds


@pytest.mark.parametrize(
    ("begun", "unbegun", "quiet_for", "silent"),
    [
        ([6], [], 60, True),
        ([4], [], 60, False),
        ([6, 0.1], [], 60, False),
        ([6], [0.1], 60, True),  # a frozen server also accepts requests
        ([], [9, 1], 60, True),
        ([], [6], 60, False),
        ([6], [], 1, False),  # another answer has just ended
        ([], [], 60, False),
    ],
)
def test_a_server_is_silent_once_no_request_has_had_an_event_for_a_while(
    server: Server, clock: Clock, begun: list[float], unbegun: list[float], quiet_for: float, *, silent: bool
) -> None:
    for seconds in begun:
        server.requests.add(SilentStream(seconds, has_begun=True))
    for seconds in unbegun:
        server.requests.add(SilentStream(seconds, has_begun=False))
    server.note_activity()
    clock.now += quiet_for
    assert server.is_silent is silent


def silence_of(server: Server, *, after: float, clock: Clock) -> bool:
    clock.now += after
    return server.is_silent


def answers_probes(server: Server, clock: Clock, *, within: float) -> None:
    for _ in range(2):
        server.note_probe()
        clock.now += within
        server.note_response()


def test_only_a_probe_without_an_answer_shows_that_an_idle_server_is_silent(server: Server, clock: Clock) -> None:
    answers_probes(server, clock, within=0.1)
    assert not silence_of(server, after=600, clock=clock)
    server.note_probe()
    assert silence_of(server, after=0, clock=clock)
    with server.reserve():  # a job that gets no answer either
        assert silence_of(server, after=1, clock=clock)
    assert silence_of(server, after=0, clock=clock)
    server.note_response()
    assert not silence_of(server, after=0, clock=clock)


@pytest.mark.parametrize("seconds", [3, 40])
def test_a_server_that_always_answers_probes_late_is_not_silent(server: Server, clock: Clock, seconds: float) -> None:
    for _ in range(3):
        server.note_probe()
        assert not silence_of(server, after=min(seconds, 20), clock=clock), "the first time"
        server.note_response()
        answers_probes(server, clock, within=seconds)
        server.note_probe()
        assert not silence_of(server, after=1.5 * seconds, clock=clock)
        assert silence_of(server, after=7 + seconds, clock=clock)
        server.note_response()
