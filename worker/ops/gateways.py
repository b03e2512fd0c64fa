"""The gateways, by the records of their processes: their states, and the findings about them. No I/O."""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import inf

from ..broker.gateway_registry import KEPT
from ..contract.records import GatewayRecord
from .findings import Finding
from .fleet import versions_finding
from .survey_types import GatewayState, StateOfGateway

_SILENT_AFTER = 15.0
"""Seconds without a renewal after which a gateway is silent: it has missed three."""


def gateway_states(
    records: Iterable[GatewayRecord], now: float, *, renewable_for: float | None
) -> tuple[GatewayState, ...]:
    """The states of the gateways. `now` is in seconds by Redis's clock; `renewable_for` as in `read_installation`.

    Records that could be renewed and have not been for a long time have none: their gateways were killed.
    """
    states = []
    for record in records:
        age = max(0.0, now - record.beat / 1000)
        if min(age, inf if renewable_for is None else renewable_for) > KEPT:
            continue
        state: StateOfGateway = "draining" if record.draining else "serving"
        if not renewable_for:
            state = "unknown"
        elif min(age, renewable_for) > _SILENT_AFTER:
            state = "silent"
        states.append(
            GatewayState(
                name=record.name,
                state=state,
                address=record.address,
                streams=record.streams,
                connections=record.connections,
                version=record.version,
                age=round(age, 1),
                host=record.host,
                pid=record.pid,
                started=record.started,
            )
        )
    return tuple(states)


def gateway_findings(gateways: Sequence[GatewayState]) -> list[Finding]:
    """The findings about gateways. Nothing is found without gateways, which an installation need not have."""
    repeated = Counter(gateway.name for gateway in gateways)
    named = [(one.name if repeated[one.name] == 1 else f"{one.name} at {one.address}", one) for one in gateways]
    findings = [
        Finding(
            "warning",
            f"gateway {name}",
            f"it has been silent for {gateway.age:.0f} s",
            f"check whether process {gateway.pid} on {gateway.host} runs: restart it if it is stopped or stuck; else "
            "its log has why it does not reach Redis (redis_unavailable)",
            "gateway_silent",
        )
        for name, gateway in named
        if gateway.state == "silent"
    ]
    alive = {name: gateway for name, gateway in named if gateway.state in ("serving", "draining")}
    if alive:
        streams = sum(gateway.streams for gateway in alive.values())
        findings.append(Finding("ok", "gateways", f"alive: {len(alive)}; open streams: {streams}"))
        findings += versions_finding("gateways", {name: gateway.version for name, gateway in alive.items()})
    return findings
