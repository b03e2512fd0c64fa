"""The body of a request: read up to a limit, and decoded. No error quotes it."""

from typing import TypeAlias, cast

import msgspec
from starlette.requests import ClientDisconnect, Request

from .access import Requester
from .problems import Problem
from .settings import GatewaySettings

JsonObject: TypeAlias = dict[str, object]


def body_limit(settings: GatewaySettings, caller: Requester) -> int:
    """The largest body that a caller may send, in bytes."""
    own = caller.key.max_body_bytes if caller.key else None
    return min(settings.max_body_bytes, own or settings.max_body_bytes)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises:
        Problem: when it is larger than the limit (413). It is refused by its announced length, before it is read.
        ClientDisconnect: when the client leaves before its end.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    parts, size = list[bytes](), 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def read_json(request: Request, limit: int) -> JsonObject:
    """The body as a JSON object.

    Raises:
        Problem: when it is too large (413), or is no JSON object (400).
        ClientDisconnect: when the client leaves before its end.
    """
    body = await read_body(request, limit)
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        where = str(error).partition("(")[2].rstrip(")")  # such as `byte 17`: the rest may quote the body
        raise Problem(400, "invalid_json", f"the body must be valid JSON{f' ({where})' if where else ''}") from None
    except RecursionError:
        raise Problem(400, "invalid_json", "the JSON of the body is nested too deeply") from None
    if not isinstance(found, dict):
        raise Problem(400, "invalid_request", "the body must be a JSON object")
    return cast("JsonObject", found)


def check_completion(body: JsonObject) -> None:
    """Check the types of what every chat completion has. vLLM checks the rest, once a worker has the job.

    Raises:
        Problem: when one is wrong (400).
    """
    messages = body.get("messages")
    wrong = {
        "stream must be true or false": not isinstance(body.get("stream"), bool | None),
        "model must be text": not isinstance(body.get("model", ""), str | None),
        "messages must be a list of objects": not isinstance(messages, list)
        or not all(isinstance(message, dict) for message in messages),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise Problem(400, "invalid_request", message, param=message.partition(" ")[0])


def _too_large(limit: int) -> Problem:
    return Problem(413, "request_too_large", f"the body is larger than {limit} bytes")
