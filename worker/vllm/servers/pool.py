"""The HTTP side of the vLLM servers: which one takes a request, what it serves, and probes of those that are away."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context

import structlog

from ...contract.entries import Object
from ..chunks.parser import ChunkParser
from ..errors import MODEL_NOT_FOUND, UNAUTHORIZED, UpstreamError, without_user
from ..http.credentials import ApiKeys
from ..http.target import base_url
from ..http.transport import HttpResponse
from ..stream.chat_stream import ChatStream, StreamTimeouts, StreamWatchdog
from .added_fields import body_for, refused_fields
from .api import VllmApi
from .circuit import Caller, CircuitState, ServerRequest
from .probes import FIRST_LIMIT, Probes
from .recent import Recent
from .server import MISSING, Server, best_of, may_be_its_fault

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

__all__ = ["CHAT", "COMPLETIONS", "Server", "ServerPool"]

_PROBE_EVERY = 2.0
_LIST_EVERY = 60.0

_log = structlog.get_logger()


class ServerPool:
    """All servers together.

    Whoever has a request waits until a server can take it, and chooses in the same step, for what is chosen while a
    circuit is half open keeps others away:

        while not upstream.accepts(model, caller):
            await upstream.wait_available(model, caller=caller)
        with (endpoint := upstream.choose(model, caller)).in_use():
            async with upstream.stream(endpoint, request, caller=caller) as stream: ...

    The caller is the job that asks, the same for all of its requests. Without one, a request is of a job of its own.
    """

    def __init__(self, urls: Sequence[str], *, keys: ApiKeys | None = None, limits: StreamTimeouts) -> None:
        self.servers = [Server(base_url(url), on_change=self._on_change) for url in urls]
        self._limits = limits
        self._changed = asyncio.Event()
        self._unlisted: Recent[bool] = Recent(time.monotonic, MISSING)
        self._missing: Recent[UpstreamError] = Recent(time.monotonic, MISSING)
        self._api = VllmApi(keys or ApiKeys(), connect=limits.connect)
        self._probes = Probes(self._api, self.servers)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._api.aclose()

    @property
    def is_available(self) -> bool:
        """Whether a server can take work, as far as is known."""
        return self.accepts("")

    def accepts(self, model: str, caller: Caller | None = None) -> bool:
        """Whether a server can take a request of a job for this model now, as far as is known; the empty name is any.

        None is said to before all have been asked once, or the first to answer would get all that had waited.
        """
        if any(not endpoint.is_known for endpoint in self.servers):
            return False
        return bool(self._taking(model, caller or Caller()))

    def all_busy(self, model: str, caller: Caller) -> bool:
        """Whether all that take requests of a job for this model have asked to be left alone for now."""
        return all(endpoint.is_busy for endpoint in self._taking(model, caller))

    def all_refuse_keys(self, model: str) -> bool:
        """Whether every server of this model is away because it takes none of the worker's keys."""
        serving = self.servers_for(model)
        return bool(serving) and all(endpoint.refuses_key for endpoint in serving)

    def should_fall_back(self, model: str, others: Sequence[str], caller: Caller) -> bool:
        """Whether every server of this model is away or has failed the job, and one can take one of the others.

        A server that refused the job has failed it, too.
        """
        serving = self.servers_for(model)
        return (
            bool(serving)
            and all(
                endpoint.is_away or endpoint.circuit in caller.failed_at or endpoint.circuit in caller.refused_at
                for endpoint in serving
            )
            and any(self.accepts(other, Caller(failed_at=caller.failed_at)) for other in others)
        )

    def servers_for(self, model: str) -> list[Server]:
        """The servers that a request for this model may go to, as far as is known; the empty name is any model.

        A model that no server lists may be asked of any, once `wait_available` has asked for the lists again.
        """
        serving = [endpoint for endpoint in self.servers if endpoint.serves(model)]
        return serving or (self.servers if model in self._unlisted else [])

    def has_candidate(self, model: str, caller: Caller) -> bool:
        """Whether a server of this model has not refused the job."""
        return any(endpoint.circuit not in caller.refused_at for endpoint in self.servers_for(model))

    def _taking(self, model: str, caller: Caller) -> list[Server]:
        """Those of them that take a request of a job now, if need be."""
        return [endpoint for endpoint in self.servers_for(model) if endpoint.circuit.admits(caller, pressed=True)]

    async def wait_available(self, model: str, others: Sequence[str] = (), *, caller: Caller | None = None) -> None:
        """Wait until a server can take a request of a job for this model; `monitor` finds out.

        Where no server lists a model, the lists are asked for again, and then any server may be asked: adapters are
        loaded at run time, some by the first request, and some servers have more names for a model than they list.
        That it did not know the model is the answer, for a minute. Servers that are away and have never said what they
        serve may have it, so it is waited for, unless one of `others` can be had.
        A server where the job has failed, and others too, is tried with a request of the worker's own meanwhile.

        Raises:
            UpstreamError: the last refusal, when every server of the model has refused the job; `model_not_found`, when
                a server said so lately; `upstream_unreachable` or `unauthorized`, when all that may have it are away,
                or have failed this job and others, or refuse the keys, and a server can take a request for one of
                `others`.
        """
        caller = caller or Caller()
        while not self.accepts(model, caller):
            changed = self._changed
            serving = self.servers_for(model)
            if serving and not self.has_candidate(model, caller):
                raise list(caller.refused_at.values())[-1] from None
            if self.should_fall_back(model, others, caller):
                if self.all_refuse_keys(model):
                    raise UpstreamError(UNAUTHORIZED, f"every server of `{model}` refuses the keys", retryable=True)
                raise UpstreamError("upstream_unreachable", f"every server of `{model}` is away", retryable=True)
            suspect = next((endpoint for endpoint in serving if endpoint.circuit.wants_trial(caller)), None)
            if suspect is not None:
                await self._try_out(suspect, model)
            elif serving:
                await _either(changed, _PROBE_EVERY)  # a trial that is not heard of gives its place up in silence
            elif answer := self._missing.get(model):
                raise UpstreamError(answer.code, answer.message, status=answer.status, retryable=False)
            elif not await self._probes.list_again():
                await _either(changed, _PROBE_EVERY)
            elif not self.servers_for(model):
                self._unlisted.put(model, True)

    def choose(self, model: str, caller: Caller | None = None, *, other_than: Server | None = None) -> Server:
        """The server for a request: of those that serve the model and can take it the one with the fewest of ours.

        It is another than those where the job has failed, and than the last one, where that may be. When none can take
        it (see `accepts`) it is one that may.
        """
        endpoint = best_of(self.servers_for(model) or self.servers, caller or Caller(), other_than)
        endpoint.circuit.reserve_trial()
        return endpoint

    async def _try_out(self, endpoint: Server, model: str) -> None:
        """Ask a server for one token, in place of a job that may be what it fails at.

        Only so can jobs that have all failed there find out whether they wait for a server or fail by themselves.
        """
        _log.info("vllm_tried_out", endpoint=without_user(endpoint.url))
        endpoint.circuit.reserve_trial()
        request: Object = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        parser = ChunkParser()

        def take(events: list[bytes]) -> bool:
            for data in events:
                parser.parse(data)
            return parser.done

        try:
            body = request | ({"model": model} if model else {})
            async with self.stream(endpoint, body, caller=Caller(is_job=False)) as stream:
                while await stream.read_into(take) and not parser.done:
                    pass
                parser.check_complete()
        except UpstreamError as error:
            if not may_be_its_fault(error):  # it has no template, or is busy, say: it answers
                circuit = endpoint.circuit
                circuit.on_success(circuit.request_of(Caller(is_job=False)))

    async def monitor(self) -> None:
        """Until cancelled: probe servers that are away every two seconds, and ask the others what they serve."""
        async with asyncio.TaskGroup() as group:
            for endpoint in self.servers:
                group.create_task(self._watch(endpoint))
                group.create_task(self._watch_list(endpoint))

    async def _watch(self, endpoint: Server) -> None:
        while True:
            changed = self._changed
            if endpoint.circuit.wants_probe:
                await self._probes.probe(endpoint)
            elif not endpoint.is_away and any(watchdog.is_silent() for watchdog in endpoint.requests):
                await self._probes.still_there(endpoint)
            await _either(changed, _PROBE_EVERY * random.uniform(0.75, 1.25))  # noqa: S311 - jitter

    async def _watch_list(self, endpoint: Server) -> None:
        while True:
            changed = self._changed
            if endpoint.is_up and time.monotonic() - endpoint.listed_at > _LIST_EVERY:
                await self._probes.ask_list(endpoint)
            await _either(changed, _PROBE_EVERY * random.uniform(0.75, 1.25))  # noqa: S311 - jitter

    def _on_change(self, endpoint: Server, former: CircuitState, state: CircuitState, reason: str) -> None:
        copy_context().run(_tell, endpoint, former, state, reason)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def stream(
        self, endpoint: Server, request: Object, route: str = CHAT, *, caller: Caller | None = None
    ) -> AsyncIterator[ChatStream]:
        """The token stream of a request; leaving the context closes it.

        How it is left is what the server's circuit learns: an UpstreamError that is raised inside the context too, such
        as that of an answer that is not whole, is a failure of the server unless it is its refusal; leaving without an
        exception is a success, and any other exception says nothing. So check inside that the answer is whole, and do
        not let out an error that comes when nothing of it is missing.

        Raises:
            UpstreamError: when the server does not give one.
        """
        circuit, model = endpoint.circuit, request.get("model")
        caller = caller or Caller()
        run = circuit.begin(caller)

        def begun() -> None:
            circuit.on_first_event(run)
            if isinstance(model, str):
                endpoint.record_answer(model)

        watchdog = StreamWatchdog(self._limits)
        endpoint.requests.add(watchdog)
        try:
            stream = await self._open(endpoint, request, route, watchdog, begun)
            try:
                yield stream
            finally:
                await stream.aclose()
            circuit.on_success(run)
        except UpstreamError as error:
            refuses_key = await self._refuses_key(endpoint, error)
            if error.code == MODEL_NOT_FOUND and isinstance(model, str):
                self._lacks(endpoint, model, caller, error)
            error.elsewhere &= route == CHAT  # a server may do without the other routes
            if error.elsewhere:
                caller.refused_at[circuit] = error
            endpoint.record_failure(run, error, refuses_key=refuses_key)
            raise
        finally:
            endpoint.requests.discard(watchdog)
            self._left(endpoint, run)

    def _lacks(self, endpoint: Server, model: str, caller: Caller, answer: UpstreamError) -> None:
        """A server does not know a model. Where all list others, that is the answer to all who ask."""
        endpoint.record_missing(model, caller)
        self._unlisted.drop(model)
        if endpoint.models and model not in endpoint.models and not self.servers_for(model):
            self._missing.put(model, answer)

    async def _refuses_key(self, endpoint: Server, error: UpstreamError) -> bool:
        """Whether a server that refused a request refuses the keys, and so its list, too; said in the error then.

        Otherwise it may refuse what is asked: a router has keys of its own for its servers. A list that it never gave
        says nothing where it forbids it (403).
        """
        if error.code != UNAUTHORIZED or (error.status == 403 and not endpoint.models):
            return False
        try:
            await self.list_models(endpoint)
        except UpstreamError as refusal:
            if refusal.code == UNAUTHORIZED and (refusal.status == 401 or endpoint.models):
                error.status = 401
                return True
        return False

    def _left(self, endpoint: Server, run: ServerRequest) -> None:
        endpoint.circuit.on_end(run)
        if endpoint.circuit.state is CircuitState.HALF_OPEN:
            self._wake()

    async def _open(
        self, endpoint: Server, request: Object, route: str, watchdog: StreamWatchdog, on_first: Callable[[], None]
    ) -> ChatStream:
        """Open the stream, without what the server does not know, whether it says so before the stream or within.

        A field is held to be unknown only once the same request was taken without it, and never for a request that
        has it of its own: a bad job, or one whose text quotes such a name in an error, must not cost the others theirs.
        """
        without = set(endpoint.unsupported_fields)

        async def opened() -> HttpResponse:
            while True:
                try:
                    body = body_for(request, without)
                    return await self._api.open(endpoint, route, body, self._limits, watchdog)
                except UpstreamError as error:
                    if not leave_out(error):
                        raise

        async def reopened(error: UpstreamError) -> HttpResponse | None:
            if not leave_out(error):
                return None
            watchdog.restart()
            return await opened()

        def leave_out(error: UpstreamError) -> bool:
            refused = refused_fields(error, request) - without
            without.update(refused)
            return bool(refused)

        def begun() -> None:
            endpoint.unsupported_fields |= without
            on_first()

        stream = ChatStream(await opened(), watchdog)
        stream.on_first, stream.reopen = begun, reopened
        return stream

    async def post(self, endpoint: Server, path: str, body: Object, *, caller: Caller | None = None) -> bytes:
        """Ask a server something small before a stream is asked of it; gives the body of its answer.

        It has as long as a first token, for all streams that broke with another server ask at once. That it is slow
        says nothing about the server, nor does a redirect: the server may send on only its completions.

        Raises:
            UpstreamError: when it does not answer, or refuses.
        """
        caller = caller or Caller()
        run = endpoint.circuit.begin(caller)
        watchdog = StreamWatchdog(self._limits)
        endpoint.requests.add(watchdog)
        try:
            async with watchdog:
                return await self._api.post(endpoint, path, body)
        except TimeoutError:
            raise watchdog.timeout_error() from None
        except UpstreamError as error:
            refuses_key = await self._refuses_key(endpoint, error)
            error.elsewhere &= 300 <= error.status < 400  # it may do without this path
            if error.elsewhere:
                caller.refused_at[endpoint.circuit] = error
            else:
                endpoint.record_failure(run, error, refuses_key=refuses_key)
            raise
        finally:  # whoever goes on to a stream begins it before another may try
            endpoint.requests.discard(watchdog)
            self._left(endpoint, run)

    async def list_models(self, endpoint: Server) -> list[str]:
        """The names of the models that a server serves.

        Raises:
            UpstreamError: when it does not say.
        """
        return await self._api.models(endpoint, FIRST_LIMIT)


def _tell(endpoint: Server, former: CircuitState, state: CircuitState, reason: str) -> None:
    """In a context of its own: it is not about the job that ran into it."""
    structlog.contextvars.unbind_contextvars("request_id")
    if state is CircuitState.OPEN:
        fix = {"fix": endpoint.fix} if endpoint.fix else {}
        _log.warning("vllm_away", endpoint=without_user(endpoint.url), reason=reason, **fix)
    elif former is CircuitState.OPEN:
        _log.info("vllm_back", endpoint=without_user(endpoint.url))


async def _either(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, but not for longer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
