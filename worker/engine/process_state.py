"""The state of a worker, as its record and its readiness show it."""

import os
import socket
from collections.abc import Callable

from ..broker.cancels import CancelListener
from ..contract.records import WorkerRecord
from ..settings import Settings
from ..version import version
from ..vllm.servers.pool import ServerPool
from .intake import NO_VLLM, STARTING, VLLM_FULL, JobIntake
from .queue_pauses import QueuePauses
from .running_jobs import RunningJobs
from .tally import Tally
from .worker_record import model_names, models_away, server_records


class ProcessState:
    """What a worker shows of itself. `now` is Redis's time in Unix ms.

    Attributes:
        started: when Redis first answered, in Unix ms; 0 before that.
        is_draining: whether the worker takes no more jobs for good.
    """

    def __init__(  # noqa: PLR0913 - it shows the state of all of these
        self,
        settings: Settings,
        *,
        name: str,
        servers: ServerPool,
        intake: JobIntake,
        running_jobs: RunningJobs,
        tally: Tally,
        pauses: QueuePauses,
        cancels: CancelListener,
        now: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._name = name
        self._servers = servers
        self._intake = intake
        self._running_jobs = running_jobs
        self._tally = tally
        self._pauses = pauses
        self._cancels = cancels
        self._now = now
        self._host = socket.gethostname()
        self.started = 0
        self.is_draining = False

    def record(self) -> WorkerRecord:
        """The entry of this worker in the hash of workers."""
        servers, paused, finished = self._servers.servers, self._intake.paused, self._running_jobs.finished
        if paused == NO_VLLM and self._servers.is_available:  # the intake notices it in a moment
            paused = ""
        finished_per_s, entries_per_s = self._tally.rates(finished)
        silences = [silence for server in servers for phase in server.silences() for silence in phase]
        return WorkerRecord(
            name=self._name,
            beat=self._now(),
            started=self.started,
            slots=self._settings.slots,
            running=self._running_jobs.with_slot,
            finished=finished,
            draining=self.is_draining,
            paused="" if paused == STARTING else paused,
            queues=self._settings.queues,
            version=version(),
            starting=paused == STARTING,
            presence=self._cancels.shows_presence,
            lease=self._settings.lease,
            host=self._host,
            pid=os.getpid(),
            metrics=self._settings.metrics,
            servers=server_records(servers),
            models=model_names(servers),
            models_away=models_away(servers),
            paused_queues=self._pauses.in_effect,
            failed=self._tally.failed,
            cancelled=self._tally.cancelled,
            tokens=self._tally.entries,
            finished_per_s=finished_per_s,
            tokens_per_s=entries_per_s,
            by_queue=self._tally.by_queue(),
            silence=round(max(silences, default=0.0), 1),
        )

    def why_not_ready(self) -> str:
        """Why the worker takes no jobs; empty while it does, or would with a free slot. Any thread may call it.

        A paused queue is no reason: a deploy must be able to go on meanwhile.
        """
        if self.is_draining:
            return "draining: the worker takes no more jobs"
        if not self.started:
            return "starting: Redis has not answered yet"
        paused = self._intake.paused
        if paused == STARTING:
            return "starting: the vLLM servers have not answered yet"
        return "" if paused in ("", VLLM_FULL) else f"paused: {paused}"
