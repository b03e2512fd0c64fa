"""The connection of a WebSocket: uvicorn's, which a stream can destroy, and which refuses as the rest of the API does.

It uses private parts of uvicorn 0.54.
"""

from typing import cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from .outlets import ABORT
from .problems import Problem
from .responses import raw_response


class WebSocketConnection(WebSocketsSansIOProtocol):
    """One connection, from its handshake on."""

    def handle_connect(self, event: Request) -> None:
        """See uvicorn: the head of the handshake is complete. `ABORT` destroys the connection."""
        if self.conn.accept(event).status_code != 101:
            self.handshake_complete = self.close_sent = True
            problem = Problem(
                400, "invalid_handshake", "the handshake must be one of WebSocket, version 13, with a key"
            )
            self.transport.write(raw_response(problem))
            self.transport.close()
            return
        super().handle_connect(event)
        cast("dict[str, object]", self.scope)[ABORT] = self.transport.abort

    def handle_parser_exception(self) -> None:
        """See uvicorn: it refuses a message of the client, and closes the connection.

        uvicorn 0.54 raises `RuntimeError` where an application sends after that, and it may before it has received the
        end. With `disconnected` it raises the `OSError` of every other client that has left.
        """
        super().handle_parser_exception()
        self.disconnected = True

    def keepalive_timeout(self) -> None:
        """See uvicorn: no pong has come in time, and it closes the connection. The same holds as above."""
        super().keepalive_timeout()
        self.disconnected = True
