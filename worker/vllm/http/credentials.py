"""The API keys of vLLM servers: from the settings, and from a file that is read again if no key is accepted."""

import asyncio
from collections.abc import Set as AbstractSet
from pathlib import Path

from ...telemetry.events import KeyFileUnreadable, Telemetry


class ApiKeys:
    """The keys of a worker, in the order in which they are tried: those of the file, then `keys`.

    Args:
        keys: keys from the settings. Empty ones are ignored.
        file: a file of keys, one a line.

    Raises:
        OSError: when the file cannot be read.
        ValueError: when the file holds no key, or a line that cannot be a key.
    """

    def __init__(self, *keys: str, file: Path | None = None) -> None:
        self._given = tuple(key for key in keys if key)
        self._file = file
        self._of_file = read_keys(file) if file else ()
        self._trouble = ""

    async def untried(self, likely: str, refused: AbstractSet[str], telemetry: Telemetry) -> str | None:
        """A key that a server has not refused, `likely` first if it is one of the keys; None if there is none left.

        Without any key, the result is an empty key, and the request has no key. Before None is returned, the file is
        read again.
        """
        key = self._first(likely, refused)
        if key is None and self._file is not None:
            await self._read_again(self._file, telemetry)
            key = self._first(likely, refused)
        return key

    def _first(self, likely: str, refused: AbstractSet[str]) -> str | None:
        keys = (*self._of_file, *self._given) or ("",)
        ordered = (likely, *keys) if likely in keys else keys
        return next((key for key in ordered if key not in refused), None)

    async def _read_again(self, file: Path, telemetry: Telemetry) -> None:
        trouble = ""
        try:
            self._of_file = await asyncio.to_thread(read_keys, file)
        except (OSError, ValueError) as error:  # the file may be in the middle of being replaced
            trouble = type(error).__name__
        if trouble and trouble != self._trouble:
            telemetry.emit(KeyFileUnreadable(error=trouble))
        self._trouble = trouble


def read_keys(file: Path) -> tuple[str, ...]:
    """The keys in a file.

    Raises:
        OSError: when the file cannot be read.
        ValueError: when the file holds no key, or a line that cannot be a key.
    """
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    keys = tuple(validated_key(line) for line in text.splitlines() if line.strip())
    if not keys:
        raise ValueError("holds no key")
    return keys


def validated_key(text: str) -> str:
    """A key without leading and trailing white space.

    Raises:
        ValueError: when an HTTP header cannot hold the key. The HTTP client would quote the key in its error.
    """
    key = text.strip()  # a secret from a file often ends with a newline
    if not (key.isascii() and key.isprintable()):
        raise ValueError("holds characters that cannot be sent in an HTTP header")
    return key
