"""The contents of a wheel: the files of `worker/` as the package `vllm_relay`, and the alias `worker`."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class WheelLayout(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # an editable installation uses the folders themselves: see dev-mode-dirs
            return
        package = Path(self.root, "worker")
        # File by file, because hatchling skips a file of a folder if its new path is the old path of another file.
        files = {str(path): f"worker/{path.name}" for path in (package / "_alias/wheel/worker").glob("*.*")}
        for path in package.iterdir():
            if path.name not in {"_alias", "__pycache__"}:
                files[str(path)] = f"vllm_relay/{path.name}"
        files[str(Path(self.root, "deploy/alerts.yaml"))] = "vllm_relay/sandbox/alerts.yaml"  # for `worker drill`
        build_data["force_include"] |= files
