"""Responses that every route may need: an error as JSON, or as an event for an EventSource."""

from http import HTTPStatus

from starlette.responses import Response
from starlette.types import Scope

from ..contract.entries import to_json
from .problems import RETRY_AFTER, Problem


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value as JSON. Nobody on the way may store it."""
    return Response(
        to_json(value), status, {"Cache-Control": "no-store", **(headers or {})}, media_type="application/json"
    )


def is_event_source(scope: Scope) -> bool:
    """Whether an EventSource asks: it accepts event streams alone, and any status but 200 closes it for ever."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    accepted = [value for name, value in scope["headers"] if name == b"accept"]
    return accepted == [b"text/event-stream"]


def problem_response(scope: Scope, problem: Problem) -> Response:
    """A problem as the response to a request.

    An EventSource gets a temporary one as an event, and connects again after the pause that the response asks for.
    """
    if problem.is_temporary and is_event_source(scope):
        pause = int(problem.headers.get("Retry-After", RETRY_AFTER))
        content = b"retry: %d\nevent: busy\ndata: %s\n\n" % (pause * 1000, problem.body)
        return Response(content, headers={"Cache-Control": "no-store"}, media_type="text/event-stream")
    headers = {"Cache-Control": "no-store", **problem.headers}
    return Response(problem.body, problem.status, headers, media_type="application/json")


def raw_response(problem: Problem) -> bytes:
    """A problem as the bytes of a response, for a connection that has no application yet and then closes."""
    head = [
        b"HTTP/1.1 %d %b\r\n" % (problem.status, HTTPStatus(problem.status).phrase.encode()),
        b"content-type: application/json\r\ncache-control: no-store\r\nconnection: close\r\n",
        b"content-length: %d\r\n\r\n" % len(problem.body),
    ]
    return b"".join([*head, problem.body])
