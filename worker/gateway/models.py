"""`GET /v1/models`: the models of all live workers, from their records in Redis."""

import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ..broker.queue_depth import live_records
from ..client.errors import MappedRetry
from ..contract.entries import JSON, Object
from .problems import Problem
from .responses import json_response
from .services import Services

_FRESH = 2.0
"""Seconds for which the list is kept: clients poll it, and every worker has a record."""


class ModelList:
    """The models of the live workers, in order."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._retry = MappedRetry(services.settings.patience)
        self._models: list[Object] = []
        self._read_at = float("-inf")

    async def read(self) -> list[Object]:
        """Return the models as OpenAI's API describes them. Raises the errors of `MappedRetry`."""
        if time.monotonic() - self._read_at >= _FRESH:
            records = await self._retry(live_records, self._services.redis, self._services.keys)
            since: dict[str, int] = {}
            for record in records:
                for name in record.models:
                    since[name] = min(since.get(name, record.started), record.started)
            self._models = [
                {"id": name, "object": "model", "created": since[name] // 1000, "owned_by": "vllm"}
                for name in sorted(since)
            ]
            self._read_at = time.monotonic()
        return self._models


def routes(services: Services) -> Sequence[BaseRoute]:
    """The routes of the list of models."""
    models = ModelList(services)

    async def list_models(request: Request) -> Response:
        await services.limits.count(services.access.caller(request))
        data: list[JSON] = [*await models.read()]
        return json_response({"object": "list", "data": data})

    async def show_model(request: Request) -> Response:
        await services.limits.count(services.access.caller(request))
        name = request.path_params["name"]
        for model in await models.read():
            if model["id"] == name:
                return json_response(model)
        raise Problem(404, "model_not_found", "no worker has a server with this model", param="model")

    return [Route("/v1/models", list_models), Route("/v1/models/{name:path}", show_model)]
