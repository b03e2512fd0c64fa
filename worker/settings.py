"""The settings of the service, from options, the environment and a .env file, in this order.

A variable that is empty counts as not set.
"""

import os
import re
from collections.abc import Collection, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx
from dotenv import dotenv_values
from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .contract.job import MAX_REQUEST_BYTES
from .contract.keys import DEFAULT_QUEUE, is_queue_name
from .redisio.urls import parse_redis_url
from .vllm.http.credentials import ApiKeys, checked_key, keys_in
from .vllm.http.target import base_url

PREFIX = "WORKER_"
_OWN_NAMES = {
    name: name.upper() for name in ("redis_url", "vllm_urls", "vllm_api_key", "vllm_api_key_2", "vllm_api_key_file")
}
_SECRET = frozenset({"redis_url", "vllm_api_key", "vllm_api_key_2"})
_DAY = 24 * 3600
_LONG_NAME = 10
"""Letters, without the prefix."""

Seconds = Annotated[float, Field(gt=0, le=_DAY)]


class ConfigError(ValueError):
    """The configuration cannot be used; one sentence for each variable that is wrong."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class Settings(BaseSettings):
    """All settings of a worker. Durations are seconds and take fractions."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,  # compose sets what it has no value for: `WORKER_SLOTS: ${SLOTS:-}`
        extra="ignore",
        populate_by_name=True,
    )

    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        validation_alias="REDIS_URL",
        description=(
            "Redis, as redis://, rediss:// (TLS), unix://, redis+sentinel://host,host2/<master name> or "
            "redis+cluster://host,host2; a password in it is never shown"
        ),
    )
    vllm_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        ("http://127.0.0.1:8000",),
        validation_alias=AliasChoices("VLLM_URLS", "VLLM_URL"),
        description="Base URLs of vLLM servers, separated by commas, with or without /v1",
    )
    vllm_api_key: SecretStr = Field(
        SecretStr(""),
        validation_alias="VLLM_API_KEY",
        description="The bearer key that the vLLM servers ask for, if they do",
    )
    vllm_api_key_2: SecretStr = Field(
        SecretStr(""),
        validation_alias="VLLM_API_KEY_2",
        description="Another key, tried where the first is refused: servers may take the one or the other for a while",
    )
    vllm_api_key_file: str = Field(
        "",
        validation_alias="VLLM_API_KEY_FILE",
        description="A file with such keys, one a line, which go before the others; it is read again after a 401",
    )
    prefix: str = Field("chat", pattern=r"^[A-Za-z0-9_.:-]{1,64}$", description="What all keys in Redis begin with")
    queues: Annotated[tuple[str, ...], NoDecode] = Field(
        (DEFAULT_QUEUE,), description="The queues to serve, separated by commas, the most important first"
    )
    # A refusal is the choice of who enqueues: by default the queue is the buffer, however long it becomes.
    queue_limit: int = Field(
        0, ge=0, description="How many jobs may wait in a queue for worker enqueue to add one; 0 is any number"
    )
    slots: int = Field(256, ge=1, le=100_000, description="How many jobs run at once")
    lease: float = Field(
        15.0,
        ge=0.5,
        le=3600,
        description="Seconds after which a silent worker's jobs go to another; one for all workers",
    )
    drain_timeout: float = Field(
        25.0, ge=0, le=_DAY, description="Seconds that running jobs have to end after SIGTERM; the rest is handed over"
    )
    retention: int = Field(3600, ge=1, le=30 * _DAY, description="Seconds that a log is kept after its end")
    remember: int = Field(_DAY, ge=1, le=365 * _DAY, description="Seconds that the outcome is kept after the end")
    dead_retention: int = Field(7 * _DAY, ge=1, le=365 * _DAY, description="Seconds that dead letters are kept")
    lifecycle_length: int = Field(
        100_000, ge=1, le=1_000_000_000, description="How many lines the lifecycle stream keeps, two for each request"
    )
    wait_replicas: int = Field(
        0, ge=0, le=100, description="How many replicas of Redis must have the end of a log before its job is done"
    )
    connect_timeout: Seconds = Field(5.0, description="Seconds to connect to vLLM")
    first_token_timeout: Seconds = Field(120.0, description="Seconds from the request to vLLM's first token")
    gap_timeout: Seconds = Field(30.0, description="Seconds from one token of vLLM to the next")
    tries: int = Field(3, ge=1, le=100, description="How often a request is sent to vLLM before it fails")
    on_interrupt: Literal["resume", "restart", "fail"] = Field(
        "resume", description="What becomes of an answer that broke off, by a fault of vLLM or of a worker"
    )
    max_deliveries: int = Field(
        5, ge=1, le=1000, description="How often a job is delivered without progress before it is buried"
    )
    max_request_bytes: int = Field(
        MAX_REQUEST_BYTES, ge=1024, le=512 * 1024 * 1024, description="The size limit of a job's request"
    )
    max_choices: int = Field(16, ge=1, le=10_000, description="How many answers (n) a job may ask for")
    max_tokens: int = Field(
        0, ge=0, description="How long an answer may become, in tokens; also of jobs that do not say; 0 is any length"
    )
    metrics: str = Field("", description="Serve Prometheus metrics at this address, such as 127.0.0.1:9100")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="How logs are written; auto is readable on a terminal and JSON elsewhere"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least level that is logged"
    )

    _unknown: tuple[str, ...] = ()

    @property
    def unknown(self) -> tuple[str, ...]:
        """Variables that begin with WORKER_ and are no settings: another program's, or very much misspelt."""
        return self._unknown

    @field_validator("vllm_urls", "queues", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: SecretStr) -> SecretStr:
        parse_redis_url(value.get_secret_value())
        return value

    @field_validator("vllm_api_key", "vllm_api_key_2")
    @classmethod
    def _header_value(cls, value: SecretStr) -> SecretStr:
        return SecretStr(checked_key(value.get_secret_value()))

    @field_validator("vllm_api_key_file")
    @classmethod
    def _key_file(cls, value: str) -> str:
        try:
            if value:
                keys_in(Path(value))
        except OSError as error:
            raise ValueError(f"is {value[:80]!r}, which cannot be read: {error.strerror or error}") from None
        return value

    @field_validator("metrics")
    @classmethod
    def _address(cls, value: str) -> str:
        if value:
            address_of(value)
        return value

    @field_validator("vllm_urls")
    @classmethod
    def _http_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("is empty: set it to the base URL of a vLLM server, such as http://127.0.0.1:8000")
        for url in value:
            if not _is_http(url):
                raise ValueError(f"holds {shown_url(url)!r}, which is no URL such as http://127.0.0.1:8000")
            parts = urlsplit(base_url(url))
            if parts.query or parts.fragment or parts.path.endswith("/completions"):
                raise ValueError(
                    f"holds {shown_url(url)!r}: give the base of the server, such as http://127.0.0.1:8000"
                )
        return value

    @field_validator("queues")
    @classmethod
    def _queue_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(map(is_queue_name, value)):
            raise ValueError("must be names of 1 to 64 characters of A-Za-z0-9_-, separated by commas")
        if len(set(value)) != len(value):
            raise ValueError("names a queue twice")
        return value

    def api_keys(self) -> ApiKeys:
        """All keys that the vLLM servers may take."""
        given = (self.vllm_api_key, self.vllm_api_key_2)
        file = Path(self.vllm_api_key_file) if self.vllm_api_key_file else None
        return ApiKeys(*(key.get_secret_value() for key in given), file=file)


