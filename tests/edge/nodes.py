"""The Node clients of the tests: their packages, installed once in the user's cache, and programs that use them."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
_INSTALL = ("install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error")
_PATIENCE = 300.0
"""Seconds that npm may take: a new machine downloads 60 MB."""


class NotInstalledError(Exception):
    """Node, npm or a package is missing. The message is the reason."""


def installed_packages() -> Path:
    """The folder with the `node_modules` of package.json, which is outside of the repository.

    The first of several processes installs it and the others wait. Another package.json gets another folder.

    Raises:
        NotInstalledError: when node or npm is missing, or npm cannot install the packages.
    """
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise NotInstalledError("node or npm is missing")
    wanted = (HERE / "package.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-relay"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"edge-{hashlib.sha256(wanted).hexdigest()[:16]}"
    with (cache / "edge.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _install(npm, wanted, folder)
    return folder


def _install(npm: str, wanted: bytes, folder: Path) -> None:
    """Install in a folder beside it and rename that, so that a broken installation is never taken for a whole one."""
    with tempfile.TemporaryDirectory(prefix="edge-", dir=folder.parent) as scratch:
        place = Path(scratch) / "packages"
        place.mkdir()
        (place / "package.json").write_bytes(wanted)
        done = subprocess.run(
            [npm, *_INSTALL], cwd=place, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
        if done.returncode:
            raise NotInstalledError(f"npm cannot install the packages: {done.stderr[-500:]}")
        place.rename(folder)
