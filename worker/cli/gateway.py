"""The commands `worker gateway` and `worker key`: the HTTP server before the queue, and the API keys for it."""

import click

from ..contract.entries import to_json
from ..gateway.settings import GATEWAY_SOURCE, load_gateway_settings
from ..telemetry.events import UnknownSettings
from ..telemetry.logging import LogReceiver, configure_logging
from .options import exit_status, run_async, settings_options
from .run import relax_garbage_collection


@click.command(epilog="Example: worker gateway --no-auth --listen 127.0.0.1:8080")
@settings_options(source=GATEWAY_SOURCE)
def gateway(**options: object) -> None:
    """Run a gateway: chat completions and streams over HTTP.

    It serves OpenAI clients, server-sent events and WebSockets until SIGTERM, and keeps no state.
    """
    settings = load_gateway_settings(**options)
    check_gateway_extra()
    from ..gateway.serving import serve  # noqa: PLC0415 - only with the extra `gateway`

    configure_logging(settings.log_format, settings.log_level)
    if settings.unknown:
        LogReceiver().emit(UnknownSettings(settings.unknown))
    relax_garbage_collection()
    exit_status(serve(settings, run_async) == 0)


def check_gateway_extra() -> None:
    """Check that the libraries of the gateway are installed.

    Raises:
        ClickException: when they are not.
    """
    try:
        from ..gateway.process import Gateway  # noqa: F401, PLC0415 - only with the extra `gateway`
    except ImportError as error:
        raise click.ClickException(
            f"{error.name} is missing: install the extra `gateway`, with pip install '.[gateway]'"
        ) from None


@click.command(epilog="Example: worker key chat-app --tenant acme >> keys.toml")
@click.argument("name")
@click.option("--tenant", metavar="NAME", help="Keys with the same tenant see each other's requests.")
@click.option("--queues", metavar="NAMES", help="Queues that the key may use, separated by commas.  [default: all]")
@click.option("--all", "sees_all", is_flag=True, help="The key sees the requests of all, for operators.")
@click.option("--in-flight", type=click.IntRange(1), help="Requests that may wait or run at once.")
@click.option("--queued", type=click.IntRange(1), help="Requests that may wait at once.")
@click.option("--requests-per-minute", type=click.IntRange(1), help="Requests in a minute.")
@click.option("--max-body-bytes", type=click.IntRange(1), help="Largest body of a request.")
def key(
    name: str,
    tenant: str | None,
    queues: str | None,
    sees_all: bool,
    in_flight: int | None,
    queued: int | None,
    requests_per_minute: int | None,
    max_body_bytes: int | None,
) -> None:
    """Make an API key for the gateway.

    Its lines for the file of keys go to standard output, and the key itself to standard error. Only the hash is in the
    file, so the key cannot be shown again.
    """
    from ..gateway.keys import hash_of, new_key, parse_keys  # noqa: PLC0415 - the other commands need no keys

    secret = new_key()
    fields = {
        "name": name,
        "hash": f"sha256:{hash_of(secret)}",
        "tenant": tenant,
        "queues": [queue.strip() for queue in queues.split(",") if queue.strip()] if queues else None,
        "all": sees_all or None,
        "in_flight": in_flight,
        "queued": queued,
        "requests_per_minute": requests_per_minute,
        "max_body_bytes": max_body_bytes,
    }
    # What JSON writes for text, numbers, true and lists of text is TOML as well.
    lines = [f"{field} = {to_json(value)}" for field, value in fields.items() if value is not None]
    text = "\n".join(["", "[[keys]]", *lines])
    parse_keys(text, "the new key")
    click.echo(text)
    click.echo(f"The key is {secret}", err=True)
