"""The pool of vLLM servers: chooses the server for each request, sends requests, and monitors the servers."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from ...contract.entries import Object
from ...telemetry.events import Receivers, Telemetry
from ..errors import MODEL_NOT_FOUND, UNAUTHORIZED, UpstreamError
from ..http.credentials import ApiKeys
from ..http.target import base_url
from ..http.transport import Transport
from ..stream.chat_stream import ChatStream
from ..stream.watchdog import StreamTimeouts, StreamWatchdog
from .api import VllmApi
from .circuit import Caller, CircuitState, ServerRequest
from .monitor import ServerMonitor, wait_set
from .opening import open_stream
from .pace import ServerPace
from .probes import Probes
from .recent import Recent
from .reports import CircuitReports
from .room import Demand, Demands, PlaceQueue, next_opening
from .server import MISSING, MOST_REQUESTS, Server, best_server, candidates, reason_to_fall_back
from .trials import send_trial

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


class ServerPool:
    """All vLLM servers of a worker.

    A job waits until a server accepts it, and chooses a server in the same step of the event loop, since the choice of
    a server whose circuit is half open blocks other jobs there:

        while not pool.accepts(model, caller):
            await pool.wait_available(model, caller=caller)
        with (server := pool.choose(model, caller)).reserve():
            async with pool.stream(server, request, caller=caller) as stream: ...

    The caller is the job, one object for all of its requests. A request without a caller counts as a job of its own.

    Args:
        urls: of the servers, in any form that `base_url` accepts.
        keys: the API keys of the servers.
        limits: how long a server may be silent.
        telemetry: receives `VllmAway`, `VllmBack`, `VllmTriedOut` and `KeyFileUnreadable`.
        pace: how often the servers are probed.
        most: the most requests in flight at one server, whatever its limit has learnt.
        transport: makes the connections to the servers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        keys: ApiKeys | None = None,
        limits: StreamTimeouts,
        telemetry: Telemetry | None = None,
        pace: ServerPace | None = None,
        most: int = MOST_REQUESTS,
        transport: Transport | None = None,
    ) -> None:
        self.limits = limits
        """The limits of requests that begin from now on."""
        self._telemetry = telemetry or Receivers()
        self._pace = pace or ServerPace()
        self.servers = [
            Server(
                base_url(url),
                on_change=self._on_change,
                on_room=self._on_room,
                on_models=self._on_models,
                pace=self._pace,
                most=most,
            )
            for url in urls
        ]
        self._changed = asyncio.Event()
        """Set, and replaced, when a circuit changes."""
        self._news = asyncio.Event()
        """Set, and replaced, when there may be more room, or after a change of a circuit or of a list of models."""
        self._places = PlaceQueue()
        self._demands = Demands(self._announce)
        self.generation = 0
        """Grows when a server comes or goes, or when its list of models changes."""
        self._unlisted: Recent[bool] = Recent(time.monotonic, MISSING)
        """Models that no server lists. Requests for them may go to any server."""
        self._missing: Recent[UpstreamError] = Recent(time.monotonic, MISSING)
        """The error of a server that does not have a model, for models that no server lists."""
        self._reports = CircuitReports(self._telemetry)
        self._api = VllmApi(keys or ApiKeys(), self._telemetry, connect=limits.connect, transport=transport)
        self._probes = Probes(self._api, self.servers, self._pace)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._api.aclose()

    @property
    def is_available(self) -> bool:
        """Whether a server gets requests for some model, as far as is known, even if all servers are full now."""
        return self._are_known and bool(candidates(self.servers, Caller()))

    @property
    def _are_known(self) -> bool:
        """Whether every server was probed once: otherwise the first server to answer would get all waiting jobs."""
        return all(server.is_known for server in self.servers)

    def accepts(self, model: str, caller: Caller | None = None) -> bool:
        """Whether a server has room for a job's request for this model now; the empty name is any model."""
        caller = caller or Caller()
        fitting = candidates(self.servers_for(model), caller)
        return self._are_known and any(server.has_room_for(caller) for server in fitting)

    def room(self, model: str) -> int:
        """How many more new jobs of this model can be sent now, less the demand; the empty name is any model.

        If no server lists the model, one job at a time finds out whether a server has it. A job that will end at once,
        because a server lately did not have the model, always has room.
        """
        if not self._are_known:
            return 0
        serving = self.servers_for(model)
        if not serving:
            is_first = model not in self._demands.by_model and self.total_room() > 0
            return int(is_first or model in self._missing)
        return max(0, sum(server.room for server in serving) - self._demands.at(serving))

    def total_room(self) -> int:
        """How many more new jobs of any model can be sent to servers now, less the demand."""
        return self.room("")

    def expect(self, model: str) -> Demand:
        """Count a job that was started here and has no server yet, until the end of the returned demand."""
        return Demand(self._demands, model)

    def models(self) -> frozenset[str]:
        """The models that some server lists."""
        return frozenset().union(*(server.models for server in self.servers))

    async def wait_changed(self, within: float) -> None:
        """Wait until room, a circuit or a list of models may have changed, for at most `within` seconds."""
        await wait_set(self._news, next_opening(self.servers, self._pace.probe_every, within))

    def are_away(self, model: str) -> bool:
        """Whether every server of this model is away."""
        return all(server.is_away for server in self.servers_for(model))

    def should_fall_back(self, model: str, others: Sequence[str], caller: Caller) -> bool:
        """Whether no server of this model may answer the job, and a server accepts a request for one of `others`.

        A server may not answer when it is away, when it has refused the job, or when the job has failed there. A server
        that was full when the job came may not answer as long as it is full.
        """
        serving = self.servers_for(model)
        return (
            bool(serving)
            and all(
                server.is_away
                or server.circuit in caller.failed_at
                or server.circuit in caller.refused_at
                or (server.circuit in caller.turned_away_by and not server.has_room_for(caller))
                for server in serving
            )
            and any(self.accepts(other, Caller(failed_at=caller.failed_at)) for other in others)
        )

    def servers_for(self, model: str) -> list[Server]:
        """The servers to which a request for this model may go, as far as is known; the empty name is any model.

        A model that no server lists may go to any server, once `wait_available` has fetched the lists again.
        """
        serving = [server for server in self.servers if server.serves(model)]
        return serving or (self.servers if model in self._unlisted else [])

    def has_candidate(self, model: str, caller: Caller) -> bool:
        """Whether a server of this model has not refused the job."""
        return any(server.circuit not in caller.refused_at for server in self.servers_for(model))

    async def wait_available(
        self, model: str, others: Sequence[str] = (), *, caller: Caller | None = None, within: float = float("inf")
    ) -> None:
        """Wait until a server accepts a job's request for this model. `monitor` must run meanwhile.

        The wait for servers of the model ends after `within` seconds, even if none accepts the request.

        If no server lists the model, the lists are fetched again. After that, any server may get the request: adapters
        are loaded at run time, some by the first request, and some servers serve more names than they list. If a server
        then does not know the model, all jobs get this error for a minute. Servers that are away and have never listed
        their models may have the model, so the job waits for them, unless a server accepts one of `others`. If this job
        and others have failed at a server, the worker sends a trial request to that server.

        Raises:
            UpstreamError: the last refusal, when every server of the model has refused the job; `model_not_found`, when
                a server lately returned that error; when no server of the model may answer the job (see
                `should_fall_back`) and a server accepts a request for one of `others`: `upstream_unreachable`,
                `unauthorized`, or the error of a server that is full.
        """
        caller = caller or Caller()
        ends_at = time.monotonic() + within
        while not self.accepts(model, caller):
            changed = self._changed
            serving = self.servers_for(model)
            if serving and not self.has_candidate(model, caller):
                raise list(caller.refused_at.values())[-1] from None
            if self.should_fall_back(model, others, caller):
                raise reason_to_fall_back(model, serving, caller)
            doubtful = next((server for server in serving if server.circuit.wants_trial(caller)), None)
            if doubtful is not None:
                await send_trial(self.stream, self._telemetry, doubtful, model)
            elif serving:
                if (left := ends_at - time.monotonic()) <= 0:
                    return
                # The end of a trial's reservation wakes nobody.
                pause = self._pace.probe_every
                await self._places.wait(model, caller, next_opening(serving, pause, min(left, pause)))
            elif answer := self._missing.get(model):
                raise UpstreamError(answer.code, answer.message, status=answer.status, retryable=False)
            elif not await self._probes.fetch_all_models():
                await wait_set(changed, self._pace.probe_every)
            elif not self.servers_for(model):
                self._unlisted.put(model, True)
                self._on_models()

    def choose(self, model: str, caller: Caller | None = None, *, other_than: Server | None = None) -> Server:
        """The best server for a request (see `best_server`), even if no server accepts the request now.

        `other_than` is the server of the last try.
        """
        server = best_server(self.servers_for(model) or self.servers, caller or Caller(), other_than)
        server.circuit.reserve_trial()
        return server

    async def monitor(self) -> None:
        """Probe the servers that are away, fetch the models and the load of the others, until cancelled."""
        await ServerMonitor(
            self._api,
            self.servers,
            self._probes,
            self._pace,
            send_trial=partial(send_trial, self.stream, self._telemetry),
            on_room=self._on_room,
            changed=lambda: self._changed,
        ).run()

    def _on_change(self, server: Server, former: CircuitState, state: CircuitState, reason: str) -> None:
        if CircuitState.OPEN in (former, state) or former is CircuitState.UNKNOWN:
            self.generation += 1
        self._reports.on_change(server, state, reason)
        self._wake()

    def _wake(self) -> None:
        """Wake everybody who waits for a change of a circuit or of a list of models."""
        self._changed.set()
        self._changed = asyncio.Event()
        self._places.wake_all()
        self._announce()

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _on_room(self, server: Server) -> None:
        """Wake as many waiting jobs as a server has room for."""
        if self._places:
            self._places.wake(server, lambda model: server in self.servers_for(model))
        self._announce()

    def _on_models(self) -> None:
        self.generation += 1
        self._wake()

    @asynccontextmanager
    async def stream(
        self, server: Server, request: Object, route: str = CHAT, *, caller: Caller | None = None
    ) -> AsyncIterator[ChatStream]:
        """The token stream of a request, as a context that closes the stream at its end.

        The end of the context is recorded in the server's circuit. Without an exception, the request succeeded. With an
        UpstreamError, the server failed, unless the error is its refusal of the request. Any other exception does not
        count. So check within the context that the answer is complete, and do not raise an error that comes after the
        answer is complete.

        Raises:
            UpstreamError: when the server sends no stream.
        """
        circuit, model = server.circuit, request.get("model")
        caller = caller or Caller()
        sent = circuit.begin(caller)
        watchdog = self._watch(server)
        server.unanswered[sent] = sent.sent_at
        try:
            stream = await open_stream(
                self._api, server, request, route, limits=self.limits, watchdog=watchdog,
                on_first=partial(server.on_first_event, sent, model), traceparent=caller.traceparent,
            )  # fmt: skip
            try:
                yield stream
            finally:
                await stream.aclose()
            circuit.on_success(sent)
            server.note_response()
        except UpstreamError as error:
            refuses_key = await self._check_key(server, error)
            if error.code == MODEL_NOT_FOUND and isinstance(model, str):
                self._record_missing(server, model, caller, error)
            error.elsewhere &= route == CHAT  # a server may lack the other routes
            if error.elsewhere:
                caller.refused_at[circuit] = error
            if sent not in server.unanswered:  # it failed within its answer, so the server was not full
                error.is_busy = error.is_draining = False
            server.record_failure(sent, error, refuses_key=refuses_key)
            raise
        finally:
            if sent not in server.unanswered:
                server.limit.on_end(time.monotonic() - sent.sent_at)
            self._end(server, sent, watchdog)

    async def post(self, server: Server, path: str, body: Object, *, caller: Caller | None = None) -> bytes:
        """Post a short query to a server before a stream is requested from it; returns the body of the response.

        The time limit is that of a first token, since all streams that broke at another server send queries at once. A
        late answer does not count against the server, nor does a redirect: it may redirect all but its completions.

        Raises:
            UpstreamError: when the server does not answer, or refuses.
        """
        caller = caller or Caller()
        sent = server.circuit.begin(caller)
        watchdog = self._watch(server)
        try:
            with watchdog:
                return await self._api.post(server, path, body)
        except TimeoutError:
            raise watchdog.timeout_error() from None
        except UpstreamError as error:
            refuses_key = await self._check_key(server, error)
            error.elsewhere &= 300 <= error.status < 400  # a server may lack this path
            if error.elsewhere:
                caller.refused_at[server.circuit] = error
            else:
                server.record_failure(sent, error, refuses_key=refuses_key)
            raise
        finally:  # a caller that then requests a stream does so before another job may try the server
            self._end(server, sent, watchdog)

    async def list_models(self, server: Server) -> list[str]:
        """The names of the models that a server lists.

        Raises:
            UpstreamError: when the server cannot be reached, or sends no list.
        """
        return await self._api.models(server, self._pace.probe_limit)

    def _watch(self, server: Server) -> StreamWatchdog:
        watchdog = StreamWatchdog(self.limits, frozen_after=self._pace.frozen_after)
        server.requests.add(watchdog)
        return watchdog

    def _end(self, server: Server, sent: ServerRequest, watchdog: StreamWatchdog) -> None:
        server.requests.discard(watchdog)
        server.unanswered.pop(sent, None)
        server.circuit.on_end(sent)
        self._reports.on_request_end(server)
        if server.circuit.state is CircuitState.HALF_OPEN:
            self._on_room(server)

    def _record_missing(self, server: Server, model: str, caller: Caller, answer: UpstreamError) -> None:
        """Record that a server does not have a model. If all servers list other models, all jobs get this error."""
        server.record_missing(model, caller)
        self._unlisted.drop(model)
        if server.models and model not in server.models and not self.servers_for(model):
            self._missing.put(model, answer)

    async def _check_key(self, server: Server, error: UpstreamError) -> bool:
        """Whether a server that refused a request refuses all keys, so that it refuses its list of models too.

        The status of the error is then set to 401. Otherwise the server may refuse only this request: a router has keys
        of its own for its servers. If a server has never sent its list and forbids it (403), the keys may be good.
        """
        if error.code != UNAUTHORIZED or (error.status == 403 and not server.models):
            return False
        try:
            await self.list_models(server)
        except UpstreamError as refusal:
            if refusal.code == UNAUTHORIZED and (refusal.status == 401 or server.models):
                error.status = 401
                return True
        return False
