"""The soak: jobs of every kind, on real processes that are killed, paused, restarted and disconnected all the time.

    python tests/chaos/soak.py --jobs 100000 --workers 4 --seed 7

The checker (soak_checker.py) compares every request with the promise. Jobs come in waves. A wave is checked once all of
its jobs have ended and nothing is pending. Its logs are then deleted, so memory does not grow with the number of jobs.
The seed determines the jobs and the faults, but not how they meet in time.
"""
# ruff: noqa: E402 - where the project is not installed, the imports below need the changed sys.path

import asyncio
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import click
import msgspec
from redis.exceptions import RedisError
from soak_checker import SEAL, Evidence, Tally, Violation, check, is_own_trial
from soak_jobs import Plan, plan
from soak_processes import Chaos, Processes
from soak_versions import VersionedClients

from worker import Client
from worker.contract.keys import GROUP, Keys
from worker.redisio.clients import command_client
from worker.redisio.errors import is_transient
from worker.sandbox.embedded_redis import find_servers
from worker.sandbox.simulator.record import Served

_WAVE = 1000
"""Jobs of a wave."""

_STUCK_AFTER = 60.0
"""Seconds without an end, after which the jobs that are left count as lost."""

_AT_ONCE = 32
"""Jobs that are added at the same time."""

_GIVEN_UP = 0.05
"""The largest share of jobs with an upstream start that was given up. It was 0.02 on a machine that stood still for
seconds, and is 0 on most."""
_KEYS = Keys()
_LASTING = {_KEYS.jobs(), _KEYS.lifecycle, _KEYS.dead, _KEYS.workers, _KEYS.queues, _KEYS.control}


class Report(msgspec.Struct, kw_only=True):
    """The results of all jobs."""

    seed: int
    jobs: int
    seconds: float
    versions: dict[str, str]
    harm: dict[str, int]
    kinds: dict[str, int]
    outcomes: dict[str, int]
    deltas: int
    attempts: int
    resumed: int
    restarted: int
    starts: int
    given_up: int
    lost: int
    duplicated: int
    violations: list[Violation]

    @property
    def table(self) -> str:
        """The report for people: one row for each figure."""
        rows: list[tuple[str, object]] = [
            ("seed", self.seed),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ("time", f"{self.seconds:.0f} s"),
            ("jobs", self.jobs),
            *((f"  {name}", count) for name, count in sorted(self.outcomes.items())),
            *sorted(self.harm.items()),
            ("attempts", self.attempts),
            ("upstream starts", self.starts),
            ("  given up unseen", self.given_up),
            ("resumed", self.resumed),
            ("restarted", self.restarted),
            ("deltas", self.deltas),
            ("lost", self.lost),
            ("duplicated", self.duplicated),
            ("all violations", len(self.violations)),
        ]
        return "\n".join(f"{name:24}{count}" for name, count in rows)


