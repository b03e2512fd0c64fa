"""The options of a job that a request of HTTP states: in the body under `relay`, or in headers of their own."""

from collections.abc import Mapping
from typing import cast

from ..client.new_job import JobOptions
from ..contract.ids import is_traceparent
from ..contract.job import MAX_NAME
from .access import Requester
from .body import JsonObject
from .problems import Problem
from .settings import GatewaySettings

FIELD = "relay"
"""The field of a body that holds the options. It is not sent to vLLM."""

_HEADERS = {
    "queue": "relay-queue",
    "fallbacks": "relay-fallbacks",
    "timeout": "relay-timeout",
    "retention": "relay-retention",
}
_LONGEST_KEY = 255
"""Characters of an idempotency key, as in other APIs."""

_OPTIONS = frozenset({*_HEADERS, "tenant", "retry_of"})


def take_job_options(
    body: JsonObject, headers: Mapping[str, str], caller: Requester, settings: GatewaySettings
) -> JobOptions:
    """Take the options out of a body, and read those of the headers. What the body states goes first.

    The header `Relay-Fallbacks` separates models by commas. `traceparent` is the header of W3C trace context, and
    is ignored if it is malformed: tracing breaks no request.

    Raises:
        Problem: when an option is unknown or malformed (400), or the caller may not use it (403).
    """
    given = body.pop(FIELD, None)
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise _invalid("must be an object")
    if unknown := sorted(given.keys() - _OPTIONS):
        raise _invalid(f"has no option {unknown[0][:64]!r}: the options are {', '.join(sorted(_OPTIONS))}")
    options: JsonObject = {name: _read(name, text) for name, field in _HEADERS.items() if (text := headers.get(field))}
    options |= {name: value for name, value in given.items() if value is not None}
    if not isinstance(queue := options.setdefault("queue", settings.queue), str):
        raise _invalid("must hold its queue as text")
    caller.check_queue(queue)
    tenant = options.get("tenant")
    if isinstance(tenant, str) and not tenant.isprintable():  # logs and metrics show it
        raise _invalid("must hold its tenant without control characters")
    if tenant is not None and caller.key is not None and not caller.sees_all and tenant != caller.tenant:
        raise Problem(403, "tenant_not_allowed", "this key may not name another tenant", param=FIELD)
    if tenant is None and caller.tenant:
        options["tenant"] = caller.tenant
    traceparent = headers.get("traceparent", "")
    if len(traceparent) <= MAX_NAME and is_traceparent(traceparent):
        options["traceparent"] = traceparent
    return cast("JobOptions", options)


def read_idempotency_key(headers: Mapping[str, str]) -> str:
    """Return the `Idempotency-Key` of a request; empty without one.

    Raises:
        Problem: when it is too long (400).
    """
    key = headers.get("idempotency-key", "").strip()
    if len(key) > _LONGEST_KEY:
        what = f"Idempotency-Key must have at most {_LONGEST_KEY} characters"
        raise Problem(400, "invalid_request", what, param="Idempotency-Key")
    return key


def _read(name: str, text: str) -> object:
    if name == "fallbacks":
        return [model for part in text.split(",") if (model := part.strip())]
    if name == "queue":
        return text
    try:
        return int(text) if name == "retention" else float(text)
    except ValueError:
        raise Problem(400, "invalid_request", f"the header {_HEADERS[name]} must be a number of seconds") from None


def _invalid(what: str) -> Problem:
    return Problem(400, "invalid_request", f"{FIELD} {what}", param=FIELD)
