"""Reports records that Redis refuses, for example because of a key of another type or a missing right."""

from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import ResponseError

from ..redisio.errors import is_transient
from ..telemetry.events import RecordRefused, Telemetry


@contextmanager
def reports_refusal(telemetry: Telemetry, record: str) -> Iterator[None]:
    """Emits `RecordRefused(record)` if Redis refuses a command for a reason that is not temporary."""
    try:
        yield
    except ResponseError as error:
        if not is_transient(error):
            telemetry.emit(RecordRefused(record))
        raise
