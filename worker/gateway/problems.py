"""Everything that the gateway refuses or fails at, as one error, and the one mapping from other errors to it.

The table of statuses is the one of worker/client/README.md.
"""

from collections.abc import Mapping
from typing import ClassVar

from ..client.errors import (
    ClientError,
    Conflict,
    Expired,
    IncompleteLog,
    InvalidArgument,
    QueueFull,
    Unavailable,
    UnknownRequest,
)
from ..contract.entries import to_json
from ..contract.job import InvalidJob
from ..telemetry.events import Failing, Telemetry

RETRY_AFTER = 2
"""Seconds after which a client may try again what was refused for a temporary reason."""

_STATUS_OF: dict[type[Exception], tuple[int, str]] = {
    InvalidJob: (400, "invalid_request"),
    InvalidArgument: (400, "invalid_request"),
    Expired: (410, "gone"),
    IncompleteLog: (410, "gone"),
    Conflict: (422, "idempotency_conflict"),
    QueueFull: (429, "queue_full"),
}

_STATUS_OF_CODE = {
    "invalid_job": 400, "invalid_request": 400, "context_length_exceeded": 400, "content_policy": 400,
    "unauthorized": 403,
    "model_not_found": 404, "not_found": 404,
    "job_too_large": 413,
    "rate_limited": 429,
    "upstream_error": 502, "upstream_truncated": 502, "upstream_aborted": 502, "upstream_malformed": 502,
    "not_a_stream": 502,
    "upstream_unavailable": 503, "upstream_unreachable": 503, "interrupted": 503,
    "first_token_timeout": 504, "gap_timeout": 504, "deadline": 504,
    "cancelled": 499,
    "buried": 500, "internal": 500,
}  # fmt: skip
"""The status for the code of an entry `error`."""

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Problem(Exception):
    """An error that a client gets, in the shape of OpenAI's API.

    Args:
        status: of HTTP.
        code: a word for programs.
        message: a sentence for people. It never quotes the body of a request.
        type: OpenAI's kind of error; by default that of the status.
        param: the field of the request that is wrong.
        headers: further headers of the response.
    """

    _CLOSE_CODES: ClassVar[dict[int, int]] = {
        400: 4400, 401: 4401, 403: 4403, 404: 4404, 410: 4410, 429: 1013, 503: 1013,
    }  # fmt: skip

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        type: str = "",  # noqa: A002 - as OpenAI has it
        headers: Mapping[str, str] | None = None,
        *,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.param = param
        self.headers = dict(headers or {})
        self.reason = ""
        """Why the gateway failed: for the log, and for no client."""

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in (429, 503)

    @property
    def error(self) -> dict[str, str | None]:
        """The error object: what stands under `error` in a body and in an event."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    @property
    def body(self) -> bytes:
        """The JSON body of a response, and the data of an event."""
        return to_json({"error": self.error}).encode()

    @property
    def close_code(self) -> int:
        """The code with which a WebSocket is closed."""
        return self._CLOSE_CODES.get(self.status, 1011 if self.status >= 500 else 1008)


def problem_of(error: Exception) -> Problem:
    """The problem for an error of the client. Every other error is a fault of ours, whose text stays here."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, InvalidJob) and error.code == "job_too_large":
        return Problem(413, error.code, str(error))
    if isinstance(error, UnknownRequest):
        return not_found()
    if isinstance(error, Unavailable):  # its text has addresses of this installation
        return unavailable()
    if isinstance(error, ClientError | InvalidJob):
        for kind, (status, code) in _STATUS_OF.items():
            if isinstance(error, kind):
                return Problem(status, code, str(error), headers=_retry_after(status))
        return _fault("the gateway cannot use its Redis: its operator finds the reason in the log", str(error))
    return _fault("the gateway failed: its operator finds the reason in the log", repr(error))


def log_reason(problem: Problem, telemetry: Telemetry) -> None:
    """Log why the gateway failed, where the client gets no reason."""
    if problem.reason:
        telemetry.emit(Failing("request_failed", problem.reason))


def problem_of_code(code: str, message: str) -> Problem:
    """The problem for an entry `error`, where nothing of the answer was sent yet."""
    status = _STATUS_OF_CODE.get(code, 500)
    return Problem(status, code, message, headers=_retry_after(status))


def not_found() -> Problem:
    """The problem for an id that is unknown, and for one of somebody else: nobody can tell them apart."""
    return Problem(404, "not_found", "there is no such request")


def unavailable() -> Problem:
    """The problem for a Redis that does not answer, or refuses for a temporary reason."""
    return Problem(503, "unavailable", "the service cannot answer at present: try again", headers=_retry_after(503))


def _fault(message: str, reason: str) -> Problem:
    problem = Problem(500, "internal", message)
    problem.reason = reason
    return problem


def _retry_after(status: int) -> dict[str, str]:
    return {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else {}
