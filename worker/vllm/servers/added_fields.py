"""The fields that the worker adds to a request for its own ends, and servers that refuse them."""

from collections.abc import Set as AbstractSet

from ...contract.entries import Object
from ..errors import UpstreamError

_ADDED = ("return_token_ids", "stream_options")
_USAGE = "include_usage"
"""What is added inside of `stream_options`."""
_REFUSALS = frozenset({400, 403, 422, 500, 501})


def body_for(request: Object, without: AbstractSet[str]) -> Object:
    """The request as it is sent: streamed, and with what the worker wants to know beside what the job asks."""
    body: Object = {**request, "stream": True}
    if "return_token_ids" not in without:
        body["return_token_ids"] = True
    if "stream_options" not in without:
        asked = request.get("stream_options")
        body["stream_options"] = {**(asked if isinstance(asked, dict) else {}), _USAGE: True}
    return body


def refused_fields(error: UpstreamError, request: Object) -> set[str]:
    """The added fields that an error names, in its message or in a word beside it, but for those of the request's own.

    A server may name a field that it does not mind, in a quotation of the request: the same request without it shows.
    """
    if error.status not in _REFUSALS:
        return set()
    said = (error.message, *error.words)
    refused = {name for name in _ADDED if name not in request and any(name in words for words in said)}
    asked = request.get("stream_options")
    if not (isinstance(asked, dict) and _USAGE in asked) and any(_USAGE in words for words in said):
        refused.add("stream_options")
    return refused
