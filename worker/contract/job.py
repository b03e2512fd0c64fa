"""A job: what a service asks for, as it stands in a job stream."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec

from .canonical import canonical_json
from .entries import Fields, Object, to_json
from .ids import VERSION, is_request_id

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""The default limit of a job's `request`, in bytes."""

MAX_BESIDE_BYTES = 16 * 1024
"""What all else of a job may add to that, names of fields included; fields that are not in the contract count too."""

MAX_FALLBACKS = 8
MAX_NAME = 256
"""The longest name of a model, tenant or `traceparent`, in characters."""

MAX_RETENTION = 30 * 24 * 3600
"""The longest that a job may have its log kept, in seconds."""

FIELDS = (b"v", b"id", b"request", b"deadline", b"retention", b"fallbacks", b"tenant", b"traceparent", b"retry_of")
"""The fields of a job that are in the contract."""

INVALID = ("invalid_job", "job_too_large")
"""The codes of an `InvalidJob`."""

_LENGTHS = ("max_tokens", "max_completion_tokens")

RawFields: TypeAlias = Mapping[bytes, bytes]

_FORBIDDEN = (
    # They steer the machinery between replicas, and the worker needs the first for itself.
    "kv_transfer_params",
    "ec_transfer_params",
    # Where some servers fetch a prompt's cache from, and which replica runs it: addresses, which no job may choose.
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "data_parallel_rank",
    # Tries of one job would collide in vLLM, where a former one may still run.
    "request_id",
)
"""Fields of a request that are never a job's business.

Left to the job, of what vLLM 0.32 knows: `priority` (refused by vLLM unless its operator has turned it on),
`cache_salt` and `session_id` (they name a cache, and collide only with one's own), `chat_template` (refused by vLLM
unless turned on), `mm_processor_kwargs` and `media_io_kwargs` (how the job's own media are read). URLs of images and
the like are fetched by vLLM: its --allowed-media-domains says from where.
"""

_FORBIDDEN_XARGS = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
"""vLLM takes `vllm_xargs` for the place where these come from, unchecked; what else is in it is its plugins' own."""


class InvalidJob(ValueError):
    """A job that cannot be run. `code` is for programs, the text for people."""

    def __init__(self, message: str, code: str = "invalid_job") -> None:
        super().__init__(message)
        self.code = code


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job that validates. `deadline` is Unix ms by Redis's clock, `retention` seconds.

    `retry_of` is the request that this one is another try of.
    """

    id: str
    request: Object
    deadline: int | None = None
    retention: int | None = None
    fallbacks: tuple[str, ...] = ()
    tenant: str = ""
    traceparent: str = ""
    retry_of: str = ""

    def to_fields(self) -> Fields:
        """The job as it is added to a job stream."""
        fields = {"v": str(VERSION), "id": self.id, "request": to_json(self.request)}
        if self.deadline is not None:
            fields["deadline"] = str(self.deadline)
        if self.retention is not None:
            fields["retention"] = str(self.retention)
        if self.fallbacks:
            fields["fallbacks"] = to_json(self.fallbacks)
        if self.tenant:
            fields["tenant"] = self.tenant
        if self.traceparent:
            fields["traceparent"] = self.traceparent
        if self.retry_of:
            fields["retry_of"] = self.retry_of
        return fields


def request_id_of(fields: RawFields) -> str:
    """The job's id: all that is needed to find its log.

    Raises:
        InvalidJob: when there is none that can be used.
    """
    raw = fields.get(b"id")
    if raw is None:
        raise InvalidJob("the job has no id: add a field `id` of 1 to 128 characters of A-Za-z0-9_-")
    text = raw.decode("utf-8", "replace")
    if not is_request_id(text):
        raise InvalidJob(f"the job's id {text[:140]!r} cannot be used: it must be 1 to 128 characters of A-Za-z0-9_-")
    return text


def times_of(fields: RawFields) -> tuple[int | None, int | None]:
    """A job's deadline (Unix ms) and retention (seconds), without a look at its request.

    Raises:
        InvalidJob: when one of them cannot be.
    """
    return (
        _whole(fields, "deadline", "a time in Unix milliseconds"),
        _whole(fields, "retention", f"a number of seconds up to {MAX_RETENTION}", MAX_RETENTION),
    )


def parse_job(fields: RawFields, max_request_bytes: int = MAX_REQUEST_BYTES) -> Job:
    """Read a job from the fields of its stream entry. Fields that are not in the contract are passed over.

    Raises:
        InvalidJob: with what is wrong and how to mend it.
    """
    size, most = size_of(fields), max_request_bytes + MAX_BESIDE_BYTES
    if size > most:
        raise InvalidJob(
            f"the job has {size} bytes in all, above the limit of {most} ({MAX_BESIDE_BYTES} more than "
            "WORKER_MAX_REQUEST_BYTES)",
            code="job_too_large",
        )
    version = _name(fields, "v") or str(VERSION)
    if version != str(VERSION):
        raise InvalidJob(f"the job's v is {version!r}: this worker speaks version {VERSION} of the contract")
    fallbacks = _strings(_text(fields, "fallbacks"))
    deadline, retention = times_of(fields)
    return Job(
        id=request_id_of(fields),
        request=_request(fields, max_request_bytes),
        deadline=deadline,
        retention=retention,
        fallbacks=fallbacks,
        tenant=_name(fields, "tenant"),
        traceparent=_name(fields, "traceparent"),
        retry_of=_retry_of(_text(fields, "retry_of")),
    )


def size_of(fields: RawFields) -> int:
    """The bytes of a job's fields, names and values."""
    return sum(len(name) + len(value) for name, value in fields.items())


