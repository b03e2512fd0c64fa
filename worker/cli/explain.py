"""The command `worker explain`: the story of one request, without its content."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
import msgspec

from ..contract.entries import Object, to_json
from ..contract.keys import Keys
from ..ops.units import duration, folded, instant
from ..settings import load_settings
from .options import CLIENT_OPTIONS, exit_status, json_option, request_id_argument, run_async, settings_options

if TYPE_CHECKING:
    from ..ops.explain import Attempt, Story


@click.command(epilog="Example: worker explain 3f0c…")
@request_id_argument
@json_option
@settings_options(*CLIENT_OPTIONS)
def explain(request_id: str, as_json: bool, **options: object) -> None:
    """Tell what happened to a request, without its content.

    That is how long and for what it waited, its attempts, resumes, usage, times and end. ID may also be that of the
    request's job, while the job is in its queue.

    Exit status 1 if nothing is known of the request, or if jobs of several requests have the id.
    """
    from ..ops.explain import AmbiguousJob  # noqa: PLC0415 - clients need not load it
    from ..ops.explain import explain as read  # noqa: PLC0415
    from ..redisio.clients import command_client  # noqa: PLC0415
    from ..redisio.urls import database_of  # noqa: PLC0415

    settings = load_settings(options, **options)
    url = settings.redis_url.get_secret_value()

    async def tell() -> bool:
        redis = command_client(url)
        try:
            story = await read(redis, Keys(settings.prefix, database_of(url)), request_id)
        except AmbiguousJob as error:
            raise click.ClickException(str(error)) from None
        finally:
            await redis.aclose()
        click.echo(to_json(msgspec.to_builtins(story)) if as_json else "\n".join(_lines(story)))
        return story.state != "unknown"

    exit_status(run_async(tell))


def _lines(story: "Story") -> Iterator[str]:
    outcome = f": {story.outcome}" if story.outcome else ""
    yield from folded(f"request {story.id} · {story.state}{outcome}{f' ({story.code})' if story.code else ''}")
    if story.state == "unknown":
        missing = "it has no log, no tombstone and no waiting job: it was never added, or has expired"
        unreadable = "its log has no entry that tells a state: another program or a later version wrote it"
        yield from folded(missing if story.log_for is None else unreadable)
    for name, text in (*_beginning(story), *_end(story)):
        yield from folded(f"  {name:<10} {text}", 13)


def _beginning(story: "Story") -> Iterator[tuple[str, str]]:
    if story.queue:
        yield "queue", story.queue + (f", job {story.job}" if story.job else "")
    if story.queued:
        yield "queued", instant(story.queued)
    if story.waits:
        yield "waits for", story.waits + ("" if story.before is None else f"; jobs before it: about {story.before}")
    if story.waited is not None:
        yield "waited", f"{story.waited:.1f} s for its start"
    for attempt in story.attempts:
        yield f"attempt {attempt.number}", _attempt(attempt)


def _end(story: "Story") -> Iterator[tuple[str, str]]:
    if story.ended:
        yield "ended", instant(story.ended) + (f", {story.finish_reason}" if story.finish_reason else "")
    if story.server:
        yield "server", story.server
    for name, values in (("usage", story.usage), ("timings", story.timings)):
        if values:
            yield name, _pairs(msgspec.to_builtins(values))
    if story.letter:
        yield "buried", f"{story.buried} (dead letter {story.letter})"
    elif story.code:
        yield "message", f"worker follow {story.id} prints it: it may quote the request"
    kept = {"log": story.log_for, "tombstone": story.tombstone_for}
    if kept_for := [f"{name} for {duration(left)}" for name, left in kept.items() if left is not None]:
        yield "kept", ", ".join(kept_for)


def _attempt(attempt: "Attempt") -> str:
    parts = [instant(attempt.began)] if attempt.began else []
    parts.append(f"by {attempt.worker}" if attempt.worker else "by an unknown worker")
    if attempt.reason:
        parts.append(f"because of {attempt.reason}")
    if attempt.kept:
        parts.append(f"resumed after {attempt.kept}")
    if attempt.restarted:
        parts.append("restarted: the former text is void")
    if attempt.model:
        parts.append(f"model {attempt.model}")
    if attempt.began:
        parts.append(f"deltas: {attempt.deltas}")
    return ", ".join(parts)


def _pairs(values: Object) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if isinstance(value, int | float))
