"""The outline of a job: what decides where the job waits, read without parsing all of its request. No I/O."""

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

import msgspec

from ..broker.job_queue import Delivery
from ..contract.job import (
    MAX_NAME,
    MAX_OTHER_FIELDS_BYTES,
    InvalidJob,
    check_limits,
    deadline_and_retention,
    parse_job,
    request_id_of,
    size_of,
)
from ..settings import Settings

DAY_MS = 24 * 3600 * 1000
"""The time from the entry of a job without a deadline to its implied deadline."""

_PARSED_UP_TO = 64 * 1024
"""The size of a job in bytes up to which its request is parsed before the job is parked. Many large requests would hold
the event loop up."""

BETWEEN_MODELS = "|"
"""Separates the model and the fallbacks in the name of a line."""

_PLAIN = "/:@+=,"


class _Request(msgspec.Struct):
    model: object = ""


_request = msgspec.json.Decoder(_Request)
_names = msgspec.json.Decoder(list[str])


@dataclass(frozen=True, slots=True)
class JobOutline:
    """What decides where a job waits. `models` are its model and its fallbacks; `deadline` is Unix ms."""

    models: tuple[str, ...]
    tenant: str
    deadline: int


def outline_of(delivery: Delivery) -> JobOutline | None:
    """The outline of a job; None if the job cannot be valid. The request is scanned for its model only."""
    fields = delivery.fields
    try:
        request_id_of(fields)
        deadline, _ = deadline_and_retention(fields)
        model = _request.decode(fields[b"request"]).model
        fallbacks = _names.decode(raw) if (raw := fields.get(b"fallbacks")) else ()
        tenant = fields.get(b"tenant", b"").decode()
    except (InvalidJob, KeyError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if len(tenant) > MAX_NAME:
        return None
    models = (model if isinstance(model, str) else "", *fallbacks)
    return JobOutline(models, tenant, deadline or delivery.enqueued + DAY_MS)


def may_be_valid(delivery: Delivery, settings: Settings) -> bool:
    """Whether a job validates, as far as that is known in little time. A large request is not parsed."""
    size = size_of(delivery.fields)
    if _PARSED_UP_TO < size <= settings.max_request_bytes + MAX_OTHER_FIELDS_BYTES:
        return True
    try:
        job = parse_job(delivery.fields, settings.max_request_bytes)
        check_limits(job.request, max_choices=settings.max_choices, max_tokens=settings.max_tokens)
    except InvalidJob:
        return False
    return True


def line_name(models: Sequence[str]) -> str:
    """The name of the line in which jobs with this model and these fallbacks wait. It is printable ASCII."""
    return BETWEEN_MODELS.join(quote(model, safe=_PLAIN, errors="surrogatepass") for model in models)


def models_of_line(name: str) -> tuple[str, ...]:
    """The model and the fallbacks of the jobs in a line."""
    return tuple(unquote(model, errors="replace") for model in name.split(BETWEEN_MODELS))
