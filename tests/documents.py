"""The documents of the repository as data: text, links, anchors, examples and tables; and what is generated in them.

    python tests/documents.py

writes the generated parts, the tables of settings in deploy/settings.md.
"""
# ruff: noqa: E402 - what follows the change of sys.path needs it, where the project is not installed

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import click
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from worker.gateway.settings import GATEWAY_SOURCE
from worker.settings import WORKER_SOURCE
from worker.settings_source import SettingsSource

_FENCE = re.compile(r"^(?:<!-- example: (\S+) -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_SETTINGS = re.compile(r"(<!-- (gateway )?settings -->\n).*?(<!-- end of the settings -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Example:
    """A block of code; `name` is the name in the comment before it, or empty."""

    name: str
    language: str
    code: str


@dataclass(frozen=True, slots=True)
class Document:
    """One Markdown file."""

    path: Path
    text: str

    @classmethod
    def read(cls, name: str) -> Self:
        """The document at a path below the root of the repository."""
        return cls(ROOT / name, (ROOT / name).read_text())

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def prose(self) -> str:
        """The text without blocks of code and comments."""
        return _COMMENT.sub("", _FENCE.sub("", self.text))

    @property
    def links(self) -> list[str]:
        """The targets of all links and pictures."""
        return _LINK.findall(self.prose)

    @property
    def anchors(self) -> set[str]:
        """The fragments by which GitHub lets the headings be addressed."""
        return {_anchor(title) for title in re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)}

    @property
    def examples(self) -> list[Example]:
        return [Example(*found) for found in _FENCE.findall(self.text)]

    def example(self, name: str) -> str:
        """The code of the first example with a name."""
        return next(example.code for example in self.examples if example.name == name)

    def row(self, first: str) -> str:
        """The row of a table whose first cell holds this word as code; empty where there is none."""
        found = re.search(rf"^\| [^|\n]*`{re.escape(first)}`.*$", self.text, re.MULTILINE)
        return found[0] if found else ""

    @property
    def first_cells(self) -> set[str]:
        """Every word that stands as code in the first cell of a table's row."""
        cells = re.findall(r"^\| (`[^|\n]*) \|", self.text, re.MULTILINE)
        return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


README = Document.read("README.md")
CONTRACT = Document.read("worker/contract/README.md")
API = Document.read("worker/client/README.md")
GATEWAY = Document.read("worker/gateway/README.md")
DEPLOY = Document.read("deploy/README.md")
COMMANDS = Document.read("deploy/commands.md")
FAILURES = Document.read("deploy/failures.md")
MONITORING = Document.read("deploy/monitoring.md")
REDIS = Document.read("deploy/redis.md")
SECRETS = Document.read("deploy/secrets.md")
SETTINGS = Document.read("deploy/settings.md")
BENCHMARKS = Document.read("tests/benchmarks/README.md")
CHAOS = Document.read("tests/chaos/README.md")
CONTRIBUTING = Document.read("CONTRIBUTING.md")
_OTHERS = ("CHANGELOG.md", "tests/transcripts/README.md")
DOCUMENTS = (
    *(README, CONTRACT, API, GATEWAY, BENCHMARKS, CHAOS, CONTRIBUTING),
    *map(Document.read, (*(f"deploy/{page.name}" for page in sorted((ROOT / "deploy").glob("*.md"))), *_OTHERS)),
)


def settings_table(source: SettingsSource[Any] = WORKER_SOURCE) -> str:
    """The table of all settings of the worker or the gateway: variable, default and meaning."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    fields: dict[str, FieldInfo] = source.kind.model_fields
    for name, field in fields.items():
        default = field.get_default()
        if isinstance(default, SecretStr):
            default = default.get_secret_value()
        shown = ",".join(default) if isinstance(default, tuple) else str(default)
        meaning = str(field.description).replace("|", "\\|").replace("<", "\\<")
        if get_origin(field.annotation) is Literal:
            meaning += f": {', '.join(f'`{word}`' for word in get_args(field.annotation))}"
        rows.append(f"| `{source.variable(name)}` |{f' `{shown}` ' if shown else ' '}| {meaning} |")
    return "\n".join(rows)


def with_settings_table(text: str) -> str:
    """A text with the tables of settings, each between its two comments."""

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}{settings_table(GATEWAY_SOURCE if found[2] else WORKER_SOURCE)}\n{found[3]}"

    return _SETTINGS.sub(table, text)


def _anchor(title: str) -> str:
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


if __name__ == "__main__":
    SETTINGS.path.write_text(with_settings_table(SETTINGS.text))
    click.echo(f"the tables of settings are written to {SETTINGS}")
