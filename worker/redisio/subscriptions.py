"""Pub/sub: the subscriptions of a client, with one connection to each server for any number of channels.

In a cluster, subscriptions may be sharded (Redis 7): the messages of a channel are then received at the master of its
slot. All changes of one step of the event loop are sent in one write. After a lost connection every channel is
subscribed to again, and its listener is notified: messages that were published meanwhile are lost.

A refusal is not final: an operator may grant the right to a channel, or restore a password. It applies to all channels
of its server. From time to time one of them is requested again, and once Redis accepts it, so are the others.
"""

import asyncio
from contextlib import suppress
from functools import partial
from typing import Protocol

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ClusterDownError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..telemetry.events import Telemetry
from .cluster import ClusterClient, forget_masters, on_master_removed, server_of
from .errors import is_transient
from .pipelined import DirectConnection, connection_lost_error, pack
from .retry import Backoff

_PING = pack(b"PING")


class Listener(Protocol):
    """The receiver of a channel's messages. Its methods return quickly and never raise, since other listeners wait."""

    def on_message(self, payload: bytes) -> None:
        """Handle a message."""

    def on_subscribed(self) -> None:
        """Called when Redis has confirmed the subscription: every later message is received."""

    def on_interrupted(self) -> None:
        """Called when the connection was lost: messages are lost until `on_subscribed` is called again."""

    def on_refused(self, error: Exception) -> None:
        """Called each time that Redis refuses the subscription: a missing right, a wrong password, an old server."""


