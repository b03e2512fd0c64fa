"""What `worker top` reads of an installation, and what its keys do there."""

from dataclasses import dataclass, field
from typing import Self

import msgspec
from redis.exceptions import RedisError

from ..broker.client_seals import cancel
from ..client.async_client import Client
from ..contract.entries import Object
from ..contract.keys import Keys
from ..ops.findings import Finding
from ..ops.running import RunningPicture, RunningRequests
from ..ops.steering import Steering
from ..ops.survey import Surveyor
from ..ops.survey_types import Survey
from ..redisio.advice import advice_on
from ..redisio.clients import command_client
from ..redisio.errors import redacted_message
from ..redisio.urls import database_of

_TIMEOUT = 3.0
"""Seconds that Redis has for each reply."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The installation at one moment. `unreadable` is why the running requests could not be read; None if they were."""

    survey: Survey
    running: RunningPicture = field(default_factory=RunningPicture)
    unreadable: Finding | None = None

    @property
    def redis_answers(self) -> bool:
        """Whether Redis answered. Otherwise the survey has only the fault."""
        return bool(self.survey.redis)

    def as_dict(self) -> Object:
        """The picture as `--json` prints it: that of the survey, with the running requests and their number."""
        values: Object = {"requests": msgspec.to_builtins(self.running.requests), "running": self.running.total}
        if self.unreadable:
            values["unreadable"] = self.unreadable.as_dict()
        return self.survey.as_dict() | values


class Installation:
    """The connection to one installation. `lease` is that of workers whose record has none, in seconds."""

    def __init__(self, url: str, prefix: str, *, lease: float) -> None:
        self.url = url
        self._keys = Keys(prefix, database_of(url))
        self._redis = command_client(url, timeout=_TIMEOUT)
        self._surveyor = Surveyor(self._redis, self._keys, url, lease=lease)
        self._running = RunningRequests(self._redis, self._keys)
        self.steering = Steering(self._redis, self._keys, lease=lease)
        self.client = Client(url, prefix=prefix, patience=_TIMEOUT)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._running.aclose()
        await self._redis.aclose()
        await self.client.aclose()

    async def read(self) -> Picture:
        """Take a picture. No error is raised: a picture has what is wrong."""
        survey = await self._surveyor.survey()
        if not survey.redis:
            return Picture(survey)
        try:
            return Picture(survey, await self._running.read([queue.name for queue in survey.queues]))
        except (RedisError, OSError) as error:
            problem = Finding("error", "the running requests", redacted_message(error), advice_on(error) or "")
            return Picture(survey, unreadable=problem)

    async def cancel(self, request_id: str) -> bool:
        """Cancel a request. Returns false if it had ended before.

        Raises:
            RedisError: when Redis refuses that or does not answer.
        """
        return await cancel(self._redis, self._keys, request_id)
