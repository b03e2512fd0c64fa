"""The fields that the worker adds to a request for its own ends, and servers that refuse them."""

from collections.abc import Set as AbstractSet

from worker.contract.entries import Object
from worker.vllm.errors import UpstreamError

_ADDED = ("return_token_ids", "stream_options")
_REFUSALS = frozenset({400, 403, 422, 500, 501})


def body_for(request: Object, without: AbstractSet[str]) -> Object:
    """The request as it is sent: streamed, and with what the worker wants to know beside what the job asks."""
    body: Object = {**request, "stream": True}
    if "return_token_ids" not in without:
        body["return_token_ids"] = True
    if "stream_options" not in without:
        asked = request.get("stream_options")
        body["stream_options"] = {**(asked if isinstance(asked, dict) else {}), "include_usage": True}
    return body


def refused_fields(error: UpstreamError, request: Object) -> set[str]:
    """The added fields that an error names, in its message or in a word beside it, but for those of the request's own.

    A server may name a field that it does not mind, in a quotation of the request: the same request without it shows.
    """
    if error.status not in _REFUSALS:
        return set()
    return {
        name for name in _ADDED
        if name not in request and (name in error.message or any(name in word for word in error.words))
    }  # fmt: skip
