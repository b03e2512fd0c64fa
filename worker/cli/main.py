"""The command `worker`: every subcommand, its options and its exit status."""

import asyncio
import gc
import os
from contextlib import aclosing, suppress
from typing import IO, NoReturn, get_args

import click
import msgspec
import structlog

from ..client.async_client import Client, State
from ..client.errors import ClientError, Unavailable
from ..client.new_job import JobOptions, new_job
from ..contract.entries import Idle, Object, to_json
from ..contract.ids import SEAL, EntryId, is_request_id
from ..settings import load_settings
from ..telemetry.logging import configure_logging
from ..version import version
from .dead_letters import dead
from .group import Commands, Interrupted
from .options import CLIENT_OPTIONS, json_option, open_client, run_async, settings_options, until_stopped
from .printer import Printer

_LONELY = 3.0
"""Seconds that a job waits until it is asked whether any worker serves its queue."""


def _version(ctx: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(f"vllm-relay {version() or '(not installed: run from its source)'}")
        ctx.exit()


@click.group(cls=Commands, epilog="Try it: worker demo", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-V", "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Token streams of vLLM on Redis Streams: durable, shared, and not lost with a worker."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False


def _check_id(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not is_request_id(value):
        raise click.BadParameter("a request id is 1 to 128 characters of A-Za-z0-9_-")
    return value


def _check_after(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> EntryId | None:
    try:
        return None if value is None else EntryId.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_request_id = click.argument("request_id", metavar="ID", callback=_check_id)


@main.command(epilog="Example: VLLM_URLS=http://127.0.0.1:8000 worker run --slots 64")
@settings_options()
def run(**options: object) -> None:
    """Take jobs and relay their tokens, until SIGTERM."""
    from ..engine.application import Worker  # noqa: PLC0415 - clients need not load it

    settings = load_settings(**options)
    configure_logging(settings.log_format, settings.log_level)
    if settings.unknown:
        structlog.get_logger().warning("unknown_settings", names=settings.unknown)
    _spare_the_collector()
    run_async(lambda: Worker(settings).run())


def _spare_the_collector() -> None:
    """Have garbage looked for less often, and not among what is loaded by now, which stays.

    With 512 streams and 20,000 tokens a second the collector's pauses were most of the added latency: its median was
    14 ms with Python's own thresholds, and 2 ms with these. The middle generation is looked through a tenth as often as
    Python does: among 3,000 streams each look took 35 ms, an eighth of the CPU to open a stream, and found nothing. How
    much garbage there may be is as before, since the oldest generation is looked through after as many objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 100, 10)


@main.command(epilog="Example: worker enqueue 'Who are you?' --model reciter --follow")
@click.argument("prompt", required=False)
@click.option("--request", "source", type=click.File("rb"), help="A JSON chat completion request; - is standard input.")
@click.option("--model", metavar="MODEL", help="The model to ask, when it is not in the request.")
@click.option("--max-tokens", type=int, help="How long the answer may become.")
@click.option("--id", "request_id", metavar="ID", help="The request id; made up when left out.")
@click.option("--queue", default="default", metavar="QUEUE", show_default=True, help="The queue to add the job to.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Seconds within which the answer must be whole.")
@click.option("--retention", type=int, metavar="SECONDS", help="Seconds that the log is kept after its end.")
@click.option("--fallback", "fallbacks", multiple=True, metavar="MODEL", help="A further model; may be given again.")
@click.option("--follow", is_flag=True, help="Print the answer as it comes.")
@json_option
@settings_options(*CLIENT_OPTIONS, "queue_limit")
def enqueue(
    prompt: str | None,
    source: IO[bytes] | None, model: str | None, max_tokens: int | None, request_id: str | None, queue: str,
    timeout: float | None, retention: int | None, fallbacks: tuple[str, ...], follow: bool, as_json: bool,
    **settings: object,
) -> None:  # fmt: skip
    """Add a chat job: a PROMPT, or a whole request as JSON. Prints the request id."""
    request = _request(prompt, source.read() if source else None)
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

    new_job(request, **options)  # a mistake is told before anything is said of Redis

    async def add_and_follow() -> bool:
        async with open_client(settings) as client:
            added = await client.enqueue(request, **options)
            if not follow:
                click.echo(to_json({"id": added}) if as_json else added)
                return True
            click.echo(f"· request {added}", err=True)
            return await _print(client, added, None, as_json=as_json, queue=queue)

    _exit(run_async(add_and_follow))


@main.command(epilog="Example: worker follow 3f0c… --json")
@_request_id
@click.option("--after", metavar="ENTRY", callback=_check_after, help="Go on after this entry id, such as 1-5.")
@json_option
@settings_options(*CLIENT_OPTIONS)
def follow(request_id: str, after: EntryId | None, as_json: bool, **settings: object) -> None:
    """Print a request's answer from its start, and as it comes. Exit status 0 only if it is whole."""

    async def print_it() -> bool:
        async with open_client(settings) as client:
            return await _print(client, request_id, after, as_json=as_json)

    _exit(run_async(print_it))


@main.command(epilog="Example: worker cancel 3f0c…")
@_request_id
@json_option
@settings_options(*CLIENT_OPTIONS)
def cancel(request_id: str, as_json: bool, **settings: object) -> None:
    """End a request, whether it waits or runs."""

    async def end_it() -> None:
        async with open_client(settings) as client:
            before = await client.cancel(request_id)
        ended = before.state in (State.ENDED, State.EXPIRED)
        said = {
            State.ENDED: f"it had ended before: {before.outcome}",
            State.EXPIRED: f"it had ended before: {before.outcome}",
            State.UNKNOWN: "cancelled; nothing was known of it: if its job comes, it will not run",
        }.get(before.state, f"cancelled; it was {before.state.value}")
        click.echo(to_json({"id": request_id, "cancelled": not ended, "was": before.state.value}) if as_json else said)

    run_async(end_it)


@main.command(epilog="Example: worker check --vllm-urls http://127.0.0.1:8000")
@json_option
@settings_options()
def check(as_json: bool, **options: object) -> None:
    """Look at the settings, Redis, the workers and every vLLM server. Exit status 1 if a worker could not work."""
    from ..ops.checks import check as look  # noqa: PLC0415 - clients need not load it

    async def report() -> bool:
        well = True
        marks = {"ok": click.style("ok     ", fg="green"), "warning": click.style("warning", fg="yellow")}
        async with aclosing(look(options)) as findings:  # a closed pipe ends it in the middle
            async for finding in findings:
                well = well and finding.level != "error"
                if as_json:
                    click.echo(to_json(finding.as_dict()))
                    continue
                mark = marks.get(finding.level, click.style("error  ", fg="red"))
                click.echo(
                    f"{mark} {finding.subject}: {finding.message}" + (f" → {finding.fix}" if finding.fix else "")
                )
        return well

    _exit(run_async(report))


@main.command(
    short_help="See it work, with nothing but this command.",
    epilog="Example: worker demo --vllm-url http://127.0.0.1:8000",
)
@click.option("--redis-url", help="Use this Redis in place of an embedded one.")
@click.option("--vllm-url", help="Use this vLLM in place of a simulated one.")
@json_option
def demo(redis_url: str | None, vllm_url: str | None, as_json: bool) -> None:
    """See it work: a Redis, a simulated vLLM, two workers, and followers of one stream, one of them late."""
    try:
        from ..sandbox.demo import DemoFailed, run_demo  # noqa: PLC0415 - of the extra `demo`
        from ..sandbox.embedded_redis import NoRedis  # noqa: PLC0415
    except ModuleNotFoundError as error:
        _needs_extra(error)

    def tell(line: str, data: Object) -> None:
        click.echo(to_json(data) if as_json else line)

    try:
        run_async(lambda: until_stopped(run_demo(tell, redis_url, vllm_url)))
    except (DemoFailed, NoRedis, TimeoutError, ExceptionGroup) as error:
        cause: Exception = error
        while isinstance(cause, ExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, BrokenPipeError):
            raise cause from None
        raise click.ClickException(str(cause) or "the demo took too long") from error


@main.command(
    short_help="Serve a simulated vLLM, with speeds and faults to order.",
    epilog="Example: worker simulate --port 8000 --rate 50 --fault stall --after 20",
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, type=click.IntRange(0, 65535), show_default=True, help="0 takes a free one.")
@click.option("--model", default="reciter", show_default=True, help="The name of the model.")
@click.option("--api-key", help="Ask for this bearer key.")
@click.option(
    "--rate",
    default=50.0,
    type=click.FloatRange(0),
    show_default=True,
    help="Tokens per second and stream; 0 is without a pause.",
)
@click.option(
    "--first-token",
    default=0.0,
    type=click.FloatRange(0),
    metavar="SECONDS",
    show_default=True,
    help="Seconds before the first token.",
)
@click.option("--fault", help="What goes wrong, such as cut, stall, freeze, reset, hang, 429, 503, error_under_200.")
@click.option("--after", default=0, type=click.IntRange(0), show_default=True, help="Delta chunks before the fault.")
@click.option("--times", type=click.IntRange(0), help="Only the first so many tries of a request meet the fault.")
@click.option(
    "--retry-after",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Seconds, for the Retry-After header of 429 and 503.",
)
def simulate(host: str, port: int, model: str, api_key: str | None, **orders: object) -> None:
    """Serve a simulated vLLM, which answers as a real one does, at the speed and with the faults that you order."""
    try:
        from ..sandbox.simulator.requests import Fault  # noqa: PLC0415 - of the extra `demo`
        from ..sandbox.simulator.server import Options, Scenario, serve_forever  # noqa: PLC0415 - of the extra `demo`
    except ModuleNotFoundError as error:
        _needs_extra(error)
    try:
        ordered = msgspec.convert(orders, Scenario)
    except msgspec.ValidationError:  # all else is checked by click
        raise click.UsageError(f"--fault must be one of {', '.join(get_args(Fault))}") from None
    options = Options(model=model, api_key=api_key, orders=ordered)

    def ready(url: str) -> None:
        click.echo(f"a simulated vLLM listens on {url}", err=True)

    with suppress(KeyboardInterrupt):  # the way to end it
        run_async(lambda: until_stopped(serve_forever(options, host=host, port=port, ready=ready)))


main.add_command(dead)


def _exit(well: bool) -> None:
    if not well:
        raise click.exceptions.Exit(1)


async def _print(client: Client, request_id: str, after: EntryId | None, *, as_json: bool, queue: str = "") -> bool:
    """Print a log as it comes, and that no worker serves the queue, if one is given; true where the answer is whole."""
    printer = Printer(as_json=as_json)
    try:
        async with aclosing(client.follow(request_id, after=after, idle=_LONELY if queue else None)) as entries:
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
        raise Unavailable(f"{error}\nGo on later with: worker follow {request_id} --after {last}") from None
    if after == SEAL:  # nothing comes after it, and so nothing has shown how it ended
        outcome = (await client.status(request_id)).outcome
        click.echo(f"· it has ended: {outcome}", err=True)
        return outcome == "done"
    return printer.answer.outcome == "done"


async def _is_served(client: Client, queue: str) -> bool:
    try:
        return await client.is_served(queue)
    except ClientError:  # a user who may not see the workers, or cannot now, can say nothing against them
        return True


def _request(prompt: str | None, source: bytes | None) -> Object:
    if (prompt is None) == (source is None):
        raise click.UsageError("give either a PROMPT or --request FILE")
    if prompt is not None and not prompt.strip():
        raise click.UsageError("the PROMPT is empty")
    if prompt is not None and not _is_text(prompt):
        raise click.UsageError("the PROMPT is not UTF-8")
    if source is None:
        return {"messages": [{"role": "user", "content": prompt}]}
    try:
        request = msgspec.json.decode(source)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise click.UsageError(f"the request is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise click.UsageError("the request is not a JSON object")
    return request


def _is_text(argument: str) -> bool:
    """Whether an argument was UTF-8: Python keeps the bytes that are not as surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _needs_extra(error: ModuleNotFoundError) -> NoReturn:
    install = "in a clone of vllm-relay: pip install '.[demo]'"
    raise click.ClickException(f"{error.name} is missing, of the extra `demo`: install it, {install}") from None
