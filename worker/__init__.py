"""vllm-relay: a durable, shareable token stream between vLLM and everything that follows a generation."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client.async_client import Client, RequestHandle, State, Status
    from .client.errors import (
        ClientError,
        Conflict,
        Expired,
        IncompleteLog,
        InvalidArgument,
        Misused,
        QueueFull,
        Refused,
        Unavailable,
        UnknownRequest,
        Unreadable,
    )
    from .client.new_job import JobOptions
    from .client.sync_client import SyncClient, SyncRequestHandle
    from .contract.answer import Answer, Choice
    from .contract.entries import (
        AnyEntry,
        BadEntry,
        Cancelled,
        Claimed,
        Delta,
        Done,
        Entry,
        Failed,
        Idle,
        Opened,
        Queued,
        Restarted,
        Resumed,
        Started,
        Terminal,
        Unknown,
        Usage,
    )
    from .contract.ids import EntryId
    from .contract.job import InvalidJob
    from .contract.records import Lifecycle
else:
    _HOMES = (
        "client.async_client",
        "client.errors",
        "contract.answer",
        "contract.entries",
        "contract.ids",
        "contract.job",
        "contract.records",
        "client.new_job",
        "client.sync_client",
    )

    def __getattr__(name: str) -> object:
        """Load a public name when it is first used.

        The program `worker` imports this package before its own first line, and SIGTERM is lost until then: see
        `worker.__main__`.
        """
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        homes = (import_module(f"{__name__}.{home}") for home in _HOMES)
        globals()[name] = found = next(getattr(home, name) for home in homes if hasattr(home, name))
        return found

    _LOADED = getattr(sys.modules.get("vllm_relay"), "__file__", None)
    if __name__ == "worker" and _LOADED and os.path.realpath(_LOADED) == os.path.realpath(__file__):
        # The process imported these files as `vllm_relay` first: see worker/import_names.py.
        from vllm_relay.import_names import add_alias

        add_alias("worker", "vllm_relay")


__all__ = [
    "Answer",
    "AnyEntry",
    "BadEntry",
    "Cancelled",
    "Choice",
    "Claimed",
    "Client",
    "ClientError",
    "Conflict",
    "Delta",
    "Done",
    "Entry",
    "EntryId",
    "Expired",
    "Failed",
    "Idle",
    "IncompleteLog",
    "InvalidArgument",
    "InvalidJob",
    "JobOptions",
    "Lifecycle",
    "Misused",
    "Opened",
    "QueueFull",
    "Queued",
    "Refused",
    "RequestHandle",
    "Restarted",
    "Resumed",
    "Started",
    "State",
    "Status",
    "SyncClient",
    "SyncRequestHandle",
    "Terminal",
    "Unavailable",
    "Unknown",
    "UnknownRequest",
    "Unreadable",
    "Usage",
]
