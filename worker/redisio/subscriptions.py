"""Subscriptions to the feeds of requests: one connection to each server, for all who listen.

In a cluster the feed is sharded, as Redis 7 has it: a channel is heard at the master of its slot. What is subscribed
to within one step of the event loop goes as one write. After a loss everything is subscribed to again, and whoever
listens is told: what came meanwhile is in the log only.
"""

import asyncio
from contextlib import suppress
from typing import Protocol

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ClusterDownError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .clients import Backoff
from .cluster import ClusterClient, forget_masters, on_master_removed, server_of
from .errors import is_transient
from .pipelined import TakenConnection, connection_lost_error, pack

_SILENCE = 5.0
"""Seconds after which a silent connection is asked whether it still lives, and then given up."""

_PING = pack(b"PING")


class Listener(Protocol):
    """Who listens to a channel. Each of these is called while others wait: it does little, and raises nothing."""

    def hear(self, payload: bytes) -> None:
        """A message has come."""

    def subscribed(self) -> None:
        """From now on messages come; what is older is in the log."""

    def interrupted(self) -> None:
        """Messages may be lost, until `subscribed` is called again."""

    def refused(self) -> None:
        """There will be no messages: the user may not subscribe, or the server cannot. Nobody is subscribed by now."""


class Subscriptions:
    """All subscriptions of a client, which has one connection to each server for this."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._prefix = b"S" if isinstance(redis, ClusterClient) else b""
        self._stations: dict[Redis, _ServerSubscriptions] = {}
        self._homes: dict[bytes, _ServerSubscriptions] = {}
        self._unplaced: dict[bytes, Listener] = {}
        self._placing: asyncio.Task[None] | None = None
        self._backoff = Backoff(None)
        self._is_closed = False
        self._retired: set[asyncio.Task[None]] = set()
        on_master_removed(redis, self._drop)

    def subscribe(self, channel: str, listener: Listener) -> None:
        """Listen to a channel; each has one listener."""
        self._unplaced[channel.encode()] = listener
        self.place()

    def unsubscribe(self, channel: str) -> None:
        """Listen to it no more."""
        name = channel.encode()
        self._unplaced.pop(name, None)
        home = self._homes.pop(name, None)
        if home is not None:
            home.drop(name)

    async def aclose(self) -> None:
        """Close the connections."""
        self._is_closed = True
        tasks = [self._placing, *(station.task for station in self._stations.values()), *self._retired]
        for task in tasks:
            while task is not None and not task.done():  # redis-py 8.1 may swallow a cancellation while it connects
                task.cancel()
                await asyncio.wait([task], timeout=0.1)

    async def _drop(self, server: Redis) -> None:
        """A server is no master any more: what was heard there is heard elsewhere."""
        station = self._stations.pop(server, None)
        if station is None:
            return
        if station.task is not None and not station.task.done():
            self._retired.add(station.task)
            station.task.add_done_callback(self._retired.discard)
        self.displace(station.retire())
        self.place()

    def place(self) -> None:
        """Find a server for every channel that has none, and subscribe there."""
        if self._unplaced and not self._is_closed and (self._placing is None or self._placing.done()):
            self._placing = asyncio.create_task(self._place())

    def displace(self, listeners: dict[bytes, Listener]) -> None:
        """These channels are not heard any more where they were; `place` finds where they are."""
        forget_masters(self._redis)
        for channel, listener in listeners.items():
            del self._homes[channel]
            self._unplaced[channel] = listener
            listener.interrupted()

    def refuse(self, listeners: dict[bytes, Listener]) -> None:
        """These channels cannot be heard where they would have to be."""
        for channel, listener in listeners.items():
            del self._homes[channel]
            listener.refused()

    async def _place(self) -> None:
        while self._unplaced:
            trouble: Exception | None = None
            for channel in list(self._unplaced):
                try:
                    server = await server_of(self._redis, channel.decode())
                except ClusterDownError as error:  # this slot has no master: others may have
                    trouble = error
                except (RedisError, OSError) as error:
                    trouble = error
                    break
                else:
                    self._settle(channel, server)
            if trouble is None:
                self._backoff.reset()
            else:
                await self._backoff.wait(trouble)

    def _settle(self, channel: bytes, server: Redis) -> None:
        listener = self._unplaced.pop(channel, None)
        if listener is None:  # it left while the server was looked for
            return
        if server not in self._stations:
            self._stations[server] = _ServerSubscriptions(self, server, self._prefix)
        self._homes[channel] = self._stations[server]
        self._homes[channel].add(channel, listener)


class _ServerSubscriptions:
    """What is heard at one server."""

    def __init__(self, owner: Subscriptions, server: Redis, prefix: bytes) -> None:
        self._owner = owner
        self._server = server
        self._verbs = prefix + b"UNSUBSCRIBE", prefix + b"SUBSCRIBE"
        self._ended, self._begun = (verb.lower() for verb in self._verbs)
        self._message = prefix.lower() + b"message"
        self._listeners: dict[bytes, Listener] = {}
        self._changed: dict[bytes, None] = {}
        self._line: _SubscriptionConnection | None = None
        self._is_refused = False
        self._backoff = Backoff(None)
        self.task: asyncio.Task[None] | None = None

    def add(self, channel: bytes, listener: Listener) -> None:
        if self._is_refused:
            self._owner.refuse({channel: listener})
            return
        self._listeners[channel] = listener
        self._change(channel)
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._run())

    def drop(self, channel: bytes) -> None:
        del self._listeners[channel]
        self._change(channel)

    def retire(self) -> dict[bytes, Listener]:
        """Come to an end; gives those who listened here."""
        listeners = self._take_all()
        if self._line is not None:
            self._line.give_up(connection_lost_error())
        return listeners

    def take(self, replies: list[object]) -> None:
        """What Redis has sent at once, messages most of all."""
        message, get = self._message, self._listeners.get
        for reply in replies:
            if isinstance(reply, list) and reply[0] == message:
                listener = get(reply[1])
                if listener is not None:
                    listener.hear(reply[2])
            else:
                self._take_answer(reply)

    def _take_answer(self, reply: object) -> None:
        if isinstance(reply, RedisError):
            if not is_transient(reply):
                self._refuse()
            elif self._line is not None:
                self._line.give_up(reply)
        elif isinstance(reply, list) and (listener := self._listeners.get(reply[1])) is not None:
            if reply[0] == self._begun:
                self._backoff.reset()
                listener.subscribed()
            elif reply[0] == self._ended:  # not asked for: the slot has moved
                del self._listeners[reply[1]]
                self._owner.displace({reply[1]: listener})
                self._owner.place()

    def _refuse(self) -> None:
        """Nothing can be heard here, until the connection is made anew: an upgrade or a new right may change it."""
        self._is_refused = True
        self._owner.refuse(self._take_all())

    def _take_all(self) -> dict[bytes, Listener]:
        listeners = dict(self._listeners)
        self._listeners.clear()
        return listeners

    def _change(self, channel: bytes) -> None:
        if self._line is None:  # once there is one, all of them are subscribed to
            return
        if not self._changed:
            asyncio.get_running_loop().call_soon(self._tell_changes)
        self._changed[channel] = None

    def _tell_changes(self) -> None:
        changed, self._changed = self._changed, {}
        if self._line is not None:
            # A command for each, for those of one sharded subscription must be of one slot.
            self._line.say(b"".join([pack(self._verbs[each in self._listeners], each) for each in changed]))

    async def _run(self) -> None:
        while self._listeners:
            try:
                await self._listen()
            except (RedisError, OSError) as error:
                self._is_refused = False
                if is_transient(error):
                    self._owner.displace(self._take_all())
                    await self._backoff.wait(error)
                    self._owner.place()
                else:
                    self._owner.refuse(self._take_all())

    async def _listen(self) -> None:
        """Connect, subscribe to all there is, and listen.

        Raises:
            RedisError: when there is no connection, or none any more.
        """
        line = await _SubscriptionConnection.open(self._server.connection_pool)
        line.station = self
        self._line, self._changed = line, dict.fromkeys(self._listeners)
        try:
            self._tell_changes()
            raise await line.end()
        finally:
            self._line = None
            await line.close()


class _SubscriptionConnection(TakenConnection):
    """The connection of a station."""

    station: _ServerSubscriptions

    def __init__(self, pool: ConnectionPool, connection: AbstractConnection) -> None:
        super().__init__(pool, connection)
        self._is_silent = False
        self._end: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    def say(self, packed: bytes) -> None:
        """Send commands; a connection that is lost says so itself."""
        with suppress(RedisError):
            self.write(packed)

    async def end(self) -> Exception:
        """Wait until the connection is lost, and tell why. One that is silent for too long is."""
        while not self._end.done():
            self._is_silent = True
            await asyncio.wait([self._end], timeout=_SILENCE)
            if self._is_silent and not self._end.done():
                self.say(_PING)
                await asyncio.wait([self._end], timeout=_SILENCE)
                if self._is_silent:
                    self.give_up(RedisTimeoutError("the feed is silent"))
        return self._end.result()

    def give_up(self, error: Exception) -> None:
        """Be done with this connection."""
        if not self._end.done():
            self._end.set_result(error)
            self.abort()

    def on_replies(self, replies: list[object]) -> None:
        """See `TakenConnection.on_replies`."""
        self._is_silent = False
        self.station.take(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `TakenConnection.connection_lost`."""
        self.give_up(connection_lost_error())
        super().connection_lost(exc)
