"""The pace of following, in seconds. Tests choose others."""

from dataclasses import dataclass

from ..contract.feed import MAX_SILENCE
from ..redisio.clients import COMMAND_TIMEOUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """When logs are read, and how long reads wait."""

    command_timeout: float = COMMAND_TIMEOUT
    """Of silence, after which a command to Redis fails."""
    tick: float = 0.5
    """Between two checks for followers that receive nothing."""
    settles_after: float = MAX_SILENCE + 0.05
    """From the confirmation of a subscription until every new entry is published: publishers skip a channel without
    subscribers for a while. The log is read meanwhile, and for as long before the confirmation."""
    settling_pause: float = 0.05
    """Between two of these readings."""
    block: float = 5.0
    """That a blocking read waits for entries."""
    first_pause: float = 0.02
    """Until the first retry for a log that does not exist yet, or at a hole. Each further pause is twice as long."""
    longest_pause: float = 0.5
    """The longest of these pauses."""
