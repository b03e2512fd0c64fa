"""A job, which is a request for an answer in a job stream, and the validation of jobs."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec

from .canonical import canonical_json
from .entries import Fields, Object, to_json
from .ids import VERSION, is_request_id

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""The default limit of a job's `request`, in bytes."""

MAX_OTHER_FIELDS_BYTES = 16 * 1024
"""The limit of everything else in a job, in bytes: other fields, known or not, and the names of all fields."""

MAX_FALLBACKS = 8
MAX_NAME = 256
"""The longest name of a model, tenant or `traceparent`, in characters."""

MAX_RETENTION = 30 * 24 * 3600
"""The longest retention of a log that a job may set, in seconds."""

FIELDS = (b"v", b"id", b"request", b"deadline", b"retention", b"fallbacks", b"tenant", b"traceparent", b"retry_of")
"""The fields of a job that are in the contract."""

INVALID = ("invalid_job", "job_too_large")
"""The codes of an `InvalidJob`."""

_LENGTHS = ("max_tokens", "max_completion_tokens")

RawFields: TypeAlias = Mapping[bytes, bytes]

_FORBIDDEN = (
    # These control transfers between replicas, and the worker itself needs the first.
    "kv_transfer_params",
    "ec_transfer_params",
    # Addresses from which some servers fetch a prompt's cache, and the replica that runs it: no job may choose these.
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "data_parallel_rank",
    # Tries of one job would collide in vLLM, where an earlier try may still run.
    "request_id",
)
"""Fields of a request that a job may not set.

Of the fields of vLLM 0.32, a job may set: `priority` (vLLM refuses it unless its operator has turned it on),
`cache_salt` and `session_id` (they select a cache that only jobs with the same value share), `chat_template` (vLLM
refuses it unless its operator has turned it on), `mm_processor_kwargs` and `media_io_kwargs` (how the job's own media
are read). vLLM fetches the URLs of images and other media: its --allowed-media-domains limits the domains.
"""

_FORBIDDEN_XARGS = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
"""vLLM reads these from `vllm_xargs` without a check. All other fields there belong to plugins of vLLM."""


class InvalidJob(ValueError):
    """A job cannot be run. `code` is for programs, the message for people."""

    def __init__(self, message: str, code: str = "invalid_job") -> None:
        super().__init__(message)
        self.code = code


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A valid job. `deadline` is Unix ms by Redis's clock, `retention` seconds.

    `retry_of` is the id of the request that this job tries again.
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
    """The request id of a job, which identifies its log.

    Raises:
        InvalidJob: when the id is missing or invalid.
    """
    raw = fields.get(b"id")
    if raw is None:
        raise InvalidJob("the job has no id: add a field `id` of 1 to 128 characters of A-Za-z0-9_-")
    text = raw.decode("utf-8", "replace")
    if not is_request_id(text):
        raise InvalidJob(f"the job's id {text[:140]!r} cannot be used: it must be 1 to 128 characters of A-Za-z0-9_-")
    return text


def deadline_and_retention(fields: RawFields) -> tuple[int | None, int | None]:
    """A job's deadline (Unix ms) and retention (seconds). The request is not parsed.

    Raises:
        InvalidJob: when one of them is invalid.
    """
    return (
        _whole_number(fields, "deadline", "a time in Unix milliseconds"),
        _whole_number(fields, "retention", f"a number of seconds up to {MAX_RETENTION}", MAX_RETENTION),
    )


def parse_job(fields: RawFields, max_request_bytes: int = MAX_REQUEST_BYTES) -> Job:
    """Read a job from the fields of its stream entry. Fields that are not in the contract are ignored.

    Raises:
        InvalidJob: when the job is invalid. The message has the reason and the fix.
    """
    size, limit = size_of(fields), max_request_bytes + MAX_OTHER_FIELDS_BYTES
    if size > limit:
        raise InvalidJob(
            f"the job has {size} bytes in all, above the limit of {limit} ({MAX_OTHER_FIELDS_BYTES} more than "
            "WORKER_MAX_REQUEST_BYTES)",
            code="job_too_large",
        )
    version = _name(fields, "v") or str(VERSION)
    if version != str(VERSION):
        raise InvalidJob(f"the job's v is {version!r}: this worker supports version {VERSION} of the contract")
    deadline, retention = deadline_and_retention(fields)
    retry_of = _text(fields, "retry_of")
    if retry_of and not is_request_id(retry_of):
        raise InvalidJob(f"the job's retry_of is {retry_of[:140]!r}: it must be the id of a request")
    return Job(
        id=request_id_of(fields),
        request=_request(fields, max_request_bytes),
        deadline=deadline,
        retention=retention,
        fallbacks=_model_names(_text(fields, "fallbacks")),
        tenant=_name(fields, "tenant"),
        traceparent=_name(fields, "traceparent"),
        retry_of=retry_of,
    )


