"""The page at `/` and the script at `/client.js`: two files, served from memory with an ETag."""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from .services import Services

_FOLDER = Path(__file__).with_name("page")


@dataclass(frozen=True)
class StaticFile:
    """A file with its headers. Browsers keep it, and ask with its ETag whether it has changed."""

    content: bytes
    headers: dict[str, str]

    async def __call__(self, request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if self.headers["ETag"] in known:
            return Response(None, 304, self.headers)
        return Response(self.content, headers=self.headers)


def routes(_: Services) -> Sequence[BaseRoute]:
    """The routes of the page and of the script."""
    page = (_FOLDER / "index.html").read_bytes()
    script = (_FOLDER / "client.js").read_bytes()
    html = {"Content-Security-Policy": content_security_policy(page)}
    # A page of any origin may import the script: it is the same for all.
    module = {"Access-Control-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin"}
    return [
        Route("/", _file(page, "text/html; charset=utf-8", html).__call__),
        Route("/client.js", _file(script, "text/javascript; charset=utf-8", module).__call__),
    ]


def content_security_policy(page: bytes) -> str:
    """The policy of the page: its own inline script and style, by their hashes, and connections to its own origin."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
            for text in re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _file(content: bytes, content_type: str, headers: dict[str, str]) -> StaticFile:
    general = {
        "Content-Type": content_type,
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        "X-Content-Type-Options": "nosniff",
    }
    return StaticFile(content, general | headers)
