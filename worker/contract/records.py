"""What is written beside the log: the tombstone, the lifecycle, dead letters and the workers' own lines."""

from collections.abc import Mapping
from typing import Any, Self, TypeVar, cast

import msgspec

from .entries import Fields, Object, Usage, to_json

_T = TypeVar("_T")


class Tombstone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is left of a request when its log has expired. `time` is Unix ms."""

    outcome: str
    time: int
    digest: str = ""

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """A tombstone as it stands in Redis; one that cannot be read says nothing."""
        return _decoded(raw, cls, cls(outcome="", time=0))


class Lifecycle(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the lifecycle stream: `started` or `finished`. At least once: dedupe by `type`, `id` and `attempt`.

    `time` is Unix ms, `timings` are in milliseconds. `line` is the id of the line itself, where it was read.
    """

    line: str = ""
    type: str
    id: str
    job: str
    queue: str
    attempt: int
    time: int
    outcome: str = ""
    model: str = ""
    tenant: str = ""
    retry_of: str = ""
    usage: Usage = msgspec.field(default_factory=Usage)
    timings: Object = msgspec.field(default_factory=dict)

    def to_fields(self) -> Fields:
        """One stream field each; empty ones are left out."""
        values = {name: getattr(self, name) for name in self.__struct_fields__ if name != "line"}
        return {name: v if isinstance(v, str) else to_json(v) for name, v in values.items() if v not in ("", {})}

    @classmethod
    def read(cls, line: str, raw: Mapping[bytes, bytes]) -> Self:
        """A line as it stands in the stream; what is missing or cannot be read there is empty."""
        texts = _texts(raw)
        named = ("type", "id", "job", "queue", "outcome", "model", "tenant", "retry_of")
        return cls(
            line=line,
            attempt=_count(texts.get("attempt", "")),
            time=_count(texts.get("time", "")),
            usage=cast("Usage", _decoded(texts.get("usage", ""), dict[str, Any], {})),
            timings=_decoded(texts.get("timings", ""), dict[str, Any], {}),
            **{name: texts.get(name, "") for name in named},
        )


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A buried job, ready to be put back. `fields` is the job as it was, with bytes that are not UTF-8 replaced.

    `truncated` (on the wire `cut`) names the fields that were too large to be kept whole. `retried_as` is the id of the
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
        """One stream field each, `fields` and `cut` as JSON; the last two only where they say something."""
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
        """A letter as it stands in the stream; what is missing or cannot be read there is empty."""
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


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's line in the hash of workers. `beat` and `started` are Unix ms; `paused` is why it takes no jobs.

    `queues` are those that it serves, and `version` is that of its package; a worker of an earlier one does not say.
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


def _texts(raw: Mapping[bytes, bytes]) -> dict[str, str]:
    return {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, value in raw.items()}


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 15 else 0


def _decoded(text: str | bytes, kind: type[_T], otherwise: _T) -> _T:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError:
        return otherwise
