"""The files of `deploy/` against the schemas of the tools that read them, and against the settings of the processes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from manifests import DEPLOY, KUBERNETES, documents, resource

from worker.engine.pace import Pace
from worker.gateway.process import LAST_STEPS
from worker.gateway.settings import GATEWAY_SOURCE, GatewaySettings
from worker.settings import Settings, variable

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
WORKER, GATEWAY = "vllm-relay-worker", "vllm-relay-gateway"
DRAIN = {
    WORKER: Settings.model_fields["drain_timeout"].default + Pace().last_steps,
    GATEWAY: GatewaySettings.model_fields["drain_delay"].default
    + GatewaySettings.model_fields["drain_timeout"].default
    + LAST_STEPS,
}
"""The longest drain in seconds, with the default settings."""


def output_of(*command: object) -> str:
    """What a checker prints. It must end with status 0."""
    tool = Path(sys.executable).with_name(str(command[0]))
    found = str(tool) if tool.exists() else shutil.which(str(command[0]))
    assert found, f"{command[0]} is missing"
    ended = subprocess.run([found, *map(str, command[1:])], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_the_compose_file_matches_its_schema() -> None:
    output_of("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


def test_the_yaml_files_are_tidy() -> None:
    rules = "{extends: default, rules: {line-length: disable, document-start: disable}}"
    assert output_of("yamllint", "--strict", "-d", rules, DEPLOY) == ""


def test_the_dockerfile_follows_the_rules_of_hadolint() -> None:
    assert output_of("hadolint", DEPLOY / "Dockerfile") == ""


def test_the_kubernetes_manifests_match_their_schemas() -> None:
    shown = output_of("kubernetes-validate", "--strict", *KUBERNETES)
    unknown = {line for line in shown.splitlines() if "WARN" in line}
    assert all("keda.sh" in line for line in unknown), unknown
    assert "deployment/vllm-relay-worker" in shown


def test_the_kustomization_names_every_manifest() -> None:
    (kustomization,) = documents(DEPLOY / "kubernetes/kustomization.yaml")
    assert sorted(kustomization["resources"]) == [path.name for path in KUBERNETES]


def test_the_secret_of_the_kustomization_has_what_the_manifests_read_and_users_with_least_rights(
    tmp_path: Path,
) -> None:
    """Its commands run here, with a `kubectl` that writes down its arguments."""
    head = (DEPLOY / "kubernetes/kustomization.yaml").read_text().partition("# Without KEDA")[0]
    commands = re.sub(r"\\\n *", "", "\n".join(re.findall(r"^#   (.*)$", head, re.MULTILINE)))
    shutil.copytree(DEPLOY / "redis", tmp_path / "deploy/redis")
    script = f'set -eu\nkubectl() {{ printf "%s\\n" "$@" > arguments; }}\n{commands}\n'
    subprocess.run(["/bin/sh", "-c", script], cwd=tmp_path, check=True, timeout=60)
    given = re.findall(r"^--from-(?:literal|file)=([^=\n]*)=?(.*)$", (tmp_path / "arguments").read_text(), re.MULTILINE)
    secret = dict(given)
    manifests = "".join(path.read_text() for path in KUBERNETES)
    assert set(re.findall(r"name: vllm-relay, key: ([\w.-]+)", manifests)) | {"keys.toml"} == set(secret)
    assert secret["redis-url-worker"].startswith("redis://worker:")
    assert secret["redis-url-gateway"].startswith("redis://gateway:")
    password = secret["redis-password"]
    assert (
        f"redis://{secret['redis-username']}:{password}@{secret['redis-address']}/0"
        == (tmp_path / "secrets/redis-url-scaler").read_text().strip()
    )


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is missing")
    program = str(Path(sys.executable).with_name("worker"))
    text = unit.read_text()
    assert "/opt/vllm-relay/bin/worker" in text
    (tmp_path / unit.name).write_text(text.replace("/opt/vllm-relay/bin/worker", program))
    # An unknown key is only a warning there: the status is 0.
    assert output_of("systemd-analyze", "verify", "--man=no", tmp_path / unit.name) == ""


@pytest.mark.parametrize("name", [WORKER, GATEWAY])
def test_every_supervisor_waits_longer_than_a_drain_takes(name: str) -> None:
    pod = resource("Deployment", name)["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > DRAIN[name]
    stop = re.search(r"^TimeoutStopSec=(\d+)$", (DEPLOY / f"systemd/{name}.service").read_text(), re.MULTILINE)
    assert stop
    assert int(stop[1]) > DRAIN[name]
    (compose,) = documents(DEPLOY / "compose.yaml")
    service = compose["services"]["worker" if name == WORKER else "web"]
    assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN[name]


@pytest.mark.parametrize("name", [WORKER, GATEWAY])
def test_a_pod_has_no_rights_that_it_does_not_need(name: str) -> None:
    pod = resource("Deployment", name)["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)


@pytest.mark.parametrize("kind", ["NetworkPolicy", "PodDisruptionBudget", "Deployment"])
@pytest.mark.parametrize("name", [WORKER, GATEWAY])
def test_selectors_select_the_pods_of_the_deployment(kind: str, name: str) -> None:
    spec = resource(kind, name)["spec"]
    selector = spec["podSelector" if kind == "NetworkPolicy" else "selector"]
    assert selector["matchLabels"] == resource("Deployment", name)["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("name", [WORKER, GATEWAY])
def test_the_variables_in_manifests_and_compose_are_settings(name: str) -> None:
    (container,) = resource("Deployment", name)["spec"]["template"]["spec"]["containers"]
    (compose,) = documents(DEPLOY / "compose.yaml")
    service = compose["services"]["worker" if name == WORKER else "web"]
    known = (
        {variable(field) for field in Settings.model_fields}
        if name == WORKER
        else {GATEWAY_SOURCE.variable(field) for field in GatewaySettings.model_fields}
    )
    used = {each["name"] for each in container["env"]} | set(service["environment"])
    assert used <= known
