"""The options of a new job, and the construction of the job. All checks are made before a command is sent to Redis."""

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
    """The options of a job. None has the same effect as omitting the option.

    `id`: the request id, 1 to 128 characters of A-Za-z0-9_-; without it one is generated. `queue`: without it,
    `default`. `timeout`: seconds within which the answer must be complete (24 hours). `retention`: seconds that the log
    is kept after its end. `fallbacks`: further models. `tenant`: the owner of the job. `traceparent`: W3C trace
    context. `retry_of`: the request that this one repeats.
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
    """A job has no option of this name."""


class NewJob(NamedTuple):
    """A job that can be added to a queue. `timeout`, in seconds, becomes its deadline by Redis's clock."""

    job: Job
    queue: str
    timeout: float | None


def new_job(request: Mapping[str, object], **options: Unpack[JobOptions]) -> NewJob:
    """Build the job that `enqueue` adds.

    Raises:
        UnknownOption: when a job has no such option.
        InvalidJob: when the request or an option is invalid.
    """
    given = _checked(options)
    queue, timeout = given.pop("queue", DEFAULT_QUEUE), given.pop("timeout", None)
    if not is_queue_name(queue):
        raise InvalidJob(f"the queue {queue[:80]!r} has an invalid name: it must be 1 to 64 characters of A-Za-z0-9_-")
    if timeout is not None and not 0 < timeout <= _LONGEST:  # false for NaN too
        raise InvalidJob(f"the timeout is {timeout:g}: it must be more than 0 seconds and at most a year")
    if not isinstance(request, Mapping):
        raise InvalidJob("the request is not a JSON object: give the body of an OpenAI chat completion")
    given["fallbacks"] = tuple(given.get("fallbacks", ()))
    body: dict[str, Any] = dict(request)
    for name, value in body.items():
        if (number := _find_non_json_number(value)) is not None:
            raise InvalidJob(f"the request's {name} holds {number}: JSON has no such number")
    job = Job(request=body, **({"id": new_request_id()} | given))
    try:
        fields = {name.encode(): value.encode() for name, value in job.to_fields().items()}
    except UnicodeEncodeError:
        raise InvalidJob("the job holds text that is not Unicode, such as half of an emoji: correct the text") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidJob(f"the request cannot be written as JSON: {error}") from None
    # The job is parsed as a worker does, so a job that workers would refuse is refused here, except for its size.
    return NewJob(parse_job(fields, _NO_LIMIT), queue, timeout)


def _find_non_json_number(value: object) -> float | None:
    """Return the first NaN or Infinity in a value: JSON has no such numbers, and msgspec writes null for them."""
    unread = [value]
    seen: set[int] = set()  # a value that contains itself is refused later, by the encoder
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
    """Return the options that are not None, after a check of their types."""
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - JobOptions.__annotations__):
        known = ", ".join(JobOptions.__annotations__)
        raise UnknownOption(f"a job has no option {', '.join(unknown)}: the options are {known}")
    for name, value in given.items():
        try:
            msgspec.convert(value, JobOptions.__annotations__[name])
        except msgspec.ValidationError as error:
            raise InvalidJob(f"the option {name} is {value!r:.80}: {error}") from None
    return given
