"""The layout of `worker/`, read from the imports in its source: who may import whom, and how large a module may be."""

import ast
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from syntax import syntax_tree

import worker

_ROOT = Path(worker.__file__).parent

_ALL_BUT_CLI = {
    "contract", "redisio", "broker", "vllm", "telemetry", "settings", "settings_source", "engine", "client", "gateway",
    "ops", "sandbox", "top", "version",
}  # fmt: skip
_MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "contract": set(),
    "telemetry": {"version"},
    "redisio": {"telemetry.events"},
    "broker": {"contract", "redisio", "telemetry.events"},
    "vllm": {"contract", "telemetry.events"},
    "settings_source": {"redisio.environment"},
    "settings": {"contract", "redisio.urls", "settings_source", "vllm.http.credentials", "vllm.http.target"},
    "engine": {"contract", "redisio", "broker", "vllm", "telemetry", "settings", "version"},
    "client": {"contract", "redisio", "broker"},
    "gateway": {"contract", "redisio", "broker", "client", "telemetry", "settings", "settings_source", "version"},
    "ops": {"contract", "redisio", "broker", "vllm", "telemetry", "settings", "engine", "version"},
    "http": set(),
    "sandbox": {"contract", "redisio", "vllm", "settings", "client"},
    "top": {"contract", "redisio", "broker", "client", "settings", "ops"},
    "cli": _ALL_BUT_CLI,
    "__main__": {"cli"},
    "__init__": {"contract", "client"},
    "import_names": set(),
}
"""The packages and modules that each part may import beside itself. A part that is not listed fails the test."""

_IO_LIBRARIES = {
    "asyncio",
    "httptools",
    "httpx",
    "redis",
    "select",
    "socket",
    "ssl",
    "structlog",
    "threading",
}


@dataclass(frozen=True)
class _Module:
    """A module of the package. Modules are named by their place below `worker`, such as `cli.main`."""

    name: str
    tree: ast.Module
    lines: int
    imports: frozenset[str]
    """Modules of the package that it imports, in functions and for types alone as well."""
    libraries: frozenset[str]
    """Everything else that it imports, by the first part of its name."""

    @property
    def part(self) -> str:
        """The package that it is in, or its own name at the top level."""
        return self.name.partition(".")[0]


