"""The documents are true: links and anchors exist, examples run as they stand, tables match the code."""

import ast
import asyncio
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from inspect import getmembers_static
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx
import pytest
from documents import (
    API,
    BENCHMARKS,
    CHAOS,
    COMMANDS,
    CONTRACT,
    CONTRIBUTING,
    DEPLOY,
    DOCUMENTS,
    FAILURES,
    GATEWAY,
    MONITORING,
    README,
    ROOT,
    SETTINGS,
    Document,
    Example,
    settings_table,
)
from redis.asyncio import Redis
from syntax import syntax_tree
from waits import eventually

import worker
from worker import Client, SyncClient
from worker.contract.entries import Cancelled, Claimed, Delta, Done, Failed, Opened, Queued, Restarted, Resumed, Started
from worker.contract.job import digest
from worker.contract.keys import Keys
from worker.gateway.settings import GATEWAY_SOURCE
from worker.ops.findings import Fault
from worker.sandbox.embedded_redis import find_servers
from worker.sandbox.simulator.requests import answer_to
from worker.settings import WORKER_SOURCE
from worker.telemetry import events, gateway_events, job_events
from worker.telemetry.events import Event, Failing
from worker.telemetry.logging import name_of

QUESTION = [{"role": "user", "content": "Who are you?"}]
TEXT = answer_to(QUESTION)
NODE_MODULES = os.path.realpath(os.environ.get("NODE_MODULES", ""))

needs_packages = pytest.mark.skipif(
    not (shutil.which("node") and "NODE_MODULES" in os.environ),
    reason="needs node and NODE_MODULES (CONTRIBUTING.md)",
)


def named(*documents: Document, language: str) -> list[Any]:
    """The examples in a language, as parameters of a test."""
    return [
        pytest.param(example, id=f"{document} {number}")
        for document in documents
        for number, example in enumerate(document.examples, 1)
        if example.language == language
    ]


