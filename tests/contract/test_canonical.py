"""Canonical JSON, compared with another implementation of RFC 8785 (canonical.mjs)."""

import hashlib
import json
import os
import random
import struct
import subprocess
from pathlib import Path

import msgspec
import pytest

from worker.contract.canonical import canonical_json

VECTORS: list[dict[str, str]] = json.loads((Path(__file__).parent / "canonical.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["json"][:40] for vector in VECTORS])
def test_a_value_is_written_as_by_another_implementation(vector: dict[str, str]) -> None:
    written = canonical_json(msgspec.json.decode(vector["json"]))
    assert written.decode() == vector["canonical"]
    assert hashlib.sha256(written).hexdigest() == vector["sha256"]


@pytest.mark.skipif("CANONICALIZE" not in os.environ, reason="needs node and CANONICALIZE: see canonical.mjs")
def test_any_number_is_written_as_by_another_implementation() -> None:
    draw = random.Random(8785)  # noqa: S311 - no secret
    texts = []
    for _ in range(20_000):
        size = 10 ** draw.randint(0, 24)
        texts += [f"[{draw.randint(-size, size)}]", f"[{draw.uniform(-1e-8, 1e-8) * size!r}]"]
        (bits,) = struct.unpack("d", draw.randbytes(8))
        texts += [f"[{bits!r}]"] if abs(bits) < float("inf") else []
    script = Path(__file__).with_name("canonical.mjs")
    given = json.dumps([{"json": text} for text in texts])
    made = subprocess.run(["node", script], input=given, capture_output=True, text=True, check=True).stdout  # noqa: S607
    assert [canonical_json(msgspec.json.decode(text)).decode() for text in texts] == [
        vector["canonical"] for vector in json.loads(made)
    ]


def test_a_deeply_nested_value_is_written() -> None:
    nested = msgspec.json.decode(b"[" * 500 + b"1.0" + b"]" * 500)
    assert canonical_json(nested) == b"[" * 500 + b"1" + b"]" * 500


def test_the_given_value_is_not_changed() -> None:
    value = {"b": [1.0, {"d": 2.0, "c": 3.0}], "a": 10**400}
    assert canonical_json(value) == b'{"a":1' + b"0" * 400 + b',"b":[1,{"c":3,"d":2}]}'
    assert repr(value) == repr({"b": [1.0, {"d": 2.0, "c": 3.0}], "a": 10**400})
