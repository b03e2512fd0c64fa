"""Reads a server's error of any shape: its message and its HTTP status. No I/O.

The shapes are those of vLLM, SGLang, TGI, llama.cpp, LiteLLM, FastAPI and proxies: `tests/vllm/test_error_table.py`
lists them. `errors.py` classifies errors by status.
"""

import ast
import html
import re

import msgspec

HEAD_OF_PAGE = 1024
"""Bytes at the start of a web page from which its text is taken."""
_TITLE = 200
_EXCERPT = 500
_DEEPEST = 8
"""How many levels of nested objects are searched."""
_MOST_PRINTED = 64 * 1024
"""The most bytes of a Python literal that are parsed."""
_INNER = ("error", "message", "detail")
_MESSAGES = ("error", "message", "error_message", "error_msg", "detail", "text", "msg")
_STATUSES = ("code", "status", "status_code", "http_status_code", "error_code")
_NAMES = ("code", "error_code", "status", "type", "error_type")
"""The most specific field first: OpenAI uses the type `invalid_request_error` for a wrong key too."""
_MARKS = ("error_message", "error_msg", "error_type", "error_code")
"""Fields that errors have and chunks of an answer do not."""
_SUCCESS = (0, "0")
_SUCCESS_WORDS = ("success", "ok", "succeeded", "no error")

_STATUS_OF_NAME = (
    ("ratelimit", 429), ("toomanyrequest", 429), ("quota", 429), ("exhausted", 429),
    ("overloaded", 503), ("unavailable", 503), ("timeout", 504), ("deadline", 504),
    ("authentication", 401), ("unauthenticated", 401), ("unauthorized", 401), ("apikey", 401),
    ("permission", 403), ("forbidden", 403), ("notfound", 404), ("unprocessable", 422), ("validation", 422),
    ("badrequest", 400), ("invalid", 400), ("valueerror", 400), ("contextlength", 400), ("contextsize", 400),
)  # fmt: skip
"""The status of an error type, by a part of its name in lower case without punctuation. The first match counts."""


def message_of(error: object, depth: int = 0) -> str:
    """The message of an error: a string, a list, or an object with the message in one of its fields.

    If an object inside an error has no such field, its JSON is the message.
    """
    if isinstance(error, str):
        return error
    if isinstance(error, list):
        first = error[0] if error else None
        if isinstance(first, dict) and ("error" in first or "message" in first) and depth < _DEEPEST:
            return message_of(first, depth + 1)
        return as_json(error) if error else ""
    if not isinstance(error, dict):
        return ""
    if depth < _DEEPEST:
        texts = (message_of(error.get(name), depth + 1) for name in _MESSAGES)
        if text := next(filter(None, texts), ""):
            return text
    return excerpt(as_json(error)) if depth and error else ""


def words_of(error: object) -> set[str]:
    """The words for programs that accompany a message: in vLLM's `param`, in other servers' `code` or `type`."""
    return {word for level in _levels(error) for name in (*_NAMES, "param") if isinstance(word := level.get(name), str)}


def status_of(error: object) -> int:
    """The HTTP status in an error: its number, or else the status of its type; 500 if it has neither."""
    return _named_status(_levels(error)[::-1]) or 500  # the innermost is the most specific


def is_error(event: object) -> bool:
    """Whether the JSON of an event, or of a whole body, is an error and not part of an answer."""
    while isinstance(event, list):  # not recursive: since Python 3.12 decoders accept more levels than calls may have
        event = event[0] if event else None
    if not isinstance(event, dict):
        return False
    if not is_no_error(event.get("error")):
        return True
    if event.get("choices"):
        return False
    if event.get("error_code") in _SUCCESS:
        return False
    # Older versions of vLLM send {"object": "error", "message": …}. Other servers have "error" in another field.
    if "error" in (event.get("object"), event.get("type"), event.get("status")) or any(map(event.get, _MARKS)):
        return True
    if "object" in event or not message_of(event):
        return False
    return bool(event.get("detail")) or (_named_status([event]) or 0) >= 400


def is_no_error(error: object) -> bool:
    """Whether an `error` field reports no error: null, false, 0, an object of these, or a report of success."""
    if not isinstance(error, dict):
        return not error
    is_success = error.get("code") in _SUCCESS and str(error.get("message")).lower() in _SUCCESS_WORDS
    return is_success or not any(error.values())


def decoded(data: bytes) -> object:
    """The value of JSON, or of a Python literal sent instead of JSON (`{'error': …}`); None for other data."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    text = data[:_MOST_PRINTED].decode("utf-8", "replace").strip()
    try:
        if inner := re.fullmatch(r"\{\s*'error'\s*:\s*(.*)\}", text, re.DOTALL):
            with_json = inner[1].encode()
            try:
                return {"error": msgspec.json.decode(with_json)}
            except msgspec.DecodeError:
                pass
        return ast.literal_eval(text) if text.startswith(("{'", "[{'")) else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    except SystemError:  # Python 3.11, if the garbage collector runs during the parse (cpython#106905)
        return None


def as_json(value: object) -> str:
    """A value as JSON, for people. A value that is nested too deeply to be encoded gives a fixed text."""
    try:
        return msgspec.json.encode(value).decode()
    except RecursionError:
        return "JSON of great depth"


def excerpt(text: str | bytes) -> str:
    """The beginning of a server's text, on one line."""
    text = " ".join((text.decode("utf-8", "replace") if isinstance(text, bytes) else text).split())
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"


def is_page(body: bytes) -> bool:
    """Whether a body is a web page or XML."""
    return body.lstrip().startswith(b"<")


def text_of_page(page: bytes) -> str:
    """The text of a web page, without markup: its title, or else the beginning of its body."""
    head = page[:HEAD_OF_PAGE].decode("utf-8", "replace")
    title = re.search(r"<title\b[^>]*>([^<]*)", head, re.IGNORECASE)
    text = title[1] if title and title[1].strip() else re.sub(r"<!--.*?-->|<[^>]*>?", " ", head, flags=re.DOTALL)
    return " ".join(html.unescape(text).split())[:_TITLE].rstrip() or "it has no words"


def _levels(error: object) -> list[dict[str, object]]:
    """The nested objects of an error, from the outermost."""
    levels: list[dict[str, object]] = []
    while len(levels) < _DEEPEST:
        if isinstance(error, list):
            error = next((item for item in error if isinstance(item, dict)), None)
        if not isinstance(error, dict):
            break
        levels.append(error)
        error = next((inner for name in _INNER if isinstance(inner := error.get(name), dict | list)), None)
    return levels


def _named_status(levels: list[dict[str, object]]) -> int | None:
    for level in levels:
        for name in _STATUSES:
            if status := _as_status(level.get(name)):
                return status
    for level in levels:
        for name in _NAMES:
            if isinstance(word := level.get(name), str) and (status := _status_of_name(word)):
                return status
    return None


def _as_status(value: object) -> int | None:
    """An HTTP status that is not a success, from an int, a float or a string of digits."""
    is_digits = isinstance(value, str) and value.isdecimal() and len(value) == 3
    if is_digits or (isinstance(value, float) and value.is_integer()):
        value = int(value)  # type: ignore[call-overload]
    return value if isinstance(value, int) and 300 <= value < 600 else None


def _status_of_name(name: str) -> int | None:
    letters = re.sub("[^a-z]", "", name.lower())
    return next((status for part, status in _STATUS_OF_NAME if part in letters), None)