def _name_of(path: Path) -> str:
    name = ".".join(path.relative_to(_ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def _read_module(path: Path, known: Collection[str]) -> _Module:
    text = path.read_text()
    tree = syntax_tree(text)
    package = path.relative_to(_ROOT).parent.parts
    imports, libraries = set[str](), set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                libraries |= {alias.name.partition(".")[0] for alias in node.names}
            case ast.ImportFrom(level=0):
                libraries.add(str(node.module).partition(".")[0])
            case ast.ImportFrom():
                imports |= _imports_in(node, package, known)
    return _Module(
        _name_of(path),
        tree,
        len(text.splitlines()),
        frozenset(imports),
        frozenset(libraries),
    )


def _imports_in(line: ast.AST, package: tuple[str, ...], known: Collection[str]) -> set[str]:
    """The modules of the package that a `from … import` loads; nothing for other statements."""
    if not isinstance(line, ast.ImportFrom) or not line.level:
        return set()
    base = ".".join([*package[: len(package) - line.level + 1], *filter(None, [line.module])])
    names = [f"{base}.{alias.name}" if base else alias.name for alias in line.names]
    return {name if name in known else base for name in names}


_PATHS = {_name_of(path): path for path in sorted(_ROOT.rglob("*.py")) if "_alias" not in path.parts}


@cache
def _modules() -> dict[str, _Module]:
    """The modules by name. They are parsed once, and only in a process that runs these tests."""
    return {name: _read_module(path, _PATHS) for name, path in _PATHS.items()}


def _loaded_with(name: str) -> set[str]:
    """The modules that are loaded with one, itself included."""
    reached, unread = set[str](), [name]
    while unread:
        if (module := unread.pop()) not in reached:
            reached.add(module)
            unread += _modules()[module].imports
    return reached


def _definitions(modules: Iterable[_Module], *kinds: type[ast.stmt]) -> dict[str, list[str]]:
    """The modules in which each name is defined, for names that have several."""
    homes = defaultdict[str, list[str]](list)
    for module in modules:
        for node in ast.walk(module.tree) if ast.ClassDef in kinds else module.tree.body:
            if isinstance(node, kinds):
                homes[str(getattr(node, "name", ""))].append(module.name)
    return {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_packages_import_only_what_is_below_them() -> None:
    forbidden = [
        f"{module.name} imports {name}"
        for module in _modules().values()
        for name in sorted(module.imports)
        if not {name, name.partition(".")[0]} & (_MAY_IMPORT[module.part] | {module.part})
    ]
    assert not forbidden


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = {module.name: module.imports for module in _modules().values()}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other: {' -> '.join(error.args[1])}") from None


def test_imports_inside_the_package_are_relative() -> None:
    """The package has two import names, `worker` and `vllm_relay`: an absolute import would load a second copy."""
    makes_the_names = {"__init__", "import_names"}
    absolute = {module.name for module in _modules().values() if module.libraries & {"worker", "vllm_relay"}}
    assert not absolute - makes_the_names


def test_the_contract_does_no_io() -> None:
    in_contract = [module for module in _modules().values() if module.part == "contract"]
    assert in_contract
    assert not [module.name for module in in_contract if module.libraries & _IO_LIBRARIES]


def test_only_telemetry_counts_and_logs() -> None:
    """Other packages emit events. Of structlog they use the context of a log line, such as the request's id, alone."""
    others = [module for module in _modules().values() if module.part != "telemetry"]
    assert not [
        module.name for module in others if module.libraries & {"prometheus_client", "opentelemetry", "logging"}
    ]
    used = {
        (module.name, node.attr)
        for module in others
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "structlog"
    }
    assert not [where for where, name in used if name != "contextvars"]


def test_only_top_draws_on_the_terminal() -> None:
    """Its libraries are those of the extra `top`, and no other command needs them."""
    others = [module for module in _modules().values() if module.part != "top"]
    assert not [module.name for module in others if module.libraries & {"textual", "rich"}]


def test_a_client_loads_nothing_of_the_worker_process() -> None:
    of_the_process = {"engine", "vllm", "telemetry", "settings", "ops", "cli", "sandbox"}
    clients = [module.name for module in _modules().values() if module.part == "client"]
    loaded = {name for client in clients for name in _loaded_with(client)} - {"telemetry.events"}
    assert clients
    assert not [name for name in loaded if name.partition(".")[0] in of_the_process]


def test_no_module_has_more_than_400_lines() -> None:
    assert not {module.name for module in _modules().values() if module.lines > 400}


def test_no_two_classes_share_a_name() -> None:
    assert not _definitions(_modules().values(), ast.ClassDef)


def test_no_two_functions_of_the_command_line_share_a_name() -> None:
    of_cli = [module for module in _modules().values() if module.part == "cli"]
    assert not _definitions(of_cli, ast.FunctionDef, ast.AsyncFunctionDef)


def test_every_module_says_what_it_is_for() -> None:
    assert not [module.name for module in _modules().values() if not ast.get_docstring(module.tree)]


def test_no_test_replaces_a_private_name_of_the_package() -> None:
    """What a test must vary is a constructor argument."""
    patched = [
        f"{path.name}:{node.lineno}"
        for path in Path(__file__).parent.rglob("*.py")
        for node in ast.walk(syntax_tree(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr"
        for target in node.args[:2]
        if isinstance(target, ast.Constant) and re.search(r"^_|^worker\..*\._", str(target.value))
    ]
    assert not patched
