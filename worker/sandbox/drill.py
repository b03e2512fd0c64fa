"""The drill: four faults under running streams, what readers saw of each, and which alerts fired."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field

import click
import httpx

from ..client.async_client import Client
from ..client.errors import ClientError
from ..contract.answer import Answer
from ..contract.entries import Delta, Object, Restarted, Resumed
from .drill_sandbox import GAP_TIMEOUT, LEASE, RATE, DrillSandbox, start_drill_sandbox
from .programs import Report, SandboxFailed, timed
from .prometheus import FASTER, Alert

_READERS = 12
_TOKENS = 300
"""Tokens of each answer: at `RATE`, they take 12 s."""
_UNDERWAY = 20
"""Deltas that each reader has before the fault."""
_LASTS = 8.0
"""Seconds that a fault of Redis lasts at least. Answers wait for its end."""
_PATIENCE = 120.0
"""Seconds that a reader waits for Redis, and the drill for anything. Only for what would never end."""


@dataclass(frozen=True)
class Fault:
    """A fault, the context in which it lasts, and the alerts that it must fire."""

    name: str
    line: str
    alerts: tuple[str, ...]
    of: Callable[[DrillSandbox], AbstractAsyncContextManager[None]]
    stops_answers: bool = False
    """Whether answers continue only after its end. Otherwise the fault lasts until they have ended."""


FAULTS = (
    Fault("worker killed", "a worker is killed (SIGKILL)", ("ProcessIsAway",), DrillSandbox.kill_worker),
    Fault("vLLM frozen", "a vLLM server freezes (SIGSTOP)", ("ServerIsSilent",), DrillSandbox.freeze_server),
    Fault(
        "Redis stalled", "Redis stalls (SIGSTOP)", ("WorkerTakesNoJobs",), DrillSandbox.stall_redis, stops_answers=True
    ),
    Fault(
        "Redis full",
        "the memory of Redis is filled up to maxmemory",
        ("RedisIsNearlyFull", "WorkerTakesNoJobs"),
        DrillSandbox.fill_redis,
        stops_answers=True,
    ),
)


@dataclass
class Reader:
    """A follower of one answer, and what it saw."""

    request_id: str
    expected: str
    """The text of an undisturbed run."""
    answer: Answer = field(default_factory=Answer)
    gap: float = 0.0
    """The longest time between two deltas, in seconds."""
    deltas: int = 0
    resumed: bool = False
    restarted: bool = False
    error: str = ""
    is_underway: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self, client: Client) -> None:
        last = 0.0
        try:
            async for entry in client.follow(self.request_id):
                self.answer.add(entry)
                if isinstance(entry, Delta):
                    now = time.monotonic()
                    self.gap = max(self.gap, now - last if last else 0.0)
                    last = now
                    self.deltas += 1
                    if self.deltas == _UNDERWAY:
                        self.is_underway.set()
                self.resumed = self.resumed or isinstance(entry, Resumed)
                self.restarted = self.restarted or isinstance(entry, Restarted)
            if self.answer.outcome != "done":
                self.error = self.answer.error or f"the answer ended as {self.answer.outcome}"
        except ClientError as error:
            self.error = str(error)
        finally:
            self.is_underway.set()

    @property
    def is_right(self) -> bool:
        """Whether the reader has the whole text, each part once, and no error."""
        return not self.error and self.answer.text == self.expected


@dataclass(frozen=True)
class Outcome:
    """What readers saw of a fault. `alerts` is None if no Prometheus evaluated them."""

    fault: Fault
    readers: Sequence[Reader]
    alerts: tuple[Alert, ...] | None

    @property
    def longest_gap(self) -> float:
        return max(reader.gap for reader in self.readers)

    @property
    def right(self) -> int:
        return sum(reader.is_right for reader in self.readers)

    @property
    def alert_names(self) -> list[str]:
        return sorted({alert.name for alert in self.alerts or ()})

    @property
    def missing_alerts(self) -> list[str]:
        """The alerts that had to fire, and did not."""
        return [] if self.alerts is None else [name for name in self.fault.alerts if name not in self.alert_names]

    @property
    def is_right(self) -> bool:
        return self.right == len(self.readers) and not self.missing_alerts

    def as_dict(self) -> Object:
        return {
            "fault": self.fault.name,
            "readers": len(self.readers),
            "longest_gap": round(self.longest_gap, 3),
            "resumed": sum(reader.resumed for reader in self.readers),
            "restarted": sum(reader.restarted for reader in self.readers),
            "texts_equal": self.right,
            "errors": [reader.error for reader in self.readers if reader.error],
            "alerts": None if self.alerts is None else list(self.alert_names),
            "missing_alerts": list(self.missing_alerts),
        }


async def run_drill(report: Report, faults: Sequence[Fault] = FAULTS) -> bool:
    """Run the drill. Returns whether every reader got the right text, and every fault fired its alerts.

    Args:
        report: receives each line.
        faults: those to show, in this order.

    Raises:
        NoRedis: when there is no Redis server.
        SandboxFailed: when a part of the sandbox does not start, or an answer does not end.
    """
    report_timed = timed(report)
    report_timed("Redis, two simulated vLLM servers and two workers start", {"starting": True})
    async with start_drill_sandbox() as sandbox:
        report_timed(
            f"they serve: {RATE} tokens/s, WORKER_LEASE={LEASE}, WORKER_GAP_TIMEOUT={GAP_TIMEOUT}",
            {"rate": RATE, "lease": LEASE, "gap_timeout": GAP_TIMEOUT},
        )
        if sandbox.prometheus is None:
            report_timed(
                "alerts are not evaluated: the program `prometheus` is missing. Install Debian's package prometheus "
                "(with RUNLEVEL=1 it starts no service), or put the binary of a release on the PATH",
                {"prometheus": None},
            )
        else:
            report_timed(
                f"Prometheus evaluates the shipped alerts, with durations divided by {FASTER}", {"prometheus": FASTER}
            )
        async with Client(sandbox.redis_url, patience=_PATIENCE) as client:
            drill = _Drill(sandbox, client, report_timed)
            outcomes = [await drill.run(fault, f"{n} of {len(faults)}") for n, fault in enumerate(faults, 1)]
    _sum_up(outcomes, report)
    return all(outcome.is_right for outcome in outcomes)


class _Drill:
    def __init__(self, sandbox: DrillSandbox, client: Client, report: Report) -> None:
        self._prometheus = sandbox.prometheus
        self._sandbox = sandbox
        self._client = client
        self._report = report
        self._fired: dict[object, Alert] = {}
        """The alerts that this fault has fired, by their labels."""

    async def run(self, fault: Fault, number: str) -> Outcome:
        """Begin answers, break the sandbox, heal it, and wait for the ends of the answers."""
        if self._prometheus is not None:
            while {alert.name for alert in await self._prometheus.firing()} & set(fault.alerts):  # noqa: ASYNC110 - Prometheus is another process
                await asyncio.sleep(0.25)  # the former fault fires them still
        readers = [await self._begin(f"{fault.name}: question {n}") for n in range(1, _READERS + 1)]
        try:
            async with asyncio.timeout(2 * _PATIENCE), asyncio.TaskGroup() as group:
                follows = [group.create_task(reader.follow(self._client)) for reader in readers]
                await asyncio.gather(*(reader.is_underway.wait() for reader in readers))
                self._report(
                    click.style(f"{number}: {fault.line}, under {_READERS} streams", bold=True),
                    {"fault": fault.name, "readers": _READERS},
                )
                self._fired = {}
                watch = group.create_task(self._watch_alerts(time.time()))
                async with fault.of(self._sandbox):
                    if fault.stops_answers:
                        await asyncio.sleep(_LASTS)
                    else:
                        await asyncio.wait(follows)
                    await self._wait_until_fired(fault.alerts)
                self._report("      the fault is over", {"healed": fault.name})
                await asyncio.wait(follows)
                watch.cancel()
            await self._sandbox.wait_ready()
        except TimeoutError:
            raise SandboxFailed(f"{fault.name}: an answer has not ended within {2 * _PATIENCE:g} s") from None
        outcome = Outcome(fault, readers, None if self._prometheus is None else tuple(self._fired.values()))
        self._report(_line_of(outcome), outcome.as_dict())
        return outcome

    async def _begin(self, question: str) -> Reader:
        request: Object = {"messages": [{"role": "user", "content": question}]}
        undisturbed = await self._client.enqueue({**request, "simulate": {"tokens": _TOKENS, "rate": 0}})
        expected = (await self._client.result(undisturbed)).text
        return Reader(await self._client.enqueue({**request, "simulate": {"tokens": _TOKENS}}), expected)

    async def _watch_alerts(self, since: float) -> None:
        """Note and report the alerts whose condition has held only since this Unix time."""
        if self._prometheus is None:
            return
        while True:
            with suppress(httpx.HTTPError):
                for alert in await self._prometheus.firing():
                    if alert.since >= since and alert.labels not in self._fired:
                        self._fired[alert.labels] = alert
                        line = f"      {click.style(alert.name, fg='yellow')}: {alert.summary}"
                        self._report(line, {"alert": alert.name, "summary": alert.summary})
            await asyncio.sleep(0.25)

    async def _wait_until_fired(self, names: Sequence[str]) -> None:
        """Wait until these alerts have fired, or for a minute: an outcome then names those that have not."""
        if self._prometheus is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE / 2):
                while not {alert.name for alert in self._fired.values()} >= set(names):  # noqa: ASYNC110 - Prometheus is another process
                    await asyncio.sleep(0.1)


def _line_of(outcome: Outcome) -> str:
    readers = outcome.readers
    parts = [
        f"longest gap {outcome.longest_gap:.1f} s",
        f"{sum(reader.resumed for reader in readers)} resumed",
        f"{sum(reader.restarted for reader in readers)} restarted",
        f"{outcome.right} of {len(readers)} texts equal those of an undisturbed run",
        *sorted({reader.error for reader in readers if reader.error}),
        *(f"{name} has not fired" for name in outcome.missing_alerts),
    ]
    return click.style(f"      {', '.join(parts)}", fg="green" if outcome.is_right else "red")


def _sum_up(outcomes: Sequence[Outcome], report: Report) -> None:
    lines = [f"{'fault':14} {'longest gap':>11}  {'resumed':>7}  {'restarted':>9}  {'texts':>8}  alerts"]
    for outcome in outcomes:
        shown = outcome.as_dict()
        alerts = "not evaluated" if outcome.alerts is None else ", ".join(outcome.alert_names) or "none"
        lines.append(
            f"{outcome.fault.name:14} {outcome.longest_gap:9.1f} s  {shown['resumed']:>7}  {shown['restarted']:>9}  "
            f"{outcome.right:>2} of {len(outcome.readers):>2}  {alerts}"
        )
    report("\n" + "\n".join(lines), {"is_right": all(outcome.is_right for outcome in outcomes)})
