"""`GET /v1/models`: the models of the live workers that serve a queue of the caller, from their records in Redis."""

import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ..broker.queue_depth import live_records
from ..client.errors import MappedRetry
from ..contract.entries import JSON, Object
from ..contract.records import WorkerRecord
from .access import Requester
from .problems import Problem
from .responses import json_response
from .services import Services

_FRESH = 2.0
"""Seconds for which the records are kept: clients poll the list, and every worker has a record."""


class ModelList:
    """The models of the live workers."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._retry = MappedRetry(services.settings.patience)
        self._records: Sequence[WorkerRecord] = ()
        self._read_at = float("-inf")

    async def read(self, caller: Requester) -> list[Object]:
        """Return a caller's models in order, as OpenAI's API describes them. Raises the errors of `MappedRetry`."""
        if time.monotonic() - self._read_at >= _FRESH:
            self._records = await self._retry(live_records, self._services.redis, self._services.keys)
            self._read_at = time.monotonic()
        since: dict[str, int] = {}
        for record in self._records:
            if any(map(caller.may_use, record.queues)):
                for name in record.models:
                    since[name] = min(since.get(name, record.started), record.started)
        return [
            {"id": name, "object": "model", "created": since[name] // 1000, "owned_by": "vllm"}
            for name in sorted(since)
        ]


def routes(services: Services) -> Sequence[BaseRoute]:
    """The routes of the list of models."""
    models = ModelList(services)

    async def list_models(request: Request) -> Response:
        caller = services.access.caller(request)
        await services.limits.count(caller)
        data: list[JSON] = [*await models.read(caller)]
        return json_response({"object": "list", "data": data})

    async def show_model(request: Request) -> Response:
        caller = services.access.caller(request)
        await services.limits.count(caller)
        name = request.path_params["name"]
        for model in await models.read(caller):
            if model["id"] == name:
                return json_response(model)
        raise Problem(404, "model_not_found", "no worker for your queues has a server with this model", param="model")

    return [Route("/v1/models", list_models), Route("/v1/models/{name:path}", show_model)]
