"""Finds the stop strings of a resumed answer as vLLM finds them. No I/O."""

from ...contract.entries import Fields, Object, to_json


def stops_of(request: Object) -> list[str]:
    """The stop strings of a request."""
    stop = request.get("stop")
    given = stop if isinstance(stop, list) else [stop]
    return [text for text in given if isinstance(text, str) and text]


class StopStrings:
    """Finds stop strings in place of the server that continues an answer, which has not generated the answer's start.

    The rule is that of vLLM 0.32.0: the stop string that ends first counts; of several, the first in the list. Text
    that may become a stop string is withheld, unless stop strings are part of the output.

    Args:
        request: the job's request.
        published: the text so far.
        withheld: text that the first server generated and withheld.
    """

    def __init__(self, request: Object, published: str, withheld: str) -> None:
        self.stops = stops_of(request)
        self.found = False
        self._is_included = bool(request.get("include_stop_str_in_output"))
        self._reach = max(map(len, self.stops), default=1) - 1
        # If stop strings are part of the output, published text may be the beginning of one.
        shown = published[-self._reach :] if self._is_included and self._reach else ""
        self._text, self._sent = shown + withheld, len(shown)

    def apply(self, fields: Fields) -> Fields:
        """A delta with the text that can be published now, and with the finish reason if it completes a stop string."""
        seen = len(self._text)
        self._text += fields.pop("content", "")
        ends = [
            (start + len(stop), rank)
            for rank, stop in enumerate(self.stops)
            # The stop string must end in the new text.
            if (start := self._text.find(stop, max(0, seen - len(stop) + 1))) >= 0
        ]
        limit = len(self._text) if self._is_included or "finish_reason" in fields else len(self._text) - self._reach
        if ends:
            self.found = True
            end, rank = min(ends)
            stop = self.stops[rank]
            fields |= {"finish_reason": "stop", "stop_reason": to_json(stop)}
            limit = end if self._is_included else end - len(stop)
        if shown := self._text[self._sent : max(limit, self._sent)]:
            fields["content"] = shown
        self._sent += len(shown)
        forget = max(0, min(self._sent, len(self._text) - self._reach))
        self._text, self._sent = self._text[forget:], self._sent - forget
        return fields
