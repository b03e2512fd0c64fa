"""The decisions of the intake as data: outlines and lines of jobs, which jobs have a place, and whose turn it is."""

import json
import time
from collections.abc import Callable

import pytest
from room import FakeServers

from worker.broker.job_queue import Delivery
from worker.broker.parked_jobs import ParkedJob, ParkedLine, bucket_of, model_of_line
from worker.engine.admission import Admission
from worker.engine.lines import KnownLines
from worker.engine.outline import DAY_MS, JobOutline, line_name, may_be_valid, models_of_line, outline_of
from worker.engine.rotation import LineRotation
from worker.settings import load_settings


def delivered(request: object = None, **fields: str | bytes) -> Delivery:
    given = {"id": "a", "request": json.dumps({"model": "m", "messages": []} if request is None else request)} | fields
    raw = {name.encode(): text if isinstance(text, bytes) else text.encode() for name, text in given.items()}
    return Delivery("default", "1000-0", raw)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


# Outlines and the names of lines.


def test_an_outline_has_what_decides_where_a_job_waits() -> None:
    job = delivered({"messages": [], "model": "m"}, tenant="acme", deadline="123", fallbacks='["b","c"]')
    assert outline_of(job) == JobOutline(("m", "b", "c"), "acme", 123)
    assert outline_of(delivered()) == JobOutline(("m",), "", 1000 + DAY_MS)
    assert outline_of(delivered({"model": None, "messages": []})) == JobOutline(("",), "", 1000 + DAY_MS)


@pytest.mark.parametrize(
    "job",
    [
        delivered(request="text"),
        delivered(request=["m"]),
        delivered(deadline="soon"),
        delivered(fallbacks="b"),
        delivered(fallbacks="[1]"),
        delivered(tenant=b"\xff"),
        delivered(tenant="x" * 257),
        delivered(id="no/slash"),
        Delivery("default", "1-0", {b"id": b"a"}),
        Delivery("default", "1-0", {b"id": b"a", b"request": b'{"model": "m'}),
        Delivery("default", "1-0", {b"id": b"a", b"request": b'{"a":' * 100_000}),
    ],
)
def test_a_job_that_cannot_be_valid_has_no_outline(job: Delivery) -> None:
    assert outline_of(job) is None


def test_the_outline_of_a_large_request_is_cheap() -> None:
    large = delivered({"messages": [{"role": "user", "content": "word " * 800_000}], "model": "m"})
    began = time.process_time()
    assert outline_of(large) is not None
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("request_", "valid"),
    [
        ({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}, True),
        ({"model": "m", "messages": []}, False),
        ({"model": "m", "messages": [{}], "n": 1000}, False),
        ({"model": "m", "messages": [], "large": "x" * 100_000}, True),
        ({"model": "m", "messages": [], "large": "x" * 300_000}, False),
    ],
)
def test_a_job_that_is_not_valid_is_recognized_unless_it_takes_long(request_: object, *, valid: bool) -> None:
    settings = load_settings(redis_url="redis://x", vllm_urls="http://x", max_request_bytes=200_000)
    assert may_be_valid(delivered(request_), settings) is valid


@pytest.mark.parametrize(
    "models",
    [
        ("m",),
        ("",),
        ("", "b"),
        ("org/model:7b", "b|c", "d%"),
        ("Möbius 模型", "a b"),
        ("#hash",),
        ("\ud800",),
    ],
)
def test_the_name_of_a_line_has_its_models(models: tuple[str, ...]) -> None:
    name = line_name(models)
    assert model_of_line(name) == name
    expected = tuple(model.encode("utf-8", "replace").decode() for model in models)
    assert models_of_line(name) == (expected if "\ud800" not in models else ("\ufffd" * 3,))


# Which jobs have a place.


