"""The commands to try the project without vLLM or Redis: `worker demo`, `worker drill` and `worker simulate`."""

from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, NoReturn, TypeVar, get_args

import click
import msgspec

from ..contract.entries import Object, to_json
from .gateway import check_gateway_extra
from .group import Interrupted
from .options import exit_status, json_option, run_async, until_stopped

_T = TypeVar("_T")


@click.command(
    short_help="See it work. Needs neither vLLM nor Redis.",
    epilog="Example: worker demo --vllm-url http://127.0.0.1:8000",
)
@click.option("--redis-url", help="Use this Redis instead of an embedded one.")
@click.option("--vllm-url", help="Use this vLLM instead of a simulated one.")
@click.option("--web", is_flag=True, help="Show the answers on a web page too. The demo then serves it until Ctrl-C.")
@json_option
def demo(redis_url: str | None, vllm_url: str | None, web: bool, as_json: bool) -> None:
    """See it work: three answers are followed live, a worker is killed in the middle, and its answer continues."""
    if web:
        check_gateway_extra()
    try:
        from ..sandbox.demo import run_demo  # noqa: PLC0415 - of the extra `demo`
    except ModuleNotFoundError as error:
        _fail_without_extra(error)
    _play(lambda: run_demo(_print_as(as_json), redis_url, vllm_url, web=web))


@click.command(
    short_help="Break a sandbox in four ways, and see what readers and alerts notice.",
    epilog="Example: worker drill --json",
)
@json_option
def drill(as_json: bool) -> None:
    """Break a sandbox of its own in four ways under running streams, and show what readers saw and which alerts fired.

    A worker is killed, a vLLM freezes, Redis stalls, and Redis has no memory left, one after the other. It takes
    about 90 s. Alerts need the program `prometheus`. Exit status 1 if a reader got a wrong text or an error, or if a
    fault did not fire its alert.
    """
    try:
        from ..sandbox.drill import run_drill  # noqa: PLC0415
        from ..sandbox.simulator import server  # noqa: F401, PLC0415 - of the extra `demo`, for the drill's vLLM servers
    except ModuleNotFoundError as error:
        _fail_without_extra(error)
    exit_status(_play(lambda: run_drill(_print_as(as_json))))


@click.command(
    short_help="Serve a simulated vLLM, with a chosen speed and chosen faults.",
    epilog="Example: worker simulate --port 8000 --rate 50 --fault stall --after 20",
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--port", default=8000, type=click.IntRange(0, 65535), show_default=True, help="The port; 0 for a free one."
)
@click.option("--model", default="reciter", show_default=True, help="The name of the model.")
@click.option("--api-key", help="Require this bearer key.")
@click.option(
    "--rate",
    default=50.0,
    type=click.FloatRange(0),
    show_default=True,
    help="Tokens per second and stream; 0 for no pause.",
)
@click.option(
    "--first-token",
    default=0.0,
    type=click.FloatRange(0),
    metavar="SECONDS",
    show_default=True,
    help="Seconds before the first token.",
)
@click.option("--fault", help="The fault, such as cut, stall, freeze, reset, hang, 429, 503, error_under_200.")
@click.option("--after", default=0, type=click.IntRange(0), show_default=True, help="Delta chunks before the fault.")
@click.option("--times", type=click.IntRange(0), help="How many tries of a request fail. By default all.")
@click.option(
    "--retry-after",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Seconds, for the Retry-After header of 429 and 503.",
)
def simulate(host: str, port: int, model: str, api_key: str | None, **scenario: object) -> None:
    """Serve a simulated vLLM, which answers as a real one does, with the speed and the faults that you choose."""
    try:
        from ..sandbox.simulator.requests import Fault  # noqa: PLC0415 - of the extra `demo`
        from ..sandbox.simulator.server import Options, Scenario, serve_forever  # noqa: PLC0415 - of the extra `demo`
    except ModuleNotFoundError as error:
        _fail_without_extra(error)
    try:
        checked = msgspec.convert(scenario, Scenario)
    except msgspec.ValidationError:  # click has checked the other options
        raise click.UsageError(f"--fault must be one of {', '.join(get_args(Fault))}") from None
    options = Options(model=model, api_key=api_key, scenario=checked)

    def ready(url: str) -> None:
        click.echo(f"a simulated vLLM listens on {url}", err=True)

    with suppress(KeyboardInterrupt):  # users end this command with Ctrl-C
        run_async(lambda: until_stopped(serve_forever(options, host=host, port=port, ready=ready)))


def _print_as(as_json: bool) -> "Callable[[str | None, Object], None]":
    """A receiver of lines that prints each for a person, or as JSON."""

    def report(line: str | None, data: Object) -> None:
        if as_json or line is not None:
            click.echo(to_json(data) if as_json else line)

    return report


def _play(make: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run the demo or the drill until its end, Ctrl-C or SIGTERM. Raises ClickException when it fails."""
    from ..sandbox.embedded_redis import NoRedis  # noqa: PLC0415 - commands for production need not load it
    from ..sandbox.programs import SandboxFailed  # noqa: PLC0415

    name = click.get_current_context().info_name
    try:
        return run_async(lambda: until_stopped(make()))
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: every process that the {name} started has ended") from None
    except (SandboxFailed, NoRedis, TimeoutError, ExceptionGroup) as error:
        cause: Exception = error
        while isinstance(cause, ExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, BrokenPipeError):
            raise cause from None
        raise click.ClickException(str(cause) or f"the {name} took too long") from error


def _fail_without_extra(error: ModuleNotFoundError) -> NoReturn:
    install = "in a clone of vllm-relay: pip install '.[demo]'"
    raise click.ClickException(f"{error.name} is missing, of the extra `demo`: install it, {install}") from None