def check_request(request: object) -> Object:
    """Check what holds for every chat request, whatever the model; the rest is vLLM's to judge.

    Raises:
        InvalidJob: with what is wrong.
    """
    if not isinstance(request, dict):
        raise InvalidJob("the request is not a JSON object: give the body of an OpenAI chat completion")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidJob('the request has no messages: give a list such as [{"role": "user", "content": "Hello"}]')
    model = request.get("model")
    if isinstance(model, str) and len(model) > MAX_NAME:
        raise InvalidJob(f"the request's model is a name of {len(model)} characters: at most {MAX_NAME} are taken")
    forbidden = [name for name in _FORBIDDEN if name in request]
    extra = request.get("vllm_xargs")
    if isinstance(extra, dict):
        forbidden += [f"{name} in vllm_xargs" for name in _FORBIDDEN_XARGS if name in extra]
    if forbidden:
        raise InvalidJob(f"the request sets {', '.join(forbidden)}: only the worker may set this")
    n = request.get("n")
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise InvalidJob(f"the request's n is {to_json(n)[:40]}: it must be a whole number from 1")
    options = request.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise InvalidJob("the request's stream_options is not a JSON object")
    return request


def check_limits(request: Object, *, max_choices: int, max_tokens: int) -> None:
    """Check what a worker's settings limit; `max_tokens` of 0 is no limit.

    Raises:
        InvalidJob: with what is too much.
    """
    for name in ("n", "best_of"):
        choices = request.get(name)
        if isinstance(choices, int) and choices > max_choices:
            raise InvalidJob(
                f"the request's {name} is {choices}: at most {max_choices} answers may be asked for "
                "(WORKER_MAX_CHOICES)"
            )
    for name in _LENGTHS if max_tokens else ():
        tokens = request.get(name)
        # vLLM would take "5000" and 5e3 for numbers too.
        if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens > max_tokens):
            raise InvalidJob(
                f"the request's {name} is {to_json(tokens)[:40]}: it must be a whole number up to {max_tokens} "
                "(WORKER_MAX_TOKENS)"
            )


def with_limit(job: Job, max_tokens: int) -> Job:
    """The job as it is to be sent: where it does not say how long the answer may become, the limit is said."""
    if not max_tokens or any(job.request.get(name) is not None for name in _LENGTHS):
        return job
    return msgspec.structs.replace(job, request=job.request | {"max_tokens": max_tokens})


def digest(request: Mapping[str, object], fallbacks: Sequence[str] = ()) -> str:
    """What tells two requests under one id apart.

    The first 32 hex digits of SHA-256 over the request as RFC 8785 writes it; further models to fall back to are part
    of what is asked, so a list of them follows it when there is one, written in the same way.
    """
    return _digest(canonical_json(request), fallbacks)


def is_digest_of(known: str, request: Mapping[str, object], fallbacks: Sequence[str] = ()) -> bool:
    """Whether a digest in a log or tombstone is that of a request.

    Logs that were begun before numbers were written as RFC 8785 says hold a digest of 1.0 where 1 is hashed today.
    """
    return known == digest(request, fallbacks) or known == _digest(
        msgspec.json.encode(request, order="deterministic"), fallbacks
    )


def _digest(written: bytes, fallbacks: Sequence[str]) -> str:
    if fallbacks:
        written += msgspec.json.encode(list(fallbacks))
    return hashlib.sha256(written).hexdigest()[:32]


def _request(fields: RawFields, limit: int) -> Object:
    raw = fields.get(b"request")
    if raw is None:
        raise InvalidJob("the job has no request: add a field `request` with the JSON of a chat completion")
    if len(raw) > limit:
        raise InvalidJob(
            f"the request has {len(raw)} bytes, above the limit of {limit} (WORKER_MAX_REQUEST_BYTES)",
            code="job_too_large",
        )
    try:
        request = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJob(f"the request is not JSON: {error}") from error
    return check_request(request)


def _text(fields: RawFields, name: str) -> str:
    try:
        return fields.get(name.encode(), b"").decode()
    except UnicodeDecodeError as error:
        raise InvalidJob(f"the job's {name} is not UTF-8") from error


def _name(fields: RawFields, name: str) -> str:
    text = _text(fields, name)
    if len(text) > MAX_NAME:
        raise InvalidJob(f"the job's {name} has {len(text)} characters: at most {MAX_NAME} are taken")
    return text


def _whole(fields: RawFields, name: str, what: str, most: int = 2**53 - 1) -> int | None:
    text = _text(fields, name)
    if not text:
        return None
    # Python refuses to convert thousands of digits, with an error that is no InvalidJob.
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and 0 < int(text) <= most):
        raise InvalidJob(f"the job's {name} is {text[:40]!r}: it must be {what}")
    return int(text)


def _retry_of(text: str) -> str:
    if text and not is_request_id(text):
        raise InvalidJob(f"the job's retry_of is {text[:140]!r}: it must be the id of a request")
    return text


def _strings(text: str) -> tuple[str, ...]:
    if not text:
        return ()
    try:
        names = tuple(msgspec.json.decode(text, type=list[str]))
    except msgspec.DecodeError as error:
        raise InvalidJob(f"the job's fallbacks is not a JSON list of model names: {error}") from error
    if len(names) > MAX_FALLBACKS or not all(0 < len(name) <= MAX_NAME for name in names):
        raise InvalidJob(
            f"the job's fallbacks are too many, or one has no name or a long one: at most {MAX_FALLBACKS} models of "
            f"1 to {MAX_NAME} characters are taken"
        )
    return names
