"""Read tokens: each lets its bearer read one request until a time. They are signed and stored nowhere.

A token may be used any number of times, because an EventSource reconnects with the URL that it has. It is made of the
time at which it expires and an HMAC-SHA256 over the request id and that time. To rotate the secret: add the new one as
the second on all replicas, then make it the first and the old one the second, then remove the old one.
"""

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Callable

_TOKEN = re.compile(r"rt_([0-9a-f]{1,12})_([A-Za-z0-9_-]{43})")


class ReadTokens:
    """Makes and checks read tokens. The first secret signs; a token of each of the secrets is valid."""

    def __init__(self, *secrets: str, lifetime: float = 3600.0, clock: Callable[[], float] = time.time) -> None:
        self._secrets = [secret.encode() for secret in secrets if secret]
        self._lifetime = lifetime
        self._clock = clock

    def token_for(self, request_id: str) -> str | None:
        """A token for a request, valid from now on; None for a gateway without a secret."""
        if not self._secrets:
            return None
        expires = f"{int(self._clock() + self._lifetime):x}"
        return f"rt_{expires}_{_signature(self._secrets[0], request_id, expires)}"

    def is_valid(self, token: str, request_id: str) -> bool:
        """Whether a token lets its bearer read this request now."""
        found = _TOKEN.fullmatch(token)
        if found is None or int(found[1], 16) < self._clock():
            return False
        signatures = [_signature(secret, request_id, found[1]) for secret in self._secrets]
        return sum(hmac.compare_digest(found[2], signature) for signature in signatures) > 0  # all are compared


def is_read_token(text: str) -> bool:
    """Whether a text looks like a read token, and not like an API key."""
    return text.startswith("rt_")


def _signature(secret: bytes, request_id: str, expires: str) -> str:
    signed = hmac.digest(secret, f"read {request_id} {expires}".encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(signed).decode().rstrip("=")
