"""How the pieces of a streamed message become whole values: text, lists, objects, logprobs and tool calls.

Strings are joined, lists are extended, objects are accumulated field by field, and of numbers the latest holds. What is
null or empty changes nothing, nor does a piece of another type than what is there. No value that is given is changed: a
piece belongs to the entry that it came in.
"""

from worker.contract.entries import JSON, Object

_NAMING = frozenset({"id", "index", "type", "format"})
"""Fields that say to what a piece belongs. Servers repeat them in each piece, so the first that is not empty stays."""

_EMPTY: tuple[JSON, ...] = (None, "", [], {})


def accumulate(whole: Object, piece: Object) -> Object:
    """An object with the next piece of it."""
    return whole | {name: accumulate_value(whole.get(name), value, name) for name, value in piece.items()}


def accumulate_value(whole: JSON, piece: JSON, name: str = "") -> JSON:
    """A value, None before its first piece, with the next piece of it. `name` is that of its field."""
    if whole in _EMPTY:
        return whole if piece is None else _first(piece)
    if piece in _EMPTY or name in _NAMING:
        return whole
    match whole, piece:
        case str(), str():
            # The name of a function may come in pieces, and may be repeated.
            return whole if name == "name" and whole == piece else whole + piece
        case list(), list():
            return _extended(whole, piece)
        case dict(), dict():
            return accumulate(whole, piece)
        case int() | float(), int() | float():
            return piece
    return whole


def add_tool_call(calls: list[Object], piece: Object) -> None:
    """Add a piece to the tool call that it belongs to, or as the beginning of another one. An empty piece is neither.

    Pieces of a call have its index. Servers that leave the index out begin a call with an id of its own or, if they
    leave that out too, with a name. A new id together with a name begins a call in any case, since some servers give
    index 0 to every call. A new id alone does not, since some make up an id for every piece.
    """
    piece = {name: value for name, value in piece.items() if value is not None}
    place = _place(calls, piece)
    if place is not None:
        calls[place] = accumulate(calls[place], piece)
    elif _says_anything(piece):
        calls.append(accumulate({}, piece))


def _first(piece: JSON) -> JSON:
    """A value that begins; one list may hold several pieces of the same thing."""
    if isinstance(piece, dict):
        return accumulate({}, piece)
    return _extended([], piece) if isinstance(piece, list) else piece


def _extended(whole: list[JSON], piece: list[JSON]) -> list[JSON]:
    """A list with more at its end. An object with an `index` is a piece of the one that has the same index and type."""
    extended = list(whole)
    for value in piece:
        place = None
        if isinstance(value, dict) and value.get("index") is not None:
            same = (value["index"], value.get("type"))
            place = next((at for at, one in enumerate(extended) if _index_and_type(one) == same), None)
        if place is None:
            extended.append(_first(value))
        else:
            extended[place] = accumulate_value(extended[place], value)
    return extended


def _index_and_type(value: JSON) -> tuple[JSON, JSON] | None:
    return (value.get("index"), value.get("type")) if isinstance(value, dict) else None


def _says_anything(piece: Object) -> bool:
    """Whether a piece of a call has more than an index and a type."""
    return any(
        _says_anything(value) if isinstance(value, dict) else value not in _EMPTY
        for name, value in piece.items()
        if name not in {"index", "type"}
    )


def _place(calls: list[Object], piece: Object) -> int | None:
    """Where the call stands to which a piece belongs; None when the piece begins a call."""
    index, call_id, name = piece.get("index"), piece.get("id"), _name_of(piece)
    # A call without an index may be the one that a server numbers only in later pieces.
    places = [at for at, call in enumerate(calls) if index is None or call.get("index") in (None, index)]
    same = [at for at in places if call_id and calls[at].get("id") == call_id]
    if same or not places:
        return same[-1] if same else None
    latest = calls[places[-1]]
    is_told_apart = not call_id and index is not None and latest.get("index") == index
    return None if name and _is_named(latest) and not is_told_apart else places[-1]


def _is_named(call: Object) -> bool:
    return bool(call.get("id") or _name_of(call))


def _name_of(piece: Object) -> JSON:
    """The name of the function, or of the custom tool, if the piece has it."""
    kinds = (piece.get("function"), piece.get("custom"))
    return next((kind["name"] for kind in kinds if isinstance(kind, dict) and kind.get("name")), None)