class Soak:
    """One run."""

    def __init__(
        self, processes: Processes, *, jobs: int, seed: int, pause: float, harms: int, progress: bool = False
    ) -> None:
        self._processes = processes
        self._jobs = jobs
        self._seed = seed
        self._dice = random.Random(seed)  # noqa: S311 - no secret
        self._chaos = Chaos(processes, random.Random(seed + 1), pause)  # noqa: S311
        self._harms = harms
        self._progress = progress
        self.is_ending = False
        """Whether to end after the wave that runs, and to report on the waves so far."""
        self._tally = Tally()
        self._kinds: Counter[str] = Counter()
        self._redis = command_client(processes.redis_url)
        self._client = Client(processes.redis_url, patience=60)
        is_mixed = len(set(processes.trees)) > 1
        self._mixed = VersionedClients(processes.redis_url, processes.trees, processes.folder) if is_mixed else None
        self._began = 0.0
        self._finished: list[dict[str, str]] = []
        self._cursors = {_KEYS.lifecycle: "0", _KEYS.dead: "0"}

    async def run(self) -> Report:
        """Run all waves and return the report."""
        began, wrong = time.monotonic(), 0
        await self._execute("PING")
        for first in range(0, self._jobs, _WAVE):
            if self.is_ending:
                self._jobs = first
                break
            plans = [
                plan(self._dice, number, f"s{self._seed}") for number in range(first, min(first + _WAVE, self._jobs))
            ]
            self._kinds.update(made.kind for made in plans)
            await self._wave(plans)
            if self._progress:
                for violation in self._tally.violations[wrong:]:
                    click.echo(f"{violation.what}: {violation.id} {violation.detail}", err=True)
                wrong = len(self._tally.violations)
                seconds = time.monotonic() - began
                click.echo(f"{first + len(plans):7} jobs, {seconds:5.0f} s, {wrong} violations", err=True)
        await self._client.aclose()
        if self._mixed:
            await self._mixed.aclose()
        info = cast("dict[str, Any]", await self._execute("INFO", "server"))
        await self._redis.aclose()
        tally = self._tally
        if tally.given_up > 1 + self._jobs * _GIVEN_UP:
            self._violated("starts", f"the logs do not show {tally.given_up} of them")
        return Report(
            seed=self._seed, jobs=self._jobs, seconds=round(time.monotonic() - began, 1),
            versions={
                "redis": str(info["redis_version"]), "python": sys.version.split()[0],
            },
            harm=dict(self._chaos.done), kinds=dict(self._kinds), outcomes=dict(tally.outcomes), deltas=tally.deltas,
            attempts=tally.attempts, resumed=tally.resumed, restarted=tally.restarted, starts=tally.starts,
            given_up=tally.given_up,
            lost=tally.count("lost"), duplicated=tally.count("duplicated"), violations=tally.violations,
        )  # fmt: skip

    async def _wave(self, plans: list[Plan]) -> None:
        self._began = time.monotonic()  # one clock for all processes of a machine
        chaos = asyncio.create_task(self._chaos.run(self._harms * len(plans) // _WAVE))
        turn = asyncio.Semaphore(_AT_ONCE)
        await asyncio.gather(*(self._submit(made, turn) for made in plans))
        waiting = await self._wait_ended({made.id for made in plans}, chaos)
        chaos.cancel()
        await asyncio.wait([chaos])
        await self._wait_nothing_pending(waiting)
        evidence = await self._evidence(plans)
        for made in plans:
            before = len(self._tally.violations)
            check(made, evidence[made.id], self._tally)
            if len(self._tally.violations) > before:
                (self._processes.folder / f"{made.id}.json").write_bytes(msgspec.json.encode((made, evidence[made.id])))
        await self._check_keys()
        for wrong in await self._mixed.wrong(plans, _STUCK_AFTER) if self._mixed else ():
            self._violated("reader", wrong)
        for failure in self._processes.failures():
            self._violated("process", failure)
        await self._delete(plans)

    def _violated(self, what: str, detail: str) -> None:
        self._tally.violations.append(Violation(what, "", detail))

    async def _execute(self, *command: object) -> object:
        """Send a command until Redis answers. Redis may execute it twice."""
        while True:
            try:
                return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]
            except (RedisError, OSError) as error:
                if not is_transient(error):
                    raise
                await asyncio.sleep(0.05)

    async def _submit(self, made: Plan, turn: asyncio.Semaphore) -> None:
        if made.cancel_after is None:
            await self._add(made, turn)
        elif made.by_client:  # a client does not add a request that is cancelled already
            await self._add(made, turn)
            await self._cancel(made)
        else:
            await asyncio.gather(self._add(made, turn), self._cancel(made))

    async def _add(self, made: Plan, turn: asyncio.Semaphore) -> None:
        async with turn:
            if made.by_client:
                await (self._mixed or self._client).enqueue(made.request, id=made.id)
                return
            request = made.raw or msgspec.json.encode(made.request)
            for _ in range(made.copies):
                await self._execute("XADD", _KEYS.jobs(), "*", "id", made.id, "request", request)

    async def _cancel(self, made: Plan) -> None:
        await asyncio.sleep(made.cancel_after or 0)
        if made.cancel_raw:
            with suppress(RedisError):  # sealed already
                await self._execute("XADD", _KEYS.tokens(made.id), SEAL, "type", "cancelled")
        else:
            await self._client.cancel(made.id)

    async def _wait_ended(self, waiting: set[str], chaos: "asyncio.Task[None]") -> set[str]:
        """Wait until the lifecycle has the end of all these jobs. Returns the jobs that got stuck."""
        until = time.monotonic() + _STUCK_AFTER
        while waiting and time.monotonic() < until:
            await self._execute("XREAD", "BLOCK", 1000, "STREAMS", _KEYS.lifecycle, self._cursors[_KEYS.lifecycle])
            ends = [entry for entry in await self._new(_KEYS.lifecycle) if entry["type"] == "finished"]
            self._finished += ends
            waiting -= {end["id"] for end in ends}
            if ends or not chaos.done():
                until = time.monotonic() + _STUCK_AFTER
        return waiting

    async def _wait_nothing_pending(self, waiting: set[str]) -> None:
        """Wait until no job is pending or unread; one that stays so is a violation. Stuck jobs shorten the wait."""
        until = time.monotonic() + (1 if waiting else _STUCK_AFTER)
        while True:
            groups = cast("list[dict[str, Any]]", await self._execute("XINFO GROUPS", _KEYS.jobs()))
            pending = sum(group["pending"] for group in groups if group["name"] == GROUP.encode())
            unread = len(cast("list[object]", await self._execute("XRANGE", _KEYS.jobs(), f"({_last(groups)}", "+")))
            if not pending and not unread:
                return
            if time.monotonic() > until:
                self._violated("pending", f"{pending} jobs pending and {unread} unread, {len(waiting)} without end")
                return
            await asyncio.sleep(0.1)

    async def _evidence(self, plans: list[Plan]) -> dict[str, Evidence]:
        found = {made.id: Evidence() for made in plans}
        self._finished += [entry for entry in await self._new(_KEYS.lifecycle) if entry["type"] == "finished"]
        letters = await self._new(_KEYS.dead)
        for request_id, one in found.items():
            pipe = self._redis.pipeline(transaction=False)
            pipe.xrange(_KEYS.tokens(request_id))
            pipe.pttl(_KEYS.tokens(request_id))
            pipe.get(_KEYS.ended(request_id))
            pipe.pttl(_KEYS.ended(request_id))
            log, one.log_expiry, stone, one.tombstone_expiry = await pipe.execute()
            one.log = [(entry_id.decode(), _texts(fields)) for entry_id, fields in log]
            one.tombstone = (stone or b"").decode()
        for name, rows in (("finished", self._finished), ("letters", [{**row, **_job(row)} for row in letters])):
            for row in rows:
                one = found.get(row["id"], Evidence())
                setattr(one, name, [*getattr(one, name), row])
        self._finished = []
        owners = {made.digest: made.id for made in plans}
        for digest, starts in self._starts().items():
            owner = owners.get(digest)
            if owner is None:
                self._violated("starts", f"{len(starts)} with a prompt that no job of this wave has")
            else:
                found[owner].starts = starts
        return found

    async def _new(self, key: str) -> list[dict[str, str]]:
        """The entries that were added to a stream since the last call."""
        rows: list[dict[str, str]] = []
        while True:
            since = f"({self._cursors[key]}"
            reply = await self._execute("XRANGE", key, since, "+", "COUNT", 5000)
            batch = cast("list[tuple[bytes, dict[bytes, bytes]]]", reply)
            if not batch:
                return rows
            rows += [_texts(fields) for _, fields in batch]
            self._cursors[key] = batch[-1][0].decode()

    def _starts(self) -> dict[str, list[Served]]:
        """The simulators' records of this wave, by the digest of the prompt. Their files are deleted."""
        starts: dict[str, dict[tuple[Path, int, float], Served]] = {}
        for path in self._processes.records:
            lines = path.read_bytes().split(b"\n") if path.exists() else []
            path.unlink(missing_ok=True)
            for line in lines:
                try:
                    record = msgspec.json.decode(line, type=Served)
                except msgspec.MsgspecError:
                    continue  # the last line of a simulator that was killed
                # A start of an earlier wave may end after its check, but none may begin then.
                if record.prompt is not None and record.started >= self._began and not is_own_trial(record):
                    starts.setdefault(record.prompt, {})[path, record.order, record.started] = record
        return {digest: list(records.values()) for digest, records in starts.items()}

    async def _check_keys(self) -> None:
        async for key in self._redis.scan_iter(count=10_000):
            if key.decode() not in _LASTING and await self._redis.pttl(key) == -1:
                self._violated("expiry", f"{key.decode()} has no expiry")

    async def _delete(self, plans: list[Plan]) -> None:
        for made in plans:
            await self._redis.unlink(_KEYS.tokens(made.id), _KEYS.ended(made.id))


def _last(groups: list[dict[str, Any]]) -> str:
    return next((group["last-delivered-id"].decode() for group in groups if group["name"] == GROUP.encode()), "0")


def _texts(fields: dict[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in fields.items()}


def _job(letter: dict[str, str]) -> dict[str, str]:
    return {"id": str(msgspec.json.decode(letter["fields"])["id"])}


async def soak(
    *, jobs: int, workers: int, seed: int, simulators: int = 2, pause: float = 0.6, harms: int = 40,
    redis_server: Path | None = None, beside: Path | None = None, folder: Path, progress: bool = False,
) -> Report:  # fmt: skip
    """Run a soak: `harms` faults for each thousand jobs, with a mean time of `pause` seconds between two."""
    server = redis_server or find_servers()[0]
    processes = Processes(folder, workers=workers, simulators=simulators, redis_server=server, beside=beside)
    run = Soak(processes, jobs=jobs, seed=seed, pause=pause, harms=harms, progress=progress)

    def end() -> None:
        if run.is_ending:
            raise KeyboardInterrupt
        run.is_ending = True
        click.echo("the soak ends after this wave; a second signal ends it at once", err=True)

    if progress:
        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, end)
    try:
        return await run.run()
    finally:
        processes.stop()


@click.command()
@click.option("--jobs", default=1000, type=click.IntRange(1), show_default=True)
@click.option("--workers", default=4, type=click.IntRange(1), show_default=True)
@click.option("--simulators", default=2, type=click.IntRange(1), show_default=True)
@click.option("--seed", default=None, type=int, help="Drawn at random and printed if left out.")
@click.option(
    "--pause", default=0.6, type=click.FloatRange(0.05), show_default=True, help="Mean seconds between two faults."
)
@click.option("--harms", default=40, type=click.IntRange(0), show_default=True, help="Faults for each thousand jobs.")
@click.option(
    "--redis-server",
    type=click.Path(path_type=Path),
    help="The redis-server to run. [default: the first that is installed]",
)
@click.option(
    "--beside",
    type=click.Path(path_type=Path, exists=True, resolve_path=True),
    help="The folder of another version of the repository. Every second worker, and every second client, runs it.",
)
@click.option("--keep", is_flag=True, help="Keep the folder with the output of the processes, as after a violation.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def main(seed: int | None, keep: bool, as_json: bool, **options: Any) -> None:  # noqa: FBT001, ANN401, from click
    """Run jobs of every kind under every kind of fault, and compare each with the promise."""
    seed = random.SystemRandom().randrange(10_000) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="vllm-relay-soak-"))
    click.echo(f"seed {seed}, folder {folder}", err=True)
    report = asyncio.run(soak(seed=seed, folder=folder, progress=True, **options))
    if not (keep or report.violations):
        shutil.rmtree(folder)
    click.echo(msgspec.json.encode(report).decode() if as_json else report.table)
    sys.exit(bool(report.violations))


if __name__ == "__main__":
    main()
