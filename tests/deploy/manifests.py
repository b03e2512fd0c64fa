"""The files of `deploy/` as data, for tests."""

import re
from pathlib import Path
from typing import Any, TypeAlias, cast

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = sorted(set((DEPLOY / "kubernetes").glob("*.yaml")) - {DEPLOY / "kubernetes/kustomization.yaml"})

Document: TypeAlias = dict[str, Any]


def documents(path: Path) -> list[Document]:
    """All documents of a YAML file."""
    return cast("list[Document]", list(yaml.safe_load_all(path.read_text())))


def resource(kind: str, name: str) -> Document:
    """A resource of the Kubernetes manifests."""
    (found,) = [
        each
        for path in KUBERNETES
        for each in documents(path)
        if each["kind"] == kind and each["metadata"]["name"] == name
    ]
    return found


def commands_that_make_the_secrets() -> str:
    """The commands at the top of compose.yaml. The last one prints an API key on standard error."""
    head = (DEPLOY / "compose.yaml").read_text().partition("# Without the command")[0]
    return "\n".join(re.findall(r"^#   (.*)$", head, re.MULTILINE))
