"""The version of this package, as it is installed."""

from importlib import metadata


def version() -> str:
    """Such as `0.1.0`, or nothing where the package runs from its source and is not installed."""
    try:
        return metadata.version("vllm-relay")
    except metadata.PackageNotFoundError:
        return ""
