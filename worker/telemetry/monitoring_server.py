"""The HTTP server for scrapers and probes, in threads of its own: `/metrics`, `/healthz` and `/readyz`.

It answers while the event loop is stuck, and says so.
"""

import socket
import threading
from collections.abc import Callable, Iterable
from typing import TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

Problem = Callable[[], str]
"""Returns what is wrong, in a sentence; empty if nothing is."""

_Headers: TypeAlias = list[tuple[str, str]]

_SILENT_CLIENT = 10.0
"""Seconds after which a client that sends nothing loses its connection, and thus its thread."""


class MonitoringServer:
    """Serves the metrics of a registry, and whether the process is healthy and ready, until `close`.

    Raises:
        OSError: when the address is in use, or does not belong to this machine.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, healthy: Problem, ready: Problem) -> None:
        self._metrics = make_wsgi_app(registry)
        self._probes = {"/healthz": healthy, "/readyz": ready}
        family, *_, address = next(iter(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        server_type = _Server6 if family == socket.AF_INET6 else ThreadingWSGIServer
        self._server = make_server(str(address[0]), port, self._respond, server_type, _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="monitoring", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port, which the system has chosen if 0 was given."""
        return self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _respond(self, request: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path, method = str(request["PATH_INFO"]), str(request["REQUEST_METHOD"])
        headers = [("Content-Type", "text/plain; charset=utf-8")]
        if method not in ("GET", "HEAD"):
            status, content = "405 Method Not Allowed", b"use GET or HEAD\n"
            headers.append(("Allow", "GET, HEAD"))
        elif path == "/metrics":
            status, headers, content = self._page_of_metrics(request)
        elif path in self._probes:
            problem = self._probes[path]()
            status, content = "503 Service Unavailable" if problem else "200 OK", f"{problem or 'ok'}\n".encode()
        else:
            status, content = "404 Not Found", b"the pages are /metrics, /healthz and /readyz\n"
        start(status, [*headers, ("Content-Length", str(len(content)))])
        return [] if method == "HEAD" else [content]

    def _page_of_metrics(self, request: WSGIEnvironment) -> tuple[str, _Headers, bytes]:
        """The metrics in the format and encoding that the scraper accepts. `name[]` has no effect."""
        heads: list[tuple[str, _Headers]] = []
        only_get = request | {"REQUEST_METHOD": "GET", "QUERY_STRING": ""}
        content = b"".join(self._metrics(only_get, lambda status, headers: heads.append((status, headers))))
        return *heads[0], content


class _Server6(ThreadingWSGIServer):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _SILENT_CLIENT

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the standard library has it
        """Log nothing."""
