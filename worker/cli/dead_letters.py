"""The commands `worker dead …`: what was buried is listed, shown, put back and dropped."""

import datetime as dt
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import click
import msgspec

from ..broker.dead_letters import DeadLetters, NotRetryable, StoredLetter, Wanted, retry_of
from ..client.async_client import Client
from ..client.errors import Conflict
from ..client.new_job import JobOptions
from ..contract.entries import Object, to_json
from ..contract.ids import EntryId
from ..contract.job import InvalidJob
from ..contract.keys import Keys
from ..redisio.clients import command_client
from ..settings import load_settings
from .options import CLIENT_OPTIONS, json_option, open_client, run_async, settings_options

_NO_LETTER = "there is no such letter: worker dead list shows which there are (one that is retried gets a new id)"
_NONE = "· no dead letters"

_Act = Callable[[StoredLetter], Awaitable[Object]]


def _check_letter_id(_ctx: click.Context, _parameter: click.Parameter, value: str) -> EntryId:
    try:
        return EntryId.parse(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no id of a dead letter: worker dead list shows them") from None


def _check_letter_ids(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[EntryId, ...]:
    return tuple(_check_letter_id(ctx, parameter, one) for one in value)


_ids = click.argument("ids", metavar="ID...", nargs=-1, callback=_check_letter_ids)
_queue = click.option("--queue", default="", help="Only letters of this queue.")
_reason = click.option("--reason", default="", metavar="TEXT", help="Only letters whose reason holds this text.")
_every = click.option("--all", "every", is_flag=True, help="All letters, or those of --queue and --reason.")
_yes = click.option("--yes", is_flag=True, help="Do not ask before --all.")


@click.group(short_help="List, show, put back or drop buried jobs.", epilog="Example: worker dead list")
def dead() -> None:
    """Deal with buried jobs: each is a letter, with the reason and the whole job. They hold prompts."""


@dead.command("list", epilog="Example: worker dead list --reason 'without progress'")
@click.option("--limit", default=50, type=click.IntRange(1), show_default=True, help="How many at most.")
@_queue
@_reason
@json_option
@settings_options(*CLIENT_OPTIONS)
def list_(limit: int, queue: str, reason: str, as_json: bool, **settings: object) -> None:
    """List dead letters, the newest last."""

    async def tell() -> None:
        async with _letters(settings) as (_, letters):
            found = await letters.newest(limit, Wanted(queue, reason))
        for filed in found:
            click.echo(to_json(_summary(filed)) if as_json else _line(filed))
        if not found:
            click.echo(_NONE, err=True)

    run_async(tell)


@dead.command(epilog="Example: worker dead show 1717171717171-0")
@click.argument("letter_id", metavar="ID", callback=_check_letter_id)
@json_option
@settings_options(*CLIENT_OPTIONS)
def show(letter_id: EntryId, as_json: bool, **settings: object) -> None:
    """Show a dead letter whole, with the job and so its prompt."""

    async def tell() -> None:
        async with _letters(settings) as (_, letters):
            filed = await letters.get(letter_id)
        if filed is None:
            raise click.ClickException(f"{letter_id}: {_NO_LETTER}")
        whole = to_json(_summary(filed) | {"cut": list(filed.letter.truncated), "fields": dict(filed.letter.fields)})
        click.echo(whole if as_json else msgspec.json.format(whole, indent=2))

    run_async(tell)


@dead.command(epilog="Example: worker dead retry --all --reason 'without progress'")
@_ids
@_every
@_queue
@_reason
@_yes
@json_option
@settings_options(*CLIENT_OPTIONS)
def retry(
    ids: tuple[EntryId, ...], every: bool, queue: str, reason: str, yes: bool, as_json: bool, **settings: object
) -> None:
    """Put jobs back, each under a new request id, which is printed; the letter stays, under a new id, and names it."""
    wanted = _chosen(ids, every=every, queue=queue, reason=reason)

    async def put_back() -> None:
        async with _letters(settings) as (client, letters):
            chosen = list(ids) or [
                EntryId.parse(filed.id) async for filed in letters.every(wanted) if not filed.letter.retried_as
            ]
            _confirm(f"Put {len(chosen)} jobs back?", ask=every and not yes)
            await _each(letters, chosen, partial(_retry, client, letters), as_json=as_json)

    run_async(put_back)


@dead.command(epilog="Example: worker dead drop 1717171717171-0")
@_ids
@_every
@_queue
@_reason
@_yes
@json_option
@settings_options(*CLIENT_OPTIONS)
def drop(
    ids: tuple[EntryId, ...], every: bool, queue: str, reason: str, yes: bool, as_json: bool, **settings: object
) -> None:
    """Drop dead letters for good, those of retried jobs as well."""
    wanted = _chosen(ids, every=every, queue=queue, reason=reason)

    async def remove() -> None:
        async with _letters(settings) as (_, letters):
            chosen = list(ids) or [EntryId.parse(filed.id) async for filed in letters.every(wanted)]
            _confirm(f"Drop {len(chosen)} dead letters for good?", ask=every and not yes)
            await _each(letters, chosen, partial(_drop, letters), as_json=as_json)

    run_async(remove)


async def _retry(client: Client, letters: DeadLetters, filed: StoredLetter) -> Object:
    """First the job, then the letter: after a crash in between, the same command attaches to the job that is there."""
    job = retry_of(filed)
    options: JobOptions = {
        "id": job.id, "queue": filed.letter.queue, "fallbacks": job.fallbacks, "tenant": job.tenant,
        "traceparent": job.traceparent, "retry_of": job.retry_of,
    }  # fmt: skip
    if job.retention is not None:
        options["retention"] = job.retention
    try:
        request_id = await client.enqueue(job.request, **options)
    except (InvalidJob, Conflict) as problem:
        raise NotRetryable(str(problem)) from None
    letter = await letters.retried(filed, request_id)
    return {"id": filed.id, "request": filed.request_id, "retried_as": request_id, "letter": letter}


async def _drop(letters: DeadLetters, filed: StoredLetter) -> Object:
    await letters.drop(EntryId.parse(filed.id))
    return {"id": filed.id, "request": filed.request_id, "dropped": True}


async def _each(letters: DeadLetters, chosen: list[EntryId], act: _Act, *, as_json: bool) -> None:
    """Do it to one after another; those that it cannot be done to are told, and do not hold up the rest."""
    undone = 0
    for letter_id in chosen:
        problem = _NO_LETTER
        done: Object = {}
        if filed := await letters.get(letter_id):
            try:
                done = await act(filed)
            except NotRetryable as error:
                problem = str(error)
        if not done:
            undone += 1
            click.echo(
                to_json({"id": str(letter_id), "error": problem}) if as_json else f"{letter_id}: {problem}", err=True
            )
            continue
        told = "dropped"
        if "retried_as" in done:
            kept = f" (the letter is now {done['letter']})" if done["letter"] else ""
            told = f"retried as {done['retried_as']}{kept}"
        click.echo(to_json(done) if as_json else f"{letter_id}: {told}")
    if undone:
        raise click.ClickException(f"{undone} of {len(chosen)} letters are as they were")
    if not chosen:
        click.echo(_NONE, err=True)


def _chosen(ids: tuple[EntryId, ...], *, every: bool, queue: str, reason: str) -> Wanted:
    if bool(ids) == every:
        raise click.UsageError("give either the IDs of letters or --all")
    if ids and (queue or reason):
        raise click.UsageError("--queue and --reason go with --all")
    return Wanted(queue, reason)


def _confirm(question: str, *, ask: bool) -> None:
    if ask and _on_a_terminal():
        click.confirm(question, abort=True, err=True)


def _on_a_terminal() -> bool:
    return sys.stdin.isatty()


@asynccontextmanager
async def _letters(options: dict[str, object]) -> AsyncIterator[tuple[Client, DeadLetters]]:
    settings = load_settings(options, **options)
    async with open_client(options) as client:
        redis = command_client(settings.redis_url.get_secret_value())
        try:
            yield client, DeadLetters(redis, Keys(settings.prefix))
        finally:
            await redis.aclose()


def _summary(filed: StoredLetter) -> Object:
    letter = filed.letter
    return {
        "id": filed.id, "time": letter.time, "queue": letter.queue, "job": letter.job, "request": filed.request_id,
        "size": filed.size, "retried_as": letter.retried_as, "reason": letter.reason,
    }  # fmt: skip


def _line(filed: StoredLetter) -> str:
    letter = filed.letter
    when = dt.datetime.fromtimestamp(letter.time / 1000, dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    reason = " ".join(letter.reason.split())
    retried = f"  (retried as {letter.retried_as})" if letter.retried_as else ""
    return f"{filed.id}  {when}  {letter.queue}  {filed.request_id or '-'}  {filed.size} bytes  {reason[:200]}{retried}"
