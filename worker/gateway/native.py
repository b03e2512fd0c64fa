"""The routes of the native API: start a request, read its state, follow one or many, and cancel."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from ..client.async_client import State
from ..client.errors import ClientError, MappedRetry
from ..contract.entries import Object
from ..contract.ids import BEFORE_ALL, SEAL, EntryId
from .access import Requester
from .body import body_limit, check_completion, read_json
from .event_cursors import check_place, cursor_text, parse_cursor
from .ids import id_of_first, id_of_key, new_id
from .job_options import read_idempotency_key, take_job_options
from .large_json import LargeJson
from .multiplex import MOST_REQUESTS, RequestsStream, parse_cursors, short_id
from .noted_calls import NotedCall
from .outlets import RAW_SEND, WIRE, Receive, Scope, Send, forget_request
from .problems import Problem, log_reason, not_found, problem_of
from .protocols.native import NativeEvents, named_event
from .repeats import Repeats, fingerprint
from .request_state import RequestState
from .responses import is_event_source, json_response, problem_response
from .running import started_requests
from .services import Services
from .stream_response import EVENT_STREAM_HEADERS, StreamResponse, response_start
from .websocket import RequestWebSocket

_LONGEST_WAIT = 60.0


def routes(services: Services) -> Sequence[BaseRoute]:
    """The routes of the native API."""
    api = _NativeApi(services)
    return [
        Route("/requests", api.start, methods=["POST"]),
        Route("/requests", api.list_running, methods=["GET"]),
        Route("/requests/{id}", api.state, methods=["GET"]),
        Route("/requests/{id}", api.cancel, methods=["DELETE"]),
        Route("/requests/{id}/events", api.events, methods=["GET"]),
        WebSocketRoute("/requests/{id}/ws", RequestWebSocket(services)),
        Route("/events", api.many_events, methods=["GET"]),
    ]


class _NativeApi:
    def __init__(self, services: Services) -> None:
        self._services = services
        self._repeats = Repeats(
            services.commands, services.keys, services.client, services.neighbours, services.settings.patience
        )
        self._ending = asyncio.Event()
        services.at_end.append(lambda _: self._ending.set())

    async def start(self, request: Request) -> "Response | StartedResponse":
        """POST /requests: add a job; 202 with its id, its URLs and a read token.

        Without an idempotency key, a browser may send the request again, unnoticed: see `repeats.py`.
        """
        services = self._services
        caller = services.access.caller(request)
        body = await read_json(request, body_limit(services.settings, caller))
        options = take_job_options(body, request.headers, caller, services.settings)
        check_completion(body)
        key = read_idempotency_key(request.headers)
        if key:
            options["id"] = request_id = id_of_key(caller.owner, key)
            await services.limits.admit(caller, request_id)
            try:
                await services.client.enqueue(body, **options)
            except BaseException:
                with contextlib.suppress(ClientError):
                    if (await services.client.status(request_id)).state is State.UNKNOWN:
                        await services.limits.ended(caller.owner, request_id)
                raise
            return self._started(request_id)
        print_, new = fingerprint(caller, body, {**options, "route": "/requests"}), new_id(caller.owner)
        count = partial(services.limits.count, caller)
        wire = request.scope.get(WIRE)
        repeated = await self._repeats.attach(print_, new, wire, is_retry=False, count=count)
        options["id"] = request_id = repeated or new
        release = self._repeats.expect(request_id, wire)
        noted = NotedCall(self._repeats, services.limits, caller.owner, print_, request_id, release)
        noted.begin()
        try:
            if repeated is None:
                await services.limits.admit(caller, request_id)
                await services.client.enqueue(body, **options)
        except BaseException:
            await noted.end(is_whole=True)
            raise
        return StartedResponse(request, self._started(request_id), noted)

    def _started(self, request_id: str) -> Response:
        services = self._services
        path = f"/requests/{request_id}"
        token = services.access.tokens.token_for(request_id)
        query = f"?token={token}" if token else ""
        shown: Object = {
            "id": request_id,
            "urls": {"state": path, "events": f"{path}/events{query}", "websocket": f"{path}/ws{query}"},
            "token": token,
        }
        return json_response(shown, 202, {"Location": path, "X-Request-Id": request_id})

    async def list_running(self, request: Request) -> Response:
        """GET /requests: the caller's requests that wait or run, the newest first; for operators, all that run."""
        services = self._services
        caller = services.access.caller(request)
        await services.limits.count(caller)
        running = await self._running(caller)
        if caller.sees_all:
            started = await MappedRetry(services.settings.patience)(started_requests, services.redis, services.keys)
            known = dict(running)
            others = [found for found in started if found not in known][:MOST_REQUESTS]
            states = await asyncio.gather(*map(services.client.status, others))
            running += [
                (found, status.state)
                for found, status in zip(others, states, strict=True)
                if status.state is State.RUNNING
            ]
        return json_response({"requests": [{"id": found, "state": state.value} for found, state in running]})

    async def state(self, request: Request) -> "LargeJson":
        """GET /requests/{id}: the state, the text so far, the usage, and a read token for the bearer of a key.

        With `?wait=` it comes after the end, or after so many seconds.
        """
        services, request_id = self._services, request.path_params["id"]
        caller = await self._reader(request, request_id)
        wait = _parse_wait(request.query_params.get("wait", "0"))
        timeout = services.settings.write_timeout
        with contextlib.ExitStack() as stack:
            held = stack.enter_context(services.held.hold(timeout))
            state = RequestState(services.client, request_id, services.streams.position, held)
            if wait and not self._ending.is_set():
                await self._wait(state, wait)
            await state.read()
            if state.has_ended and caller is not None:
                with contextlib.suppress(ClientError):
                    await services.limits.ended(caller.owner, request_id)
            shown = await state.as_dict()
            if caller is not None and (token := services.access.tokens.token_for(request_id)):
                shown["token"] = token  # a page that has a key needs one for its EventSource
            on_end = stack.pop_all().close
        return LargeJson(shown, {"X-Request-Id": request_id}, write_timeout=timeout, on_end=on_end)

    async def cancel(self, request: Request) -> Response:
        """DELETE /requests/{id}: cancel a request. One that has ended stays as it is."""
        services, request_id = self._services, request.path_params["id"]
        caller = services.access.owner_of(request, request_id)
        before = await services.client.cancel(request_id, must_exist=True)
        await services.limits.ended(caller.owner, request_id)
        is_cancelled = before.state in {State.QUEUED, State.RUNNING}
        return json_response(
            {"id": request_id, "state": State.ENDED.value if is_cancelled else before.state.value,
             "outcome": "cancelled" if is_cancelled else before.outcome}
        )  # fmt: skip

    async def events(self, request: Request) -> "Response | StreamResponse":
        """GET /requests/{id}/events: follow a request by server-sent events."""
        services, request_id = self._services, request.path_params["id"]
        await self._reader(request, request_id)
        try:
            position = parse_cursor(cursor_text(request))
            if position == SEAL:
                return Response(status_code=204)  # closes an EventSource that comes back after the end
            await services.client.open(request_id, after=position)
            await check_place(services, request_id, position)
        except (Problem, ClientError) as error:
            return _in_band(request, problem_of(error))
        return StreamResponse(services.streams, request_id, NativeEvents(), position=position)

    async def many_events(self, request: Request) -> "Response | RequestsResponse":
        """GET /events: follow the requests `ids`, or all of the caller's that run, over one connection."""
        given = _given_ids(request)
        caller = self._services.access.caller(request) if given is None else None
        if caller is not None:
            await self._services.limits.count(caller)
        for request_id in given or ():
            await self._reader(request, request_id)
        try:
            if cursor_text(request) == str(SEAL):
                return Response(status_code=204)  # an EventSource comes back after a refusal in the stream
            places = parse_cursors(cursor_text(request))
            if given and all(places.get(short_id(request_id)) == SEAL for request_id in given):
                return Response(status_code=204)
            ids = await self._ids_to_follow(given or (), caller, places)
        except Problem as problem:
            return _in_band(request, problem)
        return RequestsResponse(self, ids, places, caller)

    async def running_ids(self, caller: Requester, over: Sequence[str] = ()) -> Sequence[str]:
        """The ids of a caller's requests that have not been seen to end. Those in `over` have."""
        if over:
            await self._services.limits.ended(caller.owner, *over)
        return await self._services.limits.running(caller.owner, MOST_REQUESTS)

    @property
    def services(self) -> Services:
        """See `Services`."""
        return self._services

    async def _reader(self, request: Request, request_id: str) -> Requester | None:
        caller = self._services.access.reader(request, request_id)
        if caller is not None:
            await self._services.limits.count(caller)
        return caller

    async def _ids_to_follow(
        self, given: Sequence[str], caller: Requester | None, places: Mapping[str, EntryId]
    ) -> Sequence[str]:
        """The given requests, or those of the caller that run, or have ended since it left."""
        for request_id in given:
            is_ended = places.get(short_id(request_id)) == SEAL
            if not is_ended and (await self._services.client.status(request_id)).state is State.UNKNOWN:
                raise not_found()
        ids = list(given)
        if caller is not None:
            running = [found for found, _ in await self._running(caller)]
            ids = [*_ended_since(caller, places, running), *running][:MOST_REQUESTS]
        for request_id in ids:
            await check_place(self._services, request_id, places.get(short_id(request_id), BEFORE_ALL))
        return ids

    async def _running(self, caller: Requester) -> list[tuple[str, State]]:
        """The caller's requests that wait or run, the newest first. Those that have ended are forgotten."""
        while True:
            ids = await self.running_ids(caller)
            states = [status.state for status in await asyncio.gather(*map(self._services.client.status, ids))]
            both = list(zip(ids, states, strict=True))
            over = [request_id for request_id, state in both if state in {State.ENDED, State.EXPIRED}]
            if not over:  # an unknown one is being added
                return [(request_id, state) for request_id, state in both if state is not State.UNKNOWN]
            await self._services.limits.ended(caller.owner, *over)  # older ones come into view

    async def _wait(self, state: RequestState, seconds: float) -> None:
        """Wait for the end of a request, but not beyond the end of this process."""
        reading, ending = asyncio.create_task(state.wait(seconds)), asyncio.create_task(self._ending.wait())
        try:
            await asyncio.wait({reading, ending}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
        finally:
            for task in (reading, ending):
                task.cancel()
            await asyncio.gather(reading, ending, return_exceptions=True)


class StartedResponse:
    """The response to a request that was started. A repetition attaches if the client left before this response."""

    def __init__(self, request: Request, response: Response, noted: NotedCall) -> None:
        self._request = request
        self._response = response
        self._noted = noted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        has_left = await self._request.is_disconnected()
        try:
            await self._response(scope, receive, send)
        finally:
            await self._noted.end(is_whole=not has_left, has_ended=False)


class RequestsResponse:
    """The response that streams many logs."""

    def __init__(
        self, api: _NativeApi, ids: Sequence[str], places: Mapping[str, EntryId], caller: Requester | None
    ) -> None:
        self._api = api
        self._ids = ids
        self._places = places
        self._caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await send(response_start(EVENT_STREAM_HEADERS))
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        caller, api = self._caller, self._api
        streams = api.services.streams
        list_running = None if caller is None else partial(api.running_ids, caller)
        connection = scope, receive, scope.get(RAW_SEND, send)
        forget_request(scope)
        await streams.start(RequestsStream(streams, connection, self._ids, self._places, list_running), scope)


def _in_band(request: Request, problem: Problem) -> Response:
    """A problem for the reader of a stream. An EventSource gets an event, after which its next try gets 204."""
    log_reason(problem, request.app.state.telemetry)
    if not is_event_source(request.scope) or problem.status == 404 or problem.is_temporary:
        return problem_response(request.scope, problem)
    event = named_event("gone" if problem.status == 410 else "problem", SEAL, problem)
    return Response(event, headers=EVENT_STREAM_HEADERS)


def _ended_since(caller: Requester, places: Mapping[str, EntryId], running: Sequence[str]) -> Sequence[str]:
    """The caller's requests that it followed without seeing their ends, and that do not run any more."""
    missing = {name for name, place in places.items() if place != SEAL}.difference(map(short_id, running))
    found = (id_of_first(name, caller.owner) for name in places if name in missing)
    return [request_id for request_id in found if request_id is not None]


def _given_ids(request: Request) -> Sequence[str] | None:
    """The ids that `?ids=` has; None without it."""
    text = request.query_params.get("ids")
    if text is None:
        return None
    ids = list(dict.fromkeys(filter(None, text.split(","))))
    if len(ids) > MOST_REQUESTS:
        raise Problem(400, "too_many_requests", f"one connection follows at most {MOST_REQUESTS} requests", param="ids")
    if not ids:
        raise Problem(400, "invalid_request", "ids is empty: give ids of requests, separated by commas", param="ids")
    return ids


def _parse_wait(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _LONGEST_WAIT:
        raise Problem(400, "invalid_request", f"wait must be a number of seconds up to {_LONGEST_WAIT:g}", param="wait")
    return seconds
