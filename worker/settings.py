"""The settings of a worker: read from options, the environment and a .env file, in this order, and checked.

A variable that is empty counts as not set. The descriptions are the text of `worker run --help` and of the table in
deploy/settings.md.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from .contract.job import MAX_REQUEST_BYTES
from .contract.keys import DEFAULT_QUEUE, is_queue_name
from .redisio.urls import parse_redis_url
from .settings_source import CheckedSettings, ConfigError, SettingsSource
from .vllm.http.credentials import ApiKeys, read_keys, validated_key
from .vllm.http.target import base_url

PREFIX = "WORKER_"
_OWN_NAMES = {
    name: name.upper()
    for name in ("redis_url", "redis_url_file", "vllm_urls", "vllm_api_key", "vllm_api_key_2", "vllm_api_key_file")
}
_SECRET = frozenset({"redis_url", "vllm_api_key", "vllm_api_key_2"})
_DAY = 24 * 3600

__all__ = [
    "PREFIX", "WORKER_SOURCE", "ConfigError", "Settings", "load_settings", "parse_address", "redacted_url", "variable",
]  # fmt: skip

Seconds = Annotated[float, Field(gt=0, le=_DAY)]


class Settings(CheckedSettings):
    """All settings of a worker. Durations are seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX)

    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        validation_alias="REDIS_URL",
        description=(
            "URL of Redis: redis://, rediss:// (TLS), unix://, redis+sentinel://host,host2/<master name> or "
            "redis+cluster://host,host2. Logs and errors never show its password"
        ),
    )
    redis_url_file: str = Field(
        "",
        validation_alias="REDIS_URL_FILE",
        description="File that contains the URL of Redis, in place of REDIS_URL. It is read at the start",
    )
    vllm_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        ("http://127.0.0.1:8000",),
        validation_alias=AliasChoices("VLLM_URLS", "VLLM_URL"),
        description="Base URLs of the vLLM servers, separated by commas, with or without /v1",
    )
    vllm_api_key: SecretStr = Field(
        SecretStr(""),
        validation_alias="VLLM_API_KEY",
        description="Bearer key for the vLLM servers, if they require one",
    )
    vllm_api_key_2: SecretStr = Field(
        SecretStr(""),
        validation_alias="VLLM_API_KEY_2",
        description="Second bearer key, tried at a server that refuses the first: for the rotation of keys",
    )
    vllm_api_key_file: str = Field(
        "",
        validation_alias="VLLM_API_KEY_FILE",
        description="File with bearer keys, one a line. They are tried first, and the file is read again after a 401",
    )
    prefix: str = Field(
        "chat", pattern=r"^[A-Za-z0-9_.:-]{1,64}$", description="Prefix of all keys and channels in Redis"
    )
    queues: Annotated[tuple[str, ...], NoDecode] = Field(
        (DEFAULT_QUEUE,), description="Queues that this worker serves, separated by commas, the most important first"
    )
    # The queue is the buffer, so its length has no limit by default. A service that enqueues may set one.
    queue_limit: int = Field(
        0, ge=0, description="Number of waiting jobs from which `worker enqueue` refuses to add one; 0 is no limit"
    )
    slots: int = Field(256, ge=1, le=100_000, description="Number of jobs that this worker runs at once")
    lease: float = Field(
        15.0,
        ge=0.5,
        le=3600,
        description="Seconds of silence after which a worker's jobs go to another. It must be the same for all workers",
    )
    drain_timeout: float = Field(
        25.0,
        ge=0,
        le=_DAY,
        description="Seconds that running jobs have to end after SIGTERM. Then the worker hands them over to others",
    )
    retention: int = Field(3600, ge=1, le=30 * _DAY, description="Seconds that a log is kept after its request ended")
    remember: int = Field(
        _DAY, ge=1, le=365 * _DAY, description="Seconds that the outcome of a request is kept after it ended"
    )
    dead_retention: int = Field(
        7 * _DAY, ge=1, le=365 * _DAY, description="Seconds that dead letters, which hold prompts, are kept"
    )
    lifecycle_length: int = Field(
        100_000,
        ge=1,
        le=1_000_000_000,
        description="Number of lifecycle entries that are kept, two for each request. Consumer groups keep more",
    )
    lifecycle_max_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1024 * 1024,
        description="Redis memory of the lifecycle beyond which the oldest entries are lost to groups that are behind",
    )
    wait_replicas: int = Field(
        0, ge=0, le=100, description="Number of Redis replicas that must have the end of a log before its job is done"
    )
    connect_timeout: Seconds = Field(5.0, description="Seconds within which a connection to vLLM must be made")
    first_token_timeout: Seconds = Field(120.0, description="Seconds within which vLLM must send the first token")
    gap_timeout: Seconds = Field(30.0, description="Seconds within which vLLM must send each further token")
    tries: int = Field(3, ge=1, le=100, description="Number of times that a request is sent to vLLM before it fails")
    on_interrupt: Literal["resume", "restart", "fail"] = Field(
        "resume", description="What happens to an answer that broke off, by a fault of vLLM or of a worker"
    )
    max_deliveries: int = Field(
        5, ge=1, le=1000, description="Number of deliveries without progress after which a job becomes a dead letter"
    )
    max_request_bytes: int = Field(
        MAX_REQUEST_BYTES, ge=1024, le=512 * 1024 * 1024, description="Largest size of a job's request, in bytes"
    )
    max_choices: int = Field(16, ge=1, le=10_000, description="Largest number of answers (n) that a job may request")
    max_tokens: int = Field(
        0,
        ge=0,
        description="Longest answer in tokens. It also holds for a job that names no length; 0 is no limit",
    )
    metrics: str = Field("", description="Address at which Prometheus metrics are served, such as 127.0.0.1:9100")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="Format of the logs. auto is readable text on a terminal and JSON elsewhere"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged")

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
        return SecretStr(validated_key(value.get_secret_value()))

    @field_validator("vllm_api_key_file")
    @classmethod
    def _key_file(cls, value: str) -> str:
        try:
            if value:
                read_keys(Path(value))
        except OSError as error:
            raise ValueError(f"is {value[:80]!r}, which cannot be read: {error.strerror or error}") from None
        return value

    @field_validator("metrics")
    @classmethod
    def _address(cls, value: str) -> str:
        if value:
            parse_address(value)
        return value

    @field_validator("vllm_urls")
    @classmethod
    def _http_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("is empty: set it to the base URL of a vLLM server, such as http://127.0.0.1:8000")
        for url in value:
            if not _is_http(url):
                raise ValueError(f"holds {redacted_url(url)!r}, which is not a URL such as http://127.0.0.1:8000")
            parts = urlsplit(base_url(url))
            if parts.query or parts.fragment or parts.path.endswith("/completions"):
                raise ValueError(
                    f"holds {redacted_url(url)!r}: give the base of the server, such as http://127.0.0.1:8000"
                )
        return value

    @field_validator("queues")
    @classmethod
    def _queue_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(map(is_queue_name, value)):
            raise ValueError("must be names of 1 to 64 characters of A-Za-z0-9_-, separated by commas")
        if len(set(value)) != len(value):
            raise ValueError("contains a queue twice")
        return value

    def api_keys(self) -> ApiKeys:
        """The bearer keys for the vLLM servers."""
        given = (self.vllm_api_key, self.vllm_api_key_2)
        file = Path(self.vllm_api_key_file) if self.vllm_api_key_file else None
        return ApiKeys(*(key.get_secret_value() for key in given), file=file)


