"""What a service may ask for, and the job that becomes of it: everything is checked here, before Redis is asked."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import msgspec

from ..contract.ids import new_request_id
from ..contract.job import InvalidJob, Job, parse_job
from ..contract.keys import DEFAULT_QUEUE, is_queue_name

_LONGEST = 365 * 24 * 3600
_NO_LIMIT = 2**31


class JobOptions(TypedDict, total=False):
    """What may be said of a job beside its request. None says nothing, as if it were left out.

    `id`: the request id, 1 to 128 of A-Za-z0-9_-, made up when it is left out. `queue`: `default` when left out.
    `timeout`: seconds within which the answer must be whole (24 hours). `retention`: seconds that the log is kept
    after its end. `fallbacks`: further models. `tenant`: whose job it is. `traceparent`: W3C trace context.
    `retry_of`: the request that this one is another try of.
    """

    id: str
    queue: str
    timeout: float
    retention: int
    fallbacks: Sequence[str]
    tenant: str
    traceparent: str
    retry_of: str


class UnknownOption(InvalidJob, TypeError):
    """An option that no job has."""


class NewJob(NamedTuple):
    """A job that can be added to a queue; `timeout` in seconds becomes its deadline by Redis's clock."""

    job: Job
    queue: str
    timeout: float | None


def new_job(request: Mapping[str, object], **options: Unpack[JobOptions]) -> NewJob:
    """The job that `enqueue` adds.

    Raises:
        UnknownOption: when an option is none.
        InvalidJob: when the request or an option cannot be.
    """
    given = _checked(options)
    queue, timeout = given.pop("queue", DEFAULT_QUEUE), given.pop("timeout", None)
    if not is_queue_name(queue):
        raise InvalidJob(f"the queue {queue[:80]!r} cannot be: its name must be 1 to 64 characters of A-Za-z0-9_-")
    if timeout is not None and not 0 < timeout <= _LONGEST:  # NaN is neither
        raise InvalidJob(f"the timeout is {timeout:g}: it must be more than 0 seconds and at most a year")
    if not isinstance(request, Mapping):
        raise InvalidJob("the request is not a JSON object: give the body of an OpenAI chat completion")
    given["fallbacks"] = tuple(given.get("fallbacks", ()))
    asked: dict[str, Any] = dict(request)
    for name, value in asked.items():
        if (number := _no_number(value)) is not None:
            raise InvalidJob(f"the request's {name} holds {number}: JSON has no such number")
    job = Job(request=asked, **({"id": new_request_id()} | given))
    try:
        fields = {name.encode(): value.encode() for name, value in job.to_fields().items()}
    except UnicodeEncodeError:
        raise InvalidJob("the job holds text that is not Unicode, such as half of an emoji: mend it there") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidJob(f"the request cannot be written as JSON: {error}") from None
    # What a worker would refuse is refused here, as it would read it; the size limit is the worker's own.
    return NewJob(parse_job(fields, _NO_LIMIT), queue, timeout)


def _no_number(value: object) -> float | None:
    """The first float in a value that JSON cannot hold (NaN, Infinity), if any: msgspec writes null in its place."""
    unread = [value]
    seen: set[int] = set()  # what holds itself is refused where it is written
    while unread:
        item = unread.pop()
        if isinstance(item, float):
            if not math.isfinite(item):
                return item
        elif isinstance(item, Mapping | list | tuple | set | frozenset) and id(item) not in seen:
            seen.add(id(item))
            unread.extend(item.values() if isinstance(item, Mapping) else item)
    return None


def _checked(options: JobOptions) -> dict[str, Any]:
    """The options that say something, each of its type."""
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - JobOptions.__annotations__):
        known = ", ".join(JobOptions.__annotations__)
        raise UnknownOption(f"a job has no option {', '.join(unknown)}: there are {known}")
    for name, value in given.items():
        try:
            msgspec.convert(value, JobOptions.__annotations__[name])
        except msgspec.ValidationError as error:
            raise InvalidJob(f"the option {name} is {value!r:.80}: {error}") from None
    return given
