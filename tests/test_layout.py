"""The layout of `worker/`, read from the imports in its source: who may import whom, and how large a module may be."""

import ast
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import worker

_ROOT = Path(worker.__file__).parent
_MOST_LINES = 400

_ALL_BUT_CLI = {
    "contract", "redisio", "broker", "vllm", "telemetry", "settings", "engine", "client", "ops", "sandbox", "version",
}  # fmt: skip
_MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "contract": set(),
    "telemetry": {"version"},
    "redisio": {"telemetry.events"},
    "broker": {"contract", "redisio", "telemetry.events"},
    "vllm": {"contract", "telemetry.events"},
    "settings": {"contract", "redisio.urls", "vllm.http.credentials", "vllm.http.target"},
    "engine": {"contract", "redisio", "broker", "vllm", "telemetry", "settings", "version"},
    "client": {"contract", "redisio", "broker"},
    "ops": {"contract", "redisio", "broker", "vllm", "telemetry", "settings", "engine", "version"},
    "sandbox": {"contract", "redisio", "vllm", "settings", "client"},
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
    "logging",
    "redis",
    "select",
    "socket",
    "ssl",
    "structlog",
    "threading",
}

_NOT_YET = {
    "Backoff is a class in redisio.clients and redisio.retry": "engine, broker and client move to the second",
    "broker.ownership has 405 lines": "it will be shorter",
    "telemetry.events has 401 lines": "it will be shorter",
}
"""What breaks a rule today, and why that is still so."""


@dataclass(frozen=True)
class _Module:
    """A module of the package. Modules are named by their place below `worker`, such as `cli.main`."""

    name: str
    tree: ast.Module
    lines: int
    imports: frozenset[str]
    """Modules of the package that it imports, in functions and for types alone as well."""
    typing_imports: frozenset[str]
    """Those of them that it imports for types alone."""
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
    tree = ast.parse(text)
    package = path.relative_to(_ROOT).parent.parts
    imports, typing_imports, libraries = set[str](), set[str](), set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body):
                typing_imports |= {name for line in body for name in _imports_in(line, package, known)}
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
        frozenset(typing_imports),
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
_MODULES = {name: _read_module(path, _PATHS) for name, path in _PATHS.items()}


def _broken(rule: Iterator[str]) -> list[str]:
    return [problem for problem in rule if problem not in _NOT_YET]


def _reach(name: str) -> set[str]:
    """The modules that are loaded with one, itself included."""
    reached, unread = set[str](), [name]
    while unread:
        if (module := unread.pop()) not in reached:
            reached.add(module)
            unread += _MODULES[module].imports
    return reached


def _forbidden_imports() -> Iterator[str]:
    for module in _MODULES.values():
        allowed = _MAY_IMPORT[module.part] | {module.part}
        for imported in sorted(module.imports):
            if imported not in allowed and imported.partition(".")[0] not in allowed:
                yield f"{module.name} imports {imported}"


def test_packages_import_only_what_is_below_them() -> None:
    assert not _broken(_forbidden_imports())


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(
            {module.name: module.imports - module.typing_imports for module in _MODULES.values()}
        ).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other: {' -> '.join(error.args[1])}") from None


def test_imports_inside_the_package_are_relative() -> None:
    """The package has two import names, `worker` and `vllm_relay`: an absolute import would load a second copy."""
    makes_the_names = {"__init__", "import_names"}
    absolute = {module.name for module in _MODULES.values() if module.libraries & {"worker", "vllm_relay"}}
    assert not absolute - makes_the_names


def test_the_contract_does_no_io() -> None:
    libraries = {
        module.name: module.libraries & _IO_LIBRARIES for module in _MODULES.values() if module.part == "contract"
    }
    assert not {name: found for name, found in libraries.items() if found}


def test_only_telemetry_imports_prometheus_client() -> None:
    def found() -> Iterator[str]:
        for module in _MODULES.values():
            if "prometheus_client" in module.libraries and module.part != "telemetry":
                yield f"{module.name} imports prometheus_client"

    assert not _broken(found())


def test_a_client_loads_nothing_of_the_worker_process() -> None:
    def found() -> Iterator[str]:
        for module in _MODULES.values():
            if module.part == "client":
                for loaded in sorted(_reach(module.name) - {"telemetry.events"}):
                    if loaded.partition(".")[0] in {"engine", "vllm", "telemetry", "settings", "ops", "cli", "sandbox"}:
                        yield f"{module.name} loads {loaded}"

    assert not _broken(found())


def test_no_module_is_longer_than_a_page_that_one_can_hold_in_mind() -> None:
    assert not _broken(
        f"{module.name} has {module.lines} lines" for module in _MODULES.values() if module.lines > _MOST_LINES
    )


def test_no_two_classes_share_a_name() -> None:
    homes = defaultdict[str, list[str]](list)
    for module in _MODULES.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module.name)
    assert not _broken(f"{name} is a class in {' and '.join(of)}" for name, of in sorted(homes.items()) if len(of) > 1)


def test_no_two_functions_of_the_command_line_share_a_name() -> None:
    homes = defaultdict[str, list[str]](list)
    for module in _MODULES.values():
        for node in module.tree.body if module.part == "cli" else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                homes[node.name].append(module.name)
    assert not _broken(f"{name} is in {' and '.join(of)}" for name, of in sorted(homes.items()) if len(of) > 1)


def test_every_module_says_what_it_is_for() -> None:
    assert not [module.name for module in _MODULES.values() if not ast.get_docstring(module.tree)]
