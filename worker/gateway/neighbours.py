"""Whether the client of a request is connected: to this process, or to another one of the gateway, which is asked.

All processes subscribe to one channel. It carries their questions and answers, which are rare: only a request whose
body was sent before, and has no answer yet, leads to one.
"""

import asyncio
import itertools
import secrets
from collections.abc import Collection
from contextlib import suppress

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ..contract.keys import Keys
from ..redisio.batching import CommandBatcher
from ..redisio.cluster import ClusterClient
from ..redisio.pipelined import pack
from ..redisio.subscriptions import Subscriptions
from .outlets import Wire
from .tasks import end_tasks
from .tcp_state import is_established


class _Asked(msgspec.Struct, tag_field="kind", tag="asked"):
    """A question. `asker` is the process that gets the answers."""

    asker: str
    number: int
    ids: list[str]


class _Answered(msgspec.Struct, tag_field="kind", tag="answered"):
    """What one process knows of the requests: whether the client of each is connected to it."""

    asker: str
    number: int
    is_open: dict[str, bool]


_read = msgspec.json.Decoder(_Asked | _Answered).decode


class _Question:
    """A question that waits for its answers."""

    def __init__(self, ids: Collection[str]) -> None:
        self.found: dict[str, bool] = {}
        self.done = asyncio.get_running_loop().create_future()
        self._ids = frozenset(ids)
        self._missing: int | None = None
        self._answers = 0

    def expect(self, answers: int) -> None:
        """There will be so many answers. Some may be there already."""
        self._missing = answers - self._answers
        self._check()

    def add(self, is_open: dict[str, bool]) -> None:
        """Add an answer."""
        self.found |= is_open
        self._answers += 1
        if self._missing is not None:
            self._missing -= 1
        self._check()

    def _check(self) -> None:
        is_complete = self._missing is not None and self._missing <= 0
        if not self.done.done() and (is_complete or self.found.keys() >= self._ids):
            self.done.set_result(None)


class Neighbours:
    """Knows the connections of this process, and asks other processes about theirs.

    Args:
        patience: seconds after which a process that does not answer is taken for one that knows nothing.
    """

    def __init__(self, redis: Redis, commands: CommandBatcher, keys: Keys, *, patience: float = 2.0) -> None:
        self.wires: dict[str, Wire] = {}
        """The connections of this process whose clients wait for the first byte of a request, by its id."""
        self._subscriptions = Subscriptions(redis)
        self._commands = commands
        self._channel = keys.gateways
        self._publish = b"SPUBLISH" if isinstance(redis, ClusterClient) else b"PUBLISH"
        self._patience = patience
        self._name = secrets.token_hex(8)
        self._is_subscribed = False
        self._numbers = itertools.count()
        self._questions: dict[int, _Question] = {}
        self._answering: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to answer, and to ask once Redis has confirmed the subscription."""
        self._subscriptions.subscribe(self._channel, self)

    async def aclose(self) -> None:
        """Stop."""
        await self._subscriptions.aclose()
        await end_tasks(self._answering)

    def is_open(self, request_id: str) -> bool | None:
        """Whether the client of a request is connected to this process; None if nothing here knows its connection.

        The kernel is asked, because the event loop may not have read the end of the connection yet.
        """
        wire = self.wires.get(request_id)
        return None if wire is None else is_established(wire.transport)

    async def ask(self, ids: Collection[str]) -> dict[str, bool]:
        """Ask the other processes whether the clients of requests are connected to them.

        A request is missing in the result if no process that answers knows its connection.
        """
        if not (ids and self._is_subscribed):
            return {}
        number = next(self._numbers)
        question = self._questions[number] = _Question(ids)
        try:
            async with asyncio.timeout(self._patience):
                question.expect(await self._send(_Asked(self._name, number, list(ids))) - 1)
                await question.done
        except (TimeoutError, RedisError, OSError):
            pass
        finally:
            del self._questions[number]
        return question.found

    def on_message(self, payload: bytes) -> None:
        """See `Listener`, also below."""
        try:
            message = _read(payload)
        except msgspec.MsgspecError:
            return  # of a later version
        if isinstance(message, _Answered):
            if message.asker == self._name and message.number in self._questions:
                self._questions[message.number].add(message.is_open)
        elif message.asker != self._name:
            looked_up = ((request_id, self.is_open(request_id)) for request_id in message.ids)
            known = {request_id: is_open for request_id, is_open in looked_up if is_open is not None}
            task = asyncio.create_task(self._answer(_Answered(message.asker, message.number, known)))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    def on_subscribed(self) -> None:
        self._is_subscribed = True

    def on_interrupted(self) -> None:
        self._is_subscribed = False

    def on_refused(self, error: Exception) -> None:  # noqa: ARG002 - see `Listener`
        self._is_subscribed = False

    async def _answer(self, answer: _Answered) -> None:
        with suppress(RedisError, OSError):
            await self._send(answer)

    async def _send(self, message: _Asked | _Answered) -> int:
        """Publish a message; returns how many processes get it."""
        packed = pack(self._publish, self._channel.encode(), msgspec.json.encode(message))
        (receivers,) = await self._commands.execute(self._channel, packed, 1)
        return int(receivers)