class Subscriptions:
    """All subscriptions of a client.

    Args:
        redis: the client. One connection is taken from each server's pool.
        sharded: in a cluster, receive the messages of SPUBLISH at the master of a channel's slot. Otherwise the
            messages of PUBLISH are received, which a cluster sends to all of its nodes.
        retry_refused_after: seconds after a refusal until one of the server's channels is requested again.
        silence: seconds until a silent connection gets a PING, and then until it counts as lost.
        what: the name of lost connections in reports to `telemetry`.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        sharded: bool = True,
        retry_refused_after: float = 5.0,
        silence: float = 5.0,
        what: str = "",
        telemetry: Telemetry | None = None,
    ) -> None:
        self.retry_refused_after = retry_refused_after
        self.silence = silence
        self.new_backoff = partial(Backoff, what, telemetry)
        self.backoff = self.new_backoff()
        """The pauses between tries to find the servers of channels."""
        self._redis = redis
        self._is_sharded = sharded and isinstance(redis, ClusterClient)
        self._servers: dict[Redis, _ServerSubscriptions] = {}
        self._homes: dict[bytes, _ServerSubscriptions] = {}
        """The server of each channel that has one."""
        self._unplaced: dict[bytes, Listener] = {}
        """The listeners of channels whose server is not known yet."""
        self._placing: asyncio.Task[None] | None = None
        self._is_closed = False
        self._retired: set[asyncio.Task[None]] = set()
        on_master_removed(redis, self._remove_server)

    def subscribe(self, channel: str, listener: Listener) -> None:
        """Subscribe to a channel. A channel has one listener."""
        self._unplaced[channel.encode()] = listener
        self.place()

    def unsubscribe(self, channel: str) -> None:
        """End the subscription to a channel. Its listener is no longer called."""
        name = channel.encode()
        self._unplaced.pop(name, None)
        if (home := self._homes.pop(name, None)) is not None:
            home.remove(name)

    async def aclose(self) -> None:
        """Close the connections."""
        self._is_closed = True
        for server in self._servers.values():
            server.stop_retries()
        tasks = [self._placing, *(server.task for server in self._servers.values()), *self._retired]
        for task in tasks:
            while task is not None and not task.done():  # redis-py 8.1 may swallow a cancellation while it connects
                task.cancel()
                await asyncio.wait([task], timeout=0.1)

    def place(self) -> None:
        """Find a server for every channel that has none, and subscribe there."""
        if self._unplaced and not self._is_closed and (self._placing is None or self._placing.done()):
            self._placing = asyncio.create_task(self._place())

    def displace(self, listeners: dict[bytes, Listener]) -> None:
        """Remove channels from their server. `place` finds their new server."""
        forget_masters(self._redis)
        for channel, listener in listeners.items():
            del self._homes[channel]
            self._unplaced[channel] = listener
            listener.on_interrupted()

    async def _remove_server(self, server: Redis) -> None:
        """Find other servers for the channels of a server that is no longer a master."""
        former = self._servers.pop(server, None)
        if former is None:
            return
        if former.task is not None and not former.task.done():
            self._retired.add(former.task)
            former.task.add_done_callback(self._retired.discard)
        self.displace(former.retire())
        self.place()

    async def _place(self) -> None:
        while self._unplaced:
            trouble: Exception | None = None
            for channel in list(self._unplaced):
                try:
                    # Every master receives the messages of PUBLISH, including the master of this slot.
                    server = await server_of(self._redis, channel.decode())
                except ClusterDownError as error:  # this slot has no master: others may have one
                    trouble = error
                    continue
                except (RedisError, OSError) as error:
                    trouble = error
                    break
                listener = self._unplaced.pop(channel, None)
                if listener is None:  # unsubscribed while the server was looked up
                    continue
                if server not in self._servers:
                    self._servers[server] = _ServerSubscriptions(self, server, is_sharded=self._is_sharded)
                self._homes[channel] = self._servers[server]
                self._homes[channel].add(channel, listener)
            if trouble is not None:
                await self.backoff.wait(trouble)


class _ServerSubscriptions:
    """The subscriptions at one server, and their connection."""

    def __init__(self, owner: Subscriptions, server: Redis, *, is_sharded: bool) -> None:
        self.silence = owner.silence
        self.task: asyncio.Task[None] | None = None
        self._owner = owner
        self._server = server
        prefix = b"S" if is_sharded else b""
        self._subscribe, self._unsubscribe = prefix + b"SUBSCRIBE", prefix + b"UNSUBSCRIBE"
        self._subscribed, self._unsubscribed = self._subscribe.lower(), self._unsubscribe.lower()
        self._message = prefix.lower() + b"message"
        self._listeners: dict[bytes, Listener] = {}
        self._changed: dict[bytes, None] = {}
        """Channels to subscribe to, or to unsubscribe from, in the next write."""
        self._connection: _SubscriptionConnection | None = None
        self._backoff = owner.new_backoff()
        self._refusal: Exception | None = None
        """Why this server refuses every subscription. A new connection, which may have new rights, clears it."""
        self._refused: dict[bytes, Listener] = {}
        """The listeners of refused channels. The first one is requested again next."""
        self._retry: asyncio.TimerHandle | None = None

    def add(self, channel: bytes, listener: Listener) -> None:
        """Subscribe to a channel, unless the server refuses every subscription at present."""
        if self._refusal is not None and channel not in self._listeners:
            self._refuse({channel: listener}, self._refusal)
        else:
            self._request(channel, listener)

    def _request(self, channel: bytes, listener: Listener) -> None:
        self._listeners[channel] = listener
        self._change(channel)
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._run())

    def remove(self, channel: bytes) -> None:
        """Unsubscribe from a channel."""
        if self._refused.pop(channel, None) is None and self._listeners.pop(channel, None) is not None:
            self._change(channel)
            if self._refusal is not None:  # the answer to this channel's request no longer has a listener
                self._refuse({}, self._refusal)

    def retire(self) -> dict[bytes, Listener]:
        """Close the connection for good. Returns the listeners of this server."""
        listeners = self._remove_all()
        self.stop_retries()
        if self._connection is not None:
            self._connection.give_up(connection_lost_error())
        return listeners

    def on_replies(self, replies: list[object]) -> None:
        """Handle replies that arrived together, nearly all of them messages."""
        message, get = self._message, self._listeners.get
        for reply in replies:
            if isinstance(reply, list) and reply[0] == message:
                listener = get(reply[1])
                if listener is not None:
                    listener.on_message(reply[2])
            else:
                self._on_answer(reply)

    def _on_answer(self, reply: object) -> None:
        """Handle the reply to a command, or the end of a subscription by Redis."""
        if isinstance(reply, RedisError):
            if not is_transient(reply):
                self._refuse(self._remove_listeners(), reply)
            elif self._connection is not None:
                self._connection.give_up(reply)
        elif isinstance(reply, list) and (listener := self._listeners.get(reply[1])) is not None:
            if reply[0] == self._subscribed:
                self._backoff.reset()
                self._owner.backoff.reset()
                listener.on_subscribed()
                self._request_refused()
            elif reply[0] == self._unsubscribed:  # Redis ended the subscription, since the slot has moved
                del self._listeners[reply[1]]
                self._owner.displace({reply[1]: listener})
                self._owner.place()

    def stop_retries(self) -> None:
        """Request no refused channel again."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _refuse(self, listeners: dict[bytes, Listener], error: Exception) -> None:
        """Keep channels that Redis refuses, and request one of them again after a pause."""
        self._refusal = error
        self._refused |= listeners
        if self._retry is None:
            pause = self._owner.retry_refused_after
            self._retry = asyncio.get_running_loop().call_later(pause, self._request_first_refused)
        for listener in listeners.values():
            listener.on_refused(error)

    def _request_first_refused(self) -> None:
        """Request one refused channel again. If Redis refuses it, it becomes the last of them."""
        self._retry = None
        channel = next(iter(self._refused), None)
        if channel is None:
            self._refusal = None
        else:
            self._request(channel, self._refused.pop(channel))

    def _request_refused(self) -> None:
        """Request all refused channels again, since Redis has accepted another one."""
        self._refusal = None
        self.stop_retries()
        refused, self._refused = self._refused, {}
        for channel, listener in refused.items():
            self._request(channel, listener)

    def _remove_listeners(self) -> dict[bytes, Listener]:
        listeners = dict(self._listeners)
        self._listeners.clear()
        return listeners

    def _remove_all(self) -> dict[bytes, Listener]:
        """Remove every channel, including the refused ones."""
        refused, self._refused = self._refused, {}
        return refused | self._remove_listeners()

    def _change(self, channel: bytes) -> None:
        if self._connection is None:  # a new connection subscribes to every channel
            return
        if not self._changed:
            asyncio.get_running_loop().call_soon(self._send_changes)
        self._changed[channel] = None

    def _send_changes(self) -> None:
        changed, self._changed = self._changed, {}
        if self._connection is not None:
            # One command for each channel: the channels of one SSUBSCRIBE must be of one slot.
            verbs = {True: self._subscribe, False: self._unsubscribe}
            self._connection.send(b"".join([pack(verbs[channel in self._listeners], channel) for channel in changed]))

    async def _run(self) -> None:
        while self._listeners:
            try:
                await self._listen()
            except (RedisError, OSError) as error:
                if is_transient(error):
                    self._refusal = None
                    self.stop_retries()
                    self._owner.displace(self._remove_all())
                    await self._backoff.wait(error)
                    self._owner.place()
                else:
                    self._refuse(self._remove_listeners(), error)

    async def _listen(self) -> None:
        """Connect, subscribe to every channel, and receive messages until the connection is lost.

        Raises:
            RedisError: always, with the reason why it could not connect or why the connection was lost.
        """
        connection = await _SubscriptionConnection.open(self._server.connection_pool)
        connection.subscriptions = self
        self._connection, self._changed = connection, dict.fromkeys(self._listeners)
        try:
            self._send_changes()
            raise await connection.wait_lost()
        finally:
            self._connection = None
            await connection.close()


