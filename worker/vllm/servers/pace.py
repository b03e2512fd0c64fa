"""The pace of probes, trials and pauses at vLLM servers, in seconds. Plain data."""

from dataclasses import dataclass


@dataclass(slots=True)
class ServerPace:
    """How often a worker probes its servers, and how long it waits for them.

    A pool and all of its circuits share one object and read it each time, so that tests can change the pace.
    """

    probe_every: float = 2.0
    """The time between two probes of a server that is away, and between two checks of a server that works."""
    probe_limit: float = 3.0
    """The time limit of a probe. After a late answer the limit of the next probe is doubled."""
    idle_every: float = 2.5
    """The time between two probes of a server that has no requests."""
    idle_list_every: float = 4.0
    """The time after which such a probe requests the models instead of the health: in turns."""
    longest_probe_limit: float = 60.0
    list_every: float = 60.0
    """The time between two requests for the models of a server that works."""
    list_again_after: float = 2.0
    """The time between two requests for the models of all servers, which are sent if no server lists a model."""
    trial: float = 10.0
    """The time for which a trial request without any event blocks other requests to its server."""
    late_trial: float = 60.0
    """The same, while probes of the server are late."""
    first_pause: float = 2.0
    """The pause before the second probe or trial in a row; each further pause is twice as long."""
    longest_pause: float = 30.0
    first_drain_pause: float = 1.0
    """The pause before the worker first asks a server that is shutting down; each further pause is twice as long."""
    load_every: float = 1.0
    """The time between two readings of the load of a server that has requests."""
    load_again_after: float = 60.0
    """The time until the load of a server is read again that does not publish it."""
    frozen_after: float = 2.0
    """The silence after which a stream counts as frozen, once its server refuses connections."""
