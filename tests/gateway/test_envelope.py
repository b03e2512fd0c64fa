"""What the access log has of a request."""

import pytest
from serving import Events

from worker.gateway.envelope import Envelope
from worker.gateway.outlets import Receive, Scope, Send
from worker.telemetry.gateway_events import RequestServed


@pytest.mark.parametrize("path", ["/requests/x/events", "/requests/x/events?token=rt_secret"])
async def test_the_path_ends_before_an_encoded_question_mark(path: str) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})

    async def receive() -> dict[str, object]:
        return {"type": "http.disconnect"}

    async def send(_: object) -> None:
        pass

    events = Events()
    envelope = Envelope(app, origins=(), no_auth=False, telemetry=events)
    await envelope({"type": "http", "method": "GET", "path": path, "headers": []}, receive, send)
    (served,) = events.seen
    assert isinstance(served, RequestServed)
    assert served.path == "/requests/x/events"
