"""Trial requests of the worker's own: one token, to see whether a server answers."""

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from ...contract.entries import Object
from ...telemetry.events import Telemetry, VllmTriedOut
from ..chunks.parser import ChunkParser
from ..errors import UpstreamError, without_user
from ..stream.chat_stream import ChatStream
from .circuit import Caller
from .server import Server, counts_against_server


class OpenStream(Protocol):
    """`ServerPool.stream`."""

    def __call__(
        self, server: Server, request: Object, *, caller: Caller | None = None
    ) -> AbstractAsyncContextManager[ChatStream]: ...


async def send_trial(open_stream: OpenStream, telemetry: Telemetry, server: Server, model: str) -> None:
    """Request one token from a server, in place of jobs that may have failed there by their own fault.

    If all waiting jobs have failed at the server, or if it is draining, only this trial shows whether it works.
    """
    telemetry.emit(VllmTriedOut(endpoint=without_user(server.url)))
    circuit = server.circuit
    circuit.reserve_trial()
    request: Object = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    parser = ChunkParser()

    def on_events(events: list[bytes]) -> bool:
        for data in events:
            parser.parse(data)
        return parser.done

    try:
        body = request | ({"model": model} if model else {})
        with server.reserve():
            async with open_stream(server, body, caller=Caller(is_job=False)) as stream:
                while await stream.read_into(on_events) and not parser.done:
                    pass
                parser.check_complete()
    except UpstreamError as error:
        # The server works, but has no chat template. A draining server that is full says only that it is full.
        if not counts_against_server(error) and not (circuit.is_draining and error.is_busy):
            circuit.on_success(circuit.request_of(Caller(is_job=False)))
