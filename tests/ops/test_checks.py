"""What `worker check` finds about each thing that it checks, and which fix it names."""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme
from conftest import StartSimulator
from raw_server import sending
from redis.asyncio import Redis
from structlog.testing import capture_logs
from waits import eventually, has_run_for

from worker.contract.entries import to_json
from worker.contract.records import WorkerRecord
from worker.engine.application import Worker
from worker.engine.pace import Pace
from worker.ops.checks import check
from worker.ops.findings import Finding
from worker.sandbox.embedded_redis import start_redis
from worker.sandbox.simulator.server import Options, Simulator
from worker.settings import ConfigError, load_settings, redacted_url
from worker.telemetry.logging import configure_logging
from worker.vllm.servers.pace import ServerPace


@pytest.fixture
async def own_redis() -> AsyncIterator[tuple[Redis, str]]:
    """A Redis whose configuration may be changed."""
    with start_redis() as embedded:
        async with Redis.from_url(embedded.url, protocol=2) as redis:
            yield redis, embedded.url


async def found(*, redis_timeout: float = 5.0, **options: object) -> list[Finding]:
    return [finding async for finding in check(options, redis_timeout=redis_timeout)]


def about(findings: list[Finding], subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject.startswith(subject)]


async def test_an_eviction_policy_and_a_missing_append_only_file_are_warnings(
    own_redis: tuple[Redis, str], simulator: Simulator
) -> None:
    redis, url = own_redis
    await redis.config_set("maxmemory-policy", "allkeys-lru")
    answers, policy, storage = about(await found(redis_url=url, vllm_urls=simulator.url), "Redis")
    assert answers.level == "ok"
    assert (policy.level, policy.fix) == ("warning", "set maxmemory-policy to noeviction")
    assert "allkeys-lru" in policy.message
    assert (storage.level, storage.fix) == ("warning", "set appendonly to yes")

    await redis.config_set("maxmemory-policy", "noeviction")
    await redis.config_set("appendonly", "yes")
    findings = await found(redis_url=url, vllm_urls=simulator.url)
    assert {finding.level for finding in findings} == {"ok"}


