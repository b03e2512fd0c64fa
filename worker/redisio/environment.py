"""The URL of Redis as the environment has it, and secrets in files, as Docker and Kubernetes mount them."""

import os
from pathlib import Path

_DEFAULT = "redis://127.0.0.1:6379/0"


def url_from_environment() -> str:
    """The URL of Redis from REDIS_URL or the file that REDIS_URL_FILE names, else redis://127.0.0.1:6379/0.

    Raises:
        ValueError: when both are set, or the file cannot be used.
    """
    url, path = os.environ.get("REDIS_URL"), os.environ.get("REDIS_URL_FILE")
    if url and path:
        raise ValueError(both_set("REDIS_URL", "REDIS_URL_FILE"))
    if not path:
        return url or _DEFAULT
    try:
        return read_secret(path)
    except ValueError as error:
        raise ValueError(f"REDIS_URL_FILE {error}") from None


def read_secret(path: str) -> str:
    """The secret in a file, without space and newlines at either end.

    Raises:
        ValueError: when there is none. The message is the end of a sentence about the variable that has the path. It
            does not contain the path, which may be the secret by mistake.
    """
    try:
        secret = Path(path).read_text("utf-8").strip()
    except OSError as error:
        raise ValueError(f"names a file that cannot be read: {error.strerror or type(error).__name__}") from None
    except ValueError:
        raise ValueError("names a file that is not UTF-8, or is no path") from None
    if not secret:
        raise ValueError("names a file that is empty")
    return secret


def both_set(variable: str, file_variable: str) -> str:
    """The error of a secret that two variables have."""
    return f"{variable} and {file_variable} are both set: remove one of them"
