"""`POST /v1/chat/completions`: a chat completion through the queue, for unchanged clients of OpenAI's API."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

from redis.exceptions import RedisError
from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from ..client.async_client import State
from ..client.errors import ClientError
from ..client.new_job import JobOptions, new_job
from ..contract.entries import Object
from ..telemetry.stream_events import StreamEnd
from .access import Requester
from .answers import AnswerPace, WholeAnswer
from .body import JsonObject, body_limit, check_completion, read_json
from .chat_stream import ChunkStream
from .ids import id_of_key, new_id
from .job_options import read_idempotency_key, take_job_options
from .leaving import Leaving
from .limits import has_limits
from .noted_calls import NotedCall
from .outlets import DEFERRED, WIRE, Receive, Scope, Send, Wire
from .problems import Problem
from .protocols.chat_chunks import ChatChunks
from .repeats import Repeats, fingerprint
from .services import Services
from .tcp_state import is_acknowledged

_MOST_EVENTS = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall:
    """What the response to a request depends on. It lives as long as the response, so it has no body.

    `skip` is how many events of the stream the client has. `cancels` is whether the job is cancelled if the client
    leaves, and nobody else follows it. `fingerprint` is empty if the idempotency key `key` names the answer.
    """

    owner: str
    protocol: ChatChunks
    streams: bool
    key: str
    skip: int
    is_retry: bool
    cancels: bool
    fingerprint: str


class FoundRequest(NamedTuple):
    """The request that a response is about.

    `release` ends the subscription to the feed by which others see that the request is followed. `is_new` is whether
    its job was added just now.
    """

    request_id: str
    release: Callable[[], None]
    is_new: bool


class ChatCompletions:
    """Answers chat completions."""

    def __init__(self, services: Services, *, pace: AnswerPace | None = None) -> None:
        self._services = services
        self._pace = pace or AnswerPace()
        settings, client = services.settings, services.client
        self._repeats = Repeats(services.commands, services.keys, client, services.neighbours, settings.patience)
        self._leaving = Leaving(client, self._repeats, services.limits, after=settings.leave_after)
        self._open: dict[ChunkStream | WholeAnswer, None] = {}
        self._is_ending = asyncio.Event()
        self._ends_at = float("inf")
        """When the process ends what is open, by the event loop's clock."""
        services.at_end.append(self._end_all)

    async def respond(self, request: Request) -> "ChatResponse":
        """Begin, or find, what a request is about; returns the response to it.

        Raises:
            Problem: when the caller may not, or the request is malformed.
            InvalidJob, ClientError: when no job can be added.
        """
        caller = self._services.access.caller(request)
        body = await read_json(request, body_limit(self._services.settings, caller))
        options = take_job_options(body, request.headers, caller, self._services.settings)
        call = read_call(body, options, request.headers, caller)
        found = await self._find_or_add(call, body, options, caller, request.scope.get(WIRE))
        return ChatResponse(self, call, found)

    async def _find_or_add(
        self, call: ChatCall, body: JsonObject, options: JobOptions, caller: Requester, wire: Wire | None
    ) -> FoundRequest:
        """Find the request that a call repeats, or add the job of a new one."""
        services = self._services
        request_id = id_of_key(call.owner, call.key) if call.key else new_id(call.owner)
        with_id: JobOptions = {**options, "id": request_id}
        if call.key:
            is_known = (await services.client.status(request_id)).state is not State.UNKNOWN
            if call.skip and not is_known:
                raise Problem(410, "gone", "there is no answer with this Idempotency-Key to continue")
            if is_known:
                await services.limits.count(caller)
                await services.client.enqueue(body, **with_id)
                return FoundRequest(request_id, _do_nothing, is_new=False)
        async with self._expected(call, request_id, wire) as release:
            if not call.key:
                rivals = None
                # With a limit, `attach` comes first: what the first request counts must not refuse its repetition.
                if self._repeats.adds and not (has_limits(caller) or services.settings.queue_limit):
                    new = new_job(body, **with_id)
                    adding = partial(self._repeats.add, call.fingerprint, new, is_retry=call.is_retry)
                    rivals = await services.limits.admit_to(caller, request_id, adding)
                    if not rivals:
                        return FoundRequest(request_id, release, is_new=True)
                    await services.limits.ended(call.owner, request_id)
                repeated = await self._repeats.attach(
                    call.fingerprint, request_id, None,
                    is_retry=call.is_retry, count=partial(services.limits.count, caller), found=rivals,
                )  # fmt: skip
                if repeated is not None:
                    release()
                    return FoundRequest(repeated, self._repeats.expect(repeated, wire), is_new=False)
            await services.limits.admit_to(caller, request_id, partial(services.client.enqueue, body, **with_id))
            return FoundRequest(request_id, release, is_new=True)

    @asynccontextmanager
    async def _expected(self, call: ChatCall, request_id: str, wire: Wire | None) -> AsyncIterator[Callable[[], None]]:
        """Subscribe to the feed of a request that may be new; yields what ends this. An error leaves nothing of it."""
        release = self._repeats.expect(request_id, wire)
        try:
            yield release
        except BaseException:
            release()
            with suppress(ClientError, RedisError, OSError):
                await self._services.limits.ended(call.owner, request_id)
                if call.fingerprint:
                    await self._repeats.forget(call.fingerprint, request_id)
            raise

    async def run(self, call: ChatCall, found: FoundRequest, connection: tuple[Scope, Receive, Send]) -> None:
        """Send the response to a call, up to its end, and then see to its request."""
        request_id, release, is_new = found
        noted = NotedCall(self._repeats, self._services.limits, call.owner, call.fingerprint, request_id, release)
        response: ChunkStream | WholeAnswer
        end: StreamEnd = "shutdown"
        if call.streams:
            response = ChunkStream(
                self._services.streams, request_id, call.protocol, noted, connection,
                is_new=is_new, skip=call.skip, grace=self._services.settings.grace,
            )  # fmt: skip
        else:
            services = self._services
            response = WholeAnswer(
                services.client, request_id, call.protocol, noted, services.held,
                pace=self._pace, write_timeout=services.settings.write_timeout, telemetry=services.telemetry,
            )  # fmt: skip
        self._open[response] = None
        if self._ends_at <= asyncio.get_running_loop().time():
            response.end_now()
        try:
            if isinstance(response, ChunkStream):
                await self._services.streams.run(response)
            else:
                await response.send(*connection)
            end = response.end
        finally:
            del self._open[response]
            if end in {"left", "stalled", "problem"} and call.cancels:
                self._leaving.on_left(call.owner, request_id, call.fingerprint)
            if isinstance(response, WholeAnswer) and end == "done":
                await self._confirm(noted, connection[0])
            else:
                await noted.end(is_whole=False)

    async def _confirm(self, noted: NotedCall, scope: Scope) -> None:
        """Let nobody attach to a whole answer any more once its client has it. Nobody who is answered waits for this.

        The client's kernel has it once it has acknowledged all. If the client could not read it, or something between
        was cut, the connection is then reset.
        """
        wire, deferred = scope.get(WIRE), scope.get(DEFERRED)
        if noted.is_over or noted.has_key or wire is None or deferred is None:
            await noted.end(is_whole=True, has_ended=False)
            return

        async def confirm() -> None:
            while not (wire.transport.is_closing() or self._is_ending.is_set()):
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._pace.receipt):
                        await self._is_ending.wait()
                if wire.transport.is_closing() or is_acknowledged(wire.transport):
                    break
            await noted.end(is_whole=not wire.flow.is_broken, has_ended=False)

        deferred.append(confirm)

    def _end_all(self, within: float) -> None:
        """Let open responses end within so many seconds. No client that leaves from now on ends its job."""
        self._leaving.stop()
        self._is_ending.set()
        loop = asyncio.get_running_loop()
        self._ends_at = loop.time() + within
        loop.call_later(within, self._end_open)

    def _end_open(self) -> None:
        for response in list(self._open):
            response.end_now()


