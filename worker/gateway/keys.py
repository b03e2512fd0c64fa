"""API keys: who may use the gateway, for what, and how much. Only hashes of the keys are stored.

The file is TOML, with a table for each key:

    [[keys]]
    name = "chat-app"
    hash = "<SHA-256 of the key, 64 hex digits>"
    tenant = "acme"
    queues = ["default", "batch"]
    in_flight = 100
    requests_per_minute = 600
"""

import hashlib
import secrets
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from ..contract.keys import is_queue_name
from ..settings_source import ConfigError
from ..telemetry.events import NO_TELEMETRY, Telemetry
from ..telemetry.gateway_events import ApiKeysUnreadable

_CHECK_EVERY = 1.0
"""Seconds between two looks at the time of the file's last change."""

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.@:-]{1,64}$")]


class AccessKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One API key. Limits that are None do not apply. They count for all keys of the same tenant together."""

    name: _Name
    hash: Annotated[str, msgspec.Meta(pattern=r"^(sha256:)?[0-9a-f]{64}$")]
    tenant: _Name | None = None
    """Keys with the same tenant see each other's requests. Without one, the key is a tenant of its own."""
    queues: tuple[str, ...] = ()
    """The queues that the key may use; empty for all."""
    all: bool = False
    """Whether the key sees the requests of all: for operators."""
    in_flight: _Count | None = None
    """How many requests of the tenant may wait or run at once."""
    queued: _Count | None = None
    """How many of them may wait at once."""
    requests_per_minute: _Count | None = None
    max_body_bytes: _Count | None = None

    @property
    def owner(self) -> str:
        """Whom the requests of this key belong to."""
        return f"tenant:{self.tenant}" if self.tenant else f"key:{self.name}"


class _KeysFile(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[AccessKey] = []


def new_key() -> str:
    """A new API key: 256 random bits, so that its plain hash can be stored."""
    return f"vr_{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """The hash of an API key as the file holds it."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def parse_keys(text: str, where: str) -> Mapping[str, AccessKey]:
    """The keys of a TOML text, by their hashes.

    Raises:
        ConfigError: when the text is no such file. `where` names it.
    """
    try:
        found = msgspec.convert(tomllib.loads(text), _KeysFile).keys
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError([f"{where} cannot be read: {error}"]) from None
    names = [key.name for key in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError([f"{where} has two keys with the name {twice!r}: each needs its own"])
    for key in found:
        bad = next((queue for queue in key.queues if not is_queue_name(queue)), None)
        if bad is not None:
            raise ConfigError([f"{where}: {bad[:80]!r} of the key {key.name} is no name of a queue"])
    return {key.hash.removeprefix("sha256:"): key for key in found}


class KeyRing:
    """The API keys of a gateway. A file is read again when it has changed; if it is bad then, the former keys stay.

    Raises:
        ConfigError: when the keys cannot be read at the start, or there are none.
    """

    def __init__(
        self,
        *,
        file: Path | None = None,
        text: str = "",
        telemetry: Telemetry = NO_TELEMETRY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._telemetry = telemetry
        self._clock = clock
        self._checked_at = clock()
        self._changed_at = self._time_of_change()
        self._given = parse_keys(text, "GATEWAY_KEYS")
        self._keys = {**self._given, **self._read()}
        if not self._keys:
            raise ConfigError([f"{file or 'GATEWAY_KEYS'} has no key: `worker key NAME` prints the lines of a new one"])

    def find(self, key: str) -> AccessKey | None:
        """The entry of an API key, or None."""
        self._refresh()
        return self._keys.get(hash_of(key))

    def _refresh(self) -> None:
        now = self._clock()
        if self._file is None or now - self._checked_at < _CHECK_EVERY:
            return
        self._checked_at = now
        changed_at = self._time_of_change()
        if changed_at == self._changed_at:
            return
        try:
            self._keys = {**self._given, **self._read()}
        except ConfigError as error:
            self._telemetry.emit(ApiKeysUnreadable(str(error)))
        self._changed_at = changed_at

    def _read(self) -> Mapping[str, AccessKey]:
        if self._file is None:
            return {}
        try:
            return parse_keys(self._file.read_text("utf-8"), str(self._file))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"{self._file} cannot be read: {error}"]) from None

    def _time_of_change(self) -> tuple[int, int]:
        try:
            status = self._file.stat() if self._file else None
        except OSError:
            return 0, 0
        return (status.st_mtime_ns, status.st_ino) if status else (0, 0)
