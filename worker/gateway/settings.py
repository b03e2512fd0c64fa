"""The settings of a gateway: read from options, the environment and a .env file, in this order, and checked.

The descriptions are the text of `worker gateway --help` and of the table in deploy/settings.md.
"""

import ipaddress
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from ..contract.job import MAX_REQUEST_BYTES
from ..contract.keys import DEFAULT_QUEUE, is_queue_name
from ..redisio.urls import parse_redis_url
from ..settings import parse_address
from ..settings_source import CheckedSettings, ConfigError, SettingsSource

PREFIX = "GATEWAY_"
_OWN_NAMES = {"redis_url": "REDIS_URL", "redis_url_file": "REDIS_URL_FILE", "prefix": "WORKER_PREFIX"}
_SECRET = frozenset({"redis_url", "keys", "token_secret", "token_secret_2"})
_DAY = 24 * 3600
_SHORTEST_SECRET = 32

_Seconds = Annotated[float, Field(gt=0, le=_DAY)]


class GatewaySettings(CheckedSettings):
    """All settings of a gateway. Durations are seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX)

    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        validation_alias="REDIS_URL",
        description="URL of the workers' Redis, in the forms that `worker run` takes",
    )
    redis_url_file: str = Field(
        "",
        validation_alias="REDIS_URL_FILE",
        description="File that contains the URL of Redis, in place of REDIS_URL. It is read at the start",
    )
    prefix: str = Field(
        "chat",
        validation_alias="WORKER_PREFIX",
        pattern=r"^[A-Za-z0-9_.:-]{1,64}$",
        description="Prefix of all keys and channels in Redis, the same as the workers'",
    )
    listen: str = Field("127.0.0.1:8080", description="Address at which the gateway serves HTTP")
    workers: int = Field(1, ge=1, le=256, description="Number of processes that share the address")
    keys_file: str = Field(
        "",
        description="TOML file with the API keys. `worker key` prints its lines. A change takes effect within a second",
    )
    keys: SecretStr = Field(SecretStr(""), description="API keys in the form of the file, in place of one")
    token_secret: SecretStr = Field(
        SecretStr(""), description="Secret that signs the read tokens of requests, at least 32 characters"
    )
    token_secret_file: str = Field(
        "", description="File that contains this secret, in place of GATEWAY_TOKEN_SECRET. It is read at the start"
    )
    token_secret_2: SecretStr = Field(
        SecretStr(""), description="Second secret, whose read tokens are valid too: for the rotation of secrets"
    )
    token_secret_2_file: str = Field(
        "", description="File that contains the second secret, in place of GATEWAY_TOKEN_SECRET_2"
    )
    token_lifetime: int = Field(3600, ge=1, le=30 * _DAY, description="Seconds for which a read token is valid")
    no_auth: bool = Field(
        default=False, description="Serve everybody who can connect. Only with a loopback address such as 127.0.0.1"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description=(
            "Origins of web pages that may use the gateway, separated by commas, such as https://app.example.com; "
            "* is every origin"
        ),
    )
    queue: str = Field(DEFAULT_QUEUE, description="Queue of requests that name none")
    queue_limit: int = Field(
        0, ge=0, description="Number of waiting jobs of a queue from which requests get status 429; 0 is no limit"
    )
    patience: _Seconds = Field(5.0, description="Seconds without an answer of Redis until a request gets status 503")
    grace: float = Field(
        1.0,
        ge=0,
        le=30,
        description="Seconds for which a chat completion waits for its first entry, so that an error can be a status",
    )
    leave_after: float = Field(
        10.0,
        ge=0,
        le=_DAY,
        description="Seconds after which a chat completion is cancelled whose client has left and that nobody follows",
    )
    heartbeat: float = Field(
        12.0, gt=0, le=60, description="Seconds of silence after which a stream gets a comment, for proxies on the way"
    )
    max_body_bytes: int = Field(
        MAX_REQUEST_BYTES + 64 * 1024, ge=1024, le=512 * 1024 * 1024, description="Largest body of a request, in bytes"
    )
    max_connections: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="Number of connections of a process from which further ones get status 503",
    )
    header_timeout: _Seconds = Field(10.0, description="Seconds within which the head of a request must arrive")
    body_timeout: _Seconds = Field(60.0, description="Seconds within which the body of a request must arrive")
    keep_alive_timeout: _Seconds = Field(
        75.0,
        description="Seconds for which an idle connection is kept: longer than the idle limit of a proxy before it",
    )
    write_timeout: _Seconds = Field(
        30.0, description="Seconds after which a client that takes nothing loses its connection"
    )
    drain_delay: float = Field(
        5.0,
        ge=0,
        le=_DAY,
        description="Seconds after SIGTERM for which `/readyz` is false and new connections are still served",
    )
    drain_timeout: float = Field(
        25.0, ge=0, le=_DAY, description="Seconds that open responses then have to end, before they are ended"
    )
    metrics: str = Field(
        "",
        description=(
            "Address at which Prometheus metrics are served, such as 127.0.0.1:9101. "
            "Of several processes, each has the port after that of the one before"
        ),
    )
    access_log: bool = Field(default=True, description="Log a line for each request, without its query string")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="Format of the logs. auto is readable text on a terminal and JSON elsewhere"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged")

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip().rstrip("/") for part in value.split(",") if part.strip())
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.scheme or not parts.netloc or parts.path or parts.query):
                raise ValueError(f"holds {origin[:80]!r}, which is not an origin such as https://app.example.com")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: SecretStr) -> SecretStr:
        parse_redis_url(value.get_secret_value())
        return value

    @field_validator("listen", "metrics")
    @classmethod
    def _address(cls, value: str) -> str:
        if value:
            parse_address(value)
        return value

    @field_validator("queue")
    @classmethod
    def _queue_name(cls, value: str) -> str:
        if not is_queue_name(value):
            raise ValueError("must be a name of 1 to 64 characters of A-Za-z0-9_-")
        return value

    @field_validator("keys_file")
    @classmethod
    def _readable(cls, value: str) -> str:
        try:
            if value:
                Path(value).read_bytes()
        except OSError as error:
            raise ValueError(f"is {value[:80]!r}, which cannot be read: {error.strerror or error}") from None
        return value

    @field_validator("token_secret", "token_secret_2")
    @classmethod
    def _long_enough(cls, value: SecretStr) -> SecretStr:
        if 0 < len(value.get_secret_value()) < _SHORTEST_SECRET:
            raise ValueError(f"is too short: set it to {_SHORTEST_SECRET} random characters, as `openssl rand -hex 32`")
        return value

    @model_validator(mode="after")
    def _somebody_may(self) -> Self:
        """Refuse a gateway that nobody could use, that everybody could use, or that cannot sign its tokens."""
        if self.no_auth and not is_loopback(self.listen):
            raise ValueError(
                f"GATEWAY_NO_AUTH serves everybody who can connect, so it needs a loopback address: set GATEWAY_LISTEN "
                f"to 127.0.0.1:{parse_address(self.listen)[1]}, or set GATEWAY_KEYS_FILE in place of GATEWAY_NO_AUTH"
            )
        has_keys = bool(self.keys_file or self.keys.get_secret_value())
        if self.keys_file and self.keys.get_secret_value():
            raise ValueError("GATEWAY_KEYS and GATEWAY_KEYS_FILE are both set: remove one of them")
        if self.no_auth and has_keys:
            raise ValueError("GATEWAY_NO_AUTH and API keys exclude each other: remove one of them")
        if not self.no_auth and not has_keys:
            raise ValueError(
                "GATEWAY_KEYS_FILE is empty, so nobody could use the gateway: make a key with "
                "`worker key NAME >> keys.toml`, or try it on this machine with --no-auth"
            )
        if has_keys and not self.token_secret.get_secret_value():
            raise ValueError(
                "GATEWAY_TOKEN_SECRET is empty, and read tokens need it: set it, or the content of the file that "
                "GATEWAY_TOKEN_SECRET_FILE names, to the output of `openssl rand -hex 32`, the same for all replicas"
            )
        return self


def is_loopback(address: str) -> bool:
    """Whether only this machine can connect to an address such as `127.0.0.1:8080`."""
    host = parse_address(address)[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


GATEWAY_SOURCE = SettingsSource(
    GatewaySettings, PREFIX, _OWN_NAMES, _SECRET, files=("redis_url", "token_secret", "token_secret_2")
)


def load_gateway_settings(only: Collection[str] = (), /, **options: object) -> GatewaySettings:
    """Read the settings of a gateway. See `SettingsSource.load`.

    Raises:
        ConfigError: when a variable has a bad value or a name that is nearly a setting's. The error lists them all.
    """
    return GATEWAY_SOURCE.load(only, **options)


__all__ = ["GATEWAY_SOURCE", "PREFIX", "ConfigError", "GatewaySettings", "is_loopback", "load_gateway_settings"]
