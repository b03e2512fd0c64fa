"""The command `worker` as a whole: its help, and what becomes of a user's mistake or of Ctrl-C."""

from collections.abc import Callable
from typing import IO, Any

import click
from redis.exceptions import RedisError

from ..client.errors import ClientError
from ..contract.entries import to_json
from ..contract.job import InvalidJob
from ..redisio.advice import advice_on
from ..redisio.errors import redacted_message
from ..settings import ConfigError, variable

_SECTIONS = {
    "To ask": ("enqueue", "follow", "cancel"),
    "To run workers": ("run", "check", "dead"),
    "To try it": ("demo", "simulate"),
}


class UsageProblem(click.ClickException):
    """A setting, an option or a request that cannot be: trying again does not help, hence a status of its own."""

    exit_code = 2


class Interrupted(click.ClickException):
    """Ctrl-C, with what to do now. The status is that of a shell."""

    exit_code = 130

    def show(self, file: IO[Any] | None = None) -> None:
        """Say it, and not as an error."""
        click.echo(f"· {self.message}", file=file, err=True)


class Commands(click.Group):
    """Turns a user's mistake into a sentence and an exit status, in one place. With `--json` the sentence is JSON."""

    def invoke(self, ctx: click.Context) -> object:
        """See `click.Group.invoke`."""
        as_json = "--json" in ctx.args
        try:
            return _mapped(lambda: super(Commands, self).invoke(ctx))
        except click.ClickException as error:
            if as_json:
                raise _AsJson(error) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as click has it
        """Write the commands in groups, by what they are for."""
        limit = formatter.width - 6 - max(map(len, self.commands))
        for title, names in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit)) for name in names])


class _AsJson(click.ClickException):
    def __init__(self, error: click.ClickException) -> None:
        super().__init__(error.format_message())
        self.exit_code = error.exit_code  # type: ignore[misc]  # click has it as one of the class

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(to_json({"error": self.message, "status": self.exit_code}), file=file, err=True)


def _mapped(run: Callable[[], object]) -> object:
    try:
        return run()
    except KeyboardInterrupt:
        raise click.exceptions.Exit(Interrupted.exit_code) from None
    except BrokenPipeError:  # as in `worker follow … | head`; click ends the process quietly
        raise
    except (ConfigError, InvalidJob) as error:
        raise UsageProblem(str(error)) from None
    except RedisError as error:
        advice = advice_on(error) or f"see {variable('redis_url')}"
        raise click.ClickException(f"Redis says: {redacted_message(error)}: {advice}") from None
    except (ClientError, OSError) as error:
        raise click.ClickException(str(error) or type(error).__name__) from None
