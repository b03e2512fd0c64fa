"""Serves with one process or several, as the settings say."""

import resource
from collections.abc import Callable, Coroutine
from typing import Any

from ..settings import parse_address
from ..telemetry.events import Receivers
from ..telemetry.logging import LogReceiver
from .process import LAST_STEPS, Gateway, bind_listener, key_ring
from .settings import GatewaySettings
from .supervisor import Supervisor

_SPARE = 10.0
"""Seconds beyond the limit of a process after which its parent kills it."""

RunAsync = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]
"""Runs a coroutine in an event loop of its own."""


def serve(settings: GatewaySettings, run_async: RunAsync) -> int:
    """Serve until SIGTERM; returns the exit status.

    Raises:
        ConfigError: when an address cannot be served, or the API keys cannot be read.
    """
    _raise_file_limit()
    if settings.workers == 1:

        async def run_alone() -> None:
            await Gateway(settings).run()

        run_async(run_alone)
        return 0
    listening = bind_listener(settings)

    key_ring(settings)  # what is wrong with it is said once, and not by each child

    def run_child(number: int, parent: int) -> int:
        own = settings.model_copy(update={"metrics": metrics_address(settings.metrics, number)})

        async def run() -> None:
            await Gateway(own, listening=listening, parent=parent).run()

        run_async(run)
        return 0

    limit = settings.drain_delay + settings.drain_timeout + LAST_STEPS + _SPARE
    return Supervisor(settings.workers, run_child, listening, Receivers(LogReceiver()), limit).run()


def _raise_file_limit() -> None:
    """Let the process open as many files as it may: a connection is one, and the usual limit is 1,024."""
    try:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):
        return


def metrics_address(address: str, number: int) -> str:
    """The address for the metrics of one of several processes: each has the port after that of the one before."""
    if not address:
        return ""
    port = parse_address(address)[1]
    return f"{address.rpartition(':')[0]}:{port + number if port else 0}"
