"""The commands that steer running workers: `worker pause`, `worker resume` and `worker drain`."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import click

from ..contract.entries import Object, to_json
from ..contract.keys import Keys, is_queue_name
from ..contract.records import ControlEntry, WorkerRecord
from ..ops.units import instant, printable
from ..settings import load_settings
from .group import Interrupted
from .options import CLIENT_OPTIONS, exit_status, json_option, run_async, settings_options

if TYPE_CHECKING:
    from ..ops.steering import DrainState, Steering

_TIMEOUT = 5.0
"""Seconds that Redis has for each reply."""

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_MOST_SECONDS = 366 * 86_400
_MOST_WHY = 500


def _check_queue(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not is_queue_name(value):
        raise click.BadParameter(f"{value!r} is no queue's name: it has 1 to 64 characters of A-Za-z0-9_-")
    return value


def _read_duration(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> float:
    if value is None:
        return 0
    parts = re.findall(r"(\d+)(min|[smhd])", value)
    if not parts or "".join(map("".join, parts)) != value:
        raise click.BadParameter(f"{value!r} is no time: write it as 90s, 10m, 2h, 1d or 1h30m")
    seconds = sum(int(count) * _UNITS[unit] for count, unit in parts)
    if not 0 < seconds <= _MOST_SECONDS:
        raise click.BadParameter(f"{value!r} is out of range: a pause lasts from 1s to 366d")
    return seconds


def _check_why(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if len(value) > _MOST_WHY:
        raise click.BadParameter(f"it has {len(value)} characters, and may have {_MOST_WHY}")
    return value


_queue = click.argument("queue", callback=_check_queue)
_why = click.option(
    "--why", default="", metavar="TEXT", callback=_check_why, help="The reason, shown beside the pause or drain."
)


@asynccontextmanager
async def _open_steering(options: dict[str, object]) -> AsyncIterator["Steering"]:
    from ..ops.steering import Steering  # noqa: PLC0415 - clients need not load it
    from ..redisio.clients import command_client  # noqa: PLC0415
    from ..redisio.urls import database_of  # noqa: PLC0415

    settings = load_settings(options, **options)
    url = settings.redis_url.get_secret_value()
    redis = command_client(url, timeout=_TIMEOUT)
    try:
        yield Steering(redis, Keys(settings.prefix, database_of(url)), lease=settings.lease)
    finally:
        await redis.aclose()


@click.command(epilog="Example: worker pause default --for 10m --why 'vLLM upgrade'")
@_queue
@click.option(
    "--for", "seconds", metavar="TIME", callback=_read_duration,
    help="How long, such as 90s, 10m or 2h. Without it, until worker resume.",
)  # fmt: skip
@_why
@json_option
@settings_options(*CLIENT_OPTIONS)
def pause(queue: str, seconds: float, why: str, as_json: bool, **options: object) -> None:
    """Let no worker take jobs of QUEUE; running ones go on.

    Returns once every worker that serves the queue has confirmed that it starts no more of its jobs. Exit status 1 if
    one has not within two beats.
    """

    async def do_pause() -> bool:
        async with _open_steering(options) as steering:
            pause = await steering.pause(queue, why=why, seconds=seconds)
            state = await steering.state_of(queue, pause)
            if not as_json:
                jobs = "" if state.waiting is None else f"; jobs that wait: {state.waiting}"
                click.echo(
                    f"queue {queue} is paused {_end_of(pause)}; workers that serve it: {len(state.workers)}{jobs}"
                )
            if state.known:
                known = ", ".join(map(printable, state.known))
                click.echo(f"· no queue of this name is in use; those are: {known}", err=True)
            elif not state.workers:
                click.echo("· no worker serves it now; workers that start later take no jobs of it either", err=True)
            unconfirmed = await steering.wait_in_effect(queue)
            if as_json:
                shown = {"workers": list(state.workers), "waiting": state.waiting, "unconfirmed": sorted(unconfirmed)}
                click.echo(to_json({"queue": queue} | _as_dict(pause) | shown))
            for name, record in sorted(unconfirmed.items()):
                click.echo(f"· {printable(name)} {_unconfirmed(steering, record)}", err=True)
            if state.workers and not unconfirmed and not as_json:
                click.echo("all of them have confirmed: none of its jobs starts")
            return not unconfirmed

    exit_status(run_async(do_pause))


def _unconfirmed(steering: "Steering", record: WorkerRecord) -> str:
    if steering.is_silent(record):
        silence = steering.silence_of(record)
        return f"has been silent for {silence:.0f} s: if it still runs, it may take jobs until it has read the pause"
    return "has not confirmed, and may take jobs: its log has why it does not read the pause (control_failed)"


@click.command(epilog="Example: worker resume default")
@_queue
@json_option
@settings_options(*CLIENT_OPTIONS)
def resume(queue: str, as_json: bool, **options: object) -> None:
    """End the pause of QUEUE: workers take its jobs again."""

    async def do_resume() -> None:
        async with _open_steering(options) as steering:
            ended = await steering.resume(queue)
            paused = [] if ended else await steering.paused_queues()
        if as_json:
            click.echo(to_json({"queue": queue, "paused": None if ended is None else _as_dict(ended)}))
        elif ended is None:
            names = f"those that are: {', '.join(map(printable, paused))}" if paused else "no queue is"
            click.echo(f"· queue {queue} was not paused; {names}", err=True)
        else:
            why = f", {printable(ended.why)}" if ended.why else ""
            by = printable(ended.by) or "unknown"
            click.echo(f"queue {queue} is resumed; it was paused since {instant(ended.since)} (by {by}{why})")

    run_async(do_resume)


@click.command(epilog="Example: worker drain gpu1-4711 --wait")
@click.argument("name")
@_why
@click.option("--wait", is_flag=True, help="Follow the worker until it is gone.")
@json_option
@settings_options(*CLIENT_OPTIONS)
def drain(name: str, why: str, wait: bool, as_json: bool, **options: object) -> None:
    """Let a worker end as at SIGTERM, from afar.

    Other workers continue its jobs. NAME may be the beginning of a name. The process ends with status 0, and a
    supervisor that always restarts starts it again under another name.
    """
    from ..ops.steering import find_worker  # noqa: PLC0415 - clients need not load it

    async def do_drain() -> None:
        async with _open_steering(options) as steering:
            records = await steering.workers()
            try:
                worker = find_worker(name, records)
            except LookupError as problem:
                raise click.ClickException(str(problem)) from None
            record = records[worker]
            jobs = await steering.jobs_of(worker, record.queues) if wait else set()
            await steering.drain(worker, why=why)
            _show(as_json, {"worker": worker, "state": "asked", "running": record.running},
                  f"worker {printable(worker)} was asked to drain; jobs that run there: {record.running}")  # fmt: skip
            if steering.is_silent(record):
                silence = steering.silence_of(record)
                click.echo(f"· it has been silent for {silence:.0f} s: it drains if it still runs", err=True)
            for queue in sorted(set(record.queues) - _served_by_others(steering, records, worker)):
                click.echo(f"· no other worker serves the queue {printable(queue)}: its jobs wait for one", err=True)
            if wait:
                states = steering.watch_drain(worker, record.queues, jobs)
                await _follow(worker, states, as_json=as_json)

    run_async(do_drain)


def _served_by_others(steering: "Steering", records: dict[str, WorkerRecord], worker: str) -> set[str]:
    others = [it for name, it in records.items() if name != worker and not it.draining and not steering.is_silent(it)]
    return {queue for record in others for queue in record.queues}


async def _follow(worker: str, states: "AsyncGenerator[DrainState]", *, as_json: bool) -> None:
    try:
        async with aclosing(states):
            async for state in states:
                _show(as_json, _as_drain(worker, state), _drain_line(state))
    except asyncio.CancelledError:  # by Ctrl-C
        raise Interrupted(f"{printable(worker)} drains all the same: worker status shows it") from None


def _as_drain(worker: str, state: "DrainState") -> Object:
    if not state.is_gone:
        return {"worker": worker, "state": "draining", "running": state.running}
    return {
        "worker": worker, "state": "gone", "running": 0, "ended": state.ended, "handed_over": state.handed_over,
    }  # fmt: skip


def _drain_line(state: "DrainState") -> str:
    if not state.is_gone:
        return f"jobs that run there: {state.running}"
    return f"it is gone; of its jobs ended: {state.ended}, handed over: {state.handed_over}"


def _show(as_json: bool, value: Object, line: str) -> None:
    click.echo(to_json(value) if as_json else line)


def _as_dict(entry: ControlEntry) -> Object:
    return {"by": entry.by, "why": entry.why, "since": entry.since, "until": entry.until}


def _end_of(pause: ControlEntry) -> str:
    return f"until {instant(pause.until)}" if pause.until else "until worker resume"
