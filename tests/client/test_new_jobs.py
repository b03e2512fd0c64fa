"""An invalid job is refused before anything is sent to Redis."""

from types import MappingProxyType
from typing import Any

import pytest

from worker import InvalidJob
from worker.client.new_job import JobOptions, new_job
from worker.contract.job import digest, parse_job

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tenant": 5}, "the option tenant is 5: Expected `str`, got `int`"),
        ({"fallbacks": "abc"}, "the option fallbacks is 'abc': Expected `array`, got `str`"),
        ({"fallbacks": 5}, "the option fallbacks is 5: "),
        ({"fallbacks": [1]}, "the option fallbacks is [1]: "),
        ({"fallbacks": [""]}, "fallbacks"),
        ({"id": 5}, "the option id is 5: "),
        ({"id": ""}, "the job's id '' cannot be used"),
        ({"id": "a/b"}, "the job's id 'a/b' cannot be used"),
        ({"queue": 5}, "the option queue is 5: "),
        ({"queue": ""}, "the queue '' has an invalid name"),
        ({"timeout": "5"}, "the option timeout is '5': "),
        ({"timeout": True}, "the option timeout is True: "),
        ({"timeout": float("nan")}, "the timeout is nan"),
        ({"timeout": 0}, "the timeout is 0"),
        ({"retention": "60"}, "the option retention is '60': "),
        ({"retention": 5.5}, "the option retention is 5.5: "),
        ({"retention": 0}, "the job's retention is '0'"),
        ({"traceparent": b"00"}, "the option traceparent is b'00': "),
        ({"retry_of": 5}, "the option retry_of is 5: "),
        ({"retry_of": "a b"}, "the job's retry_of is 'a b'"),
    ],
)
def test_an_invalid_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        new_job(ASK, **options)
    assert message in str(caught.value)


def test_an_unknown_option_is_also_a_type_error() -> None:
    for kind in (InvalidJob, TypeError):
        with pytest.raises(kind, match="a job has no option priority: the options are id, queue, timeout, retention"):
            new_job(ASK, priority=3)  # type: ignore[call-arg]  # that is the point


def test_an_option_that_is_none_is_left_out() -> None:
    nothing: dict[str, Any] = dict.fromkeys(JobOptions.__annotations__)
    job, queue, timeout = new_job(ASK, **nothing)
    assert (job.request, len(job.id), queue, timeout) == (ASK, 32, "default", None)
    assert (job.retention, job.fallbacks, job.tenant, job.retry_of) == (None, (), "", "")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (None, "the request is not a JSON object"),
        (5, "the request is not a JSON object"),
        ("abc", "the request is not a JSON object"),
        ([("messages", [1])], "the request is not a JSON object"),
        (ASK | {"a": object()}, "the request cannot be written as JSON: "),
        (ASK | {"a": 10**5000}, "the request cannot be written as JSON: "),
        (ASK | {"a": "\ud83d"}, "text that is not Unicode"),
        (ASK | {None: 1}, "the request cannot be written as JSON: "),
        # msgspec writes null for numbers that JSON does not have
        (ASK | {"temperature": float("nan")}, "the request's temperature holds nan: JSON has no such number"),
        (ASK | {"top_p": -float("inf")}, "the request's top_p holds -inf: JSON has no such number"),
        (ASK | {"x": {"y": [1.5, ({"z": float("inf")},)]}}, "the request's x holds inf: JSON has no such number"),
        (ASK | {"x": MappingProxyType({"y": float("nan")})}, "the request's x holds nan: JSON has no such number"),
        (ASK | {"messages": [{"role": "user", "content": [float("nan")]}]}, "the request's messages holds nan"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else type(value).__name__,
)
def test_an_invalid_request_is_refused(request_: Any, message: str) -> None:  # noqa: ANN401 - anything
    with pytest.raises(InvalidJob) as caught:
        new_job(request_)
    assert message in str(caught.value)


def test_a_request_that_contains_itself_is_refused() -> None:
    endless: dict[str, Any] = dict(ASK)
    endless["a"] = endless
    with pytest.raises(InvalidJob, match="cannot be written as JSON"):
        new_job(endless)


def test_client_and_worker_compute_the_same_digest() -> None:
    odd = ASK | {"messages": tuple(ASK["messages"]), "a": {1: 1.0}, "b": b"bytes", "c": 1.5, "d": 2**70}
    job = new_job(odd).job
    read = parse_job({name.encode(): text.encode() for name, text in job.to_fields().items()})
    assert digest(job.request) == digest(read.request)
    assert job.request == read.request