def size_of(fields: RawFields) -> int:
    """The size of a job in bytes: the names and values of its fields."""
    return sum(len(name) + len(value) for name, value in fields.items())


def check_request(request: object) -> Object:
    """Check the rules that every chat request must keep, for any model. vLLM checks the rest. Returns the request.

    Raises:
        InvalidJob: when the request breaks a rule. The message has the reason.
    """
    if not isinstance(request, dict):
        raise InvalidJob("the request is not a JSON object: give the body of an OpenAI chat completion")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidJob('the request has no messages: give a list such as [{"role": "user", "content": "Hello"}]')
    model = request.get("model")
    if isinstance(model, str) and len(model) > MAX_NAME:
        raise InvalidJob(f"the request's model is a name of {len(model)} characters: at most {MAX_NAME} are allowed")
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
    """Check a request against the limits in a worker's settings. A `max_tokens` of 0 is no limit.

    Raises:
        InvalidJob: when the request exceeds a limit. The message has the field and the limit.
    """
    for name in ("n", "best_of"):
        choices = request.get(name)
        if isinstance(choices, int) and choices > max_choices:
            raise InvalidJob(
                f"the request's {name} is {choices}: at most {max_choices} answers may be requested "
                "(WORKER_MAX_CHOICES)"
            )
    for name in _LENGTHS if max_tokens else ():
        tokens = request.get(name)
        # vLLM accepts "5000" and 5e3 as numbers too.
        if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens > max_tokens):
            raise InvalidJob(
                f"the request's {name} is {to_json(tokens)[:40]}: it must be a whole number up to {max_tokens} "
                "(WORKER_MAX_TOKENS)"
            )


def with_max_tokens(job: Job, max_tokens: int) -> Job:
    """The job with `max_tokens` in its request, unless the request limits the answer itself or there is no limit."""
    if not max_tokens or any(job.request.get(name) is not None for name in _LENGTHS):
        return job
    return msgspec.structs.replace(job, request=job.request | {"max_tokens": max_tokens})


def digest(request: Mapping[str, object], fallbacks: Sequence[str] = ()) -> str:
    """The digest of a request, by which two requests under one id are told apart.

    The digest is the first 32 hex digits of SHA-256 over the request in the form of RFC 8785. Fallback models are a
    part of the request: if there are any, their list follows in the same form.
    """
    return _digest(canonical_json(request), fallbacks)


def is_digest_of(known: str, request: Mapping[str, object], fallbacks: Sequence[str] = ()) -> bool:
    """Whether a digest in a log or tombstone is that of a request.

    Earlier versions did not write numbers as RFC 8785 does: they hashed 1.0 where this version hashes 1.
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
        raise InvalidJob(f"the job's {name} has {len(text)} characters: at most {MAX_NAME} are allowed")
    return text


def _whole_number(fields: RawFields, name: str, expected: str, limit: int = 2**53 - 1) -> int | None:
    text = _text(fields, name)
    if not text:
        return None
    # Python refuses to convert thousands of digits, with an error that is not an InvalidJob.
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and 0 < int(text) <= limit):
        raise InvalidJob(f"the job's {name} is {text[:40]!r}: it must be {expected}")
    return int(text)


def _model_names(text: str) -> tuple[str, ...]:
    if not text:
        return ()
    try:
        names = tuple(msgspec.json.decode(text, type=list[str]))
    except msgspec.DecodeError as error:
        raise InvalidJob(f"the job's fallbacks is not a JSON list of model names: {error}") from error
    if len(names) > MAX_FALLBACKS or not all(0 < len(name) <= MAX_NAME for name in names):
        raise InvalidJob(
            f"the job's fallbacks are too many, or one has no name or a long one: at most {MAX_FALLBACKS} models of "
            f"1 to {MAX_NAME} characters are allowed"
        )
    return names
