"""The benchmark measures correctly: its numbers, its search for the highest rate, and some seconds of each bridge."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import psutil
import pytest
from board import Count
from bridge import Bridge, floor, ours, straightforward
from chunks import TOKEN_IDS, WORDS, Stream, whole_answer
from edge import SERVERS, EdgeRig
from ladder import FINENESS, Highest, Verdict, ladder
from measure import TICKS, cpu_of_others, kept_apart, median, percentile, session_niceness, undisturbed
from plot import svg
from reading import FOLLOWERS, Reading
from report import TARGETS, Report, Target, this_machine
from rig import Rig, RigFailed
from scenarios import Figures, Run
from short import Contestant, ShortJobs

from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.stream.sse import SSEDecoder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it measures by means of Linux alone")

_HERE = Path(__file__).parent
_TRANSCRIPTS = _HERE.parent / "transcripts"


def _events(body: bytes) -> list[bytes]:
    """The data of all events in HTTP chunks."""
    decoder, events = SSEDecoder(), []
    while body:
        size, _, rest = body.partition(b"\r\n")
        events += decoder.feed(rest[: int(size, 16)])
        assert rest[int(size, 16) :][:2] == b"\r\n"
        body = rest[int(size, 16) + 2 :]
    return events


def _shape(chunk: object) -> object:
    """The parts of a chunk, whatever its text."""
    if isinstance(chunk, dict):
        return [(name, _shape(value)) for name, value in chunk.items()]
    if isinstance(chunk, list):
        return [_shape(value) for value in chunk[:1]]
    return type(chunk)


def test_the_load_is_what_vllm_sends() -> None:
    stream = Stream(7)
    body = stream.opening.partition(b"\r\n\r\n")[2] + stream.token(0) + stream.token(1) + stream.ending
    events = _events(body)
    real = SSEDecoder().feed((_TRANSCRIPTS / "continuous_usage_token_ids.body").read_bytes())
    assert events[-1] == real[-1] == b"[DONE]"
    for ours_, theirs in ((events[0], real[0]), (events[1], real[1]), (events[-3], real[-3]), (events[-2], real[-2])):
        sent, recorded = json.loads(ours_), json.loads(theirs)
        if recorded["choices"]:
            recorded.pop("usage", None)  # requested in each chunk of this transcript
        assert _shape(sent) == _shape(recorded)


def test_the_worker_finds_the_words_and_token_ids_in_the_load() -> None:
    stream, parser = Stream(3), ChunkParser()
    body = stream.opening.partition(b"\r\n\r\n")[2] + b"".join(map(stream.token, range(200))) + stream.ending
    entries = [fields for event in _events(body) for fields in parser.parse(event)]
    texts = [(fields["content"], json.loads(fields["token_ids"])) for fields in entries if "content" in fields]
    assert texts == [(WORDS[n % len(WORDS)], [TOKEN_IDS[n % len(WORDS)]]) for n in range(200)]
    parser.check_complete()


def test_an_answer_in_one_write_has_the_bytes_of_one_in_many() -> None:
    stream = Stream(7)
    assert whole_answer(7, 12) == b"".join([stream.opening, *map(stream.token, range(12)), stream.ending])
    assert whole_answer(8, 12) != whole_answer(7, 12)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(n) for n in range(1, 101)]
    random.Random(1).shuffle(values)  # noqa: S311
    assert [percentile(values, part) for part in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([3.0], 99) == 3
    assert math.isnan(percentile([], 50))


def test_a_median_passes_over_what_could_not_be_measured() -> None:
    assert median([None, 3.0, math.nan, 1.0, 2.0]) == 2
    assert median([None, math.nan]) is None


def _climb(judge: Callable[[float], Verdict]) -> tuple[Highest, list[float]]:
    rates, tried = ladder(1000), []
    rate = next(rates)
    while True:
        tried.append(rate)
        try:
            rate = rates.send(judge(rate))
        except StopIteration as end:
            return end.value, tried


@pytest.mark.parametrize("capacity", [90, 999, 1000, 5500, 26_000, 110_000])
def test_the_ladder_finds_the_highest_rate_that_is_held(capacity: float) -> None:
    found, tried = _climb(lambda rate: Verdict.HELD if rate <= capacity else Verdict.LOST)
    assert capacity / FINENESS <= found.rate <= capacity
    assert not found.at_least
    assert len(tried) < 16


def test_the_ladder_ends_where_nothing_is_held() -> None:
    assert _climb(lambda _: Verdict.LOST)[0] == Highest(0.0)


def test_a_rate_that_the_load_generator_cannot_keep_is_no_limit_of_the_bridge() -> None:
    found, _ = _climb(lambda rate: Verdict.HELD if rate <= 50_000 else Verdict.VOID)
    assert found.at_least
    assert 50_000 / FINENESS <= found.rate <= 50_000


def test_ratios_are_taken_within_a_round_and_then_their_median() -> None:
    rounds: list[dict[str, Figures]] = [
        {"ours": {"cpu_us_20000": cpu}, "floor": {"cpu_us_20000": least}}
        for cpu, least in ((20.0, 10.0), (60.0, 20.0), (30.0, 30.0))
    ]
    report = Report(machine=this_machine(), bridges={"ours": "", "floor": ""}, rounds=rounds, notes=["one"])
    assert report.medians["ours"]["cpu_us_20000"] == 30
    assert report.ratios["CPU per delta at 20,000/s, against the floor"] == 2
    assert report.ratios["highest rate, against node"] is None
    assert "2.00 |      ≤ 2 |     yes |" in report.table


@pytest.mark.parametrize(
    ("target", "value", "reached", "gross"),
    [
        (Target("", "", 9, ("x",), at_least=True), 9.0, True, False),
        (Target("", "", 9, ("x",), at_least=True), 5.0, False, False),
        (Target("", "", 9, ("x",), at_least=True), 4.4, False, True),
        (Target("", "", 2, of="x"), 4.1, False, True),
        (Target("", "", 2), 100.0, False, False),
    ],
)
def test_only_a_ratio_can_be_missed_grossly(target: Target, value: float, reached: bool, gross: bool) -> None:  # noqa: FBT001
    assert (target.reached(value), target.gross(value)) == (reached, gross)


def test_what_is_compared_with_several_is_compared_with_the_best() -> None:
    rounds: list[dict[str, Figures]] = [
        {"a": {"x": 8.0}, "b": {"x": 4.0}, "c": {"x": None}, "ours": {"x": 2.0, "y": 1.0}}
    ]
    assert Target("", "x", 1, ("a", "b", "c")).measured(rounds) == 0.5
    assert Target("", "x", 1, ("a", "b", "c"), at_least=True).measured(rounds) == 0.25
    assert Target("", "x", 1, of="y").measured(rounds) == 2
    assert Target("", "x", 1, ("c",)).measured(rounds) is None


def test_every_target_has_its_figure_in_the_report() -> None:
    figures = Report(machine=this_machine(), bridges={"ours": ""}, rounds=[{}], notes=[]).medians["ours"]
    assert {target.figure for target in TARGETS} <= figures.keys()


_SECONDS = 3.0
"""A window that is longer than a busy machine keeps a process from running."""


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds. The limit is only for a test that would otherwise hang."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


_BRIDGES = {"ours": lambda _: ours(), "straightforward": lambda _: straightforward(), "floor": floor}


@pytest.mark.parametrize("name", _BRIDGES)
def test_some_seconds_of_each_bridge(name: str, tmp_path: Path) -> None:
    _some_seconds(_BRIDGES[name](tmp_path))


def test_some_seconds_of_the_floor_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    bridge = floor(tmp_path)
    monkeypatch.undo()
    _some_seconds(bridge)


def _some_seconds(bridge: Bridge) -> None:
    with Rig(bridge, streams=8, followed=range(0, 8, 2)) as rig:
        rig.open(8)
        window = rig.steady(200, _SECONDS)
        while window.replied < 100 or math.isnan(window.p50):  # the machine has not run one of the processes meanwhile
            window = rig.window(_SECONDS)
        rig.drained()
        assert 0 < window.p50 <= window.p99
        assert 0 < window.cpu < 2
        until(lambda: rig.missing() == 0)  # a bridge that the machine does not run looks drained
        until(lambda: rig.board[Count.READ] > 50)
        assert rig.board[Count.STRAY] == 0


@pytest.mark.parametrize("name", ["ours", "straightforward"])
def test_some_short_jobs_of_each_bridge(name: str, tmp_path: Path) -> None:
    with ShortJobs(_BRIDGES[name](tmp_path)) as jobs:
        burst = jobs.burst(20, 3, limit=300)
        assert burst.complete
        assert burst.rate > 0
        assert burst.cpu > 0
        assert burst.redis_cpu > 0
        latencies = jobs.first_deltas(5)
        assert len(latencies) == 5
        assert min(latencies) > 0
        sent, _ = jobs.commands(10, 3)
        assert sent["xadd"] >= 10 * (1 + 3 + 1)  # the job, its tokens and their end
        assert sent["xinfo"] == 0


_TINY = """
import sys
from redis import Redis
redis, words = Redis(port=int(sys.argv[1]), protocol=2), sys.argv[3:]
adds = [f"redis.call('XADD', KEYS[1], '*', 'type', 'delta', 'content', '{word}')" for word in words]
script = " ".join([*adds, "redis.call('XACK', 'chat:jobs', 'workers', ARGV[1])"])
redis.xgroup_create("chat:jobs", "workers", "0", mkstream=True)
for _ in range(int(sys.argv[2])):
    ((_, ((job, fields),)),) = redis.xreadgroup("workers", "one", {"chat:jobs": ">"}, count=1, block=0)
    redis.eval(script, 1, b"chat:tokens:{%b}" % fields[b"id"], job)
