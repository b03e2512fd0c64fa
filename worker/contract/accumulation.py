"""Joins the pieces of a streamed message into whole values: text, lists, objects, logprobs and tool calls.

Strings are joined, lists are extended, objects are accumulated field by field, and a number replaces the one before. A
piece that is null or empty, or of another type than the value so far, changes nothing. The whole value is changed in
place, since an answer may have many pieces. A piece is never changed, since it belongs to an entry.

Text stays in pieces until `join_pieces`, since a copy of the whole text for each piece would take quadratic time.
"""

from typing import cast

from .entries import JSON, Object

_NAMING = frozenset({"id", "index", "type", "format"})
"""Fields that identify what a piece belongs to. Servers repeat them in each piece, so the first value stays."""

_EMPTY: tuple[JSON, ...] = (None, "", [], {})


class _Pieces:
    """Text that is not joined yet. It stands in a value as if it were JSON."""

    __slots__ = ("texts",)

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)


def join_pieces(value: JSON) -> JSON:
    """Join the text in a value, in place; returns the value. Before this, only the functions here can read it."""
    whole: object = value
    if isinstance(whole, _Pieces):
        return "".join(whole.texts)
    if isinstance(value, dict):
        for name, part in value.items():
            if isinstance(part, dict | list | _Pieces):
                value[name] = join_pieces(part)
    elif isinstance(value, list):
        for at, part in enumerate(value):
            if isinstance(part, dict | list | _Pieces):
                value[at] = join_pieces(part)
    return value


def accumulate(whole: Object, piece: Object) -> Object:
    """Add the next piece of an object; returns the object."""
    for name, value in piece.items():
        whole[name] = accumulate_value(whole.get(name), value, name)
    return whole


def accumulate_value(whole: JSON, piece: JSON, name: str = "") -> JSON:
    """Add the next piece of a value, which is None before the first; returns the value. `name` is its field's name."""
    text: object = whole
    if isinstance(text, _Pieces):
        if isinstance(piece, str):
            text.texts.append(piece)
        return whole
    if whole in _EMPTY:
        return whole if piece is None else _first(piece)
    if piece in _EMPTY or name in _NAMING:
        return whole
    match whole, piece:
        case str(), str():
            if name == "name":  # servers send the name of a function in pieces, or repeat the whole name
                return whole if whole == piece else whole + piece
            return cast("JSON", _Pieces(whole, piece))
        case list(), list():
            _extend(whole, piece)
            return whole
        case dict(), dict():
            return accumulate(whole, piece)
        case int() | float(), int() | float():
            return piece
    return whole


def add_tool_call(calls: list[Object], piece: Object) -> None:
    """Add a piece to the tool call that it belongs to, or begin another call with it. An empty piece is ignored.

    Pieces of a call have its index. Servers that omit the index begin a call with a new id or, without ids, with a
    name. A new id together with a name always begins a call, since some servers give index 0 to every call. A new id
    alone does not, since some servers generate an id for every piece.
    """
    piece = {name: value for name, value in piece.items() if value is not None}
    place = _place(calls, piece)
    if place is not None:
        accumulate(calls[place], piece)
    elif _has_content(piece):
        calls.append(accumulate({}, piece))


def _first(piece: JSON) -> JSON:
    """A new value, made of its first piece. A list may hold several pieces of one element."""
    if isinstance(piece, dict):
        return accumulate({}, piece)
    if isinstance(piece, list):
        whole: list[JSON] = []
        _extend(whole, piece)
        return whole
    return piece


def _extend(whole: list[JSON], piece: list[JSON]) -> None:
    """Extend a list. An object with an `index` is a piece of the element that has the same index and type."""
    for value in piece:
        if not isinstance(value, dict) or value.get("index") is None:
            whole.append(value)
            continue
        same = (value["index"], value.get("type"))
        place = next((at for at, one in enumerate(whole) if _index_and_type(one) == same), None)
        if place is None:
            whole.append(_first(value))
        else:
            whole[place] = accumulate_value(whole[place], value)


def _index_and_type(value: JSON) -> tuple[JSON, JSON] | None:
    return (value.get("index"), value.get("type")) if isinstance(value, dict) else None


def _has_content(piece: Object) -> bool:
    """Whether a piece of a call has more than an index and a type."""
    return any(
        _has_content(value) if isinstance(value, dict) else value not in _EMPTY
        for name, value in piece.items()
        if name not in {"index", "type"}
    )


def _place(calls: list[Object], piece: Object) -> int | None:
    """The position of the call that a piece belongs to; None when the piece begins a call."""
    index, call_id, name = _index_of(piece), piece.get("id"), _name_of(piece)
    # A server may number a call only from its second piece on.
    places = [at for at, call in enumerate(calls) if index is None or _index_of(call) in (None, index)]
    same = [at for at in places if call_id and calls[at].get("id") == call_id]
    place = next(reversed(same or places), None)
    if place is None or not name:
        return place
    call = calls[place]
    if not (call.get("id") or _name_of(call)):
        return place
    has_arguments = any(tool.get("arguments") or tool.get("input") for tool in _tools(call))
    # A later piece may continue or repeat the name. Once a call has arguments, another name begins another call.
    is_same = same or (not call_id and index is not None and _index_of(call) == index)
    return place if is_same and (name == _name_of(call) or not has_arguments) else None


def _index_of(piece: Object) -> str | None:
    """The index of a call. Some servers send it as a number in one piece and as text in another."""
    index = piece.get("index")
    return None if index is None else str(int(index) if isinstance(index, float) and index.is_integer() else index)


def _name_of(piece: Object) -> JSON:
    """The name of the function, or of the custom tool, if the piece has it."""
    return next((tool["name"] for tool in _tools(piece) if tool.get("name")), None)


def _tools(piece: Object) -> list[Object]:
    return [tool for tool in (piece.get("function"), piece.get("custom")) if isinstance(tool, dict)]
