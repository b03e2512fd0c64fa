"""The ASGI application of the gateway: the routes of all rooms, and what surrounds them."""

from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..client.errors import ClientError
from ..contract.job import InvalidJob
from . import chat, models, native
from .envelope import Envelope, refuse_websocket
from .problems import Problem, log_reason, problem_of
from .responses import problem_response
from .services import Services
from .static import routes as static_routes

Room = Callable[[Services], Sequence[BaseRoute]]
"""Returns the routes of a room."""

ROOMS: tuple[Room, ...] = (chat.routes, models.routes, native.routes, static_routes)

_EXPOSED = (
    "Location", "X-Request-Id", "Retry-After", "Retry-After-Ms", "X-Should-Retry", "X-Workflow-Run-Id",
)  # fmt: skip
"""Headers of a response that pages of other origins may read."""

_CODES = {404: "not_found", 405: "method_not_allowed"}
_MESSAGES = {404: "there is nothing at this path", 405: "this path does not take this method"}


def build_application(services: Services, why_not_ready: Callable[[], str], rooms: Sequence[Room] = ROOMS) -> ASGIApp:
    """Join the routes of all rooms. `why_not_ready` returns what `/readyz` answers with; empty while it is ready."""
    settings = services.settings

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        why_not = why_not_ready()
        return PlainTextResponse(f"{why_not or 'ok'}\n", 503 if why_not else 200, {"Cache-Control": "no-store"})

    routes: list[BaseRoute] = [Route("/healthz", healthz), Route("/readyz", readyz)]
    for room in rooms:
        routes += room(services)
    app = Starlette(
        routes=routes,
        exception_handlers={
            Problem: _on_error,
            ClientError: _on_error,
            InvalidJob: _on_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_error,
        },
    )
    app.state.telemetry = services.telemetry
    app.router.redirect_slashes = False
    app.router.default = _find_nothing
    with_cors = CORSMiddleware(
        app,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "HEAD", "POST", "DELETE"),
        allow_headers=("*",),  # the headers that a page asks for: those of OpenAI's clients change with their versions
        expose_headers=_EXPOSED,
        max_age=600,
    )
    return Envelope(
        with_cors, origins=settings.cors_origins, no_auth=settings.no_auth, telemetry=services.telemetry
    )  # fmt: skip


async def _find_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """Where no route is. Starlette refuses a WebSocket with a status, of which browsers see nothing."""
    if scope["type"] == "websocket":
        await refuse_websocket(scope, receive, send, Problem(404, "not_found", _MESSAGES[404]))
        return
    raise HTTPException(404)


async def _on_error(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    if isinstance(error, ClientError):  # the HTTP server logs every other one
        log_reason(problem, request.app.state.telemetry)
    return problem_response(request.scope, problem)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - Starlette's types do not say it
    code, headers = error.status_code, error.headers
    if code == 405:  # Starlette names the methods of the first route of this path only
        routes = [route for route in request.app.routes if isinstance(route, Route)]
        methods = [route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE]
        headers = {"Allow": ", ".join(sorted(set().union(*methods)))}
    problem = Problem(
        code, _CODES.get(code, "invalid_request"), _MESSAGES.get(code, str(error.detail)), headers=headers
    )
    return problem_response(request.scope, problem)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)
