"""The root command: its help lists commands in sections, and it maps every error to a message and an exit status."""

from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import click
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..client.errors import ClientError
from ..contract.entries import to_json
from ..contract.job import InvalidJob
from ..redisio.advice import advice_on, advice_on_no_answer
from ..redisio.errors import is_connection_refused, is_login_refused, redacted_message
from ..settings import ConfigError, variable


class UsageProblem(click.ClickException):
    """A setting, an option or a request is invalid. A retry does not help, so this has an exit status of its own."""

    exit_code = 2


class Interrupted(click.ClickException):
    """The user pressed Ctrl-C. The message has the commands for what to do next; the exit status is that of a shell."""

    exit_code = 130

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message as a note, since this is no error."""
        click.echo(f"· {self.message}", file=file, err=True)


class SectionedGroup(click.Group):
    """The root command. `sections` are the commands of each section of its help, by the section's title.

    Errors of every command are mapped here and nowhere else. With `--json`, the error is JSON too.
    """

    def __init__(self, *, sections: Mapping[str, Sequence[click.Command]], **attributes: Any) -> None:  # noqa: ANN401 - click's
        super().__init__(**attributes)
        self._sections = sections
        for commands in sections.values():
            for command in commands:
                self.add_command(command)

    def invoke(self, ctx: click.Context) -> object:
        """See `click.Group.invoke`."""
        as_json = "--json" in ctx.args
        try:
            return _map_errors(lambda: super(SectionedGroup, self).invoke(ctx))
        except click.ClickException as error:
            if as_json:
                raise _JsonError(error) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as click has it
        """Write the commands in their sections."""
        limit = formatter.width - 6 - max(map(len, self.commands))
        for title, commands in self._sections.items():
            with formatter.section(title):
                formatter.write_dl([(str(command.name), command.get_short_help_str(limit)) for command in commands])


class _JsonError(click.ClickException):
    def __init__(self, error: click.ClickException) -> None:
        super().__init__(error.format_message())
        self.exit_code = error.exit_code  # type: ignore[misc]  # click has it as one of the class

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(to_json({"error": self.message, "status": self.exit_code}), file=file, err=True)


def _map_errors(run: Callable[[], object]) -> object:
    try:
        return run()
    except KeyboardInterrupt:
        raise click.exceptions.Exit(Interrupted.exit_code) from None
    except BrokenPipeError:  # as in `worker follow … | head`; click ends the process quietly
        raise
    except (ConfigError, InvalidJob) as error:
        raise UsageProblem(str(error)) from None
    except (RedisConnectionError, RedisTimeoutError) as error:
        advice = advice_on(error) or advice_on_no_answer(error)
        problem = "refuses" if is_login_refused(error) or is_connection_refused(error) else "does not answer"
        if variable("redis_url") not in advice:
            advice = f"{advice} ({variable('redis_url')})"
        raise click.ClickException(f"Redis {problem}: {redacted_message(error).rstrip('.')}: {advice}") from None
    except RedisError as error:
        advice = advice_on(error) or f"see {variable('redis_url')}"
        raise click.ClickException(
            f"Redis returned an error: {redacted_message(error).rstrip('.')}: {advice}"
        ) from None
    except (ClientError, OSError) as error:
        raise click.ClickException(str(error) or type(error).__name__) from None
