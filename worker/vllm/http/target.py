"""The targets of requests: the URL, the server and the shared head. No I/O."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self, TypeAlias

import httpx

Origin: TypeAlias = tuple[str, str, int]
"""Scheme, host and port."""
_ENDS = frozenset(b"\r\n\0")
"""Bytes that end a line, and are not allowed in a header."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL to which JSON is posted, with the head of these requests, which differ only in Content-Length.

    The head is built once per target, because httpx (0.28) takes 0.2 ms to build it.
    """

    url: str
    origin: Origin
    head: bytes

    @classmethod
    def of(cls, client: httpx.AsyncClient, url: str, headers: Mapping[str, str]) -> Self:
        """The target of a client's requests to a URL, with these headers. A user in the URL overrides `authorization`.

        Raises:
            httpx.HTTPError: when the URL is not the address of a server, or a header contains a line end.
        """
        request = client.build_request(
            "POST", url, headers={"content-type": "application/json", "accept-encoding": "identity", **headers}
        )
        user, password = request.url.username, request.url.password
        if user or password:
            request = next(httpx.BasicAuth(user, password).auth_flow(request))
        del request.headers["content-length"]
        return cls(url, origin_of(request.url), head_of(request))

    def with_header(self, name: str, value: str) -> Self:
        """The same target with a further header. The value must hold no line end."""
        return replace(self, head=b"%b%b: %b\r\n" % (self.head, name.encode(), value.encode()))


def base_url(url: str) -> str:
    """The base URL of a server, from a URL with or without `/v1`, a route after it, and a slash at the end."""
    return re.sub(r"(/v1(/(chat/)?completions|/models)?)?/*$", "", url.rstrip("/"))


def origin_of(url: httpx.URL) -> Origin:
    """The server of a URL.

    Raises:
        httpx.UnsupportedProtocol: when the URL is not the address of a server.
    """
    if url.scheme not in {"http", "https"} or not url.host:
        raise httpx.UnsupportedProtocol(f"{url.scheme}://{url.host} is not the address of a server")
    return url.scheme, url.raw_host.decode(), url.port or (443 if url.scheme == "https" else 80)


def head_of(request: httpx.Request) -> bytes:
    """The request line and the headers, each with its line end."""
    headers = request.headers.raw
    if any(_ENDS.intersection(value) for _, value in headers):
        raise httpx.LocalProtocolError("a header contains a line end")
    lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%b: %b" % header for header in headers]
    return b"\r\n".join([*lines, b""])
