"""The times of following, in seconds. Tests use other values."""

from dataclasses import dataclass

from ..contract.feed import MAX_SILENCE
from ..redisio.clients import COMMAND_TIMEOUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """When logs are read, and how long reads wait, in seconds."""

    command_timeout: float = COMMAND_TIMEOUT
    """The silence after which a command to Redis fails."""
    tick: float = 0.5
    """The time between two checks for followers that receive no entries."""
    noticed_after: float = MAX_SILENCE + 0.05
    """The time from the confirmation of a subscription until every new entry is published, since publishers skip a
    channel without subscribers for a while. The log is read meanwhile, and for as long before the confirmation."""
    reread_pause: float = 0.05
    """The pause between two of these reads."""
    retry_refused_after: float = 5.0
    """The time from the refusal of a subscription until one is requested again. The logs are polled meanwhile."""
    block: float = 5.0
    """How long a blocking read waits for entries."""
    first_pause: float = 0.02
    """The pause before the first retry for a log that does not exist yet, or at a hole. Later pauses are doubled."""
    longest_pause: float = 0.5
    """The longest of these pauses."""