def test_a_model_has_as_many_places_as_room_until_a_demand_ends() -> None:
    admission = Admission(servers := FakeServers(a=2, b=1))
    first, second, third = (admission.admit(["a"]) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is None
    assert admission.admit(["b"]) is not None
    first.end()
    assert admission.admit(["a"]) is not None
    assert servers.total_room() == 0


def test_a_fallback_is_used_only_if_the_servers_of_the_model_are_away() -> None:
    servers = FakeServers(a=0, b=1)
    admission = Admission(servers)
    assert admission.admit(["a", "b"]) is None
    servers.away = {"a"}
    demand = admission.admit(["a", "b"])
    assert demand is not None
    assert demand.model == "b"
    assert admission.admit(["a", "b"]) is None


def test_a_model_whose_jobs_come_back_pauses_longer_and_longer_until_one_ends() -> None:
    clock = Clock()
    admission = Admission(FakeServers(a=1000, b=1), clock)
    starts = []
    while clock.now < 10:
        if admission.admit(["a"]):
            starts.append(clock.now)
            admission.on_parked("a")
            admission.on_parked("a")  # another job that comes back during the pause does not lengthen it
        clock.now += 0.01
    assert 7 <= len(starts) <= 11
    assert admission.admit(["b"])
    assert 0 < admission.next_end_of_pause <= 2
    admission.on_ended("a")
    assert admission.admit(["a"])
    assert admission.next_end_of_pause == float("inf")


def test_one_job_of_an_unlisted_model_starts_and_the_others_follow_if_it_ends() -> None:
    admission = Admission(FakeServers(a=5))
    assert admission.admit(["new"])
    assert admission.admit(["new"]) is None
    admission.on_ended("new")
    assert all(admission.admit(["new"]) for _ in range(3))


def test_a_job_of_an_unlisted_model_that_comes_back_waits_for_a_change_of_the_servers() -> None:
    servers = FakeServers(a=5)
    admission = Admission(servers)
    assert admission.admit(["new"])
    admission.on_parked("new")
    assert admission.admit(["new"]) is None
    servers.generation += 1
    assert admission.admit(["new"])
    assert admission.admit(["new"]) is None


def test_a_job_that_found_full_servers_for_an_unlisted_model_starts_again_when_its_lists_are_forgotten() -> None:
    clock = Clock()
    servers = FakeServers(a=5)
    admission = Admission(servers, clock)
    assert admission.admit(["new"])
    servers.rooms["new"] = 0  # the job has fetched the lists: any server may have the model
    admission.on_parked("new")
    del servers.rooms["new"]
    clock.now = 60
    assert admission.admit(["new"])
    assert admission.admit(["new"]) is None


def test_no_job_of_an_unlisted_model_starts_while_the_servers_are_full() -> None:
    assert Admission(FakeServers(a=0)).admit(["new"]) is None


def test_a_process_remembers_a_bounded_number_of_models() -> None:
    admission = Admission(FakeServers(a=100_000))
    for number in range(3000):
        assert admission.admit([f"new-{number}"])
    assert admission.admit(["new-2999"]) is None
    for number in range(2000, 3000):
        admission.on_ended(f"new-{number}")
    assert admission.admit(["late"])
    admission.on_ended("late")
    assert admission.admit(["late"])
    assert admission.admit(["late"])
    assert admission.admit(["new-0"])


# Whose turn it is.


def line(bucket: str = "-", model: str = "a", queue: str = "default", jobs: int = 100) -> ParkedLine:
    return ParkedLine(queue, f"waiting:{bucket}:{model}", bucket, model, jobs)


def always(_: ParkedLine) -> bool:
    return True


def room_of(**rooms: int) -> Callable[[ParkedLine], bool | None]:
    def admit(line: ParkedLine) -> bool | None:
        rooms[line.model] -= 1
        return rooms[line.model] >= 0 or None

    return admit


def counts(chosen: dict[ParkedLine, list[bool]]) -> dict[str, int]:
    return {line.consumer.removeprefix("waiting:"): len(places) for line, places in chosen.items()}


def test_the_tenants_of_a_queue_take_turns() -> None:
    rotation: LineRotation[bool] = LineRotation(["default"])
    lines = [line("1", jobs=10_000), line("2", jobs=3), line("3", jobs=1)]
    assert counts(rotation.choose(lines, 6, always)) == {"1:a": 3, "2:a": 2, "3:a": 1}
    order = [next(iter(counts(rotation.choose([line("1"), line("2")], 1, always)))) for _ in range(4)]
    assert order in (["1:a", "2:a", "1:a", "2:a"], ["2:a", "1:a", "2:a", "1:a"])


def test_begun_jobs_come_first_whatever_their_queue() -> None:
    rotation: LineRotation[bool] = LineRotation(["high", "low"])
    begun = line("!0", queue="low", jobs=12)
    assert (begun.tries, begun.has_tenant) == (0, False)
    lines = [line("1", queue="high"), line("2", queue="low"), begun]
    for _ in range(3):
        assert counts(rotation.choose(lines, 4, always)) == {"!0:a": 4}
    assert counts(rotation.choose([line("1", queue="high"), line("!2", jobs=1)], 2, always)) == {"!2:a": 1, "1:a": 1}


def test_a_tenant_that_comes_late_is_next() -> None:
    rotation: LineRotation[bool] = LineRotation(["default"])
    rotation.choose([line("1")], 16, always)
    assert counts(rotation.choose([line("1"), line("2", jobs=1)], 1, always)) == {"2:a": 1}


def test_a_tenant_has_one_turn_for_all_of_its_models() -> None:
    rotation: LineRotation[bool] = LineRotation(["default"])
    lines = [line("1", "a"), line("1", "b"), line("2", "a")]
    assert counts(rotation.choose(lines, 8, always)) == {"1:a": 2, "1:b": 2, "2:a": 4}


def test_a_full_model_does_not_stop_the_others() -> None:
    rotation: LineRotation[bool] = LineRotation(["default"])
    lines = [line("1", "a"), line("1", "b"), line("2", "a")]
    assert counts(rotation.choose(lines, 16, room_of(a=1, b=2))) == {"1:a": 1, "1:b": 2}
    assert rotation.choose(lines, 16, room_of(a=0, b=0)) == {}
    assert rotation.choose(lines, 0, always) == {}


def test_the_more_important_queue_comes_first_and_the_other_does_not_starve() -> None:
    rotation: LineRotation[bool] = LineRotation(["high", "low"])
    lines = [line(queue="low", jobs=1000), line(queue="high", jobs=1000)]
    chosen = rotation.choose(lines, 160, always)
    by_queue = {line.queue: len(places) for line, places in chosen.items()}
    assert by_queue == {"high": 140, "low": 20}
    assert len(rotation.choose([line(queue="low", jobs=5)], 16, always)[line(queue="low", jobs=5)]) == 5


# What a process knows of the lines.


def parked(tenant: str = "", models: tuple[str, ...] = ("a",), queue: str = "default") -> tuple[ParkedJob, JobOutline]:
    delivery = Delivery(queue, "1-0", {})
    return ParkedJob(delivery, tenant, line_name(models), 5), JobOutline(models, tenant, 5)


def test_a_line_is_known_at_once_when_this_process_parks_a_job() -> None:
    known = KnownLines()
    for _ in range(2):
        known.on_parked(*parked("acme"))
    (only,) = known.all()
    assert (only.queue, only.bucket, only.model, only.jobs) == ("default", bucket_of("acme"), "a", 2)
    assert known.grown.is_set()
    known.on_taken(only, 1, 1)
    assert [line.jobs for line in known.all()] == [1]
    known.on_taken(only, 1, 0)
    assert known.all() == []


def test_a_listing_replaces_the_lines_of_its_queue_only() -> None:
    known = KnownLines()
    known.on_parked(*parked(queue="other"))
    known.on_parked(*parked())
    known.replace("default", [line("7")])
    assert {(line.queue, line.bucket) for line in known.all()} == {("other", "-"), ("default", "7")}


def test_the_models_of_a_line_with_a_long_name_are_learnt_from_its_jobs() -> None:
    models = ("m" * 150, "f" * 150)
    known = KnownLines()
    unknown = line(model=model_of_line(line_name(models)))
    assert known.models_of(unknown) is None
    known.learn(JobOutline(models, "", 5))
    assert known.models_of(unknown) == models
    late = ("2000" * 100, "f" * 150)
    for number in range(2001):
        known.learn(JobOutline((f"{number}" * 100, "f" * 150), "", 5))
    assert known.models_of(line(model=model_of_line(line_name(late)))) == late


def test_a_queue_is_read_ahead_while_tenants_are_in_use_or_another_queue_has_lines() -> None:
    clock = Clock()
    known = KnownLines(clock)
    assert not known.reads_ahead("default")
    known.on_parked(*parked())
    assert not known.reads_ahead("default")
    assert known.reads_ahead("other")
    known.on_seen("default", JobOutline(("a",), "acme", 5))
    assert known.reads_ahead("default")
    clock.now = 3600
    assert not known.reads_ahead("default")
    known.replace("default", [line("7", jobs=9999)])
    assert known.reads_ahead("default")
    known.replace("default", [line("7", jobs=10_000)])
    assert not known.reads_ahead("default")
    known.replace("default", [line("7", f"model-{number}", jobs=1) for number in range(1000)])
    assert not known.reads_ahead("default")
