"""A transport for httpx and httpx2 whose event streams survive a gateway that is killed or restarted."""

from .transport import ResumingTransport

__all__ = ["ResumingTransport"]
