"""Request ids that show whom they belong to, so that any replica can tell without a lookup.

An id is 32 hex digits, which are random or derived from an idempotency key, and then 16 hex digits: a hash of the owner
and the first part. An id that somebody invents may carry its own tag, but no such request exists.
"""

import hashlib
import hmac
import re
import secrets

_ID = re.compile(r"[0-9a-f]{48}")
FIRST = 32
"""How many characters of an id are before the hash of its owner."""


def new_id(owner: str) -> str:
    """A random id for a request of this owner."""
    return _with_tag(secrets.token_hex(FIRST // 2), owner)


def id_of_key(owner: str, idempotency_key: str) -> str:
    """The id for an idempotency key: the same for the same owner and key, on every replica."""
    return _with_tag(_hash("key", owner, idempotency_key)[:FIRST], owner)


def id_of_first(first: str, owner: str) -> str | None:
    """The id of this owner that begins with `first`; None if there cannot be one."""
    return _with_tag(first, owner) if re.fullmatch(rf"[0-9a-f]{{{FIRST}}}", first) else None


def belongs(request_id: str, owner: str) -> bool:
    """Whether an id was made for this owner. False for every other text."""
    if _ID.fullmatch(request_id) is None:
        return False
    return hmac.compare_digest(request_id, _with_tag(request_id[:FIRST], owner))


def owner_hash(owner: str) -> str:
    """A name for the owner in keys of Redis, which shows nothing of it."""
    return _hash("owner", owner)[:32]


def _with_tag(first: str, owner: str) -> str:
    return first + _hash("tag", owner, first)[:16]


def _hash(*parts: str) -> str:
    """A hash of several texts. Their lengths keep `a` + `bc` apart from `ab` + `c`."""
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return hashlib.sha256(b"".join(b"%d:%s" % (len(part), part) for part in encoded)).hexdigest()
