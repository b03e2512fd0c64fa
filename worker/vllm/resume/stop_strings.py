"""The stop strings of an answer that is gone on with, found as vLLM finds them. No I/O."""

from ...contract.entries import Fields, Object, to_json


def stops_of(request: Object) -> list[str]:
    """The stop strings of a request."""
    stop = request.get("stop")
    given = stop if isinstance(stop, list) else [stop]
    return [text for text in given if isinstance(text, str) and text]


class StopStrings:
    """Finds the stop strings of an answer that is gone on with, in place of the server, which has not seen its start.

    The rule is that of vLLM 0.32.0: the one that ends first, of these the first in the list; text that may yet become
    one is held back, unless it is part of the output. `held` is what the first server held back.
    """

    def __init__(self, request: Object, published: str, held: str) -> None:
        self.stops = stops_of(request)
        self.found = False
        self._include = bool(request.get("include_stop_str_in_output"))
        self._reach = max(map(len, self.stops), default=1) - 1
        # Text that was sent can still begin a stop string where that is part of the output.
        shown = published[-self._reach :] if self._include and self._reach else ""
        self._text, self._sent = shown + held, len(shown)

    def take(self, fields: Fields) -> Fields:
        """A delta with the text that can be shown by now, and with the end where it completes a stop string."""
        seen = len(self._text)
        self._text += fields.pop("content", "")
        ends = [
            (start + len(stop), rank) for rank, stop in enumerate(self.stops) if (start := self._find(stop, seen)) >= 0
        ]
        upto = len(self._text) if self._include or "finish_reason" in fields else len(self._text) - self._reach
        if ends:
            self.found = True
            end, rank = min(ends)
            stop = self.stops[rank]
            fields |= {"finish_reason": "stop", "stop_reason": to_json(stop)}
            upto = end if self._include else end - len(stop)
        if shown := self._text[self._sent : max(upto, self._sent)]:
            fields["content"] = shown
        self._sent += len(shown)
        forget = max(0, min(self._sent, len(self._text) - self._reach))
        self._text, self._sent = self._text[forget:], self._sent - forget
        return fields

    def _find(self, stop: str, seen: int) -> int:
        """Where it begins, if it ends in what is new."""
        return self._text.find(stop, max(0, seen - len(stop) + 1))
