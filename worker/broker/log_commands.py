"""The commands about one log that its owner sends, packed, and what is read from their replies."""

from itertools import chain
from typing import Any

from redis.exceptions import ResponseError

from ..contract.entries import Entry, Fields, parse_leniently
from ..contract.ids import SEAL, EntryId
from ..redisio.pipelined import pack
from ..redisio.transactions import Transaction
from .log_pages import RawEntry
from .log_writer import LogWriter


async def look(line: Transaction, key: str, ended: str) -> tuple[RawEntry | None, bool]:
    """Watch a log and its tombstone; gives the log's last entry, and whether the tombstone is there."""
    reply, gone = await line.watch([key, ended], last_of(key), command("EXISTS", ended))
    return first_of(reply), bool(gone)


def has_ended(replies: list[Any]) -> bool:
    """Whether a log has its seal, or there is a tombstone; of the replies to its last entry and to that."""
    last, ended = replies
    return id_of(first_of(last)) == SEAL or bool(ended)


async def is_trimmed(line: Transaction, log: LogWriter, length: int) -> bool:
    """Whether all that a log lacks is at its front, as far as its owner's own attempt shows."""
    (reply,) = await line.query(command("XRANGE", log.key, "-", "+", "COUNT", "1"))
    first = id_of(first_of(reply))
    return first is not None and first.attempt == log.attempt and length == log.accepted.n - first.n + 1


async def greatest_id(line: Transaction, key: str) -> EntryId | None:
    """The greatest id that a log ever had, also where its entry was deleted; nothing where there is no log."""
    try:
        (reply,) = await line.query(command("XINFO", "STREAM", key))
    except ResponseError as error:
        if "no such key" not in str(error):
            raise
        return None
    return EntryId.parse(dict(zip(reply[::2], reply[1::2], strict=True))[b"last-generated-id"])


def is_taken(error: ResponseError) -> bool:
    """Whether Redis refused an entry because the log has, or had, one of that id or a greater one."""
    return "equal or smaller" in str(error) or "exhausted the last" in str(error)


async def entry_at(line: Transaction, key: str, entry_id: EntryId) -> Entry | None:
    """The entry of this id, if the log has it; one that cannot be read is of an unknown type."""
    (reply,) = await line.query(command("XRANGE", key, str(entry_id), str(entry_id)))
    raw = first_of(reply)
    return parse_leniently(*raw) if raw else None


def first_of(reply: list[tuple[bytes, list[bytes]]]) -> RawEntry | None:
    """The first entry of what XRANGE and XREVRANGE give."""
    if not reply:
        return None
    entry_id, flat = reply[0]
    return entry_id, dict(zip(flat[::2], flat[1::2], strict=True))


def id_of(entry: RawEntry | None) -> EntryId | None:
    """The id of an entry, if there is one."""
    return EntryId.parse(entry[0]) if entry else None


def command(*words: str) -> bytes:
    """Any command."""
    return pack(*[word.encode() for word in words])


def last_of(key: str) -> bytes:
    """Reads the last entry."""
    return command("XREVRANGE", key, "+", "-", "COUNT", "1")


def xlen(key: str) -> bytes:
    """Counts the entries."""
    return command("XLEN", key)


def xadd(key: str, entry_id: EntryId, fields: Fields, *, create: bool) -> bytes:
    """Adds an entry; where the log is not there, only if it may `create` it."""
    return command("XADD", key, *([] if create else ["NOMKSTREAM"]), str(entry_id), *chain(*fields.items()))


def expire(key: str, seconds: int) -> bytes:
    """Lets a key expire after so many seconds."""
    return command("EXPIRE", key, str(seconds))


def pexpireat(key: str, when: int) -> bytes:
    """Lets a key expire at a time in Unix ms."""
    return command("PEXPIREAT", key, str(when))
