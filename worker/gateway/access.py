"""Who asks, and what they may: the one place that looks at keys, tokens and whom a request belongs to.

An id of somebody else gets the same answer as one that does not exist.
"""

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from .ids import belongs
from .keys import AccessKey, KeyRing
from .problems import Problem, not_found
from .tokens import ReadTokens, is_read_token

SUBPROTOCOL = "vllm-relay.v1"
"""The subprotocol that the gateway speaks over WebSocket, and echoes."""

KEY_NAME = "vllm_relay.key"
"""The key of a scope with the name of the API key, for the log."""

_BEARER = "bearer."
_LONGEST = 512
"""Characters of a key or token that is looked at."""
_MOST_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Requester:
    """Who asks. `key` is None without authentication, and for the bearer of a read token."""

    owner: str
    key: AccessKey | None = None
    sees_all: bool = False

    @property
    def name(self) -> str:
        """The name of the key, or empty."""
        return self.key.name if self.key else ""

    @property
    def tenant(self) -> str | None:
        """The tenant of the key: what the job gets as its `tenant`."""
        return self.key.tenant if self.key else None

    def may_see(self, request_id: str) -> bool:
        """Whether a request is one of the caller's, judged by its id."""
        return self.sees_all or belongs(request_id, self.owner)

    def may_use(self, queue: str) -> bool:
        """Whether the caller may use a queue."""
        return not (self.key and self.key.queues) or queue in self.key.queues

    def check_queue(self, queue: str) -> str:
        """Check that the caller may use a queue; returns it.

        Raises:
            Problem: when it may not (403).
        """
        if not self.may_use(queue):
            raise Problem(403, "queue_not_allowed", f"this key may not use the queue {queue[:64]!r}", param="queue")
        return queue


class Access:
    """Authentication by API keys and read tokens. Without a key ring everybody is an operator."""

    def __init__(self, keys: KeyRing | None, tokens: ReadTokens) -> None:
        self._keys = keys
        self.tokens = tokens

    def caller(self, connection: HTTPConnection) -> Requester:
        """Who asks, by the API key in `Authorization: Bearer` or the WebSocket subprotocol `bearer.<base64url>`.

        Raises:
            Problem: without a valid key (401).
        """
        if self._keys is None:
            return Requester("", sees_all=True)
        given = _bearers(connection)
        for text in given:
            key = self._keys.find(text)
            if key is not None:
                connection.scope[KEY_NAME] = key.name
                return Requester(key.owner, key, sees_all=key.all)
        if any(map(is_read_token, given)):
            raise _unauthorized("a read token only reads its request: this needs an API key")
        raise _unauthorized("the API key is wrong" if given else "an API key is needed: Authorization: Bearer <key>")

    def reader(self, connection: HTTPConnection, request_id: str) -> Requester | None:
        """Check that the bearer of a key or token may read a request; returns the caller, or None for a read token.

        A token stands in the same places as a key, or as `?token=` in the URL.

        Raises:
            Problem: without a valid key or token (401), or for a request of somebody else (404).
        """
        tokens = [text for text in _tokens(connection) if is_read_token(text)]
        if self._keys is not None and tokens:
            if any(self.tokens.is_valid(token, request_id) for token in tokens):
                return None
            if not any(map(self._has_key, _bearers(connection))):
                raise _unauthorized("the read token is wrong, has expired, or is for another request")
        return self.owner_of(connection, request_id)

    def owner_of(self, connection: HTTPConnection, request_id: str) -> Requester:
        """Check that a request is the caller's, as for a cancel: a read token is not enough.

        Raises:
            Problem: without a valid key (401), or for a request of somebody else (404).
        """
        caller = self.caller(connection)
        if not caller.may_see(request_id):
            raise not_found()
        return caller

    def _has_key(self, text: str) -> bool:
        return self._keys is not None and self._keys.find(text) is not None


def _tokens(connection: HTTPConnection) -> list[str]:
    in_url = connection.query_params.getlist("token")
    return [*_bearers(connection), *(text for text in in_url[:_MOST_TOKENS] if len(text) <= _LONGEST)]


def _bearers(connection: HTTPConnection) -> list[str]:
    """The keys and tokens in the headers of a request."""
    found = []
    for header in connection.headers.getlist("authorization"):
        scheme, _, text = header.partition(" ")
        if scheme.lower() == "bearer":
            found.append(text.strip())
    if connection.scope["type"] == "websocket":
        found += _decoded(connection.scope.get("subprotocols") or ())
    return [text for text in found if 0 < len(text) <= _LONGEST]


def _decoded(subprotocols: Iterable[str]) -> list[str]:
    found = []
    for offered in subprotocols:
        if offered.startswith(_BEARER):
            text = offered.removeprefix(_BEARER)
            try:
                found.append(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("ascii"))
            except (binascii.Error, ValueError):
                continue
    return found


def _unauthorized(message: str) -> Problem:
    return Problem(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