def load_settings(only: Collection[str] = (), /, **options: object) -> Settings:
    """Read the settings; options that are None are left to the environment.

    With `only` it reads no more than these settings, as a command does that needs few of them: the others keep their
    defaults, whatever the environment says.

    Raises:
        ConfigError: naming every variable that has a bad value, or a name that is nearly one of ours.
    """
    used = [name for name in Settings.model_fields if name in only or not only]
    given = {
        _OWN_NAMES.get(name, name): field.get_default() for name, field in Settings.model_fields.items()
        if name not in used
    }  # fmt: skip
    given |= {_OWN_NAMES.get(name, name): value for name, value in options.items() if value is not None}
    env_file = Path(".env")
    try:
        in_file = dotenv_values(env_file) if env_file.is_file() else {}
    except UnicodeDecodeError:
        raise ConfigError([f"{env_file} is not UTF-8: save it as UTF-8"]) from None
    problems, strange = [], []
    for names, where in ((in_file, f" (in {env_file})"), (os.environ, "")):
        for name in sorted(filter(_is_strange, names)):
            near = next((own for own in map(variable, used) if _is_misspelt(name.upper(), own)), "")
            if near:
                problems.append(f"{name}{where} is no setting: did you mean {near}?")
            else:
                strange.append(f"{name}{where}")
    try:
        settings = Settings(_env_file=env_file, **given)  # type: ignore[call-arg]  # pydantic checks them
    except ValidationError as error:
        raise ConfigError([*problems, *map(_told, error.errors())]) from None
    if problems:
        raise ConfigError(problems)
    settings._unknown = tuple(strange)  # noqa: SLF001 - pydantic has no other way to keep what is no setting
    return settings


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return _OWN_NAMES.get(name, PREFIX + name.upper())


