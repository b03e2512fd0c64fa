"""Reports of records beside the logs that Redis refuses, such as a key of another type or a missing right."""

from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import ResponseError

from ..redisio.errors import is_transient
from ..telemetry.events import RecordRefused, Telemetry


@contextmanager
def reports_refusal(telemetry: Telemetry, record: str) -> Iterator[None]:
    """Emits `RecordRefused(record)` where Redis refuses a command for a reason that does not pass by itself."""
    try:
        yield
    except ResponseError as error:
        if not is_transient(error):
            telemetry.emit(RecordRefused(record))
        raise
