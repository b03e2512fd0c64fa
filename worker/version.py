"""The version of the installed package."""

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """The version, such as `0.1.0`; empty where the package runs from its source and is not installed."""
    try:
        return metadata.version("vllm-relay")
    except metadata.PackageNotFoundError:
        return ""
