"""The vLLM servers as the workers' records have them, and the findings about them."""

from collections.abc import Mapping
from urllib.parse import urlsplit

from ..contract.records import REFUSES_ALL, SILENT, ServerRecord, WorkerRecord
from ..settings import variable
from ..vllm.errors import UNAUTHORIZED
from .findings import Fault, Finding, grouped, listed
from .survey_types import ServerState, StateOfServer

_THIS_HOST = ("localhost", "127.0.0.1", "::1", "host.docker.internal")


def _seen_by(alive: Mapping[str, WorkerRecord]) -> dict[str, dict[str, ServerRecord]]:
    """The servers as each worker sees them, for workers that have a list in their records."""
    return {
        name: {_place(server.url, record.host): server for server in record.servers}
        for name, record in alive.items()
        if record.servers
    }


def _place(url: str, host: str) -> str:
    """The URL of a server, with the worker's host if the URL means that host."""
    try:
        name = urlsplit(url).hostname
    except ValueError:  # a record may hold any text
        return url
    return f"{url} of {host}" if name in _THIS_HOST else url


def server_states(alive: Mapping[str, WorkerRecord]) -> list[ServerState]:
    """The states of all servers of the live workers, by URL."""
    seen = _seen_by(alive)
    states = []
    for url in sorted({url for servers in seen.values() for url in servers}):
        there = [servers[url] for servers in seen.values() if url in servers]
        states.append(
            ServerState(
                url=url,
                state=_state_of(there),
                reason=next((server.reason for server in there if server.reason), ""),
                requests=sum(server.requests for server in there),
                limit=round(sum(server.limit for server in there), 2),
                workers=len(there),
            )
        )
    return states


def _state_of(there: list[ServerRecord]) -> StateOfServer:
    states = {server.state for server in there}
    if "away" in states:
        return "partly" if "up" in states else "away"
    if "up" not in states:
        return "starting"
    if any(server.reason == REFUSES_ALL for server in there):
        return "full"
    busy = [server for server in there if server.requests]  # answers show more than probes
    return "silent" if all(server.reason == SILENT for server in busy or there) else "up"


def _outage_findings(alive: Mapping[str, WorkerRecord]) -> list[Finding]:
    """The error if no job, or no job for some model, can run, because all servers are away for every worker."""
    servers = [server for record in alive.values() for server in record.servers]
    up = {model for record in alive.values() for model in record.models if model not in record.models_away}
    away = {model for record in alive.values() for model in record.models_away} - up
    if servers and all(record.servers for record in alive.values()) and all(s.state == "away" for s in servers):
        message = "all vLLM servers are away for every worker: no job can run"
    elif away:
        message = f"all servers of a model are away for every worker, and its jobs wait: {listed(sorted(away))}"
    else:
        return []
    refused = all(server.reason == UNAUTHORIZED for server in servers if server.state == "away")
    fix = "start one of them: the findings about each server have the reason"
    return [Finding("error", "vLLM servers", message, fix, "vllm_login" if refused else "vllm_away")]


def server_findings(alive: Mapping[str, WorkerRecord]) -> list[Finding]:
    """What the workers see of each vLLM server: their requests and limits there, and where they do not agree."""
    seen = _seen_by(alive)
    findings = _outage_findings(alive)
    for state in server_states(alive):
        url = state.url
        there = {name: servers[url] for name, servers in seen.items() if url in servers}
        subject = f"workers at vLLM {url}"
        message = f"requests of theirs: {state.requests}"
        if state.limit:
            message += f"; their limits, learnt from the server: {state.limit:.0f}"
        if without := [name for name in seen if name not in there]:
            message += f"; not in {variable('vllm_urls')} of {listed(without)}"
        findings.append(Finding("ok", subject, message))
        refusing = [name for name, server in there.items() if server.reason == UNAUTHORIZED]
        if state.state == "away":
            message = f"it is away for all workers that have it ({state.reason or 'no reason is known'})"
            fix = "start it, or look at its log and at the network; requests go to other servers, or wait"
            if refusing:
                fix = f"correct {variable('vllm_api_key')} of {listed(refusing)}: the server refuses the keys"
            fault: Fault = "vllm_login" if refusing else "vllm_away"
            findings.append(Finding("warning", subject, message, fix, fault))
        if state.state == "silent":
            what = f"has {state.requests} requests and has sent nothing" if state.requests else "has answered no probe"
            message = f"it {what} for some seconds: it may be frozen"
            fix = "look at its log and its GPU, and restart it if it stays so: the answers continue elsewhere"
            findings.append(Finding("warning", subject, message, fix, "vllm_silent"))
        if state.state == "partly":
            up = [name for name, server in there.items() if server.state == "up"]
            away = {name: server.reason or "away" for name, server in there.items() if server.state == "away"}
            reasons = "; ".join(f"{reason}: {listed(names)}" for reason, names in sorted(grouped(away).items()))
            message = f"it is up for {listed(up)}, and away for others ({reasons})"
            fix = "check the network and the keys of the workers for which it is away"
            fault = "vllm_login" if refusing else "vllm_away"
            findings.append(Finding("warning", subject, message, fix, fault))
        if refused := [name for name, server in there.items() if server.reason == REFUSES_ALL]:
            message = f"it has refused every request of {listed(refused)} for half a minute (429, 503); their jobs wait"
            fix = "add servers if other clients fill it; if it is a proxy, see its log: it may have no server behind it"
            findings.append(Finding("warning", subject, message, fix, "vllm_full"))
    return findings
