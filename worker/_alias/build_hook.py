"""What a wheel holds: the files of `worker/` as the package `vllm_relay`, and the alias `worker` beside them."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class WheelLayout(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # uses the folders as they are: see dev-mode-dirs
            return
        package = Path(self.root, "worker")
        # File by file: hatchling passes over a folder's file whose new path is the old one of another.
        files = {str(path): f"worker/{path.name}" for path in (package / "_alias/wheel/worker").glob("*.*")}
        for path in package.iterdir():
            if path.name not in {"_alias", "__pycache__"}:
                files[str(path)] = f"vllm_relay/{path.name}"
        build_data["force_include"] |= files
