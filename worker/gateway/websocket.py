"""The WebSocket of one request: the same entries as its event stream, as messages."""

from starlette.requests import HTTPConnection

from ..client.errors import ClientError
from ..contract.ids import SEAL
from .access import SUBPROTOCOL
from .envelope import refuse_websocket
from .event_cursors import check_place, parse_cursor
from .outlets import RAW_SEND, Receive, Scope, Send
from .problems import Problem, log_reason, problem_of
from .protocols.native import NativeMessages
from .services import Services
from .stream_response import LogStream

_CODES = {"done": 1000, "shutdown": 1012}
_LONGEST_REASON = 123


class WebSocketStream(LogStream):
    """The stream of one log over a WebSocket. Its end is a close code."""

    __slots__ = ()

    @property
    def waiting_request(self) -> str:
        return ""  # no message has a place in a queue: `GET /requests/{id}` has it

    async def finish(self, last: bytes) -> None:
        """See `ClientStream`. The server waits for the client's close frame before it ends the connection."""
        if last:
            await self.send({"type": "websocket.send", "text": last.decode()})
        code, reason = _CODES.get(self.end, 1011), ""
        if self.problem is not None:
            code, reason = self.problem.close_code, self.problem.message
        reason = reason.encode()[:_LONGEST_REASON].decode(errors="ignore")
        await self.send({"type": "websocket.close", "code": code, "reason": reason})


class RequestWebSocket:
    """The route of a request's WebSocket. It accepts every handshake, since browsers do not see why one is refused."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        connection, request_id = HTTPConnection(scope), scope["path_params"]["id"]
        services = self._services
        try:
            caller = services.access.reader(connection, request_id)
            if caller is not None:
                await services.limits.count(caller)
            position = parse_cursor(connection.query_params.get("after", ""))
            if position != SEAL:
                await services.client.open(request_id, after=position)
                await check_place(services, request_id, position)
        except (Problem, ClientError) as error:
            problem = problem_of(error)
            log_reason(problem, services.telemetry)
            await refuse_websocket(scope, receive, send, problem)
            return
        if (await receive())["type"] != "websocket.connect":
            return
        offered = scope.get("subprotocols") or []
        await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL if SUBPROTOCOL in offered else None})
        streams = services.streams
        raw_send = scope.get(RAW_SEND, send)
        await streams.start(
            WebSocketStream(streams, request_id, NativeMessages(), (scope, receive, raw_send), position), scope
        )
