"""Where requests go, and the head that they have: without I/O, and made once for a URL."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, TypeAlias

import httpx

Origin: TypeAlias = tuple[str, str, int]
"""Scheme, host and port."""
_ENDS = frozenset(b"\r\n\0")
"""What ends a line, and may not stand in a header."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where JSON is posted to, with the head that all these requests share but for their length.

    httpx (0.28) makes it, once: what it does for a single request takes 0.2 ms.
    """

    url: str
    origin: Origin
    head: bytes

    @classmethod
    def of(cls, client: httpx.AsyncClient, url: str, headers: Mapping[str, str]) -> Self:
        """The target that a URL is to a client: with these headers, and the user of the URL before an authorization.

        Raises:
            httpx.HTTPError: for a URL that is no address of a server, and for a header with a line end in it.
        """
        request = client.build_request(
            "POST", url, headers={"content-type": "application/json", "accept-encoding": "identity", **headers}
        )
        user, password = request.url.username, request.url.password
        if user or password:
            request = next(httpx.BasicAuth(user, password).auth_flow(request))
        del request.headers["content-length"]
        return cls(url, origin_of(request.url), head_of(request))


def base_url(url: str) -> str:
    """The server's base: given with or without `/v1`, a route behind it, and a slash at the end."""
    return re.sub(r"(/v1(/(chat/)?completions|/models)?)?/*$", "", url.rstrip("/"))


def origin_of(url: httpx.URL) -> Origin:
    """The server of a URL.

    Raises:
        UnsupportedProtocol: for a URL that is no address of a server.
    """
    if url.scheme not in {"http", "https"} or not url.host:
        raise httpx.UnsupportedProtocol(f"{url.scheme}://{url.host} is no address of a server")
    return url.scheme, url.raw_host.decode(), url.port or (443 if url.scheme == "https" else 80)


def head_of(request: httpx.Request) -> bytes:
    """The request line and the headers, each with its line end."""
    headers = request.headers.raw
    if any(_ENDS.intersection(value) for _, value in headers):
        raise httpx.LocalProtocolError("a header has a line end in it")
    lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%b: %b" % header for header in headers]
    return b"\r\n".join([*lines, b""])
