"""`import vllm_relay` works beside `import worker`, also where a user's own `worker.py` hides the latter."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import assert_type
from zipfile import ZipFile

import pytest

import vllm_relay
import worker

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

SAME_CLASSES = """
import {first}, {second}
import importlib
from {first} import Client, Unavailable
from {second}.client.errors import Unavailable as Other
import {second}.contract.entries

assert {first} is {second}
assert Unavailable is Other
assert {second}.client.async_client.Client is Client
assert importlib.import_module("{second}.contract") is importlib.import_module("{first}.contract")
assert importlib.import_module("{second}.http") is importlib.import_module("{first}.http")
assert {second}.contract.entries.__spec__.name == {second}.contract.entries.__name__
assert importlib.util.find_spec("{second}.nothing") is None
try:
    raise Other("same")
except Unavailable:
    print("caught")
"""

USERS_OWN_BEFORE = """
import worker
assert worker.MINE
import vllm_relay
from vllm_relay import Client
from vllm_relay.client.errors import Unavailable
assert Unavailable is vllm_relay.Unavailable
assert Client.__module__ == "vllm_relay.client.async_client"
print(vllm_relay.Client is Client)
"""

USERS_OWN_AFTER = """
from vllm_relay import Client, SyncClient
import vllm_relay.cli.main
import worker
assert worker.MINE
assert "Client" not in vars(worker)
print(Client is vllm_relay.Client)
"""

TYPED = """
from typing import assert_type
from vllm_relay import Client
import worker
async def enqueue(client: Client) -> bool:
    assert_type(await client.enqueue({}), str)
    return worker.MINE
"""

USERS_OWN_ON_A_LATER_PATH = """
import sys
from vllm_relay import Client
sys.path.insert(0, "later")
import worker
print(worker.MINE)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as an installation unpacks it."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    with ZipFile(built) as archive:
        archive.extractall(folder / "site-packages")
    return folder / "site-packages"


@pytest.fixture(params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest) -> str:
    """What an installation of this kind puts on Python's path."""
    if request.param == "wheel":
        return str(request.getfixturevalue("wheel"))
    return os.pathsep.join(str(ROOT / folder) for folder in PROJECT["tool"]["hatch"]["build"]["dev-mode-dirs"])


def run(installed: str, *command: str) -> str:
    """What the command prints, run by Python in the test's folder, which comes first on Python's path."""
    ended = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": installed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(("first", "second"), [("worker", "vllm_relay"), ("vllm_relay", "worker")])
def test_both_names_give_the_same_modules(installed: str, first: str, second: str) -> None:
    assert run(installed, "-c", SAME_CLASSES.format(first=first, second=second)) == "caught\n"


@pytest.mark.parametrize("script", [USERS_OWN_BEFORE, USERS_OWN_AFTER])
def test_a_users_own_module_named_worker_does_not_hide_vllm_relay(installed: str, script: str, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("MINE = True\n")
    (tmp_path / "service.py").write_text(script)
    assert run(installed, "service.py") == "True\n"


def test_importing_vllm_relay_leaves_the_name_worker_free(installed: str, tmp_path: Path) -> None:
    (tmp_path / "later").mkdir()
    (tmp_path / "later/worker.py").write_text("MINE = True\n")
    assert run(installed, "-c", USERS_OWN_ON_A_LATER_PATH) == "True\n"


def test_the_command_runs_beside_a_users_own_worker(installed: str, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("raise SystemExit('the wrong one')\n")
    module, _, function = PROJECT["project"]["scripts"]["worker"].partition(":")
    script = f"import sys; from {module} import {function}; sys.argv = ['worker', '--version']; {function}()"
    for command in (["-c", script], ["-m", "vllm_relay", "--version"]):
        assert run(installed, *command).startswith("vllm-relay")


def test_either_name_runs_as_a_program(installed: str) -> None:
    for name in ("worker", "vllm_relay"):
        assert run(installed, "-m", name, "--version").startswith("vllm-relay")


def test_the_shipped_alerts_are_found(installed: str) -> None:
    script = "from vllm_relay.sandbox.prometheus import find_alerts; print(find_alerts().read_text(), end='')"
    assert run(installed, "-c", script) == (ROOT / "deploy/alerts.yaml").read_text()


def test_the_public_names_are_the_same() -> None:
    assert vllm_relay.__all__ == worker.__all__
    assert all(getattr(vllm_relay, name) is getattr(worker, name) for name in worker.__all__)


def test_mypy_knows_the_types_of_a_wheel_beside_a_users_own_worker(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("MINE = True\n")
    (tmp_path / "service.py").write_text(TYPED)
    checker = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "service.py"]
    path = os.pathsep.join(map(str, (tmp_path, wheel)))
    checked = subprocess.run(checker, env=os.environ | {"MYPYPATH": path}, capture_output=True, text=True, check=False)
    assert checked.stdout == "Success: no issues found in 1 source file\n"


def test_type_checkers_see_one_class_under_both_names() -> None:
    client: worker.SyncClient | None = None
    assert_type(client, vllm_relay.SyncClient | None)
