"""The keys that vLLM servers ask for: several may be given, and a file that holds some is read again."""

import asyncio
from collections.abc import Set as AbstractSet
from pathlib import Path

import structlog

_log = structlog.get_logger()


class ApiKeys:
    """The keys of a worker, the likeliest to be taken first: those of the file, then those given.

    Args:
        keys: empty ones are none.
        file: holds keys, one a line.

    Raises:
        OSError: when the file cannot be read.
        ValueError: when it holds what can be no key, or nothing.
    """

    def __init__(self, *keys: str, file: Path | None = None) -> None:
        self._given = tuple(key for key in keys if key)
        self._file = file
        self._of_file = keys_in(file) if file else ()
        self._trouble = ""

    async def untried(self, likely: str, refused: AbstractSet[str]) -> str | None:
        """A key that a server has not refused yet, `likely` first if it is one; None when there is none.

        The empty one stands for no key at all, where none is given. The file is read again before it is said that
        there is none.
        """
        key = self._first(likely, refused)
        if key is None and self._file is not None:
            await self._read_again(self._file)
            key = self._first(likely, refused)
        return key

    def _first(self, likely: str, refused: AbstractSet[str]) -> str | None:
        keys = (*self._of_file, *self._given) or ("",)
        ordered = (likely, *keys) if likely in keys else keys
        return next((key for key in ordered if key not in refused), None)

    async def _read_again(self, file: Path) -> None:
        trouble = ""
        try:
            self._of_file = await asyncio.to_thread(keys_in, file)
        except (OSError, ValueError) as error:  # it may be in the middle of being replaced
            trouble = type(error).__name__
        if trouble and trouble != self._trouble:
            _log.warning("key_file_unreadable", error=trouble)
        self._trouble = trouble


def keys_in(file: Path) -> tuple[str, ...]:
    """The keys of a file.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it holds what can be no key, or nothing.
    """
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    keys = tuple(checked_key(line) for line in text.splitlines() if line.strip())
    if not keys:
        raise ValueError("holds no key")
    return keys


def checked_key(text: str) -> str:
    """A key as it is sent.

    Raises:
        ValueError: for what no header can carry. The HTTP client would quote it in its error.
    """
    key = text.strip()  # a secret from a file often ends with a newline
    if not (key.isascii() and key.isprintable()):
        raise ValueError("holds characters that cannot be sent in an HTTP header")
    return key
