"""API keys that are refused or changed while jobs run. A refusal that the operator can fix ends no job."""

from pathlib import Path
from typing import Any

import pytest
from conftest import StartSimulator, StartWorker
from structlog.testing import capture_logs
from waits import eventually

from worker import Client, Done, Failed
from worker import State as JobState
from worker.contract.entries import Object
from worker.engine.application import Worker
from worker.engine.pace import Pace
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest
from worker.telemetry.logging import LogReceiver, configure_logging
from worker.vllm.http.credentials import ApiKeys, read_keys
from worker.vllm.servers.pace import ServerPace

OLD, NEW = "the-old-key", "the-new-key"
CUT = Scenario(fault="cut", after=4, times=1, rate=100)
LONG_WAITS = Pace(longest_block=0.1, first_retry=0.01, longest_wait_here=3600)
"""A job waits in its worker until the test has seen that, and not in its queue after a second."""


@pytest.fixture
def pace() -> Pace:
    return Pace(longest_block=0.1, first_retry=0.01, longest_retry=0.01)


@pytest.fixture
def server_pace() -> ServerPace:
    return ServerPace(probe_every=0.05, first_pause=0.05, longest_pause=0.05)


def chat_request(**more: Any) -> Object:  # noqa: ANN401
    return {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}], **more}


TEXT = answer_to(chat_request()["messages"])


class Changing(Simulator):
    """A server whose key changes once an answer has broken off; it replies `status` to the old key."""

    def __init__(self, *, status: int = 401, lists: bool = False, scenario: Scenario = CUT) -> None:
        super().__init__(Options(api_key=OLD, scenario=scenario))
        self.status = status
        self.refused = 0
        self._lists = lists

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        if any(served.fault for served in self.served):
            self.options = Options(api_key=NEW)
        if self._authorized(request) or request.path == "/health" or (self._lists and request.path == "/v1/models"):
            await super()._handle(request, connection)
            return
        self.refused += 1
        await connection.respond(self.status, "application/json", b'{"error": "no"}')

    def _authorized(self, request: HttpRequest) -> bool:
        return (self._lists and request.path == "/v1/models") or super()._authorized(request)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"{OLD}\n")
    return file


def write(file: Path, text: str) -> None:
    """Replace the file atomically, as tools that rotate keys do."""
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").rename(file)


async def waits(worker: Worker) -> bool:
    return worker.metrics.registry.get_sample_value("vllm_relay_jobs_waiting_for_model") == 1


@pytest.mark.parametrize("lists", [False, True], ids=["its list guarded", "its list open"])
@pytest.mark.parametrize("status", [401, 403])
async def test_an_answer_whose_key_changes_mid_stream_resumes_with_the_new_key_of_the_file(
    client: Client, start_worker: StartWorker, key_file: Path, status: int, *, lists: bool
) -> None:
    """A refused key does not count as a try: only one more is left after the break. No key is logged.

    A probe after the break may show first that the key is refused.
    """
    configure_logging("json", "info")
    async with Changing(status=status, lists=lists) as server:
        await start_worker(server, tries=2, vllm_api_key_file=str(key_file))
        with capture_logs() as logs:
            request_id = await client.enqueue(chat_request())

            async def refused() -> bool:
                return server.refused > (3 if lists else 0)

            await eventually(refused)
            assert (await client.status(request_id)).state is JobState.RUNNING
            write(key_file, f"{NEW}\n")
            answer = await client.result(request_id)
    assert (answer.outcome, answer.text) == ("done", TEXT)
    assert OLD not in str(logs)
    assert NEW not in str(logs)


