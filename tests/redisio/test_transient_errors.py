"""Which refusals of Redis may pass by themselves."""

import pytest
from redis.exceptions import ResponseError

from worker.redisio.errors import is_transient


@pytest.mark.parametrize(
    ("message", "passes"),
    [
        ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", True),
        ("NOREPLICAS Not enough good replicas to write.", True),
        ("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.", True),
        ("BUSY Redis is busy running a script.", True),
        ("UNBLOCKED force unblock from blocking operation, instance state changed", True),
        ("OOM command not allowed when used memory > 'maxmemory'.", True),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", False),
        ("unknown command 'XADD', with args beginning with: 'OOM '", False),
    ],
)
def test_a_refusal_that_passes_by_itself_is_transient(message: str, passes: bool) -> None:  # noqa: FBT001 - a parameter
    assert is_transient(ResponseError(message)) is passes