@pytest.mark.parametrize("mode", ["standalone", "cluster"])
async def test_a_valkey_is_recognized_with_its_version_and_mode(
    mode: str, redis_url: str, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Valkey 9 has `server_mode` in place of `redis_mode`, and states a version of Redis beside its own."""
    info = Redis.info

    async def info_of_valkey(self: Redis, *sections: str) -> dict[str, object]:
        reply = dict(await info(self, *sections))
        reply.pop("redis_mode", None)
        return reply | {"redis_version": "7.2.4", "valkey_version": "9.1.2", "server_mode": mode}

    monkeypatch.setattr(Redis, "info", info_of_valkey)
    first = about(await found(redis_url=redis_url, vllm_urls=simulator.url), "Redis")[0]
    if mode == "cluster":
        assert (first.level, first.message) == ("error", "it runs in cluster mode")
        assert "redis+cluster://" in first.fix
    else:
        assert (first.level, first.message) == ("ok", "Valkey 9.1.2 answers")


async def test_a_key_of_another_type_in_place_of_a_queue_is_an_error(
    redis: Redis, redis_url: str, simulator: Simulator
) -> None:
    await redis.set("chat:jobs", "something else", ex=60)
    (queue,) = about(await found(redis_url=redis_url, vllm_urls=simulator.url), "queue")
    assert queue == Finding(
        "error",
        "queue default",
        "the key chat:jobs is not a stream",
        "remove it, or choose another WORKER_PREFIX",
        "queue_unserved",
    )


async def test_every_queue_is_listed_with_its_jobs_and_a_lack_of_workers(
    redis: Redis, redis_url: str, simulator: Simulator
) -> None:
    await redis.xgroup_create("chat:jobs:high", "workers", id="0", mkstream=True)
    for _ in range(3):
        await redis.xadd("chat:jobs:high", {"id": "x"})
    await redis.xreadgroup("workers", "somebody", {"chat:jobs:high": ">"}, count=1)
    findings = await found(redis_url=redis_url, vllm_urls=simulator.url, queues="high,default")
    assert [finding.message for finding in about(findings, "queue")] == [
        "jobs that wait: 2; with a worker: 1",
        "no job waits or runs",
    ]
    (workers,) = about(findings, "workers")
    assert (workers.level, workers.fix) == ("warning", "start one: worker run")
    assert workers.message == "no worker runs; jobs to be done: 3"
    await redis.delete("chat:jobs:high")


async def test_before_the_first_worker_starts_that_is_no_problem(redis_url: str, simulator: Simulator) -> None:
    findings = await found(redis_url=redis_url, vllm_urls=simulator.url)
    assert about(findings, "workers") == [Finding("ok", "workers", "no worker runs yet")]


async def test_workers_are_counted_and_silent_or_paused_ones_are_listed(
    redis: Redis, redis_url: str, simulator: Simulator
) -> None:
    now = (await redis.time())[0] * 1000
    for name, beat, why in (("busy", now, ""), ("waiting", now, "no_vllm"), ("killed", now - 60_000, "")):
        lease = 1.0 if name == "killed" else 0.0
        line = WorkerRecord(name=name, beat=beat, started=1, slots=8, running=3, finished=0, paused=why, lease=lease)
        await redis.hset("chat:workers", name, to_json(line))
    await redis.hset("chat:workers", "garbled", "{")
    await has_run_for(redis, 2)
    findings = await found(redis_url=redis_url, vllm_urls=simulator.url, lease=15)
    assert about(findings, "workers") == [Finding("ok", "workers", "alive: 2; of their 16 slots in use: 6")]
    killed, waiting = about(findings, "worker ")
    assert (killed.subject, killed.level) == ("worker killed", "warning")
    assert killed.message.startswith("it has been silent for 6")
    assert (waiting.subject, waiting.message) == ("worker waiting", "it takes no jobs at the moment: no_vllm")
    assert waiting.fix.startswith("start a vLLM server")
    await redis.delete("chat:workers")


async def test_a_server_that_is_away_beside_one_that_answers_is_a_warning(redis_url: str, simulator: Simulator) -> None:
    servers = about(await found(redis_url=redis_url, vllm_urls=f"http://127.0.0.1:1,{simulator.url}"), "vLLM")
    assert [server.level for server in servers] == ["warning", "ok"]
    (alone,) = about(await found(redis_url=redis_url, vllm_urls="http://127.0.0.1:1"), "vLLM")
    assert alone.level == "error"


async def test_a_missing_or_wrong_password_is_found_with_its_fix(
    own_redis: tuple[Redis, str], simulator: Simulator
) -> None:
    redis, url = own_redis
    await redis.config_set("requirepass", "hidden-pw")
    for bad in (url, url.replace("//", "//:wrong-pw@")):
        (refused,) = about(await found(redis_url=bad, vllm_urls=simulator.url), "Redis")
        assert refused.level == "error"
        assert "HELLO" not in refused.message
        assert "redis://:PASSWORD@host" in refused.fix
        assert "-pw" not in str(refused)
    good = about(await found(redis_url=url.replace("//", "//:hidden-pw@"), vllm_urls=simulator.url), "Redis")
    assert good[0].level == "ok"


async def test_options_of_the_url_without_effect_are_listed(redis_url: str, simulator: Simulator) -> None:
    findings = await found(redis_url=f"{redis_url}?protocol=3&max_connections=4", vllm_urls=simulator.url)
    _, finding = about(findings, "settings")
    assert (finding.level, finding.message) == (
        "warning",
        "options of REDIS_URL without effect: max_connections, protocol",
    )
    assert about(findings, "queue")[0].level == "ok"


async def test_servers_that_are_not_redis_or_not_vllm_are_found(redis_url: str, simulator: Simulator) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    port = redis_url.split(":")[2].partition("/")[0]
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        web = "{}:{}".format(*server.sockets[0].getsockname())
        findings = await found(
            redis_url=f"redis://{web}", vllm_urls=f"http://127.0.0.1:{port},{simulator.url}/elsewhere"
        )
    (redis,) = about(findings, "Redis")
    no_http, no_route = about(findings, "vLLM")
    assert (redis.level, no_http.level, no_route.level) == ("error", "error", "error")
    assert redis.message
    assert no_http.message.startswith(f"cannot reach http://127.0.0.1:{port}/v1/models: ")
    assert no_route.message == "Not Found"


async def test_a_proxy_or_redirect_before_a_vllm_is_found_with_its_fix(redis_url: str, simulator: Simulator) -> None:
    page = b"<!doctype html><title>Dashboard</title>"
    pages = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(page), page)
    moved = b"HTTP/1.1 308 X\r\nlocation: https://other/v1/models\r\ncontent-length: 0\r\n\r\n"
    async with sending(pages) as web, sending(moved) as redirect:
        urls = [web, redirect, simulator.url.replace("http:", "https:"), simulator.url + "/v1/chat/completions"]
        page_found, moved_found, plain, good = about(await found(redis_url=redis_url, vllm_urls=",".join(urls)), "vLLM")
    assert page_found.message == "a web page came instead of an answer: Dashboard"
    assert page_found.fix == "check that VLLM_URLS is the URL of a vLLM server"
    assert moved_found.message == "HTTP 308: the server redirects to https://other/v1/models, which is not followed"
    assert moved_found.fix == "set VLLM_URLS to the server's own URL"
    assert plain.fix == "if the server does not speak TLS there, its URL begins with http://"
    assert (good.level, good.message) == ("ok", "serves reciter")


@pytest.mark.parametrize(
    ("sent", "text", "fix"),
    [
        (b"", "the server closed the connection", "if the server speaks TLS, its URL begins with https://"),
        (None, "Connection reset by peer", "if the server speaks TLS, its URL begins with https://"),
        (b"HTTP/1.1 404 X\r\nconnection: close\r\n\r\n<html><title>Nothing matches</title>" + b"<p>x</p>" * 999,
         "HTTP 404: a web page came instead of an answer: Nothing matches",
         "check that VLLM_URLS is the URL of a vLLM server"),
        (b"HTTP/1.1 401 X\r\nconnection: close\r\n\r\n<html><title>401</title></html>",
         "HTTP 401: a web page came instead of an answer: 401",
         "set VLLM_API_KEY to the key that the server was started with"),
        (b"HTTP/1.1 502 X\r\nconnection: close\r\n\r\n<html><title>502 Bad Gateway</title></html>",
         "HTTP 502: a web page came instead of an answer: 502 Bad Gateway",
         "start vLLM there, or set VLLM_URLS"),
    ],
)  # fmt: skip
async def test_the_reply_of_a_server_that_is_not_vllm_is_found_with_its_fix(
    redis_url: str, sent: bytes | None, text: str, fix: str
) -> None:
    """An empty reply closes the connection, and None resets it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if sent is None:
            of_socket = writer.get_extra_info("socket")
            of_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.write(sent or b"")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        where = "http://{}:{}".format(*server.sockets[0].getsockname())
        (finding,) = about(await found(redis_url=redis_url, vllm_urls=where), "vLLM")
    assert finding.level == "error"
    assert finding.message.endswith(text)
    assert finding.fix == fix


async def test_every_vllm_is_listed_with_its_models(redis_url: str, start_simulator: StartSimulator) -> None:
    one = await start_simulator(Options(model="small"))
    other = await start_simulator(Options(model="large", api_key="k"))
    findings = await found(redis_url=redis_url, vllm_urls=f"{one.url},{other.url}", vllm_api_key="k")
    assert [finding.message for finding in about(findings, "vLLM")] == ["serves small", "serves large"]


async def test_all_bad_settings_are_listed_and_nothing_else_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_SLOT", "3")
    findings = await found(redis_url="redis://:hidden-pw@h:port", vllm_urls="u:hidden-pw@h", vllm_api_key="ke\ny")
    assert len(findings) == 4
    assert {(finding.level, finding.subject) for finding in findings} == {("error", "settings")}
    assert "hidden-pw" not in str(findings)


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:port/0",
        "redis://[::1",
        "redis://:pa#ss@127.0.0.1",
        "http://127.0.0.1",
        "127.0.0.1:6379",
    ],
)
def test_an_invalid_redis_url_is_refused_in_our_words(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^REDIS_URL must be a URL such as [^']*$"):
        load_settings(redis_url=url)


def test_a_key_from_a_file_may_end_with_a_newline() -> None:
    assert load_settings(vllm_api_key=" key\n").vllm_api_key.get_secret_value() == "key"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:pw@h:1/0?password=pw", "redis://***@h:1/0"),
        ("rediss://u:p/w?#@@h/0", "rediss://***@h/0"),
        ("u:pw@h:8000", "***@h:8000"),
        ("unix://u:pw@/run/redis.sock?db=1", "unix://***@/run/redis.sock"),
        ("http://h/v1#pw", "http://h/v1"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert redacted_url(url) == shown


async def test_workers_that_cannot_renew_their_records_in_a_full_redis_are_not_called_silent(
    own_redis: tuple[Redis, str], simulator: Simulator
) -> None:
    redis, url = own_redis
    await redis.hset(
        "chat:workers", "w", to_json(WorkerRecord(name="w", beat=1, started=1, slots=8, running=3, finished=0))
    )
    await redis.config_set("maxmemory", "1")
    findings = await found(redis_url=url, vllm_urls=simulator.url)
    assert [finding.level for finding in findings] == ["ok", "ok", "error", "warning", "ok", "ok"]
    assert not about(findings, "worker")


async def become_a_replica(redis: Redis) -> None:
    await redis.replicaof("127.0.0.1", "1")


async def fail_to_save(redis: Redis) -> None:
    await redis.config_set("save", "3600 1")
    in_its_place = Path(str((await redis.config_get("dir"))["dir"]), "dump.rdb")
    await asyncio.to_thread(in_its_place.mkdir)
    await redis.bgsave(schedule=False)

    async def failed() -> bool:
        return bool((await redis.info("persistence"))["rdb_last_bgsave_status"] == "err")

    await eventually(failed)


async def miss_its_replicas(redis: Redis) -> None:
    await redis.config_set("min-replicas-to-write", "2")


@pytest.mark.parametrize(
    ("harm", "fix"),
    [
        (become_a_replica, "this is a replica: set REDIS_URL to its master"),
        (fail_to_save, "give Redis space on its disk"),
        (miss_its_replicas, "start the replicas"),
    ],
)
async def test_a_redis_that_takes_no_writes_is_an_error_and_no_worker_is_called_silent(
    own_redis: tuple[Redis, str], simulator: Simulator, harm: Callable[[Redis], Awaitable[None]], fix: str
) -> None:
    redis, url = own_redis
    await redis.hset(
        "chat:workers", "w", to_json(WorkerRecord(name="w", beat=1, started=1, slots=8, running=3, finished=0))
    )
    await harm(redis)
    findings = await found(redis_url=url, vllm_urls=simulator.url)
    (refusal,) = [finding for finding in findings if finding.level == "error"]
    assert refusal.message.startswith("it refuses writes: ")
    assert refusal.fix.startswith(fix)
    assert not about(findings, "worker")


async def test_for_a_redis_that_still_loads_the_fix_is_to_wait(simulator: Simulator) -> None:
    async def load(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):  # the check closes with replies unread
            while await reader.read(4096):
                writer.write(b"-LOADING Redis is loading the dataset in memory\r\n")
        writer.close()

    async with await asyncio.start_server(load, "127.0.0.1", 0) as server:
        where = "redis://{}:{}".format(*server.sockets[0].getsockname())
        (loading,) = about(await found(redis_url=where, vllm_urls=simulator.url), "Redis")
    assert (loading.level, loading.fix) == ("error", "wait until Redis has loaded its data from disk")


@pytest.fixture
async def secure(redis_url: str, tmp_path: Path) -> AsyncIterator[tuple[int, Path]]:
    """A port before the Redis that speaks TLS, as `localhost`, and the certificate of its authority."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    port = urlsplit(redis_url).port

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, before = await asyncio.open_connection("127.0.0.1", port)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
            target.close()
            with suppress(OSError):
                await target.wait_closed()

        await asyncio.gather(copy(reader, before), copy(behind, writer))

    async with await asyncio.start_server(pass_on, "localhost", 0, family=socket.AF_INET, ssl=context) as server:
        yield server.sockets[0].getsockname()[1], tmp_path / "ca.pem"


@pytest.fixture
async def unhelpful() -> AsyncIterator[dict[str, int]]:
    """The ports of a server that never answers and of one that closes every connection."""
    over = asyncio.Event()

    async def stay_mute(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with (
        await asyncio.start_server(stay_mute, "127.0.0.1", 0) as mute,
        await asyncio.start_server(close, "127.0.0.1", 0) as closing,
    ):
        yield {"mute": mute.sockets[0].getsockname()[1], "closing": closing.sockets[0].getsockname()[1]}
        over.set()
        await asyncio.sleep(0)


WORDS: list[tuple[str, str, str]] = [
    # REDIS_URL, words of the message, and the fix; {plain} and {tls} are ports, {ca} is a file
    ("redis://127.0.0.1:1/0", "Connect call failed", "start Redis there, or set REDIS_URL"),
    ("redis://127.0.0.1:{mute}/0", "Timeout reading", "Redis accepts connections and is silent"),
    (
        "redis://127.0.0.1:{closing}/0",
        "",
        "it closes connections at once: check that REDIS_URL",
    ),
    ("redis://no-such-host.invalid/0", "not known", "check the name of the host in REDIS_URL"),
    ("rediss://127.0.0.1:{plain}/0", "Timeout", "this port has no TLS: begin REDIS_URL with redis, not rediss"),
    ("rediss+cluster://127.0.0.1:{plain}", "Timeout", "this port has no TLS: begin REDIS_URL with redis, not rediss"),
    ("redis://127.0.0.1:{tls}/0", "", "this port requires TLS: begin REDIS_URL with rediss, not redis"),
    (
        "redis+sentinel://127.0.0.1:{tls}/m",
        "no sentinel answers",
        "this port requires TLS: begin REDIS_URL with rediss",
    ),
    (
        "rediss://localhost:{tls}/0",
        "CERTIFICATE_VERIFY_FAILED",
        "trust the certificate's issuer: ?ssl_ca_certs=/path/to/ca.pem",
    ),
    ("rediss://127.0.0.1:{tls}/0?ssl_ca_certs={ca}", "address mismatch", "use the host name of the server's cert"),
    ("redis://127.0.0.1:{plain}/99", "DB index is out of range", "set REDIS_URL to a database that exists: 0 to 15"),
    ("redis://:pw@127.0.0.1:{plain}/0", "without any password", "remove the password from REDIS_URL"),
    ("redis+cluster://127.0.0.1:{plain}", "cluster support disabled", "this is no cluster: begin REDIS_URL with redis"),
    ("redis+sentinel://127.0.0.1:{plain}/m", "unknown command 'SENTINEL'", "no sentinel listens there: set REDIS_URL"),
]


@pytest.mark.parametrize(("url", "words", "fix"), WORDS)
async def test_trouble_on_the_way_to_redis_is_found_with_its_fix(
    url: str, words: str, fix: str, redis_url: str, secure: tuple[int, Path], simulator: Simulator,
    unhelpful: dict[str, int],
) -> None:  # fmt: skip
    url = url.format(plain=urlsplit(redis_url).port, tls=secure[0], ca=secure[1], **unhelpful)
    # Only where Redis never answers is the limit part of the case. Even a busy machine has to connect within it.
    limit = 2 if words in {"Timeout", "Timeout reading"} else 60
    (finding,) = about(await found(redis_url=url, vllm_urls=simulator.url, redis_timeout=limit), "Redis")
    assert finding.level == "error"
    assert words.lower() in finding.message.lower().replace("`", "'")
    assert finding.fix.startswith(fix)


MIXED_UP = [case for case in WORDS if "TLS" in case[2] and "+" not in case[0]]


@pytest.mark.parametrize(("url", "words", "fix"), MIXED_UP)
async def test_a_worker_that_waits_for_redis_logs_that_tls_is_mixed_up(
    url: str, words: str, fix: str, redis_url: str, secure: tuple[int, Path], simulator: Simulator
) -> None:
    """The error itself is only a timeout or a closed connection."""
    url = url.format(plain=urlsplit(redis_url).port, tls=secure[0])
    service = Worker(load_settings(redis_url=url, vllm_urls=simulator.url), pace=Pace(command_timeout=0.5))
    configure_logging("json")
    with capture_logs() as logs:
        running = asyncio.create_task(service.run())

        async def is_logged() -> bool:
            return any(entry["event"] == "redis_unavailable" for entry in logs)

        await eventually(is_logged)
        service.stop()
        await running
    logged = next(entry for entry in logs if entry["event"] == "redis_unavailable")
    assert words in logged["error"]
    assert logged["advice"] == fix


async def test_a_certificate_can_be_trusted_in_two_ways(
    secure: tuple[int, Path], simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, authority = secure
    url = f"rediss://localhost:{port}/0"
    named = about(await found(redis_url=f"{url}?ssl_ca_certs={authority}", vllm_urls=simulator.url), "Redis")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    trusted = about(await found(redis_url=url, vllm_urls=simulator.url), "Redis")
    assert named[0].level == trusted[0].level == "ok"


async def test_a_vllm_that_lists_its_models_late_may_be_busy(redis_url: str) -> None:
    """Or it is a router that queries all of its servers first. Workers do not treat it as away."""
    async with sending(then_close=False) as url:
        options: dict[str, object] = {"redis_url": redis_url, "vllm_urls": url}
        findings = [finding async for finding in check(options, pace=ServerPace(probe_limit=2))]
    assert findings[-1].message == f"{url}/v1/models did not answer within 2 s"
    assert findings[-1].fix == "check whether it is busy: workers give it more time to answer"
