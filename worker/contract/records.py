"""What is written beside the log: the tombstone, the lifecycle, dead letters and the workers' own lines."""

import msgspec

from worker.contract.entries import Fields, Object, to_json


class Tombstone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is left of a request when its log has expired. `time` is Unix ms."""

    outcome: str
    time: int
    digest: str = ""


class Lifecycle(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the lifecycle stream: `started` or `finished`. At least once: dedupe by `type`, `id` and `attempt`."""

    type: str
    id: str
    job: str
    queue: str
    attempt: int
    time: int
    outcome: str = ""
    model: str = ""
    tenant: str = ""
    usage: Object = msgspec.field(default_factory=dict)
    timings: Object = msgspec.field(default_factory=dict)

    def to_fields(self) -> Fields:
        """One stream field each; empty ones are left out."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: v if isinstance(v, str) else to_json(v) for name, v in values.items() if v not in ("", {})}


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A buried job, ready to be put back: `fields` is the job as it was, bytes that are no UTF-8 replaced."""

    reason: str
    queue: str
    job: str
    time: int
    fields: Fields

    def to_fields(self) -> Fields:
        """One stream field each, `fields` as JSON."""
        return {
            "reason": self.reason,
            "queue": self.queue,
            "job": self.job,
            "time": str(self.time),
            "fields": to_json(self.fields),
        }


class WorkerLine(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's line in the hash of workers. `beat` and `started` are Unix ms."""

    name: str
    beat: int
    started: int
    slots: int
    running: int
    finished: int
    draining: bool = False