class ChatResponse:
    """The response to one chat completion, as ASGI."""

    def __init__(self, completions: ChatCompletions, call: ChatCall, found: FoundRequest) -> None:
        self._run = partial(completions.run, call, found)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = partial(self._run, (scope, receive, send))
        deferred = scope.get(DEFERRED)
        if deferred is None:
            await run()
        else:
            deferred.append(run)


def read_call(body: JsonObject, options: JobOptions, headers: Mapping[str, str], caller: Requester) -> ChatCall:
    """Read what a client wants from its body and headers.

    Raises:
        Problem: when a field or a header is malformed (400).
    """
    check_completion(body)
    streams = bool(body.get("stream"))
    key = read_idempotency_key(headers)
    skip = _number(headers.get("relay-after", "0"), "Relay-After")
    if skip and not (key and streams):
        raise _invalid("Relay-After", "needs an Idempotency-Key and a stream")
    leaves = headers.get("relay-on-disconnect", "continue" if key else "cancel")
    if leaves not in {"continue", "cancel"}:
        raise _invalid("Relay-On-Disconnect", "must be cancel or continue")
    return ChatCall(
        owner=caller.owner,
        protocol=ChatChunks.of(cast("Object", body)),
        streams=streams,
        key=key,
        skip=skip,
        is_retry=_is_retry(headers.get("x-stainless-retry-count", "")),
        cancels=leaves == "cancel",
        fingerprint="" if key else fingerprint(caller, body, options),
    )


def _is_retry(text: str) -> bool:
    return text.isascii() and text.isdecimal() and text.strip("0") != ""


def _number(text: str, name: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 17 and int(text) <= _MOST_EVENTS):
        raise _invalid(name, "must be a number of events")
    return int(text)


def _invalid(name: str, what: str) -> Problem:
    return Problem(400, "invalid_request", f"{name} {what}", param=name)


def _do_nothing() -> None:
    pass


def routes(services: Services) -> Sequence[BaseRoute]:
    """The route of chat completions."""
    return [Route("/v1/chat/completions", ChatCompletions(services).respond, methods=["POST"])]
