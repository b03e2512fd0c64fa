"""Prints entries on a terminal: the answer's text on standard output, notes about it on standard error."""

import sys

import click

from ..contract.answer import Answer
from ..contract.entries import (
    TAKEOVER,
    Claimed,
    Delta,
    Entry,
    Failed,
    Queued,
    Restarted,
    Resumed,
    Started,
    text_of_parts,
    to_json,
    transcript_of,
)


class Printer:
    """Prints a log as it is followed. With `as_json` each entry is one line of JSON, and nothing else is printed."""

    def __init__(self, *, as_json: bool) -> None:
        self.answer = Answer()
        self._json = as_json
        self._last = ""
        self._unfinished = ""
        """The stream whose last line has no end yet, `out` or `err`; empty if there is none."""

    def show(self, entry: Entry) -> None:
        """Print the next entry."""
        self.answer.add(entry)
        self._last = str(entry.id)
        if self._json:
            click.echo(entry.to_json())
            return
        match entry:
            case Delta(index=0):
                self._write(entry.reasoning, "err")
                self._write(f"{entry.text}{entry.refusal}{transcript_of(entry.extra)}", "out")
            case Queued():
                self._note("waiting for a worker")
            case Started():
                self._note_amid_text(f"taken by {entry.worker}")
            case Claimed():
                how = "taken over by" if entry.reason == TAKEOVER else f"{entry.reason}: tried again by"
                self._note_amid_text(f"{how} {entry.worker}")
            case Restarted():
                self._note("the answer starts again: the text above is void")
            case Resumed():
                self._note_amid_text("the answer continues")
        if self.answer.end is not None:
            self._finish()

    def break_off(self) -> str:
        """End the unfinished line, since no more entries come; returns the last printed id, or an empty string."""
        self._end_line()
        return self._last

    def _finish(self) -> None:
        """Print the tool calls, the other choices, and how the request ended."""
        self._end_line()
        for choice in self.answer.choices:
            if choice.index:
                extra = choice.extra
                text = f"{text_of_parts(extra)}{choice.content}{choice.refusal}{transcript_of(extra)}"
                click.echo(f"[{choice.index}] {text}")
            function_call = choice.message().get("function_call")
            for call in [*choice.tool_calls, *([function_call] if function_call else [])]:
                click.echo(to_json(call))
        end = self.answer.end
        if isinstance(end, Failed):
            click.secho(f"error: {self.answer.error}", err=True, fg="red")
        elif end is not None:
            used = self.answer.usage.get("completion_tokens")
            tokens = f", {used} tokens" if used else ""
            self._note(f"{self.answer.outcome}{tokens}")

    def _note(self, text: str) -> None:
        self._end_line()
        click.secho(f"· {text}", err=True, dim=True)

    def _note_amid_text(self, text: str) -> None:
        """Print a note within an answer. On a terminal it begins a new line; a file or pipe gets no extra line end."""
        if self._unfinished == "out" and not sys.stdout.isatty():
            click.secho(f"· {text}", err=True, dim=True)
        else:
            self._note(text)

    def _write(self, text: str, stream: str) -> None:
        """Print a piece of the reasoning or of the answer. A change between them begins a new line."""
        if not text:
            return
        if self._unfinished != stream:
            self._end_line()
        ends_line = text.endswith("\n")
        if stream == "err":
            text = click.style(text, dim=True)
        click.echo(text, nl=False, err=stream == "err")
        self._unfinished = "" if ends_line else stream

    def _end_line(self) -> None:
        if self._unfinished:
            click.echo(err=self._unfinished == "err")
            self._unfinished = ""
