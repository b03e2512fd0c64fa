"""Classifies errors of Redis: whether they are transient, whether an operator can fix them, and their text for logs.

This module does no I/O. `advice.py` has the fixes.
"""

import re

from redis import exceptions


class TooFewReplicas(exceptions.RedisError):
    """Fewer replicas than required have acknowledged a write in time."""


_TRANSIENT = (
    TooFewReplicas,
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.BusyLoadingError,
    exceptions.ReadOnlyError,
    exceptions.OutOfMemoryError,
    exceptions.TryAgainError,
    exceptions.ClusterDownError,
    exceptions.MasterDownError,
    exceptions.ExecAbortError,  # Redis refused EXEC itself, for a reason that arose after MULTI
    OSError,
)
_TRANSIENT_PREFIXES = ("NOREPLICAS", "MASTERDOWN", "MISCONF", "BUSY ", "UNBLOCKED", "OOM ")
_CONNECTION_REFUSALS = ("max number of clients", "DENIED ")
_PIPELINE_QUOTE = re.compile(r"Command # \d+ \(.*\) of pipeline caused error: \(?['\"]?|['\"],\)$", re.DOTALL)
"""redis-py puts a command's arguments around the error of a pipeline."""
_ARGUMENTS_QUOTE = re.compile(r",? with args beginning with:.*", re.DOTALL)
"""Redis quotes the arguments of a command that it does not know. Those of a PUBLISH are part of an answer."""


def is_transient(error: BaseException) -> bool:
    """Whether the same command may succeed in a moment, as after a lost connection, a failover or full memory."""
    if isinstance(error, _TRANSIENT):
        return not is_permission_denied(error)
    return isinstance(error, exceptions.ResponseError) and redacted_message(error).startswith(_TRANSIENT_PREFIXES)


def is_permission_denied(error: BaseException) -> bool:
    """Whether Redis denies a permission or a password (NOPERM, NOAUTH, WRONGPASS), which an operator can grant.

    A command that was renamed or disabled counts too, and so does a transaction that is refused for such a reason.
    """
    if isinstance(error, exceptions.ExecAbortError):
        return "because of: NOPERM" in str(error)
    return is_unknown_command(error) or isinstance(
        error, exceptions.NoPermissionError | exceptions.AuthenticationError | exceptions.AuthorizationError
    )


def is_login_refused(error: BaseException) -> bool:
    """Whether Redis refuses the password or the user (NOAUTH, WRONGPASS), or requires or knows no password."""
    return isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError)


def is_connection_refused(error: BaseException) -> bool:
    """Whether Redis answers a new connection with a refusal, because of its `maxclients` or its protected mode."""
    return isinstance(error, exceptions.RedisError) and redacted_message(error).startswith(_CONNECTION_REFUSALS)


def is_unknown_command(error: BaseException) -> bool:
    """Whether Redis does not know a command, because an operator renamed or disabled it."""
    return isinstance(error, exceptions.ResponseError) and redacted_message(error).startswith("unknown command")


def redacted_message(error: BaseException) -> str:
    """The text of an error without the arguments of commands, which may hold a prompt or an answer."""
    return _ARGUMENTS_QUOTE.sub("", _PIPELINE_QUOTE.sub("", str(error))) or type(error).__name__
