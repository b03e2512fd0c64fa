"""The response to a chat completion that is not streamed: the whole answer, after it has ended.

Clients wait 10 minutes for the next byte, and proxies less. So after a while the response begins with spaces, which
JSON allows. Its status is then 200 whatever comes, and clients do not look for an error in the body: an answer that
fails after that ends with a broken connection, and a client that repeats the request gets the error at once.
"""

import asyncio
from collections.abc import Awaitable
from contextlib import aclosing
from dataclasses import dataclass

from ..client.async_client import Client
from ..client.errors import ClientError
from ..contract.answer import Answer
from ..contract.entries import Cancelled, Done, Failed, Object
from ..telemetry.events import Telemetry
from ..telemetry.stream_events import StreamEnd
from .chat_stream import problem_of_end
from .held_answers import SMALL, HeldAnswer, HeldAnswers, size_of
from .large_json import json_pieces, send_pieces
from .noted_calls import NotedCall
from .outlets import ABORT, Receive, Scope, Send
from .problems import Problem, log_reason, problem_of, unavailable
from .protocols.chat_chunks import INTERRUPTED, STOPPING, ChatChunks
from .responses import problem_response
from .stream_response import response_start

_HEADERS = {"Content-Type": "application/json", "Cache-Control": "no-store"}


@dataclass(frozen=True, slots=True)
class AnswerPace:
    """The times of responses with whole answers, in seconds."""

    grace: float = 20.0
    """The time after which the first space is sent."""
    keep_alive: float = 12.0
    """The time between two spaces."""
    receipt: float = 0.5
    """The time after a complete answer in which a connection that was cut on the way is reset."""


class WholeAnswer:
    """The response with one answer. `end` is why it ended, once `send` has returned."""

    def __init__(
        self, client: Client, request_id: str, options: ChatChunks, noted: NotedCall, held: HeldAnswers, *,
        pace: AnswerPace, write_timeout: float, telemetry: Telemetry,
    ) -> None:  # fmt: skip
        self.end: StreamEnd = "done"
        self.has_begun = False
        self._client = client
        self._request_id = request_id
        self._options = options
        self._noted = noted
        self._headers = {"X-Request-Id": request_id}
        self._held = held
        self._pace = pace
        self._write_timeout = write_timeout
        self._telemetry = telemetry
        self._stopping = asyncio.Event()

    def end_now(self) -> None:
        """End the response, because the process stops."""
        self._stopping.set()

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait for the answer, and send it."""
        with self._held.hold() as held:
            await self._send(held, scope, receive, send)

    async def _send(self, held: HeldAnswer, scope: Scope, receive: Receive, send: Send) -> None:
        waits: list[asyncio.Task[object]] = [
            asyncio.create_task(_run(self._body(held))),
            asyncio.create_task(_run(_wait_left(receive))),
            asyncio.create_task(_run(self._stopping.wait())),
        ]
        answering, leaving, stopping = waits
        try:
            while not await _first_of(waits, self._pace.keep_alive if self.has_begun else self._pace.grace):
                await self._keep_alive(send)
            if answering.done():
                result = answering.result()
                await self._respond(result, scope, send)
            elif leaving.done():
                self.end = "left"
            elif stopping.done():
                self.end = "shutdown"
                problem = problem_of_end(INTERRUPTED, STOPPING, has_key=False)
                await self._refuse(problem, scope, send)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)

    async def _body(self, held: HeldAnswer) -> Object | Problem:
        try:
            self._noted.begin()
            answer = await self._follow()
            if isinstance(answer.end, Done) and answer.opened is None:
                answer = await self._read(held)
        except (ClientError, Problem) as error:
            self.end = "problem"
            problem = problem_of(error)
            log_reason(problem, self._telemetry)
            return problem
        if isinstance(answer.end, Failed):
            return problem_of_end(answer.end.code, answer.end.message, has_key=self._noted.has_key)
        if isinstance(answer.end, Cancelled):
            return problem_of_end("cancelled", "the request was cancelled", has_key=self._noted.has_key)
        if held.is_large:  # the steps of a thread take turns with the event loop
            return await asyncio.to_thread(completion, answer, self._options)
        return completion(answer, self._options)

    async def _follow(self) -> Answer:
        """Wait for the end. Of a large answer only the end is kept: it is read once it is complete."""
        answer, size = Answer(), 0
        async with aclosing(self._client.follow(self._request_id)) as entries:
            async for entry in entries:
                size += size_of(entry)
                if size > SMALL:
                    answer = Answer()
                answer.add(entry)
            if isinstance(answer.end, Done):
                await self._noted.on_done()
            else:  # before the follower leaves: identical requests would attach to one that nobody follows
                await self._noted.end(is_whole=not self.has_begun)
        return answer

    async def _read(self, held: HeldAnswer) -> Answer:
        answer = Answer()
        async for page in self._client.pages(self._request_id):
            for entry in page:
                answer.add(entry)
                await held.add(entry)
        if answer.end is None:
            raise unavailable()
        return answer

    async def _respond(self, result: object, scope: Scope, send: Send) -> None:
        if isinstance(result, Problem):
            await self._refuse(result, scope, send)
            return
        await self._begin(send)
        if not await send_pieces(json_pieces(result), scope, send, self._write_timeout):
            self.end = "stalled"

    async def _refuse(self, problem: Problem, scope: Scope, send: Send) -> None:
        if self.has_begun:
            abort = scope.get(ABORT)
            if abort is not None:
                abort()
            return
        problem.headers.update(self._headers)
        await problem_response(scope, problem)(scope, _receive_nothing, send)

    async def _keep_alive(self, send: Send) -> None:
        await self._begin(send)
        await send({"type": "http.response.body", "body": b" ", "more_body": True})

    async def _begin(self, send: Send) -> None:
        if not self.has_begun:
            self.has_begun = True
            self._noted.on_first_byte()
            await send(response_start(_HEADERS | self._headers))


def completion(answer: Answer, options: ChatChunks) -> Object:
    """The answer as a chat completion, without what only the worker requested."""
    whole = answer.completion()
    choices = whole["choices"]
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and not options.token_ids:
            choice.pop("token_ids", None)
    extra: Object = dict(answer.end.extra) if answer.end else {}
    if answer.opened is not None:
        extra = answer.opened.extra | extra
    return extra | whole


async def _run(awaitable: Awaitable[object]) -> object:
    return await awaitable


async def _first_of(waits: list[asyncio.Task[object]], within: float) -> bool:
    """Wait until one of the tasks is done. Returns false if none is in time."""
    done, _ = await asyncio.wait(waits, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


async def _wait_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _receive_nothing() -> dict[str, object]:
    return {"type": "http.disconnect"}
