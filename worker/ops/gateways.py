"""The gateways, by the records of their processes: their states, and the findings about them. No I/O."""

from collections.abc import Iterable, Sequence

from ..contract.records import GatewayRecord
from .findings import Finding
from .fleet import versions_finding
from .survey_types import GatewayState, StateOfGateway

_SILENT_AFTER = 15.0
"""Seconds without a renewal after which a gateway is silent: it has missed three."""


def gateway_states(
    records: Iterable[GatewayRecord], now: float, *, renewable_for: float | None
) -> tuple[GatewayState, ...]:
    """The states of the gateways. `now` is in seconds by Redis's clock; `renewable_for` as in `read_installation`."""
    states = []
    for record in records:
        age = max(0.0, now - record.beat / 1000)
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
    findings = [
        Finding(
            "warning",
            f"gateway {gateway.name}",
            f"it has been silent for {gateway.age:.0f} s",
            f"check whether process {gateway.pid} on {gateway.host} still runs; if so, its log has why it does not "
            "reach Redis (redis_unavailable)",
            "gateway_silent",
        )
        for gateway in gateways
        if gateway.state == "silent"
    ]
    alive = [gateway for gateway in gateways if gateway.state in ("serving", "draining")]
    if alive:
        streams = sum(gateway.streams for gateway in alive)
        findings.append(Finding("ok", "gateways", f"alive: {len(alive)}; open streams: {streams}"))
        findings += versions_finding("gateways", {gateway.name: gateway.version for gateway in alive})
    return findings
