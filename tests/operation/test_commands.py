"""The command as its user meets it: what it prints where, its exit status, and how it reports a mistake."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from command import Ended, environment, line_with, rest, run, started
from conftest import StartSimulator, StartWorker, stream
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from steered_clock import SteeredClock
from waits import eventually

from worker import Client, Delta
from worker.cli.main import main
from worker.cli.options import Surroundings
from worker.contract.ids import SEAL
from worker.ops.checks import check
from worker.sandbox.embedded_redis import find_servers, free_port, start_redis
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.version import version

WHO = [{"role": "user", "content": "Who are you?"}]
STORY = [{"role": "user", "content": "Tell me a story"}]
NOWHERE = "redis://:hidden-pw@127.0.0.1:1/0"


def prints(ended: Ended, *texts: str) -> None:
    """Check that standard error has these texts, and no traceback."""
    assert "Traceback" not in ended.err
    for text in texts:
        assert text in ended.err


def text_of(lines: list[str]) -> str:
    return "".join(json.loads(line).get("content", "") for line in lines)


# run, enqueue and follow


async def test_a_worker_process_serves_a_request_and_its_text_is_streamed(
    redis_url: str, start_simulator: StartSimulator
) -> None:
    clock = SteeredClock(halt_after=5)
    slow = await start_simulator(clock=clock)
    async with (
        started("run", REDIS_URL=redis_url, VLLM_URLS=slow.url) as worker,
        started("enqueue", "Tell me a story", "--model", "reciter", "--follow", REDIS_URL=redis_url) as process,
    ):
        assert process.stdout is not None
        first = await process.stdout.read(20)
        assert slow.served[0].ended is None, "the text is there before the answer has ended"
        clock.hurry()
        ended = await rest(process)
        assert first.decode() + ended.out == answer_to(STORY) + "\n", "standard output is the text alone"
        assert ended.status == 0
        prints(ended, "· request ", "· waiting for a worker", "· taken by ", "· done, ")
        worker.terminate()
        assert (await rest(worker)).status == 0


async def test_json_lines_are_streamed(
    redis_url: str, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    clock = SteeredClock(halt_after=5)
    slow = await start_simulator(clock=clock)
    await start_worker(slow, gap_timeout=60)
    async with started("enqueue", "Who are you?", "--follow", "--json", REDIS_URL=redis_url) as process:
        first = await line_with(process.stdout, '"delta"')
        assert slow.served[0].ended is None
        clock.hurry()
        ended = await rest(process)
    entries = [json.loads(line) for line in (first, *ended.lines)]
    assert all(entry["id"] and entry["type"] for entry in entries)
    assert entries[-1]["type"] == "done"
    assert entries[-1]["id"] == str(SEAL)
    assert text_of([first, *ended.lines]) == answer_to(WHO)
    assert ended.status == 0


@pytest.mark.usefixtures("worker")
async def test_a_request_is_read_from_a_file_or_from_standard_input(
    redis_url: str, simulator: Simulator, tmp_path: Path
) -> None:
    request = {"messages": WHO, "temperature": 0.5, "max_tokens": 3}
    file = tmp_path / "request.json"
    file.write_text(json.dumps(request), encoding="utf-8")
    named, piped = await asyncio.gather(
        run("enqueue", "--request", str(file), "--id", "named", "--follow", REDIS_URL=redis_url),
        run(
            "enqueue", "--request", "-", "--model", "reciter", "--max-tokens", "5", "--follow",
            stdin=json.dumps(request).encode(), REDIS_URL=redis_url,
        ),
    )  # fmt: skip
    assert (named.status, piped.status) == (0, 0)
    prints(named, "· request named\n", "· done, 3 tokens")
    prints(piped, "· done, 5 tokens")
    assert {served.request.get("max_tokens") for served in simulator.served} == {3, 5}
    assert all(served.request["temperature"] == 0.5 for served in simulator.served)


async def test_enqueue_prints_the_id_and_nothing_else(redis_url: str, client: Client) -> None:
    plain, as_json = await asyncio.gather(
        run("enqueue", "Hi", "--retention", "60", "--queue", "low", REDIS_URL=redis_url),
        run("enqueue", "Hi", "--timeout", "30", "--json", "--redis-url", redis_url),
    )
    assert (plain.status, as_json.status) == (0, 0)
    assert plain.err == as_json.err == ""
    for request_id in (plain.out.strip(), json.loads(as_json.out)["id"]):
        assert (await client.status(request_id)).state.value == "queued"


@pytest.mark.usefixtures("worker")
async def test_a_failed_answer_is_exit_status_1_with_a_sentence(redis_url: str) -> None:
    ended = await run("enqueue", "Hi", "--model", "nope", "--follow", REDIS_URL=redis_url)
    assert (ended.status, ended.out) == (1, "")
    prints(ended, "error: The model `nope` does not exist", "(model_not_found)")


@pytest.mark.usefixtures("worker")
async def test_an_id_that_another_request_has_is_refused(redis_url: str, client: Client) -> None:
    await client.result(await client.enqueue({"messages": WHO}, id="mine"))
    ended = await run("enqueue", "Something else", "--id", "mine", REDIS_URL=redis_url)
    assert (ended.status, ended.out) == (1, "")
    prints(ended, "Error: the id mine belongs to another request")


@pytest.mark.usefixtures("worker")
async def test_following_a_finished_request_from_its_start_or_after_an_entry(redis_url: str, client: Client) -> None:
    request_id = await client.enqueue({"messages": WHO})
    entries = [entry async for entry in client.follow(request_id)]
    seen = entries[6]
    whole, tail, sealed = await asyncio.gather(
        run("follow", request_id, REDIS_URL=redis_url),
        run("follow", request_id, "--after", str(seen.id), "--json", REDIS_URL=redis_url),
        run("follow", request_id, "--after", str(entries[-2].id), "--json", REDIS_URL=redis_url),
    )
    assert (whole.status, tail.status, sealed.status) == (0, 0, 0)
    assert whole.out == answer_to(WHO) + "\n"
    assert [json.loads(line)["id"] for line in tail.lines] == [str(entry.id) for entry in entries[7:]]
    assert [json.loads(line)["type"] for line in sealed.lines] == ["done"]


async def test_following_a_request_that_waits_goes_on_when_a_worker_comes(
    redis_url: str, client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    request_id = await client.enqueue({"messages": WHO})
    async with started("follow", request_id, REDIS_URL=redis_url) as process:
        await line_with(process.stderr, "waiting for a worker")
        await start_worker(simulator)
        ended = await rest(process)
    assert (ended.status, ended.out) == (0, answer_to(WHO) + "\n")


async def test_following_an_unknown_or_expired_request_is_exit_status_1(redis_url: str, redis: Redis) -> None:
    await redis.set("chat:ended:{old}", json.dumps({"outcome": "done", "time": 1000}), ex=60)
    unknown, expired = await asyncio.gather(
        run("follow", "nope", REDIS_URL=redis_url), run("follow", "old", "--json", REDIS_URL=redis_url)
    )
    assert (unknown.status, unknown.out, expired.status, expired.out) == (1, "", 1, "")
    prints(unknown, "Error: the request nope is unknown")
    prints(expired, '{"error":"request old ended (done) and its log has expired","status":1}')


async def test_reasoning_goes_to_standard_error_and_ends_its_line(redis_url: str, redis: Redis) -> None:
    key = "chat:tokens:{thinker}"
    for entry_id, fields in (
        ("1-0", {"type": "of_a_later_version"}),
        ("1-1", {"type": "delta", "reasoning": "Let me "}),
        ("1-2", {"type": "delta", "reasoning": "think."}),
        ("1-3", {"type": "delta", "content": "Four"}),
        (str(SEAL), {"type": "done"}),
    ):
        await redis.xadd(key, fields, id=entry_id)  # type: ignore[arg-type]  # dict is invariant
    await redis.expire(key, 60)
    ended = await run("follow", "thinker", REDIS_URL=redis_url)
    assert (ended.status, ended.out, ended.err) == (0, "Four\n", "Let me think.\n· done\n")


async def test_a_broken_pipe_ends_follow_quietly(
    redis_url: str, client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=100))))
    request_id = await client.enqueue({"messages": STORY})
    reader, writer = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker", "follow", request_id, "--json",
        stdout=writer, stderr=asyncio.subprocess.PIPE, env=environment(REDIS_URL=redis_url),
    )  # fmt: skip
    os.close(writer)
    await asyncio.to_thread(os.read, reader, 1)
    os.close(reader)  # as `head -1` does
    ended = await rest(process)
    assert ended.err == ""
    await client.cancel(request_id)


# cancel


async def test_cancel_prints_the_state_that_the_request_was_in(
    redis_url: str, client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    waiting = await client.enqueue({"messages": WHO}, queue="unserved")
    await start_worker(await start_simulator(clock=SteeredClock(halt_after=3)), gap_timeout=300)
    running = await client.enqueue({"messages": STORY})

    async with started("follow", running, REDIS_URL=redis_url) as follower:
        await line_with(follower.stderr, "taken by")
        of_waiting, of_running, of_unknown = await asyncio.gather(
            run("cancel", waiting, REDIS_URL=redis_url),
            run("cancel", running, "--json", REDIS_URL=redis_url),
            run("cancel", "nobody", REDIS_URL=redis_url),
        )
        followed = await rest(follower)
    assert (of_waiting.status, of_waiting.out) == (0, "cancelled; the request was queued\n")
    assert json.loads(of_running.out) == {"id": running, "cancelled": True, "was": "running"}
    assert (of_unknown.status, of_running.status) == (0, 0)
    assert "the request was unknown" in of_unknown.out
    assert followed.status == 1, "a follower of a cancelled request does not have the whole answer"
    prints(followed, "· cancelled")

    again, as_json = await asyncio.gather(
        run("cancel", waiting, REDIS_URL=redis_url), run("cancel", running, "--json", REDIS_URL=redis_url)
    )
    assert (again.status, again.out) == (0, "the request had ended before: cancelled\n")
    assert json.loads(as_json.out) == {"id": running, "cancelled": False, "was": "ended"}


# run: how it ends, and what it logs


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_worker_with_0_after_its_jobs(
    signum: signal.Signals, redis_url: str, client: Client, start_simulator: StartSimulator
) -> None:
    clock = SteeredClock(halt_after=1)
    slow = await start_simulator(clock=clock)
    async with started("run", REDIS_URL=redis_url, VLLM_URLS=slow.url) as process:
        request_id = await client.enqueue({"messages": WHO})
        text, logged = "", ""
        async for entry in client.follow(request_id):
            if isinstance(entry, Delta):
                if not text:
                    process.send_signal(signum)
                    while "worker_draining" not in logged:
                        logged += await line_with(process.stderr, "")
                    clock.hurry()
                text += entry.content
        assert text == answer_to(WHO), "the stream was not cut"
        ended = await rest(process)
    assert ended.status == 0
    assert ended.out == ""
    events = [json.loads(line)["event"] for line in (logged + ended.err).splitlines()]
    assert events == ["worker_starting", "worker_started", "worker_draining", "job_finished", "worker_stopped"]


async def test_a_gateway_process_serves_and_ends_on_sigterm_with_0(redis_url: str) -> None:
    listen = "127.0.0.1:0"
    async with (
        httpx.AsyncClient(timeout=60) as http,
        started("gateway", "--no-auth", REDIS_URL=redis_url, GATEWAY_LISTEN=listen, GATEWAY_DRAIN_DELAY="0") as process,
    ):
        address = json.loads(await line_with(process.stderr, "gateway_started"))["listen"]
        assert (await http.get(f"http://{address}/healthz")).status_code == 200
        process.terminate()
        ended = await rest(process)
    assert ended.status == 0
    prints(ended, "gateway_stopped")


async def test_a_worker_that_waits_for_redis_logs_that_and_ends_on_sigterm() -> None:
    async with started("run", REDIS_URL=NOWHERE) as process:
        starting = json.loads(await line_with(process.stderr, "worker_starting"))
        line = json.loads(await line_with(process.stderr, "redis_unavailable"))
        assert starting["redis"] == line["redis"] == "redis://***@127.0.0.1:1/0"
        assert "refused" in line["error"]
        process.terminate()
        ended = await rest(process)
    assert ended.status == 0
    assert "hidden-pw" not in ended.err


async def test_no_secret_prompt_or_output_is_printed_or_logged(
    start_simulator: StartSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, password = "key-4711-secret", "pass-0815-secret"
    prompt, output = "my diary says zanzibar", "the answer is xylophone"
    guarded = await start_simulator(Options(api_key=key, scenario=Scenario(text=output)))
    with start_redis() as embedded:
        with BlockingRedis.from_url(embedded.url, protocol=2) as redis:
            redis.config_set("requirepass", password)
        url = embedded.url.replace("//", f"//:{password}@")
        settings = {
            "REDIS_URL": url,
            "VLLM_API_KEY": key + "\n",  # as a secret from a file often is
            "VLLM_URLS": guarded.url,
            "WORKER_LOG_LEVEL": "debug",
            "WORKER_TRIES": "1",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        checked = await run("check")
        async with started("run") as process:
            async with Client(url) as client:
                done = await client.result(
                    await client.enqueue({"messages": [{"role": "user", "content": prompt}]}, id="good")
                )
                odd: dict[str, object] = {"messages": [{"role": "user", "content": prompt}], "top_k": prompt}
                failed = await client.result(await client.enqueue(odd | {"simulate": {"fault": "cut"}}, id="bad"))
            process.terminate()
            ended = await rest(process)
        unreachable = await run("check", VLLM_URLS="http://somebody:url-0815-secret@127.0.0.1:1")
        misspelt = await run("check", "--vllm-urls", "somebody:url-0815-secret@host", "--redis-url", url + "#x@y")
        helped = await run("run", "--help")
    assert (done.outcome, done.text, failed.outcome) == ("done", output, "error")
    assert (ended.status, unreachable.status, misspelt.status) == (0, 1, 1)
    printed = "".join(e.out + e.err for e in (checked, ended, unreachable, misspelt, helped))
    for secret in (key, password, "url-0815-secret", "zanzibar", "xylophone"):
        assert secret not in printed

    lines = [json.loads(line) for line in ended.err.splitlines()]
    assert all(line["worker"] and line["level"] and line["timestamp"] for line in lines)
    finished = {line["request_id"]: line for line in lines if line["event"] == "job_finished"}
    assert {name: line["outcome"] for name, line in finished.items()} == {"good": "done", "bad": "error"}
    good, bad = finished["good"], finished["bad"]
    assert (good["queue"], good["model"], good["tokens"]) == ("default", "reciter", done.usage["completion_tokens"])
    assert (bad["code"], bad["queue"], bad["seconds"] >= 0) == ("upstream_truncated", "default", True)
    versions = {line["version"] for line in lines if line["event"] in ("worker_starting", "worker_started")}
    assert versions == {version()}


# Redis is away


async def test_a_command_notes_at_once_that_redis_is_away_and_goes_on_when_it_is_back() -> None:
    port = free_port()
    async with started("enqueue", "Hi", REDIS_URL=f"redis://:hidden-pw@127.0.0.1:{port}/0") as process:
        line = await line_with(process.stderr, "Redis does not answer")
        assert f"`worker check` shows how to fix it. Trying redis://***@127.0.0.1:{port}/0 (REDIS_URL) for 10 s" in line
        server = subprocess.Popen(  # noqa: ASYNC220 - it starts at once
            [find_servers()[0], "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--requirepass", "hidden-pw"],
            stdout=subprocess.DEVNULL,
        )
        try:
            ended = await rest(process)
        finally:
            server.kill()
            server.wait()
    assert ended.status == 0
    assert ended.out.strip()


@pytest.mark.parametrize("arguments", [["enqueue", "Hi"], ["follow", "x"], ["cancel", "x", "--json"]])
def test_a_command_gives_up_when_redis_stays_away(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", NOWHERE)
    result = CliRunner().invoke(main, arguments, obj=Surroundings(redis_patience=0.2))
    assert (result.exit_code, result.stdout) == (1, "")
    assert ('{"error":"' if "--json" in arguments else "Error: ") + "Redis does not answer" in result.stderr
    assert "hidden-pw" not in result.output


def test_an_error_about_a_wrong_password_names_redis(redis_url: str) -> None:
    result = CliRunner().invoke(main, ["enqueue", "Hi", "--redis-url", redis_url.replace("//", "//no:body@")])
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: Redis refuses: invalid username-password pair or user is disabled. `worker check` shows how to fix it\n"
    )
    result = CliRunner().invoke(main, ["pause", "default", "--redis-url", redis_url.replace("//", "//no:body@")])
    assert result.stderr.startswith("Error: Redis refuses: invalid username-password pair or user is disabled: correct")


# mistakes

MISTAKES: list[tuple[list[str], str]] = [
    (["nonsense"], "No such command 'nonsense'"),
    (["enqueue"], "give either a PROMPT or --request FILE"),
    (["enqueue", "Hi", "--request", "-"], "give either a PROMPT or --request FILE"),
    (["enqueue", "--request", "/no/such/file"], "No such file"),
    (["enqueue", "--request", "."], "Is a directory"),
    (["enqueue", "Hi", "--max-tokens", "many"], "'many' is not a valid integer"),
    (["enqueue", "Hi", "--id", "a/b"], "id 'a/b' cannot be used"),
    (["enqueue", "Hi", "--queue", "a b"], "the queue 'a b' has an invalid name"),
    (["enqueue", "Hi", "--timeout", "nan"], "the timeout is nan"),
    (["enqueue", "Hi", "--timeout", "-1"], "the timeout is -1"),
    (["enqueue", "Hi", "--retention", "0"], "retention is '0'"),
    (["enqueue", "Hi", "--prefix", "a b"], "WORKER_PREFIX is 'a b'"),
    (["enqueue", "\udcff"], "the PROMPT is not UTF-8"),
    (["enqueue", "Hi", "--model", "\udcff"], "the job holds text that is not Unicode"),
    (["enqueue", "Hi", "--fallback", "\udcff"], "the job holds text that is not Unicode"),
    (["enqueue", "Hi", "--fallback", ""], "one has no name"),
    (["follow"], "Missing argument 'ID'"),
    (["follow", "a b"], "a request id is 1 to 128 characters"),
    (["follow", "x", "--after", "soon"], "'soon' is not the id of a log entry"),
    (["cancel", "}{"], "a request id is 1 to 128 characters"),
    (["run", "--slots", "many"], "WORKER_SLOTS is 'many'"),
    (["run", "--log-level", "loud"], "WORKER_LOG_LEVEL is 'loud'"),
    (["run", "--redis-url", "redis://127.0.0.1:port"], "REDIS_URL must be a URL such as"),
    (["run", "--vllm-urls", "http://127.0.0.1:port"], "VLLM_URLS holds 'http://127.0.0.1:port'"),
    (["run", "--vllm-api-key", "ключ"], "VLLM_API_KEY holds characters that cannot be sent"),
    (["demo", "--vllm-url", "nowhere"], "VLLM_URLS holds 'nowhere'"),
    (["demo", "--redis-url", "nowhere"], "REDIS_URL must be a URL such as"),
    (["simulate", "--fault", "sabotage"], "--fault must be one of refuse, 429"),
    (["simulate", "--port", "99999"], "99999 is not in the range"),
    (["simulate", "--rate", "-1"], "-1.0 is not in the range"),
]
REQUESTS: list[tuple[bytes, str]] = [
    (b"", "the request is not JSON"),
    (b"{messages}", "the request is not JSON"),
    (b"\xff\xfe", "the request is not JSON"),
    (b"[" * 100_000, "the request is not JSON"),
    (b"[]", "the request is not a JSON object"),
    (b"{}", "the request has no messages"),
    (b'{"messages": [1], "n": 0}', "the request's n is 0"),
]


def mistaken(arguments: list[str], text: str, given: bytes = b"") -> None:
    """Check that the mistake is the only line of standard error, also where no Redis answers."""
    result = CliRunner().invoke(main, arguments, input=given, env={"REDIS_URL": NOWHERE})
    assert (result.exit_code, result.stdout) == (2, "")
    assert isinstance(result.exception, SystemExit)
    (error,) = [line for line in result.stderr.splitlines() if not line.startswith(("Usage:", "Try ")) and line]
    assert error.startswith("Error: ")
    assert text in error


@pytest.mark.parametrize(("arguments", "text"), MISTAKES)
def test_a_mistake_is_a_line_with_exit_status_2(arguments: list[str], text: str) -> None:
    mistaken(arguments, text)


@pytest.mark.parametrize(("given", "text"), REQUESTS)
def test_an_invalid_request_is_a_line_with_exit_status_2(given: bytes, text: str) -> None:
    mistaken(["enqueue", "--request", "-"], text, given)


async def test_a_misspelt_setting_stops_a_worker_with_a_hint() -> None:
    ended, malformed = await asyncio.gather(
        run("run", WORKER_SLOT="3", WORKER_LEASE="0"), run("enqueue", "--request", "-", stdin=b"{messages}")
    )
    assert (ended.status, ended.out) == (2, "")
    prints(ended, "WORKER_SLOT is not a setting: did you mean WORKER_SLOTS?", "WORKER_LEASE is '0'")
    assert len(ended.err.splitlines()) == 2
    assert (malformed.status, malformed.out) == (2, "")
    prints(malformed, "Error: the request is not JSON")


async def test_variables_of_kubernetes_and_of_other_programs_stop_no_command(
    redis_url: str, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "WORKER_PORT": "tcp://10.0.0.1:80", "WORKER_SERVICE_HOST": "10.0.0.1", "WORKER_PORT_80_TCP_ADDR": "10.0.0.1",
        "WORKER_CONCURRENCY": "4", "WORKER_CLASS": "sync",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    enqueued = await run("enqueue", "Hi", REDIS_URL=redis_url, WORKER_SLOTS="0", VLLM_URLS="nowhere")
    assert (enqueued.status, enqueued.err) == (0, "")
    checked = await run("check", REDIS_URL=redis_url, VLLM_URLS=simulator.url)
    assert checked.status == 0
    assert " ".join(checked.out.split()).count("WORKER_CLASS, WORKER_CONCURRENCY") == 1
    assert "WORKER_PORT" not in checked.out
    async with started("run", REDIS_URL=redis_url, VLLM_URLS=simulator.url) as process:
        warning = json.loads(await line_with(process.stderr, "unknown_settings"))
        assert (warning["level"], warning["names"]) == ("warning", ["WORKER_CLASS", "WORKER_CONCURRENCY"])
        await line_with(process.stderr, "worker_started")
        process.terminate()
        ended = await rest(process)
    assert (ended.status, "unknown_settings" in ended.err) == (0, False)


# check


async def test_check_finds_nothing_wrong(redis_url: str, simulator: Simulator) -> None:
    ended = await run("check", REDIS_URL=redis_url, VLLM_URLS=f"{simulator.url}/v1")
    assert (ended.status, ended.err) == (0, "")
    findings = re.split(r"\n(?! )", ended.out.strip())
    assert [finding.split()[0] for finding in findings] == ["ok", "ok", "warning", "ok", "ok", "ok"]
    assert f"vLLM {simulator.url}: serves reciter" in ended.out
    assert "append-only file" in findings[2]
    assert max(map(len, ended.lines)) <= 80


async def test_check_lists_everything_that_is_wrong_at_once(start_simulator: StartSimulator) -> None:
    guarded = await start_simulator(Options(api_key="k"))
    urls = f"http://127.0.0.1:1,{guarded.url}"
    plain, as_json = await asyncio.gather(
        run("check", REDIS_URL=NOWHERE, VLLM_URLS=urls), run("check", "--json", REDIS_URL=NOWHERE, VLLM_URLS=urls)
    )
    assert (plain.status, plain.err, as_json.status) == (1, "", 1)
    _, redis, away, refused = (" ".join(finding.split()) for finding in re.split(r"\n(?! )", plain.out.strip()))
    assert redis.startswith("error Redis redis://***@127.0.0.1:1/0: ")
    assert redis.endswith("→ start Redis there, or set REDIS_URL")
    assert away.endswith("→ start vLLM there, or set VLLM_URLS")
    assert "Unauthorized → set VLLM_API_KEY to the key that the server was started with" in refused
    findings = [json.loads(line) for line in as_json.lines]
    assert [finding["level"] for finding in findings] == ["ok", "error", "error", "error"]
    assert all(set(finding) == {"level", "subject", "text", "mend"} for finding in findings)


async def test_check_lists_bad_settings() -> None:
    ended = await run("check", "--json", "--slots", "0", WORKER_PREFX="x", VLLM_URLS=",")
    assert ended.status == 1
    texts = [json.loads(line)["text"] for line in ended.lines]
    assert len(texts) == 3
    assert any("did you mean WORKER_PREFIX?" in text for text in texts)


# help

HELP = {
    "run": ["--redis-url", "REDIS_URL", "redis://127.0.0.1:6379/0", "--slots", "WORKER_SLOTS", "[auto|json|console]"],
    "demo": ["--redis-url", "--vllm-url", "--json"],
    "enqueue": ["PROMPT", "--request", "--follow", "--json", "--id", "--timeout", "--redis-url"],
    "follow": ["ID", "--after", "--json"],
    "cancel": ["ID", "--json"],
    "check": ["--vllm-urls", "--json", "Exit status 1"],
    "dead": ["list", "show", "retry", "drop"],
    "simulate": ["--port", "--rate", "--fault", "--first-token"],
}


@pytest.mark.parametrize("name", HELP)
def test_the_help_of_each_command_has_an_example(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"worker {name} " in result.stdout.partition("  Example: ")[2]
    for text in HELP[name]:
        assert text in result.stdout


async def test_the_help_lists_every_command_and_where_to_begin() -> None:
    helped, long, short = await asyncio.gather(run("--help"), run("--version"), run("-V"))
    assert (helped.status, long.status, short.out) == (0, 0, long.out)
    for name in HELP:
        assert f"\n  {name} " in helped.out
    sections = re.findall(r"^(\w.*):$", helped.out, re.MULTILINE)
    assert sections == ["Options", "Requests", "Workers", "Gateway", "Try it"]
    assert "..." not in helped.out.partition("Options:")[2], "every line is whole"
    assert "worker demo" in helped.out
    assert long.out.startswith("vllm-relay ")


# simulate, and what is not installed


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_simulate_serves_until_a_signal(signum: signal.Signals) -> None:
    async with started("simulate", "--port", "0", "--model", "mine", "--api-key", "k") as process:
        url = (await line_with(process.stderr, "listens on")).split()[-1]
        findings = [f async for f in check({"vllm_urls": url, "vllm_api_key": "k", "redis_url": NOWHERE})]
        assert (findings[-1].subject, findings[-1].message) == (f"vLLM {url}", "serves mine")
        process.send_signal(signum)
        ended = await rest(process)
    assert (ended.status, ended.out) == (0, "")
    prints(ended)


@pytest.mark.parametrize("name", ["demo", "simulate"])
async def test_a_command_of_the_extra_names_it_where_it_is_not_installed(name: str, tmp_path: Path) -> None:
    (tmp_path / "h11.py").write_text("raise ModuleNotFoundError(\"No module named 'h11'\", name='h11')\n")
    ended = await run(name, PYTHONPATH=str(tmp_path))
    assert (ended.status, ended.out) == (1, "")
    expected = "h11 is missing, of the extra `demo`: install it, in a clone of vllm-relay: pip install '.[demo]'"
    assert ended.err == f"Error: {expected}\n"  # the package is on no index


async def test_a_port_in_use_is_a_line(simulator: Simulator) -> None:
    ended = await run("simulate", "--port", simulator.url.rpartition(":")[2])
    assert ended.status == 1
    prints(ended, "address already in use")
    assert len(ended.err.splitlines()) == 1


async def test_enqueue_accepts_fallback_models(redis_url: str, redis: Redis) -> None:
    ended = await run("enqueue", "Hi", "--model", "a", "--fallback", "b", "--fallback", "c", REDIS_URL=redis_url)
    ((_, job),) = await stream(redis, "chat:jobs")
    assert (ended.status, json.loads(job[b"fallbacks"])) == (0, ["b", "c"])


async def test_a_worker_that_starts_later_runs_an_enqueued_job(
    redis_url: str, client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    ended = await run("enqueue", "Who are you?", REDIS_URL=redis_url)
    await start_worker(simulator)
    request_id = ended.out.strip()

    async def done() -> bool:
        return (await client.status(request_id)).outcome == "done"

    await eventually(done)


# Small things


async def interrupted(process: Process) -> Ended:
    """Send Ctrl-C and wait for the end."""
    process.send_signal(signal.SIGINT)
    return await rest(process)


@pytest.mark.parametrize("as_json", [False, True], ids=["plain", "json"])
async def test_ctrl_c_while_following_prints_how_to_go_on_and_how_to_cancel(
    redis_url: str, client: Client, start_worker: StartWorker, start_simulator: StartSimulator, *, as_json: bool
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(fault="stall", after=3))), gap_timeout=60)
    flag = ["--json"] if as_json else []
    async with started("enqueue", "Hi", "--id", "mine", "--follow", *flag, REDIS_URL=redis_url) as process:
        await line_with(process.stdout if as_json else process.stderr, '"1-3"' if as_json else "taken by")
        ended = await interrupted(process)
    message = json.loads(ended.err.splitlines()[-1])["error"] if as_json else ended.err
    found = re.search(r"still running: worker follow mine --after (\d+-\d+), or worker cancel mine", message)
    assert found
    assert ended.status == 130
    assert "Traceback" not in ended.err
    async with started("follow", "mine", REDIS_URL=redis_url) as process:
        await line_with(process.stderr, "taken by")
        again = await interrupted(process)
    assert again.status == 130
    await client.cancel("mine")


async def test_ctrl_c_before_anything_was_added_ends_quietly() -> None:
    async with started("enqueue", "Hi", REDIS_URL=NOWHERE) as process:
        await line_with(process.stderr, "Redis does not answer")
        ended = await interrupted(process)
    assert (ended.status, ended.out, ended.err) == (130, "", "")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["enqueue", "--json", ""], 2, "the PROMPT is empty"),
        (["enqueue", "--json", "Hi", "--odd"], 2, "No such option '--odd'"),
        (["follow", "--json", "a b"], 2, "a request id is 1 to 128"),
        (["follow", "nope", "--json"], 1, "the request nope is unknown"),
        (["dead", "show", "--json", "1-1"], 1, "there is no such letter"),
        (["run", "--json"], 2, "No such option '--json'"),
    ],
)
def test_errors_are_json_where_the_rest_is(arguments: list[str], status: int, words: str, redis_url: str) -> None:
    result = CliRunner().invoke(main, arguments, env={"REDIS_URL": redis_url})
    assert (result.exit_code, result.stdout) == (status, "")
    error = json.loads(result.stderr)
    assert error["status"] == status
    assert words in error["error"]


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    mistaken(["enqueue", prompt], "the PROMPT is empty")


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_is_heeded(no_color: str) -> None:
    arguments = ["check", "--redis-url", NOWHERE, "--vllm-urls", "http://127.0.0.1:1"]
    result = CliRunner().invoke(main, arguments, color=True, env={"NO_COLOR": no_color})
    assert ("\x1b[" in result.stdout) == (not no_color)


def test_help_names_the_kind_of_each_value() -> None:
    helped = CliRunner().invoke(main, ["run", "--help"]).stdout
    for option in ("--metrics HOST:PORT", "--retention SECONDS", "--lease SECONDS", "--vllm-api-key KEY"):
        assert option in helped
    assert "--timeout SECONDS" in CliRunner().invoke(main, ["enqueue", "--help"]).stdout


def test_a_shell_completes_the_commands() -> None:
    def complete(**variables: str) -> str:
        return CliRunner().invoke(main, prog_name="worker", env=variables).stdout

    assert "_worker_completion" in complete(_WORKER_COMPLETE="zsh_source")  # for bash, click asks for its version first
    assert complete(_WORKER_COMPLETE="bash_complete", COMP_WORDS="worker enq", COMP_CWORD="1") == "plain,enqueue\n"


async def test_enqueue_notes_that_no_worker_serves_the_queue(redis_url: str) -> None:
    async with started("enqueue", "Hi", "--queue", "slow", "--follow", REDIS_URL=redis_url) as process:
        line = await line_with(process.stderr, "no worker serves the queue slow")
        ended = await interrupted(process)
    assert "worker run --queues slow" in line
    assert ended.status == 130
