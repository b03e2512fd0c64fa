"""Opens the stream of a request at a server. Fields that the worker adds are omitted if the server refuses them."""

from collections.abc import Callable
from collections.abc import Set as AbstractSet

from ...contract.entries import Object
from ..errors import UpstreamError
from ..http.connection import HttpResponse
from ..stream.chat_stream import ChatStream
from ..stream.watchdog import StreamTimeouts, StreamWatchdog
from .api import VllmApi
from .server import Server

_ADDED = ("return_token_ids", "stream_options")
_USAGE = "include_usage"
"""The field that is added inside `stream_options`."""
_REFUSALS = frozenset({400, 403, 422, 500, 501})


def body_for(request: Object, without: AbstractSet[str]) -> Object:
    """The body to send for a request: streamed, with the added fields except those in `without`."""
    body: Object = {**request, "stream": True}
    if "return_token_ids" not in without:
        body["return_token_ids"] = True
    if "stream_options" not in without:
        requested = request.get("stream_options")
        body["stream_options"] = {**(requested if isinstance(requested, dict) else {}), _USAGE: True}
    return body


def refused_fields(error: UpstreamError, request: Object) -> set[str]:
    """The added fields that an error mentions, in its message or in its words for programs.

    Fields that the request itself has are ignored. A server that quotes the request may mention a field that it
    accepts: only the same request without the field shows whether the field was refused.
    """
    if error.status not in _REFUSALS:
        return set()
    texts = (error.message, *error.words)
    refused = {name for name in _ADDED if name not in request and any(name in text for text in texts)}
    requested = request.get("stream_options")
    if not (isinstance(requested, dict) and _USAGE in requested) and any(_USAGE in text for text in texts):
        refused.add("stream_options")
    return refused


async def open_stream(
    api: VllmApi,
    server: Server,
    request: Object,
    route: str,
    *,
    limits: StreamTimeouts,
    watchdog: StreamWatchdog,
    on_first: Callable[[], None],
    traceparent: str = "",
) -> ChatStream:
    """Open the stream of a request without the added fields that the server refuses, before or within the stream.

    The refusal of a field is remembered only once the server has accepted the same request without the field, and never
    for a request that has the field itself. Otherwise other jobs would lose the field because of one bad job, or of a
    job whose text contains the field's name and is quoted in an error. `on_first` is called at the first event.

    Raises:
        UpstreamError: when the server sends no stream.
    """
    without = set(server.unsupported_fields)

    def omit_refused(error: UpstreamError) -> bool:
        refused = refused_fields(error, request) - without
        without.update(refused)
        return bool(refused)

    async def post() -> HttpResponse:
        while True:
            try:
                body = body_for(request, without)
                return await api.open(server, route, body, limits, watchdog, traceparent=traceparent)
            except UpstreamError as error:
                if not omit_refused(error):
                    raise

    async def reopen(error: UpstreamError) -> HttpResponse | None:
        if not omit_refused(error):
            return None
        watchdog.restart()
        return await post()

    def on_first_event() -> None:
        server.unsupported_fields |= without
        on_first()

    return ChatStream(await post(), watchdog, on_first=on_first_event, reopen=reopen)
