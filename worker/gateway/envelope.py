"""What surrounds every request: origins, HEAD, the access log and the count of requests.

It is pure ASGI. Streams bypass it: they write their head by `send`, and everything after it by the
`send` that the scope has as `RAW_SEND`, which costs nothing for each message.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..telemetry.events import Telemetry
from ..telemetry.gateway_events import ProbeServed, RequestServed
from .access import KEY_NAME, SUBPROTOCOL
from .outlets import DEFERRED, RAW_SEND, WIRE
from .problems import Problem, unavailable
from .responses import problem_response
from .tasks import end_tasks

_PROBES = frozenset({"/healthz", "/readyz"})

OVERLOADED = "vllm_relay.overloaded"
"""Set in the scope by the connection when there are too many."""


class Envelope:
    """Calls the application with what surrounds every request.

    Args:
        app: the application.
        origins: the origins of web pages that may use the gateway, or `*`.
        no_auth: whether everybody may do everything, so that a page of another origin must be kept out.
        telemetry: receives `RequestServed`.
    """

    def __init__(self, app: ASGIApp, *, origins: tuple[str, ...], no_auth: bool, telemetry: Telemetry) -> None:
        self._app = app
        self._origins = frozenset(origins)
        self._no_auth = no_auth
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            return
        scope[RAW_SEND] = send
        scope[DEFERRED] = deferred = list[Callable[[], Awaitable[None]]]()
        began, status = time.monotonic(), 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        try:
            await self._respond(scope, receive, observed)
            if scope.get("method") == "HEAD":
                deferred.clear()
            elif deferred:
                # A stream goes on without the coroutines of the middleware and the router in memory.
                await deferred.pop()()
        except asyncio.CancelledError:
            raise
        except BaseException:
            status = status or 500
            raise
        finally:
            kind = ProbeServed if scope["path"] in _PROBES and status in (200, 503) else RequestServed
            self._telemetry.emit(
                kind(
                    method=scope.get("method", "GET"),
                    route=getattr(scope.get("route"), "path", "other"),
                    path=scope["path"].partition("?")[0][:200],  # a client may encode the ? before a token
                    status=status or 499,
                    seconds=round(time.monotonic() - began, 6),
                    key=scope.get(KEY_NAME, ""),
                )
            )
        while deferred:
            await deferred.pop()()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
        except Problem as problem:
            if scope["type"] == "websocket":
                await refuse_websocket(scope, receive, send, problem)
            else:
                await problem_response(scope, problem)(scope, receive, send)
            return
        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._respond_to_head(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if scope.get(OVERLOADED):
            raise unavailable()
        connection = HTTPConnection(scope)
        origin, host = connection.headers.get("origin"), connection.headers.get("host", "")
        if self._no_auth and not _is_local(host):
            raise Problem(403, "host_not_allowed", "without authentication the gateway serves this machine alone")
        if origin is None or origin in self._origins or "*" in self._origins or _is_same(origin, host):
            return
        # The browser refuses the response to other pages. What remains is what has an effect all the same: WebSocket,
        # to which CORS does not apply, and simple requests to a gateway without authentication.
        if scope["type"] == "websocket" or (self._no_auth and scope["method"] not in ("OPTIONS", "GET", "HEAD")):
            raise Problem(403, "origin_not_allowed", "pages of this origin may not use the gateway")

    async def _respond_to_head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head of a response and end it there: a stream would go on without a body."""
        ended = asyncio.Event()
        sent = asyncio.Event()

        async def head_only(message: Message) -> None:
            if message["type"] != "http.response.start":
                await ended.wait()
            elif not sent.is_set():
                sent.set()
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        scope[RAW_SEND] = head_only
        scope.pop(WIRE, None)
        app = asyncio.ensure_future(self._app(scope, receive, head_only))
        is_sent = asyncio.ensure_future(sent.wait())
        try:
            await asyncio.wait({app, is_sent}, return_when=asyncio.FIRST_COMPLETED)
            if app.done():
                app.result()  # raises what the application raised
        finally:
            await end_tasks([app, is_sent])


async def refuse_websocket(scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
    """Accept a WebSocket and close it with the code of a problem: browsers do not see why a handshake is refused."""
    message = await receive()
    if message["type"] != "websocket.connect":
        return
    offered = scope.get("subprotocols") or []
    await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL if SUBPROTOCOL in offered else None})
    await send({"type": "websocket.close", "code": problem.close_code, "reason": problem.message[:100]})


def _is_same(origin: str, host: str) -> bool:
    """Whether a page comes from the gateway itself. A proxy may end the TLS, so the scheme is not compared."""
    return bool(host) and origin.lower().partition("://")[2] == host.lower()


def _is_local(host: str) -> bool:
    """Whether a `Host` names this machine. A page that lets its own name lead to 127.0.0.1 sends that name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:  # as for an address in brackets that is none
        return False
    return name in {"localhost", "::1"} or (name.startswith("127.") and name.replace(".", "").isdecimal())
