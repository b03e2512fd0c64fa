"""The events that a gateway emits. The rules for all events are in `worker.telemetry.events`."""

from dataclasses import dataclass

from .events import Event


@dataclass(frozen=True, slots=True)
class GatewayStarted(Event):
    version: str
    listen: str
    redis: str


@dataclass(frozen=True, slots=True)
class GatewayDraining(Event):
    """SIGTERM arrived: `/readyz` is false, and the listening socket closes after the drain delay."""

    connections: int


@dataclass(frozen=True, slots=True)
class GatewayStopped(Event):
    """The process ends. `cut` connections had not ended in time."""

    cut: int = 0


@dataclass(frozen=True, slots=True)
class GatewayProcessEnded(Event):
    """One of several processes has ended by itself, and is started again."""

    level = "warning"
    pid: int
    status: int


@dataclass(frozen=True, slots=True)
class ApiKeysUnreadable(Event):
    """The file with the API keys has changed and is bad. The keys that were read before stay valid."""

    level = "warning"
    error: str


@dataclass(frozen=True, slots=True)
class RequestServed(Event):
    """A request has got its whole response. `route` is its pattern, `path` has no query string."""

    method: str
    route: str
    path: str
    status: int
    seconds: float
    key: str = ""
    """The name of the API key."""


@dataclass(frozen=True, slots=True)
class ProbeServed(RequestServed):
    """A probe has got its response: they come every few seconds."""

    level = "silent"


@dataclass(frozen=True, slots=True)
class HttpServerFault(Event):
    """The HTTP server reports an error that has no exception."""

    level = "error"
    error: str
