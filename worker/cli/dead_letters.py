"""The commands `worker dead …`: list, show, put back and drop buried jobs."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import click
import msgspec

from ..broker.dead_letters import DeadLetters, LetterFilter, NotRetryable, StoredLetter, retry_of
from ..client.async_client import Client
from ..client.errors import Conflict
from ..client.new_job import JobOptions
from ..contract.entries import Object, to_json
from ..contract.ids import EntryId
from ..contract.job import InvalidJob
from ..contract.keys import Keys
from ..ops.units import folded, instant, size
from ..redisio.clients import command_client
from ..settings import load_settings
from .options import CLIENT_OPTIONS, Surroundings, json_option, open_client, run_async, settings_options

_NOT_FOUND = "there is no such letter: worker dead list shows all letters (one that is retried gets a new id)"
_ALL = LetterFilter()
_REASON_SHOWN = 200
"""Characters of a reason in the list. `worker dead show` has all."""

_Action = Callable[[StoredLetter], Awaitable[Object]]


def _check_letter_id(_ctx: click.Context, _parameter: click.Parameter, value: str) -> EntryId:
    try:
        return EntryId.parse(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not the id of a dead letter: worker dead list shows them") from None


def _check_letter_ids(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[EntryId, ...]:
    return tuple(_check_letter_id(ctx, parameter, one) for one in value)


_ids = click.argument("ids", metavar="ID...", nargs=-1, callback=_check_letter_ids)
_queue = click.option("--queue", default="", help="Only letters of this queue.")
_reason = click.option("--reason", default="", metavar="TEXT", help="Only letters whose reason contains this text.")
_every = click.option("--all", "every", is_flag=True, help="All letters, or those of --queue and --reason.")
_yes = click.option("--yes", is_flag=True, help="Do not ask before --all.")


@click.group(short_help="List, show, put back or drop buried jobs.", epilog="Example: worker dead list")
def dead() -> None:
    """Manage dead letters. Each is a buried job with the reason and the whole request, which contains the prompt."""


@dead.command("list", epilog="Example: worker dead list --reason 'without progress'")
@click.option("--limit", default=50, type=click.IntRange(1), show_default=True, help="How many at most.")
@_queue
@_reason
@json_option
@settings_options(*CLIENT_OPTIONS)
def list_(limit: int, queue: str, reason: str, as_json: bool, **settings: object) -> None:
    """List dead letters, from oldest to newest."""
    wanted = LetterFilter(queue, reason)

    async def print_them() -> None:
        async with _open_letters(settings) as (_, letters):
            found = await letters.newest(limit, wanted)
        for stored in found:
            click.echo(to_json(_summary(stored)) if as_json else "\n".join(_summary_lines(stored)))
        if not found:
            click.echo(_none_of(wanted), err=True)

    run_async(print_them)


@dead.command(epilog="Example: worker dead show 1717171717171-0")
@click.argument("letter_id", metavar="ID", callback=_check_letter_id)
@json_option
@settings_options(*CLIENT_OPTIONS)
def show(letter_id: EntryId, as_json: bool, **settings: object) -> None:
    """Show a whole dead letter, including the prompt of its job."""

    async def print_it() -> None:
        async with _open_letters(settings) as (_, letters):
            stored = await letters.get(letter_id)
        if stored is None:
            raise click.ClickException(f"{letter_id}: {_NOT_FOUND}")
        letter = stored.letter
        whole = to_json(_summary(stored) | {"cut": list(letter.truncated), "fields": dict(letter.fields)})
        click.echo(whole if as_json else msgspec.json.format(whole, indent=2))

    run_async(print_it)


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
    """Put jobs back, each under a new request id, which is printed. The letter, marked as retried, gets a new id."""
    wanted = _check_selection(ids, every=every, queue=queue, reason=reason)

    async def put_all_back() -> None:
        async with _open_letters(settings) as (client, letters):
            chosen = list(ids) or [
                EntryId.parse(stored.id)
                async for stored in letters.oldest_first(wanted)
                if not stored.letter.retried_as
            ]
            if every and not yes:
                _confirm(f"Put {len(chosen)} jobs back?")
            await _apply_to_each(letters, chosen, partial(put_back, client, letters), wanted, as_json=as_json)

    run_async(put_all_back)


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
    """Drop dead letters for good, including those of retried jobs."""
    wanted = _check_selection(ids, every=every, queue=queue, reason=reason)

    async def drop_all() -> None:
        async with _open_letters(settings) as (_, letters):

            async def drop_one(stored: StoredLetter) -> Object:
                await letters.drop(EntryId.parse(stored.id))
                return {"id": stored.id, "request": stored.request_id, "dropped": True}

            chosen = list(ids) or [EntryId.parse(stored.id) async for stored in letters.oldest_first(wanted)]
            if every and not yes:
                _confirm(f"Drop {len(chosen)} dead letters for good?")
            await _apply_to_each(letters, chosen, drop_one, wanted, as_json=as_json)

    run_async(drop_all)


async def put_back(client: Client, letters: DeadLetters, stored: StoredLetter) -> Object:
    """Enqueue a buried job again, then mark its letter as retried; returns what `--json` prints.

    The job is enqueued first: after a crash between the two steps, the same command finds that job and adds no other.

    Raises:
        NotRetryable: when the job cannot be enqueued.
    """
    job = retry_of(stored)
    options: JobOptions = {
        "id": job.id, "queue": stored.letter.queue, "fallbacks": job.fallbacks, "tenant": job.tenant,
        "traceparent": job.traceparent, "retry_of": job.retry_of,
    }  # fmt: skip
    if job.retention is not None:
        options["retention"] = job.retention
    try:
        request_id = await client.enqueue(job.request, **options)
    except (InvalidJob, Conflict) as problem:
        raise NotRetryable(str(problem)) from None
    letter = await letters.mark_retried(stored, request_id)
    return {"id": stored.id, "request": stored.request_id, "retried_as": request_id, "letter": letter}


async def _apply_to_each(
    letters: DeadLetters, chosen: list[EntryId], action: _Action, wanted: LetterFilter, *, as_json: bool
) -> None:
    """Apply an action to one letter after another. A failure is reported, and the other letters are still processed."""
    failed = 0
    for letter_id in chosen:
        problem = _NOT_FOUND
        done: Object = {}
        if stored := await letters.get(letter_id):
            try:
                done = await action(stored)
            except NotRetryable as error:
                problem = str(error)
        if not done:
            failed += 1
            click.echo(
                to_json({"id": str(letter_id), "error": problem}) if as_json else f"{letter_id}: {problem}", err=True
            )
            continue
        result = "dropped"
        if "retried_as" in done:
            kept = f" (the letter is now {done['letter']})" if done["letter"] else ""
            result = f"retried as {done['retried_as']}{kept}"
        click.echo(to_json(done) if as_json else f"{letter_id}: {result}")
    if failed:
        raise click.ClickException(f"{failed} of {len(chosen)} letters were not changed")
    if not chosen:
        click.echo(_none_of(wanted), err=True)


def _none_of(wanted: LetterFilter) -> str:
    return "· no dead letters" if wanted == _ALL else "· no dead letter matches --queue and --reason"


def _check_selection(ids: tuple[EntryId, ...], *, every: bool, queue: str, reason: str) -> LetterFilter:
    if bool(ids) == every:
        raise click.UsageError("give either the IDs of letters or --all")
    if ids and (queue or reason):
        raise click.UsageError("--queue and --reason can only be used with --all")
    return LetterFilter(queue, reason)


def _confirm(question: str) -> None:
    if Surroundings.current().can_confirm:
        click.confirm(question, abort=True, err=True)


@asynccontextmanager
async def _open_letters(options: dict[str, object]) -> AsyncIterator[tuple[Client, DeadLetters]]:
    settings = load_settings(options, **options)
    async with open_client(options) as client:
        redis = command_client(settings.redis_url.get_secret_value())
        try:
            yield client, DeadLetters(redis, Keys(settings.prefix))
        finally:
            await redis.aclose()


def _summary(stored: StoredLetter) -> Object:
    letter = stored.letter
    return {
        "id": stored.id, "time": letter.time, "queue": letter.queue, "job": letter.job, "request": stored.request_id,
        "size": stored.size, "retried_as": letter.retried_as, "reason": letter.reason,
    }  # fmt: skip


def _summary_lines(stored: StoredLetter) -> list[str]:
    letter = stored.letter
    retried = f", retried as {letter.retried_as}" if letter.retried_as else ""
    return [
        *folded(f"{stored.id}  {instant(letter.time)}  queue {letter.queue}  {size(stored.size)}", 4),
        *folded(f"    request {stored.request_id or 'without a valid id'}{retried}", 4),
        *folded(f"    {' '.join(letter.reason.split())[:_REASON_SHOWN]}", 4),
    ]
