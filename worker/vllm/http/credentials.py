"""The API keys of vLLM servers: those that are set, and those of a file, which is read again when none is accepted."""

import asyncio
from collections.abc import Set as AbstractSet
from pathlib import Path

from ...telemetry.events import KeyFileUnreadable, Telemetry


class ApiKeys:
    """The keys of a worker, in the order in which they are tried: those of the file, then those that were given.

    Args:
        keys: empty ones are left out.
        file: holds keys, one a line.

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
        """A key that a server has not refused, `likely` first if it is one of the keys; None when there is none left.

        The empty key stands for no key at all, where none is set. The file is read again before the answer is None.
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
        except (OSError, ValueError) as error:  # somebody may be replacing the file right now
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
    """A key without the blanks around it.

    Raises:
        ValueError: when an HTTP header cannot carry the key. The HTTP client would quote the key in its error.
    """
    key = text.strip()  # a secret from a file often ends with a newline
    if not (key.isascii() and key.isprintable()):
        raise ValueError("holds characters that cannot be sent in an HTTP header")
    return key