WORKER_SOURCE = SettingsSource(Settings, PREFIX, _OWN_NAMES, _SECRET, {"VLLM_URL": "vllm_urls"}, ("redis_url",))


def load_settings(only: Collection[str] = (), /, **options: object) -> Settings:
    """Read the settings. See `SettingsSource.load`.

    Raises:
        ConfigError: when a variable has a bad value or a name that is nearly a setting's. The error lists them all.
    """
    return WORKER_SOURCE.load(only, **options)


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return WORKER_SOURCE.variable(name)


def redacted_url(url: str) -> str:
    """A URL without the user's name, the password and the query, for logs and errors.

    The text is not parsed as a URL, because an invalid URL may contain a password too.
    """
    scheme = re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]*://)?", url)
    start = scheme.group() if scheme else ""
    _, user, place = url.removeprefix(start).rpartition("@")
    return f"{start}{user and '***@'}{re.split('[?#]', place)[0]}"


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of an address such as `127.0.0.1:9100` or `[::1]:9100`.

    Raises:
        ValueError: when the text is not such an address.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"is {text[:80]!r}: it must be a host and a port, such as 127.0.0.1:9100")
    return host.strip("[]"), int(port)


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        httpx.URL(url).host.encode("idna")  # httpx and the resolver do this with each request
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except (ValueError, httpx.InvalidURL):  # a bad port, or a name that no host can have
        return False
