"""Routes for tests of what surrounds the rooms of a gateway."""

import asyncio
from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from worker.gateway.answers import AnswerPace
from worker.gateway.body import body_limit, read_json
from worker.gateway.chat import ChatCompletions
from worker.gateway.envelope import refuse_websocket
from worker.gateway.problems import Problem
from worker.gateway.responses import json_response
from worker.gateway.services import Services


class Endless:
    """A response that begins a stream and then waits: `ends` is set when the client has left or the process stops."""

    def __init__(self) -> None:
        self.begun = 0
        self.left = 0

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        self.begun += 1
        await send({"type": "http.response.body", "body": b": begun\n\n", "more_body": True})
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            self.left += 1


def _slow_routes() -> Sequence[BaseRoute]:
    """`/slow` answers once `/release` is called."""
    released = asyncio.Event()

    async def slow(_request: Request) -> Response:
        await released.wait()
        return json_response({})

    async def release(_request: Request) -> Response:
        released.set()
        return json_response({})

    return [Route("/slow", slow), Route("/release", release)]


def plain_room(services: Services) -> Sequence[BaseRoute]:
    """What every room does: it authenticates, reads bodies, and refuses."""

    async def echo(request: Request) -> Response:
        caller = services.access.caller(request)
        body = await read_json(request, body_limit(services.settings, caller))
        return json_response({"owner": caller.owner, "fields": sorted(body)})

    async def start(request: Request) -> Response:
        caller = services.access.caller(request)
        request_id = request.path_params["id"]
        await services.limits.admit(caller, request_id)
        return json_response({"id": request_id}, 202)

    async def read(request: Request) -> Response:
        caller = services.access.reader(request, request.path_params["id"])
        if caller is not None:
            await services.limits.count(caller)
        return json_response({"id": request.path_params["id"]})

    async def cancel(request: Request) -> Response:
        services.access.owner_of(request, request.path_params["id"])
        return json_response({"id": request.path_params["id"]})

    async def fail(_request: Request) -> Response:
        raise ZeroDivisionError("a secret prompt")

    async def socket(websocket: WebSocket) -> None:
        try:
            services.access.reader(websocket, websocket.path_params["id"])
        except Problem as problem:
            await refuse_websocket(websocket.scope, websocket.receive, websocket.send, problem)
            return
        await websocket.accept(websocket.scope["subprotocols"][0] if websocket.scope["subprotocols"] else None)
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    endless = Endless()
    return [
        Route("/echo", echo, methods=["POST"]),
        Route("/start/{id}", start, methods=["POST"]),
        Route("/read/{id}", read),
        Route("/read/{id}", cancel, methods=["DELETE"]),
        Route("/fail", fail),
        *_slow_routes(),
        Route("/endless", endless),
        WebSocketRoute("/socket/{id}", socket),
    ]


def whole_room(pace: AnswerPace) -> Callable[[Services], Sequence[BaseRoute]]:
    """The route of chat completions, with other times for answers that are not streamed."""

    def routes(services: Services) -> Sequence[BaseRoute]:
        completions = ChatCompletions(services, pace=pace)
        return [Route("/v1/chat/completions", completions.respond, methods=["POST"])]

    return routes