def shown_url(url: str) -> str:
    """A URL without the user's name and password, nor its query: fit for logs.

    It is not taken apart as a URL, for what is shown as wrong may be none, and holds the password all the same.
    """
    scheme = re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]*://)?", url)
    start = scheme.group() if scheme else ""
    _, user, place = url.removeprefix(start).rpartition("@")
    return f"{start}{user and '***@'}{re.split('[?#]', place)[0]}"


def address_of(text: str) -> tuple[str, int]:
    """Host and port of an address such as `127.0.0.1:9100` or `[::1]:9100`.

    Raises:
        ValueError: when it is none.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"is {text[:80]!r}: it must be a host and a port, such as 127.0.0.1:9100")
    return host.strip("[]"), int(port)


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        httpx.URL(url).host.encode("idna")  # as httpx and the resolver do, each time
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except (ValueError, httpx.InvalidURL):  # a port that is none, or a name that no host can have
        return False


def _is_strange(name: str) -> bool:
    """Whether a variable begins as ours do and is none, and is not of Kubernetes for a service named `worker`."""
    name = name.upper()
    own = {variable(field) for field in Settings.model_fields}
    return name.startswith(PREFIX) and name not in own and not re.search(r"_SERVICE_|_PORT(_|$)", name)


def _is_misspelt(name: str, own: str) -> bool:
    """Whether one letter is missing, too many, another or swapped, or two where the name is long; or the prefix is
    where ours has none. Whatever is further off may be another program's.
    """
    said, meant = name.removeprefix(PREFIX), own.removeprefix(PREFIX)
    if said == meant:
        return True
    begin = _same(said, meant)
    end = _same(said[begin:][::-1], meant[begin:][::-1])
    rest = [text[begin : len(text) - end] for text in (said, meant)]
    most = 1 if len(meant) < _LONG_NAME else 2
    return max(map(len, rest)) <= most or (len(rest[0]) == len(rest[1]) == 2 and rest[0] == rest[1][::-1])


def _same(one: str, other: str) -> int:
    """With how many letters both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _told(error: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails is private
    name = _field_of(str(error["loc"][0]))
    value = "" if name in _SECRET else f" is {str(error['input'])[:80]!r}:"
    message = str(error["msg"]).removeprefix("Value error, ")
    text = f"{variable(name)} {message}" if error["type"] == "value_error" else f"{variable(name)}{value} {message}"
    return text[:1] + text[1:].replace("Input should", "it should")


def _field_of(location: str) -> str:
    """The field that pydantic means: it names the alias where there is one."""
    by_variable = {variable(name): name for name in Settings.model_fields} | {"VLLM_URL": "vllm_urls"}
    return by_variable.get(location.upper(), location)
