"""The packed commands that the owner of a log sends, and the readers of their replies."""

from itertools import chain
from typing import Any

from redis.exceptions import RedisError, ResponseError

from ..contract.entries import Entry, Fields, parse_leniently
from ..contract.ids import SEAL, EntryId
from ..redisio.errors import redacted_message
from ..redisio.pipelined import pack
from ..redisio.transactions import Transaction
from .log_pages import RawEntry
from .log_writer import LogWriter


def command(*words: str) -> bytes:
    """Any command, packed."""
    return pack(*[word.encode() for word in words])


def read_last(key: str) -> bytes:
    """Reads the last entry."""
    return command("XREVRANGE", key, "+", "-", "COUNT", "1")


def xadd(key: str, entry_id: EntryId, fields: Fields, *, create: bool) -> bytes:
    """Adds an entry. `create` is whether the command may create the log if it does not exist."""
    return command("XADD", key, *([] if create else ["NOMKSTREAM"]), str(entry_id), *chain(*fields.items()))


def expire(key: str, seconds: int) -> bytes:
    """Makes a key expire after this number of seconds."""
    return command("EXPIRE", key, str(seconds))


def expire_at(key: str, when: int) -> bytes:
    """Makes a key expire at a time in Unix ms."""
    return command("PEXPIREAT", key, str(when))


def first_of(reply: list[tuple[bytes, list[bytes]]]) -> RawEntry | None:
    """The first entry in a reply to XRANGE or XREVRANGE."""
    if not reply:
        return None
    entry_id, flat = reply[0]
    return entry_id, dict(zip(flat[::2], flat[1::2], strict=True))


def id_of(entry: RawEntry | None) -> EntryId | None:
    """The id of an entry, or None without an entry."""
    return EntryId.parse(entry[0]) if entry else None


def has_ended(replies: list[Any]) -> bool:
    """Whether a log has its seal or a tombstone, by the replies to `read_last` and to EXISTS of the tombstone."""
    last, exists = replies
    return id_of(first_of(last)) == SEAL or bool(exists)


def is_id_taken(error: RedisError) -> bool:
    """Whether Redis refused an entry because the log has, or had, an entry with that id or a greater one."""
    text = redacted_message(error)  # an error may quote the text of an entry
    return "equal or smaller" in text or "exhausted the last" in text


async def watch_end(transaction: Transaction, key: str, ended: str) -> tuple[RawEntry | None, bool]:
    """Watch a log and its tombstone; returns the log's last entry, and whether the tombstone exists."""
    last, exists = await transaction.watch([key, ended], read_last(key), command("EXISTS", ended))
    return first_of(last), bool(exists)


async def entry_at(transaction: Transaction, key: str, entry_id: EntryId) -> Entry | None:
    """The entry with this id, or None. An entry that cannot be read is returned as `Unknown`."""
    (reply,) = await transaction.query(command("XRANGE", key, str(entry_id), str(entry_id)))
    raw = first_of(reply)
    return parse_leniently(*raw) if raw else None


async def greatest_id(transaction: Transaction, key: str) -> EntryId | None:
    """The greatest id that a log ever had, even if the entry was deleted; None if there is no log."""
    try:
        (reply,) = await transaction.query(command("XINFO", "STREAM", key))
    except ResponseError as error:
        if "no such key" not in str(error):
            raise
        return None
    return EntryId.parse(dict(zip(reply[::2], reply[1::2], strict=True))[b"last-generated-id"])


async def is_trimmed(transaction: Transaction, log: LogWriter, length: int) -> bool:
    """Whether a log of this length lacks entries only at its front. Only its current attempt is checked."""
    (reply,) = await transaction.query(command("XRANGE", log.key, "-", "+", "COUNT", "1"))
    first = id_of(first_of(reply))
    return first is not None and first.attempt == log.attempt and length == log.accepted.n - first.n + 1
