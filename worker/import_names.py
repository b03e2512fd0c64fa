"""The package has two import names, `worker` and `vllm_relay`, and one set of modules.

A module named `worker` is common: a `worker.py` beside a user's service hides this package under that name, but not
under `vllm_relay`. In this repository and in an editable installation the files are in the folder `worker`, and
`_alias/editable` adds the other name. A wheel has the files in the folder `vllm_relay`, so that type checkers find
them there too, and `_alias/wheel` adds the name `worker`. Both names import the same module objects, so a class or an
exception is the same under both. This module imports no other module of the package.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType


def add_alias(alias: str, name: str) -> None:
    """Make imports of `alias` and of its submodules return the modules of `name`, which must be imported already."""
    sys.modules[alias] = sys.modules[name]
    sys.meta_path.insert(0, _AliasFinder(alias, name))


class _AliasFinder(MetaPathFinder):
    """Finds `<alias>.x.y` by importing `<name>.x.y`."""

    def __init__(self, alias: str, name: str) -> None:
        self._alias = alias
        self._name = name

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - part of the protocol
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self._alias}."):
            return None
        name = self._name + fullname.removeprefix(self._alias)
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            return None
        spec = ModuleSpec(fullname, _LoadedModule(module), is_package=hasattr(module, "__path__"))
        spec.origin, spec.has_location = module.__file__, True
        return spec


class _LoadedModule(InspectLoader):
    """Returns a module that is loaded under another name, and restores its spec, which the import replaces."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:  # noqa: ARG002 - part of the protocol
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec

    def get_code(self, fullname: str) -> CodeType | None:  # noqa: ARG002 - part of the protocol
        """The module's code, which `python -m` runs again under the name `__main__`."""
        loader = self._spec.loader if self._spec else None
        return loader.get_code(self._module.__name__) if isinstance(loader, InspectLoader) else None

    def get_source(self, fullname: str) -> str | None:  # noqa: ARG002 - part of the protocol
        """Return no source: the module object has its own file."""
        return None