async def test_an_answer_whose_key_is_refused_resumes_at_a_server_that_accepts_it(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    async with Changing() as server:
        other = await start_simulator(Options(api_key=OLD))
        await start_worker(server, other, tries=2, vllm_api_key=OLD)
        answer = await client.result(await client.enqueue(chat_request()))
    assert (answer.outcome, answer.text) == ("done", TEXT)
    assert len(other.served) == 1


async def test_each_server_gets_the_key_that_it_accepts(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """The worker finds the accepted key once, and no server refuses keys again and again."""
    servers = [await start_simulator(Options(api_key=key)) for key in (OLD, NEW)]
    worker = await start_worker(*servers, vllm_api_key=OLD, vllm_api_key_2=NEW)
    for _ in range(4):
        answer = await client.result(await client.enqueue(chat_request()))
        assert answer.outcome == "done"
    assert [endpoint.accepted_key for endpoint in worker._servers.servers] == [OLD, NEW]


async def test_a_job_whose_key_every_server_refuses_waits_for_another(
    client: Client, start_worker: StartWorker, key_file: Path
) -> None:
    """The worker takes no further job meanwhile: the queue is the buffer."""
    async with Changing() as one, Changing() as other:
        for server in (one, other):
            server.options = Options(api_key=NEW)
        worker = await start_worker(one, other, pace=LONG_WAITS, vllm_api_key_file=str(key_file))
        request_id = await client.enqueue(chat_request())
        await eventually(lambda: waits(worker))
        write(key_file, f"{OLD}\n\n  {NEW}  \n")
        answer = await client.result(request_id)
    assert isinstance(answer.end, Done)


@pytest.mark.parametrize("lists", [False, True], ids=["its list guarded", "its list open"])
async def test_a_job_whose_key_is_refused_waits_until_its_deadline_and_no_longer(
    client: Client, start_worker: StartWorker, *, lists: bool
) -> None:
    async with Changing(lists=lists) as server:
        server.options = Options(api_key=NEW)
        await start_worker(server, vllm_api_key=OLD, tries=1)
        answer = await client.result(await client.enqueue(chat_request(), timeout=5))
        assert server.refused
    assert isinstance(answer.end, Failed)
    assert answer.end.code == "deadline"


async def test_a_server_that_forbids_everything_refuses_the_key(
    client: Client, start_worker: StartWorker, key_file: Path
) -> None:
    """It listed its models before and refuses even that now, so the refusal is not about this request."""
    async with Changing(status=403) as server:
        worker = await start_worker(server, tries=1, pace=LONG_WAITS, vllm_api_key_file=str(key_file))
        await eventually(lambda: _has_listed(worker))
        server.options = Options(api_key=NEW)
        request_id = await client.enqueue(chat_request())
        await eventually(lambda: waits(worker))
        write(key_file, NEW)
        assert (await client.result(request_id)).outcome == "done"


async def _has_listed(worker: Worker) -> bool:
    return bool(worker._servers.servers[0].models)


async def test_a_request_that_is_forbidden_where_others_are_not_ends_with_its_tries(
    client: Client, start_worker: StartWorker
) -> None:
    """A policy in front of the server may refuse a request, with 403."""

    class Choosy(Simulator):
        requests = 0

        async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
            if b"forbidden" in request.body:
                self.requests += 1
                await connection.respond(403, "text/html", b"<h1>Forbidden</h1>")
            else:
                await super()._handle(request, connection)

    async with Choosy() as server:
        await start_worker(server)
        answer = await client.result(await client.enqueue(chat_request(user="forbidden")))
        assert isinstance(answer.end, Failed)
        assert (answer.end.code, server.requests) == ("unauthorized", 3)
        assert (await client.result(await client.enqueue(chat_request()))).outcome == "done"


async def test_requests_refused_with_401_by_a_server_that_accepts_the_key_block_no_others(
    client: Client, start_worker: StartWorker, server_pace: ServerPace
) -> None:
    """A router replies 401 where its own key for one of its servers is wrong. Only the jobs for that server wait."""
    server_pace.first_pause = server_pace.longest_pause = 3600

    class Router(Simulator):
        mended = False
        refused = 0

        async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
            if b"refused" in request.body and not self.mended:
                self.refused += 1
                await connection.respond(401, "application/json", b'{"error": "invalid key for this model"}')
            else:
                await super()._handle(request, connection)

    async with Router() as router:
        await start_worker(router, tries=1)
        waiting = [await client.enqueue(chat_request(user="refused")) for _ in range(8)]

        async def has_request() -> bool:
            return router.refused > 8

        await eventually(has_request)
        for _ in range(3):
            assert (await client.result(await client.enqueue(chat_request()))).outcome == "done"
        router.mended = True
        assert {(await client.result(request_id)).outcome for request_id in waiting} == {"done"}


# The keys


async def test_the_key_accepted_last_is_tried_first_and_the_others_in_order(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\ufeffone\r\n two \n\n")
    keys = ApiKeys("three", "", "four", file=file)
    tried: list[str] = []
    while (key := await keys.untried("three", set(tried), LogReceiver())) is not None:
        tried.append(key)
    assert tried == ["three", "one", "two", "four"]
    assert await keys.untried("gone", set(), LogReceiver()) == "one"
    assert await ApiKeys().untried("", set(), LogReceiver()) == ""
    assert await ApiKeys().untried("", {""}, LogReceiver()) is None


async def test_a_key_file_that_cannot_be_read_again_changes_nothing_and_is_logged_once(tmp_path: Path) -> None:
    configure_logging("json", "info")
    file = tmp_path / "keys"
    file.write_text("secret")
    keys, receiver = ApiKeys(file=file), LogReceiver()
    with capture_logs() as logs:
        for content in (None, b"ke\xffy", b"", b"cl\xc3\xa9"):
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)
            for _ in range(2):
                assert await keys.untried("", {"secret"}, receiver) is None
                assert await keys.untried("", set(), receiver) == "secret"
        file.write_text("another")
        assert await keys.untried("", {"secret"}, receiver) == "another"
    assert [(line["event"], line["error"]) for line in logs] == [
        ("key_file_unreadable", "FileNotFoundError"),
        ("key_file_unreadable", "ValueError"),
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "holds no key"), (b"\n \n", "holds no key"), (b"\xff", "is not UTF-8"), (b"a\x01b", "cannot be sent")],
)
def test_a_key_file_without_a_usable_key_is_refused_with_the_reason(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    """The message quotes nothing of the file."""
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        read_keys(tmp_path / "keys")
