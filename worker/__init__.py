"""vllm-relay: a durable, shareable token stream between vLLM and everything that follows a generation."""

from worker.client import Client, JobOptions, State, Status
from worker.client_errors import (
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
from worker.contract.answer import Answer, Choice
from worker.contract.entries import (
    BadEntry,
    Cancelled,
    Claimed,
    Delta,
    Done,
    Entry,
    Failed,
    Opened,
    Queued,
    Restarted,
    Resumed,
    Started,
    Terminal,
    Unknown,
)
from worker.contract.ids import EntryId
from worker.contract.job import InvalidJob
from worker.sync_client import SyncClient

__all__ = [
    "Answer",
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
    "IncompleteLog",
    "InvalidArgument",
    "InvalidJob",
    "JobOptions",
    "Misused",
    "Opened",
    "QueueFull",
    "Queued",
    "Refused",
    "Restarted",
    "Resumed",
    "Started",
    "State",
    "Status",
    "SyncClient",
    "Terminal",
    "Unavailable",
    "Unknown",
    "UnknownRequest",
    "Unreadable",
]
