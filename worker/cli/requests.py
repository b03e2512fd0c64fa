"""The commands for requests: `worker enqueue`, `worker follow` and `worker cancel`."""

import asyncio
from contextlib import aclosing
from typing import IO

import click
import msgspec

from ..client.async_client import Client, State
from ..client.errors import ClientError, Unavailable
from ..client.new_job import JobOptions, new_job
from ..contract.entries import Idle, Object, to_json
from ..contract.ids import SEAL, EntryId
from .group import Interrupted
from .options import (
    CLIENT_OPTIONS,
    exit_status,
    json_option,
    open_client,
    request_id_argument,
    run_async,
    settings_options,
)
from .printer import Printer


def _check_after(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> EntryId | None:
    try:
        return None if value is None else EntryId.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(epilog="Example: worker enqueue 'Who are you?' --model reciter --follow")
@click.argument("prompt", required=False)
@click.option("--request", "source", type=click.File("rb"), help="A JSON chat completion request; - is standard input.")
@click.option("--model", metavar="MODEL", help="The model, if the request does not have one.")
@click.option("--max-tokens", type=int, help="The largest number of tokens in the answer.")
@click.option("--id", "request_id", metavar="ID", help="The request id. By default a random one.")
@click.option("--queue", default="default", metavar="QUEUE", show_default=True, help="The queue to add the job to.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Seconds within which the answer must be complete.")
@click.option("--retention", type=int, metavar="SECONDS", help="Seconds that the log is kept after its end.")
@click.option("--fallback", "fallbacks", multiple=True, metavar="MODEL", help="A fallback model; may be given again.")
@click.option("--follow", is_flag=True, help="Print the answer as it arrives.")
@json_option
@settings_options(*CLIENT_OPTIONS, "queue_limit")
def enqueue(
    prompt: str | None,
    source: IO[bytes] | None, model: str | None, max_tokens: int | None, request_id: str | None, queue: str,
    timeout: float | None, retention: int | None, fallbacks: tuple[str, ...], follow: bool, as_json: bool,
    **settings: object,
) -> None:  # fmt: skip
    """Add a chat job: a PROMPT, or a whole request as JSON. Prints the request id."""
    request = _read_request(prompt, source)
    request |= {name: value for name, value in (("model", model), ("max_tokens", max_tokens)) if value is not None}
    options: JobOptions = {"queue": queue}
    if request_id is not None:
        options["id"] = request_id
    if timeout is not None:
        options["timeout"] = timeout
    if retention is not None:
        options["retention"] = retention
    if fallbacks:
        options["fallbacks"] = fallbacks

    new_job(request, **options)  # so that a mistake is reported even if Redis does not answer

    async def add() -> bool:
        async with open_client(settings) as client:
            added = await client.enqueue(request, **options)
            if not follow:
                click.echo(to_json({"id": added}) if as_json else added)
                return True
            click.echo(f"· request {added}", err=True)
            return await print_answer(client, added, as_json=as_json, queue=queue)

    exit_status(run_async(add))


@click.command(epilog="Example: worker follow 3f0c… --json")
@request_id_argument
@click.option("--after", metavar="ENTRY", callback=_check_after, help="Continue after this entry id, such as 1-5.")
@json_option
@settings_options(*CLIENT_OPTIONS)
def follow(request_id: str, after: EntryId | None, as_json: bool, **settings: object) -> None:
    """Print a request's answer from its start, and as it arrives. Exit status 0 only if it is complete."""

    async def print_it() -> bool:
        async with open_client(settings) as client:
            return await print_answer(client, request_id, after, as_json=as_json)

    exit_status(run_async(print_it))


@click.command(epilog="Example: worker cancel 3f0c…")
@request_id_argument
@json_option
@settings_options(*CLIENT_OPTIONS)
def cancel(request_id: str, as_json: bool, **settings: object) -> None:
    """Cancel a request that waits or runs.

    A request that is not known is cancelled too: its job may wait without a log, as after a plain XADD, or come later.
    It will not run, and Redis keeps the cancel for a day. Exit status 0 in each case.
    """

    async def end_it() -> None:
        async with open_client(settings) as client:
            before = await client.cancel(request_id)
        had_ended = before.state in (State.ENDED, State.EXPIRED)
        if as_json:
            click.echo(to_json({"id": request_id, "cancelled": not had_ended, "was": before.state.value}))
        elif had_ended:
            click.echo(f"the request had ended before: {before.outcome}")
        elif before.state is State.UNKNOWN:
            click.echo("cancelled; the request was unknown: if its job waits or comes, it will not run")
        else:
            click.echo(f"cancelled; the request was {before.state.value}")

    run_async(end_it)


async def print_answer(
    client: Client, request_id: str, after: EntryId | None = None,
    *, as_json: bool, queue: str = "", unserved_after: float = 3.0,
) -> bool:  # fmt: skip
    """Print a log as it arrives; returns whether the answer is complete.

    If `queue` is given, no entry came for `unserved_after` seconds and no worker serves the queue, a note is printed.
    """
    printer = Printer(as_json=as_json)
    idle = unserved_after if queue else None
    try:
        async with aclosing(client.follow(request_id, after=after, idle=idle)) as entries:
            async for entry in entries:
                if not isinstance(entry, Idle):
                    printer.show(entry)
                elif queue and not printer.answer.started and not await _is_served(client, queue):
                    start = f"start one with worker run --queues {queue}"
                    click.echo(f"· no worker serves the queue {queue}: {start}", err=True)
                    queue = ""
    except asyncio.CancelledError:  # by Ctrl-C
        last = printer.break_off() or ("" if after is None else str(after))
        more = f" --after {last}" if last else ""
        raise Interrupted(f"still running: worker follow {request_id}{more}, or worker cancel {request_id}") from None
    except ClientError as error:
        last = printer.break_off()
        if not last or not isinstance(error, Unavailable):
            raise
        raise Unavailable(f"{error}\nContinue later with: worker follow {request_id} --after {last}") from None
    if after == SEAL:  # no entry comes after the seal, so the outcome was not printed
        outcome = (await client.status(request_id)).outcome
        click.echo(f"· the request has ended: {outcome}", err=True)
        return outcome == "done"
    return printer.answer.outcome == "done"


async def _is_served(client: Client, queue: str) -> bool:
    try:
        return await client.is_served(queue)
    except ClientError:  # no note if the user may not read the worker records, or if Redis does not answer
        return True


def _read_request(prompt: str | None, source: IO[bytes] | None) -> Object:
    if (prompt is None) == (source is None):
        raise click.UsageError("give either a PROMPT or --request FILE")
    if prompt is not None and not prompt.strip():
        raise click.UsageError("the PROMPT is empty")
    if source is None:
        try:
            (prompt or "").encode()
        except UnicodeEncodeError:  # Python keeps bytes of an argument that are not UTF-8 as surrogates
            raise click.UsageError("the PROMPT is not UTF-8") from None
        return {"messages": [{"role": "user", "content": prompt}]}
    try:
        request = msgspec.json.decode(source.read())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise click.UsageError(f"the request is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise click.UsageError("the request is not a JSON object")
    return request
