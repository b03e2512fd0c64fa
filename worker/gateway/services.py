"""What the routes of a gateway share. Each room exports `routes(services)`, and `application.py` joins them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from redis.asyncio import Redis

from ..client.async_client import Client
from ..contract.keys import Keys
from ..redisio.batching import CommandBatcher
from ..telemetry.events import Telemetry
from .access import Access
from .held_answers import HeldAnswers
from .limits import Limits
from .neighbours import Neighbours
from .open_streams import OpenStreams
from .settings import GatewaySettings

EndStreams = Callable[[float], None]
"""Ends the open streams of a room, as their protocol needs. It gets the seconds that they have; it returns at once."""


@dataclass(frozen=True, slots=True)
class Services:
    """The parts that routes use."""

    settings: GatewaySettings
    client: Client
    redis: Redis
    """For commands of the gateway's own. Wrap them in `MappedRetry`, so that an outage becomes status 503."""
    commands: CommandBatcher
    """For those of `redis` that are sent for each request. They share one connection."""
    keys: Keys
    access: Access
    limits: Limits
    streams: OpenStreams
    neighbours: Neighbours
    telemetry: Telemetry
    at_end: list[EndStreams] = field(default_factory=list)
    """Called when the process stops, once the listening socket is closed. A room appends to it in `routes`.

    `streams.end_all` is the first.
    """
    held: HeldAnswers = field(default_factory=HeldAnswers)
    """The bound on answers that are sent as a whole."""
    is_stopping: Callable[[], bool] = lambda: False
    """Whether SIGTERM has come. Streams that begin now still get all that they can."""