sys.stdin.read()
"""


def tiny_bridge(answered: int, words: list[str]) -> Bridge:
    """A bridge that knows all answers, and writes each in one script. It stops after so many jobs."""
    return Bridge("tiny", "", lambda _vllm, redis: [sys.executable, "-c", _TINY, str(redis), str(answered), *words])


def test_commands_that_a_script_calls_are_not_among_those_that_were_sent() -> None:
    with ShortJobs(tiny_bridge(10**6, WORDS[:10])) as jobs:
        sent, called = jobs.commands(4, 10)
    assert (sent["xadd"], sent["eval"]) == (4, 4)
    assert called == {"xadd": 40, "xack": 4}


def test_a_bridge_that_loses_text_fails() -> None:
    with ShortJobs(tiny_bridge(10**6, WORDS[:9])) as jobs, pytest.raises(RigFailed, match="the log of job"):
        jobs.burst(5, 10)


def test_a_bridge_that_falls_behind_has_a_rate_and_a_note_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("short._WARM_UP", 0)  # else it may answer all of its jobs before the first window
    run = Run(seconds=1.0, rung_seconds=1.0, show=lambda _: None)
    contestant = Contestant(tiny_bridge(2000, WORDS[:10]), run)
    try:
        contestant.burst(2000, 10, 1.0, counts=True)
        contestant.burst(2000, 10, 1.0, counts=True)
    finally:
        contestant.close()
    rate = contestant.figures["short_rate_10"]
    assert rate is not None
    assert rate < 2000
    assert contestant.figures == {"short_rate_10": rate, "short_us_10": None, "short_redis_us_10": None}
    (note,) = run.notes
    assert "tiny did not keep up" in note
    assert not [child for child in psutil.Process().children() if _TINY in child.cmdline()]


def test_who_measures_is_not_on_the_core_of_the_bridge(tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    with Rig(floor(tmp_path), streams=1) as rig:
        with rig.apart():
            assert len(cores) == 1 or not os.sched_getaffinity(0) & os.sched_getaffinity(rig.bridge_pid)
        assert os.sched_getaffinity(0) == os.sched_getaffinity(rig.bridge_pid) == cores
        with pytest.raises(RigFailed), rig.apart():
            raise RigFailed
        assert os.sched_getaffinity(0) == os.sched_getaffinity(rig.bridge_pid) == cores


def test_looking_at_all_other_processes_is_no_part_of_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def at_others(_: object) -> Counter[int]:
        looked.append(time.monotonic_ns())
        time.sleep(0.1)
        looked.append(time.monotonic_ns())
        return Counter()

    monkeypatch.setattr("rig.cpu_of_others", at_others)
    with Rig(floor(tmp_path), streams=1) as rig:
        seconds = rig.window(0.1).seconds
    _, done, again, _ = looked
    assert 0.1 <= seconds <= (again - done) / 1e9


@pytest.mark.parametrize("name", FOLLOWERS)
def test_a_second_of_each_way_to_read(name: str) -> None:
    with ExitStack() as stack:
        rig = Reading(stack, FOLLOWERS[name], 6)
        rig.pace(60)
        rig.pace(0)
        rig.follow(FOLLOWERS[name], 6)
        before = rig.look()
        rig.pace(300)
        until(lambda: rig.look().read > before.read)
        assert rig.look().follower > before.follower
        assert rig.board[Count.STRAY] == 0


@pytest.mark.parametrize("name", SERVERS)
def test_a_second_of_each_server_of_events(name: str) -> None:
    with ExitStack() as stack:
        rig = EdgeRig(stack, SERVERS[name], 4)
        rig.follow(8)
        before = rig.look()
        rig.pace(400)
        until(lambda: bool((after := rig.look()).latencies) and after.events - before.events >= 40)
        assert rig.look().cpu > before.cpu


def test_servers_whose_windows_alternate_leave_each_other_alone() -> None:
    with ExitStack() as stack:
        rigs = [EdgeRig(stack, SERVERS[name], 4) for name in ("gateway", "raw")]
        for rig in rigs:
            rig.follow(8)
        for rig in rigs:
            window = rig.steady(2000, _SECONDS)
            assert window.rate > 0
            assert window.cpu_us > 0
        raw = psutil.Process(rigs[1].server.process.pid)
        before = raw.num_ctx_switches().voluntary
        rigs[0].steady(2000, 1.0)
        assert raw.num_ctx_switches().voluntary - before < 100  # while it is measured, it wakes 1,400 times a second


def test_what_the_rest_of_the_machine_does_is_counted() -> None:
    burn = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\nsys.stdin.read()"
    ours = {os.getpid()}
    before = cpu_of_others(ours)
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as burner:
        assert burner.stdin is not None
        assert burner.stdout is not None
        burner.stdout.readline()
        spent = cpu_of_others(ours) - before
        assert spent[burner.pid] >= 0.2 * TICKS
        assert burner.pid not in cpu_of_others(ours | {burner.pid})
        burner.stdin.close()


def test_a_process_is_kept_apart_for_a_while_only() -> None:
    cores = os.sched_getaffinity(0)
    wait = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with (
        subprocess.Popen(wait, stdin=subprocess.PIPE) as one,
        subprocess.Popen(wait, stdin=subprocess.PIPE) as other,
    ):
        with kept_apart([one.pid], [other.pid]):
            assert len(os.sched_getaffinity(one.pid)) == 1
            assert len(cores) == 1 or not os.sched_getaffinity(one.pid) & os.sched_getaffinity(other.pid)
        with kept_apart([one.pid], [os.getpid()]), kept_apart([other.pid], [os.getpid()]):
            assert os.sched_getaffinity(one.pid) == os.sched_getaffinity(other.pid)
            assert len(cores) == 1 or not os.sched_getaffinity(one.pid) & os.sched_getaffinity(0)
        assert os.sched_getaffinity(one.pid) == os.sched_getaffinity(other.pid) == cores


def may_come_first(pid: int) -> bool:
    try:
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
    return True


def test_processes_come_before_all_else_for_a_while_only_where_that_is_allowed() -> None:
    wait = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with (
        subprocess.Popen(wait, stdin=subprocess.PIPE, start_new_session=True) as one,
        subprocess.Popen(wait, stdin=subprocess.PIPE) as other,
    ):
        before, session = os.getpriority(os.PRIO_PROCESS, one.pid), session_niceness(one.pid)
        with undisturbed(one.pid, [other.pid]):
            if may_come_first(one.pid):
                assert os.sched_getscheduler(other.pid) == os.SCHED_FIFO
                assert os.getpriority(os.PRIO_PROCESS, one.pid) < before
                if in_an_autogroup(one.pid):
                    assert session_niceness(one.pid) < session
        assert os.sched_getscheduler(other.pid) == os.SCHED_OTHER
        assert os.getpriority(os.PRIO_PROCESS, one.pid) == before
        assert session_niceness(one.pid) == session


def in_an_autogroup(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/autogroup").read_text() != ""
    except OSError:
        return False


def test_a_process_outside_of_autogroups_has_no_niceness_of_its_session() -> None:
    """The kernel's own threads are in no autogroup; in some containers no process is."""
    assert session_niceness(2) == 0


def test_a_process_that_comes_first_does_not_take_this_session_with_it() -> None:
    session = session_niceness(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as one, undisturbed(one.pid, []):
        assert session_niceness(os.getpid()) == session


def test_the_plot_has_a_bar_for_each_bridge_that_was_measured() -> None:
    figures: dict[str, Figures] = {"ours": {"highest_rate": 50_000.0}, "straightforward": {"highest_rate": None}}
    bridges = {"ours": "", "straightforward": "", "floor": ""}
    drawn = ET.fromstring(  # noqa: S314 - our own
        svg(Report(machine=this_machine(), bridges=bridges, rounds=[figures], notes=[]))
    )
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"50,000", "cannot", "ours", "straightforward"} <= set(texts)
    assert "floor" not in texts
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}rect"))) == 2


def test_the_documents_show_the_report_that_is_kept() -> None:
    report = msgspec.json.decode((_HERE / "report.json").read_bytes(), type=Report)
    assert report.table in (_HERE / "README.md").read_text()
    assert (_HERE / "report.svg").read_text() == svg(report)
