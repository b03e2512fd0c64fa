"""The records besides the logs: tombstones, lifecycle entries, dead letters, records of workers and of gateways."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self, TypeVar, cast, get_type_hints

import msgspec

from .entries import Fields, Object, Usage, to_json

_T = TypeVar("_T")


class Tombstone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The outcome of a request, kept longer than its log. `time` is Unix ms."""

    outcome: str
    time: int
    digest: str = ""

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """Read a tombstone as stored in Redis. A tombstone that cannot be read is empty."""
        return _decoded(raw, cls, cls(outcome="", time=0))


class Lifecycle(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of the lifecycle stream: a request has `started` or `finished`.

    An entry may come more than once: deduplicate by `type`, `id` and `attempt`. `time` is Unix ms, `timings` are in
    milliseconds. `worker` is the name of the worker that started or ended the request, `server` the address of the vLLM
    server that last streamed to it, without a password. `line` is the entry's own id; it is empty in an entry that was
    not read from Redis.
    """

    line: str = ""
    type: str
    id: str
    job: str
    queue: str
    attempt: int
    time: int
    worker: str = ""
    server: str = ""
    outcome: str = ""
    model: str = ""
    tenant: str = ""
    retry_of: str = ""
    usage: Usage = msgspec.field(default_factory=Usage)
    timings: Object = msgspec.field(default_factory=dict)

    def to_fields(self) -> Fields:
        """The entry as stream fields, without empty ones."""
        values = {name: getattr(self, name) for name in self.__struct_fields__ if name != "line"}
        return {name: v if isinstance(v, str) else to_json(v) for name, v in values.items() if v not in ("", {})}

    @classmethod
    def read(cls, line: str, raw: Mapping[bytes, bytes]) -> Self:
        """Read an entry as stored in the stream. Fields that are missing or cannot be read are empty."""
        texts = _texts(raw)
        named = ("type", "id", "job", "queue", "worker", "server", "outcome", "model", "tenant", "retry_of")
        return cls(
            line=line,
            attempt=_count(texts.get("attempt", "")),
            time=_count(texts.get("time", "")),
            usage=cast("Usage", _decoded(texts.get("usage", ""), dict[str, Any], {})),
            timings=_decoded(texts.get("timings", ""), dict[str, Any], {}),
            **{name: texts.get(name, "") for name in named},
        )


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A buried job, ready to be put back. `fields` are the job's fields, with bytes that are not UTF-8 replaced.

    `truncated` (on the wire `cut`) lists the fields that were too large to be kept whole. `retried_as` is the id of the
    request by which the job was put back.
    """

    reason: str
    queue: str
    job: str
    time: int
    fields: Fields
    truncated: tuple[str, ...] = ()
    retried_as: str = ""

    def to_fields(self) -> Fields:
        """The letter as stream fields. `fields` and `cut` are JSON; empty `cut` and `retried_as` are left out."""
        fields = {
            "reason": self.reason,
            "queue": self.queue,
            "job": self.job,
            "time": str(self.time),
            "fields": to_json(self.fields),
        }
        if self.truncated:
            fields["cut"] = to_json(self.truncated)
        if self.retried_as:
            fields["retried_as"] = self.retried_as
        return fields

    @classmethod
    def read(cls, raw: Mapping[bytes, bytes]) -> Self:
        """Read a letter as stored in the stream. Fields that are missing or cannot be read are empty."""
        texts = _texts(raw)
        return cls(
            reason=texts.get("reason", ""),
            queue=texts.get("queue", ""),
            job=texts.get("job", ""),
            time=_count(texts.get("time", "")),
            fields=_decoded(texts.get("fields", ""), Fields, {}),
            truncated=_decoded(texts.get("cut", ""), tuple[str, ...], ()),
            retried_as=texts.get("retried_as", ""),
        )


REFUSES_ALL = "refuses_all"
"""The reason in the record of a server that is up and has refused every request for a while, as a full server does."""

SILENT = "silent"
"""The reason in the record of a server that is up, has requests, and has sent no event of any of them for a while."""


class ControlEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator asked of the workers: the value of a field in the control hash.

    `by` is who asked (`user@host`), `why` the reason or empty, `since` and `until` are Unix ms. An `until` of 0 is no
    end.
    """

    by: str = ""
    why: str = ""
    since: int = 0
    until: int = 0

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """Read an entry as stored in Redis. Whatever cannot be read has its default: the field itself is the order."""
        known = _known_values(raw, _TYPES_OF_CONTROL_ENTRY)
        texts = {name: known[name][:_MAX_TEXT] for name in ("by", "why") if name in known}
        return cls(**known | texts)

    def has_ended(self, now: int) -> bool:
        """Whether the entry no longer holds at a time in Unix ms of Redis's clock."""
        return 0 < self.until <= now


_MAX_TEXT = 500
"""Characters of a text that a control entry keeps: every worker reads all entries three times a lease."""


class ServerRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A vLLM server as a worker sees it, in the worker's record.

    `url` has no password. `state` is `starting` (not probed yet), `up` or `away`, `reason` is why the server is away,
    or `refuses_all` or `silent`.
    `requests` are the worker's requests in flight at the server, `limit` is how many it may have there at present.
    """

    url: str
    state: str
    reason: str = ""
    requests: int = 0
    limit: float = 0.0


class QueueCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker has done of one queue: the jobs that end in a second lately, and those that failed so far."""

    finished_per_s: float = 0.0
    failed: int = 0


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's record in the hash of workers.

    `beat` and `started` are Unix ms. `paused` is the reason why the worker takes no jobs, and is empty while it takes
    jobs. `starting` is whether the worker takes no jobs because it has not probed its vLLM servers yet. `queues` are
    the queues that the worker serves, `version` is that of its package, `lease` its lease in seconds, `metrics` the
    address of its metrics, `models` the names of the models that its servers have, as far as they are known, without
    those that do not fit, and `models_away` those of `models` whose servers are all away. `paused_queues` are those of
    `queues` that an operator paused, as far as this worker knows.

    `finished`, `failed`, `cancelled` and `tokens` count since the start: jobs that ended here, those of them with the
    outcome `error`, those that were cancelled, and log entries that Redis accepted, nearly all of them with one token.
    `finished_per_s` and `tokens_per_s` are their rates over the latest two to three beats, so the rates of all live
    workers add up to that of the installation. `silence` is for how many seconds the most silent stream has had no
    event from vLLM; 0 without streams. `presence` is whether the worker is subscribed to its channel of presence
    (`Keys.presence`).

    Earlier versions wrote only some of the fields that have a default here.
    """

    name: str
    beat: int
    started: int
    slots: int
    running: int
    finished: int
    draining: bool = False
    paused: str = ""
    queues: tuple[str, ...] = ()
    version: str = ""
    starting: bool = False
    lease: float = 0.0
    host: str = ""
    pid: int = 0
    metrics: str = ""
    servers: tuple[ServerRecord, ...] = ()
    models: tuple[str, ...] = ()
    models_away: tuple[str, ...] = ()
    paused_queues: tuple[str, ...] = ()
    presence: bool = False
    failed: int = 0
    cancelled: int = 0
    tokens: int = 0
    finished_per_s: float = 0.0
    tokens_per_s: float = 0.0
    by_queue: dict[str, QueueCounts] = {}
    silence: float = 0.0

    @classmethod
    def read(cls, raw: bytes) -> Self | None:
        """Read a record as stored in Redis; None if it is not one.

        A later version may write other values. A field with such a value has its default.
        """
        try:
            return cls(**_known_values(raw, _TYPES_OF_WORKER_RECORD))
        except TypeError:  # a field without a default is missing
            return None


class GatewayRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A gateway process's record in the sorted set of gateways.

    `beat` is when it was renewed, in Unix ms: the record's score. `started` is Unix ms, `version` that of the package,
    `address` where it listens. `connections` and `streams` are those that are open.
    """

    host: str
    pid: int
    started: int = 0
    version: str = ""
    address: str = ""
    connections: int = 0
    streams: int = 0
    draining: bool = False
    beat: int = 0

    @property
    def name(self) -> str:
        """The process, by its host and its pid."""
        return f"{self.host}:{self.pid}"

    @classmethod
    def read(cls, raw: bytes, beat: int) -> Self | None:
        """Read a record and its score as stored in Redis; None if it is not one. See `WorkerRecord.read`."""
        try:
            return cls(**_known_values(raw, _TYPES_OF_GATEWAY_RECORD) | {"beat": beat})
        except TypeError:
            return None


_TYPES_OF_WORKER_RECORD = get_type_hints(WorkerRecord)
_TYPES_OF_GATEWAY_RECORD = get_type_hints(GatewayRecord)
_TYPES_OF_CONTROL_ENTRY = get_type_hints(ControlEntry)


def _known_values(raw: bytes, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a JSON object that have these types, by name. A text that is no such object has none."""
    values = _decoded(raw, dict[str, Any], {})
    known = {}
    for name, kind in kinds.items():
        with suppress(msgspec.ValidationError, KeyError):
            known[name] = msgspec.convert(values[name], kind)
    return known


def _texts(raw: Mapping[bytes, bytes]) -> dict[str, str]:
    return {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, value in raw.items()}


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 15 else 0


def _decoded(text: str | bytes, kind: type[_T], otherwise: _T) -> _T:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return otherwise