async def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """What a command prints on standard output; fails the test if the command fails."""
    process = await asyncio.create_subprocess_exec(
        *command, env=os.environ | (env or {}), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, out.decode() + err.decode()
    return out.decode()


# Links.


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(document: Document) -> None:
    others = {other.path: other for other in DOCUMENTS}
    for link in document.links:
        if urlsplit(link).scheme:
            assert link.startswith("https://"), f"{link} is not https"
            continue
        place, _, anchor = link.partition("#")
        target = (document.path.parent / place).resolve() if place else document.path
        assert target.exists(), f"{link} leads to no file"
        assert not place.startswith("/"), f"{link} is not relative"
        if anchor:
            assert anchor in others[target].anchors, f"{link} leads to no heading"


def test_every_document_is_reachable_from_the_readme() -> None:
    reached, todo = set[Path](), [README.path]
    by_path = {document.path: document for document in DOCUMENTS}
    while todo:
        path = todo.pop()
        reached.add(path)
        links = (link.partition("#")[0] for link in by_path[path].links if not urlsplit(link).scheme)
        targets = ((path.parent / link).resolve() for link in links if link)
        todo += [target for target in targets if target in by_path and target not in reached]
    assert reached == set(by_path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_file_that_is_named_exists(document: Document) -> None:
    text = document.prose + "".join(example.code for example in document.examples if example.language == "sh")
    packages = "|".join(path.parent.name for path in (ROOT / "worker").glob("*/__init__.py"))
    for name in re.findall(rf"(?<![\w./=-])(?:worker|tests|deploy|\.ci|{packages})/[\w./-]*[\w/]", text):
        there = (ROOT / name, ROOT / "worker" / name, ROOT / "worker" / f"{name}.py")
        assert any(path.exists() for path in there), f"{name} does not exist"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_no_path_of_a_machine_and_no_registry_is_named(document: Document) -> None:
    assert not re.findall(r"pypi\.org|npmjs|pkg\.go\.dev|(?<![\w.])/(?:work|root|home|opt|usr)/", document.text)


@pytest.mark.parametrize("document", [README, DEPLOY], ids=str)
def test_a_readme_that_leads_to_other_pages_has_at_most_200_lines(document: Document) -> None:
    assert len(document.text.splitlines()) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_nothing_says_to_install_the_package_by_its_name(document: Document) -> None:
    assert not re.search(r"pip install\s+\W*vllm-relay", document.text), "the package is on no index"


# Examples.


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_example_of_a_program_is_run_by_a_test(document: Document) -> None:
    tested = {"python", "statuses", "edge", "redis-cli", "typescript"}
    tested |= {"openai", "follow", "sdks"}  # in tests/edge/test_examples.py
    unmarked = [
        example.code
        for example in document.examples
        if example.language not in {"", "sh"} and example.name not in tested
    ]
    assert not unmarked


@pytest.mark.parametrize("example", named(*DOCUMENTS, language="python"))
def test_every_python_example_imports_the_name_of_its_own(example: Example) -> None:
    imported = {
        node.module for node in ast.walk(syntax_tree(example.code)) if isinstance(node, ast.ImportFrom) and node.module
    }
    packages = {name.partition(".")[0] for name in imported}
    assert "vllm_relay" in packages
    assert "worker" not in packages


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("example", named(README, API, language="python"))
async def test_every_python_example_prints_the_answer(example: Example, redis_url: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example.code)
    printed = await run(sys.executable, script, env={"REDIS_URL": redis_url})
    if example.name == "python":
        assert TEXT in printed
        assert "done" in printed


@pytest.mark.usefixtures("worker")
async def test_the_service_with_statuses_maps_each_error_as_the_table_does(
    redis_url: str, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    service = _module(tmp_path / "statuses.py", API.example("statuses"))
    for kind, status in service.STATUS.items():
        row = next(row for row in API.text.splitlines() if row.startswith(f"| `{kind.__name__}` |"))
        assert str(status) in row.rsplit("|", 2)[1]
    body = {"messages": QUESTION}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://relay") as http:
        first = await http.post("/chat", json=body, headers={"Idempotency-Key": "one"})
        whole = await http.get(f"/chat/{first.json()['id']}")
        clash = await http.post("/chat", json=body | {"seed": 1}, headers={"Idempotency-Key": "one"})
        refused = [await http.post("/chat", json={}), await http.get("/chat/none")]
        await redis.delete("chat:tokens:{one}")
        gone = await http.get("/chat/one")
    await service.client.aclose()
    assert whole.json()["choices"][0]["message"]["content"] == TEXT
    assert [response.status_code for response in (clash, *refused, gone)] == [422, 400, 404, 410]


@pytest.mark.usefixtures("worker")
async def test_the_edge_of_the_documents_serves_each_user_his_own_requests(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    edge = _module(tmp_path / "edge.py", API.example("edge"))
    ann, bob = {"X-User": "ann"}, {"X-User": "bob"}
    body = {"messages": QUESTION}
    async with (
        edge.lifespan(edge.app),
        httpx.AsyncClient(transport=httpx.ASGITransport(edge.app), base_url="http://edge") as http,
    ):
        asked = [await http.post("/chat", json=body, headers=ann | {"Idempotency-Key": "one"}) for _ in range(2)]
        path = f"/chat/{asked[0].json()['id']}"
        whole = await http.get(f"{path}/events", headers=ann)
        events = whole.text.split("\n\n")[:-1]
        ids = [event.split("\n")[0].removeprefix("id: ") for event in events]
        rest = await http.get(f"{path}/events", headers=ann | {"Last-Event-ID": ids[2]})
        same = await http.get(f"{path}/events", headers=ann, params={"after": ids[2]})
        refused = [
            await http.get(f"{path}/events", headers=bob),
            await http.delete(path, headers=bob),
            await http.get(f"{path}none/events", headers=ann),
            await http.get(f"{path}/events", headers=ann | {"Last-Event-ID": "yesterday"}),
            await http.post("/chat", json={}, headers=ann),
            await http.post("/chat", json=body),
        ]
        cancelled = await http.delete(path, headers=ann)
    assert [response.status_code for response in asked] == [202, 202]
    assert asked[0].json() == asked[1].json()
    entries = [json.loads(event.split("\ndata: ")[1]) for event in events]
    assert "".join(entry.get("content", "") for entry in entries) == TEXT
    assert whole.text.endswith(rest.text)
    assert rest.text == same.text
    assert rest.text.startswith(f"id: {ids[3]}")
    assert [response.status_code for response in refused] == [404, 404, 404, 400, 400, 422]
    assert cancelled.json() == {"was": "ended"}


@needs_packages
@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("document", [README, CONTRACT], ids=str)
async def test_the_typescript_example_has_right_types_and_prints_the_answer(
    document: Document, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    (tmp_path / "example.mts").write_text(document.example("typescript"))
    options = [
        "--strict",
        "--noUncheckedIndexedAccess",
        "--target",
        "es2022",
        "--module",
        "nodenext",
        "--types",
        "node",
    ]
    await run("node", "node_modules/typescript/bin/tsc", *options, "example.mts", cwd=tmp_path)
    assert TEXT in await run("node", "example.mjs", env={"REDIS_URL": redis_url}, cwd=tmp_path)


def redis_cli() -> str:
    beside = [str(server.parent / "redis-cli") for server in find_servers()]
    found = next(filter(None, map(shutil.which, ["redis-cli", *beside])), None)
    if found is None:
        pytest.skip("no redis-cli at hand")
    return found


async def shell(redis_url: str, lines: str) -> str:
    """What lines of an example print when a shell runs them at the tests' Redis."""
    command = lines.replace("redis-cli", f"{redis_cli()} -p {urlsplit(redis_url).port}", 1)
    process = await asyncio.create_subprocess_shell(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed, _ = await process.communicate()
    return printed.decode()


@pytest.mark.usefixtures("worker")
async def test_the_redis_cli_lines_of_the_contract_enqueue_follow_and_cancel(redis_url: str, redis: Redis) -> None:
    enqueue, follow, cancel = re.split(r"(?:^#.*\n)+", CONTRACT.example("redis-cli"), flags=re.MULTILINE)[1:]
    assert re.fullmatch(r"OK\n(QUEUED\n){3}0-1\n1\n\d+-\d+\n", await shell(redis_url, enqueue))
    assert "chat:tokens:{demo-1}\n0-1\ntype\nqueued\nv\n1" in await shell(redis_url, follow)
    assert "\n1-0\ntype\nstarted" in await shell(redis_url, follow.replace("' 0", "' 0-1"))
    await eventually(lambda: redis.exists("chat:ended:{demo-1}"))
    assert "exhausted the last possible ID" in await shell(redis_url, cancel), "it had ended before"

    await redis.delete("chat:tokens:{demo-1}", "chat:ended:{demo-1}")
    assert await shell(redis_url, cancel) == "18446744073709551615-18446744073709551615\n"
    await shell(redis_url, enqueue)

    async def remembered() -> object:
        return b"cancelled" in (await redis.get("chat:ended:{demo-1}") or b"")

    await eventually(remembered)


@pytest.mark.usefixtures("worker")
async def test_the_redis_cli_lines_of_the_readme_enqueue_follow_and_cancel(redis_url: str, redis: Redis) -> None:
    enqueue, follow, cancel = README.example("redis-cli").splitlines()
    assert re.fullmatch(r"\d+-\d+\n", await shell(redis_url, enqueue))
    assert "chat:tokens:{demo-1}\n1-0\ntype\nstarted" in await shell(redis_url, follow)
    await eventually(lambda: redis.exists("chat:ended:{demo-1}"))
    assert "exhausted the last possible ID" in await shell(redis_url, cancel), "it had ended before"


# Settings.


def test_the_table_of_settings_is_the_generated_one() -> None:
    for source in (WORKER_SOURCE, GATEWAY_SOURCE):
        assert settings_table(source) in SETTINGS.text, "write the tables anew: python tests/documents.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_setting_that_is_named_exists(document: Document) -> None:
    names = set(re.findall(r"`((?:WORKER|GATEWAY)_[A-Z_0-9]+)`", document.text))
    of_kubernetes = {"WORKER_PORT", "WORKER_SERVICE_HOST"}
    known = {source.variable(name) for source in (WORKER_SOURCE, GATEWAY_SOURCE) for name in source.kind.model_fields}
    assert names - of_kubernetes <= known


# The contract.


def test_every_key_entry_type_and_field_is_described() -> None:
    keys = Keys()
    fixed = [keys.jobs(), keys.lifecycle, keys.dead, keys.workers, keys.cancel]
    fixed += [keys.asked("<fingerprint>"), keys.unanswered("<fingerprint>")]
    fixed += [keys.running("<owner>"), keys.waiting("<owner>")]
    for key in [*fixed, keys.tokens("<id>"), keys.ended("<id>"), keys.feed("<id>")]:
        assert f"| `{key}`" in CONTRACT.text
    for kind in (Queued, Started, Claimed, Resumed, Restarted, Opened, Delta, Done, Failed, Cancelled):
        row = re.search(rf"^\| `{kind.type}` \|.*$", CONTRACT.text, re.MULTILINE)
        assert row, f"{kind.type} is not described"
        if kind not in (Failed, Cancelled, Queued):
            missing = [name for name in kind.__struct_fields__ if name != "id" and f"`{name}`" not in row[0]]
            assert not missing, f"{kind.type}: {missing}"


@pytest.mark.parametrize("document", [CONTRACT, API], ids=str)
def test_every_error_code_is_in_the_table(document: Document) -> None:
    sources = [
        *(ROOT / "worker/vllm").rglob("*.py"),
        ROOT / "worker/engine/generation.py",
        ROOT / "worker/engine/job_runner.py",
        ROOT / "worker/engine/settlement.py",
    ]
    text = "".join(path.read_text() for path in sources)
    used = set(re.findall(r'UpstreamError\(\s*"(\w+)"', text)) | set(re.findall(r'_failed\("(\w+)"', text))
    used |= set(re.findall(r'code(?:, retryable)? = "(\w+)"', text)) | set(re.findall(r'code="(\w+)"', text))
    assert len(used) > 10
    assert used <= document.first_cells


def test_the_digests_are_those_that_clients_and_workers_write() -> None:
    request = {"model": "m", "temperature": 1.0}
    assert f"has the digest `{digest(request)}`" in CONTRACT.text
    assert f"it is\n`{digest(request, ['s'])}`" in CONTRACT.text


# The Python API.


def test_every_public_name_is_described() -> None:
    missing = [name for name in worker.__all__ if not re.search(rf"`{name}\b", API.text)]
    assert not missing


@pytest.mark.parametrize("kind", [Client, SyncClient])
def test_every_method_is_described(kind: type) -> None:
    methods = [name for name, member in getmembers_static(kind) if callable(member) and name[0] != "_"]
    assert "enqueue" in methods
    missing = [name for name in methods if not re.search(rf"`{name}\b", API.text)]
    assert not missing


def test_every_job_option_is_described() -> None:
    assert set(worker.JobOptions.__annotations__) <= API.first_cells


# Operation.


def test_every_log_event_is_described() -> None:
    kinds = [
        kind
        for module in (events, job_events, gateway_events)
        for kind in vars(module).values()
        if isinstance(kind, type)
    ]
    logged = [kind for kind in kinds if issubclass(kind, Event) and kind.level != "silent"]
    names = {name_of(kind) for kind in logged if kind not in (Event, Failing)}
    sources = [
        path.read_text() for part in ("engine", "broker", "redisio") for path in (ROOT / "worker" / part).glob("*.py")
    ]
    lasting = re.compile(r'(?:\b(?:Backoff|Failing|failing|Outage)\(|\bwhat(?:: str)? ?= ?)"(\w+)"')
    lasting_names = {name for source in sources for name in lasting.findall(source)}
    assert len(lasting_names) > 5
    assert (names | lasting_names) - MONITORING.first_cells == set()


def test_every_fault_is_described_in_order() -> None:
    faults = [name for name in get_args(Fault) if name]
    described = re.findall(
        r"^\| `(\w+)` ", FAILURES.text.partition("## Faults\n")[2].partition("\n## ")[0], re.MULTILINE
    )
    assert described == faults


def test_every_command_is_described() -> None:
    from worker.cli.main import main  # noqa: PLC0415 - it loads what no other test here needs

    words = {word.split()[1] for word in COMMANDS.first_cells if word.startswith("worker ")}
    assert words == set(main.commands)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_command_that_is_shown_exists_with_its_options(document: Document) -> None:
    from worker.cli.main import main  # noqa: PLC0415 - it loads what no other test here needs

    shell = "\n".join(example.code for example in document.examples if example.language == "sh")
    shown = re.findall(r"`worker (\w+)([^`\n]*)`", document.prose)
    shown += re.findall(r"(?:^|/|&& )worker (\w+)([^&#\n]*)", shell, re.MULTILINE)
    for name, rest in shown:
        options = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options, f"worker {name}{rest}"


def test_every_route_of_the_gateway_is_described() -> None:
    source = "".join(path.read_text() for path in (ROOT / "worker/gateway").glob("*.py"))
    routes = {route.replace(":path", "") for route in re.findall(r'Route\(\s*"([^"]+)"', source)}
    assert "/requests/{id}/events" in routes
    assert routes == {cell.split()[-1] for cell in GATEWAY.first_cells if re.match("(GET|POST|DELETE) /", cell)}


# Figures and commands.


def test_the_figures_of_the_readme_are_in_the_report() -> None:
    figures = re.findall(r"\d[\d,.]*\d", README.text.partition("On one core")[2].partition("[Benchmarks]")[0])
    for figure in ("117,377", "12.88", "16.2", "0.15"):
        assert figure in figures
        assert re.search(rf"\| +{re.escape(figure)} \|", BENCHMARKS.text), f"{figure} is not in the report"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = re.search(r"## Tests\n\n```sh\n(.*?)\n```", README.text)
    assert command
    assert command[1] in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("document", [CHAOS], ids=str)
def test_every_file_of_fault_tests_is_described(document: Document) -> None:
    files = {path.name for path in (ROOT / "tests/chaos").glob("test_*.py")}
    assert files == {name for name in document.first_cells if name.startswith("test_")}


def test_the_layout_lists_every_package() -> None:
    packages = {f"worker/{path.name}/" for path in (ROOT / "worker").iterdir() if (path / "__init__.py").exists()}
    assert packages == {name for name in CONTRIBUTING.first_cells if name.startswith("worker/") and name[-1] == "/"}


def test_every_class_of_the_glossary_exists() -> None:
    terms = re.findall(
        r"^\| (.*?) \|", CONTRIBUTING.text.partition("## Glossary")[2].partition("## Prose")[0], re.MULTILINE
    )
    named_classes = {word for term in terms for word in re.findall(r"`([A-Z]\w+)`", term)}
    source = "".join(path.read_text() for path in (ROOT / "worker").rglob("*.py"))
    assert named_classes
    assert {name for name in named_classes if not re.search(rf"^class {name}\b", source, re.MULTILINE)} == set()


def _module(path: Path, code: str) -> Any:  # noqa: ANN401 - whatever the example defines
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