class _SubscriptionConnection(DirectConnection):
    """A connection that receives messages."""

    subscriptions: _ServerSubscriptions

    def __init__(self, pool: ConnectionPool, connection: AbstractConnection) -> None:
        super().__init__(pool, connection)
        self._is_silent = False
        self._lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    def send(self, packed: bytes) -> None:
        """Send commands. If the connection is lost, `wait_lost` returns the error."""
        with suppress(RedisError):
            self.write(packed)

    async def wait_lost(self) -> Exception:
        """Wait until the connection is lost or silent for too long; returns the error."""
        silence = self.subscriptions.silence
        while not self._lost.done():
            self._is_silent = True
            await asyncio.wait([self._lost], timeout=silence)
            if self._is_silent and not self._lost.done():
                self.send(_PING)
                await asyncio.wait([self._lost], timeout=silence)
                if self._is_silent:
                    self.give_up(RedisTimeoutError("the subscribed connection is silent"))
        return self._lost.result()

    def give_up(self, error: Exception) -> None:
        """End this connection with an error."""
        if not self._lost.done():
            self._lost.set_result(error)
            self.abort()

    def on_replies(self, replies: list[object]) -> None:
        """See `DirectConnection`."""
        self._is_silent = False
        self.subscriptions.on_replies(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `DirectConnection`."""
        self.give_up(connection_lost_error())
        super().connection_lost(exc)
