"""Where settings come from: options, the environment and a .env file, in this order, and how errors name them.

The worker and the gateway each have a class of settings and a `SettingsSource` for it.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, Generic, TypeVar

from dotenv import dotenv_values
from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from .redisio.environment import both_set, read_secret

_LONG_NAME = 10
"""Letters, without the prefix."""


class ConfigError(ValueError):
    """The settings cannot be used. `problems` has one sentence for each variable that is wrong."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class CheckedSettings(BaseSettings):
    """What all classes of settings share."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True,  # Docker Compose sets a variable without a value to "": `WORKER_SLOTS: ${SLOTS:-}`
        extra="ignore",
        populate_by_name=True,
    )

    _unknown: tuple[str, ...] = ()

    @property
    def unknown(self) -> tuple[str, ...]:
        """Variables with the prefix that are not settings: another program uses them, or they are misspelt."""
        return self._unknown


_S = TypeVar("_S", bound=CheckedSettings)


class SettingsSource(Generic[_S]):
    """Reads the settings of one class.

    Args:
        kind: the class.
        prefix: of the variables.
        own_names: the variables of settings that have no prefix.
        secret: settings whose value no error shows.
        aliases: further variables, and the settings that they mean.
        files: secret settings that may be in a file, whose path is the setting of the same name with `_file`.
    """

    def __init__(
        self,
        kind: type[_S],
        prefix: str,
        own_names: Mapping[str, str],
        secret: Collection[str],
        aliases: Mapping[str, str] | None = None,
        files: Collection[str] = (),
    ) -> None:
        self.kind = kind
        self.prefix = prefix
        self._own_names = own_names
        self._secret = secret
        self._aliases = aliases or {}
        self._files = files

    def load(self, only: Collection[str] = (), /, **options: object) -> _S:
        """Read the settings. An option that is None counts as not set, so the environment decides.

        `only` limits the settings that are read, for a command that needs few of them. The others keep their defaults,
        even if the environment has bad values for them.

        Raises:
            ConfigError: when a variable has a bad value or a name that is nearly a setting's. The error lists them all.
        """
        fields = self.kind.model_fields
        used = [name for name in fields if name in only or name.removesuffix("_file") in only or not only]
        given = {
            self._own_names.get(name, name): field.get_default() for name, field in fields.items() if name not in used
        }
        given |= {self._own_names.get(name, name): value for name, value in options.items() if value is not None}
        env_file = Path(".env")
        try:
            in_file = dotenv_values(env_file) if env_file.is_file() else {}
        except UnicodeDecodeError:
            raise ConfigError([f"{env_file} is not UTF-8: save it as UTF-8"]) from None
        from_files, problems = self._read_files(used, options, {**in_file, **os.environ})
        given |= {self._own_names.get(name, name): secret for name, secret in from_files.items()}
        unknown = []
        for names, where in ((in_file, f" (in {env_file})"), (os.environ, "")):
            for name in sorted(filter(self._is_unknown, names)):
                near = next((own for own in map(self.variable, used) if self._is_misspelt(name.upper(), own)), "")
                if near:
                    problems.append(f"{name}{where} is not a setting: did you mean {near}?")
                else:
                    unknown.append(f"{name}{where}")
        try:
            settings = self.kind(_env_file=env_file, **given)  # type: ignore[call-arg]  # pydantic checks them
        except ValidationError as error:
            # An error without a location is about several settings. It may follow from a problem that is listed.
            errors = [each for each in error.errors() if each["loc"] or not problems]
            raise ConfigError([*problems, *(self._sentence(each, from_files) for each in errors)]) from None
        if problems:
            raise ConfigError(problems)
        settings._unknown = tuple(unknown)  # noqa: SLF001 - pydantic has no other way to keep what is not a setting
        return settings

    def variable(self, name: str) -> str:
        """The environment variable of a setting."""
        return self._own_names.get(name, self.prefix + name.upper())

    def _read_files(
        self, used: Collection[str], options: Mapping[str, object], variables: Mapping[str, str | None]
    ) -> tuple[dict[str, str], list[str]]:
        """The secrets in files, and the problems with these. An option for a secret takes the place of its file."""
        variables = {name.upper(): value for name, value in variables.items() if value}
        secrets, problems = {}, []
        for name in self._files:
            own, own_file = self.variable(name), self.variable(f"{name}_file")
            path = options.get(f"{name}_file") or variables.get(own_file)
            if name not in used or not path or options.get(name) is not None:
                continue
            if own in variables:
                problems.append(both_set(own, own_file))
                continue
            try:
                secrets[name] = read_secret(str(path))
            except ValueError as error:
                problems.append(f"{own_file} {error}")
        return secrets, problems

    def _is_unknown(self, name: str) -> bool:
        """Whether a variable has the prefix, and is neither a setting nor from Kubernetes (a service of that name)."""
        name = name.upper()
        if not name.startswith(self.prefix) or re.search(r"_SERVICE_|_PORT(_|$)", name):
            return False
        return name not in map(self.variable, self.kind.model_fields)

    def _is_misspelt(self, name: str, own: str) -> bool:
        """Whether a variable's name is nearly that of a setting's. A less similar one may be another program's.

        Nearly means one of these: one letter is missing, added or replaced (two in a long name); two letters are
        swapped; the name has the prefix and the setting's variable does not.
        """
        found, meant = name.removeprefix(self.prefix), own.removeprefix(self.prefix)
        if found == meant:
            return True
        start = _common_length(found, meant)
        end = _common_length(found[start:][::-1], meant[start:][::-1])
        rest = [text[start : len(text) - end] for text in (found, meant)]
        limit = 1 if len(meant) < _LONG_NAME else 2
        return max(map(len, rest)) <= limit or (len(rest[0]) == len(rest[1]) == 2 and rest[0] == rest[1][::-1])

    def _sentence(self, error: Any, from_files: Collection[str]) -> str:  # noqa: ANN401 - pydantic's ErrorDetails is private
        # pydantic names the alias where there is one.
        fields = {self.variable(name): name for name in self.kind.model_fields} | dict(self._aliases)
        message = str(error["msg"]).removeprefix("Value error, ")
        if not error["loc"]:  # of several settings together, which the message names
            return message
        location = str(error["loc"][0])
        name = fields.get(location.upper(), location)
        value = "" if name in self._secret else f" is {str(error['input'])[:80]!r}:"
        own = self.variable(f"{name}_file" if name in from_files else name)
        text = f"{own} {message}" if error["type"] == "value_error" else f"{own}{value} {message}"
        return text[:1] + text[1:].replace("Input should", "it should")


def _common_length(one: str, other: str) -> int:
    """The number of letters with which both texts begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
