"""What a type checker knows about the transport. Only mypy reads this: nothing here is called."""

import httpx
import httpx2

from worker.http import ResumingTransport


def the_clients_of_both_libraries_take_it() -> None:
    httpx.Client(transport=ResumingTransport())
    httpx.AsyncClient(transport=ResumingTransport(httpx.AsyncHTTPTransport(http2=True)))
    httpx2.Client(transport=ResumingTransport())
    httpx2.AsyncClient(transport=ResumingTransport(httpx2.AsyncHTTPTransport(http2=True), limit=5))
