"""The commands `worker gateway` and `worker key`."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from worker.cli.main import main
from worker.gateway.keys import KeyRing
from worker.settings_source import ConfigError


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_a_new_key_is_printed_once_and_only_its_hash_is_in_the_file(runner: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    secrets = []
    for name, *options in (
        ["chat-app", "--tenant", "acme", "--queues", "default, batch", "--in-flight", "100", "--queued", "50"],
        ["operator", "--all", "--requests-per-minute", "600", "--max-body-bytes", "1000"],
    ):
        made = runner.invoke(main, ["key", name, *options])
        assert made.exit_code == 0, made.output
        secret = made.stderr.removeprefix("The key is ").strip()
        assert secret.startswith("vr_")
        assert secret not in made.stdout
        secrets.append(secret)
        file.write_text(made.stdout if not file.exists() else file.read_text() + made.stdout)
    ring = KeyRing(file=file)
    one, two = (ring.find(secret) for secret in secrets)
    assert one
    assert two
    assert (one.name, one.tenant, one.queues, one.in_flight, one.queued) == (
        "chat-app", "acme", ("default", "batch"), 100, 50,
    )  # fmt: skip
    assert (two.owner, two.all, two.requests_per_minute, two.max_body_bytes) == ("key:operator", True, 600, 1000)
    assert ring.find(secrets[0] + "x") is None


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, 'a"', "ä"])
def test_a_key_needs_a_name_that_fits_into_logs(runner: CliRunner, name: str) -> None:
    made = runner.invoke(main, ["key", name])
    assert made.exit_code == 2
    assert "name" in made.stderr


def test_a_file_without_a_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text("")
    with pytest.raises(ConfigError, match="has no key: `worker key NAME`"):
        KeyRing(file=file)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "GATEWAY_KEYS_FILE is empty, so nobody could use the gateway"),
        (["--no-auth", "--listen", "0.0.0.0:8080"], "needs a loopback address: set GATEWAY_LISTEN to 127.0.0.1:8080"),
        (["--keys", "[[keys]]"], "GATEWAY_TOKEN_SECRET is empty, and read tokens need it"),
        (["--no-auth", "--workers", "0"], "GATEWAY_WORKERS is '0'"),
        (["--keys", "[[keys", "--token-secret", "0" * 32], "GATEWAY_KEYS cannot be read"),
    ],
)
def test_a_gateway_that_would_be_unsafe_or_of_no_use_does_not_start(
    runner: CliRunner, options: list[str], words: str
) -> None:
    ended = runner.invoke(main, ["gateway", "--listen", "127.0.0.1:0", *options])
    assert ended.exit_code == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_nearly_right_variable_is_reported(runner: CliRunner) -> None:
    ended = runner.invoke(main, ["gateway"], env={"GATEWAY_LISTENS": "127.0.0.1:1", "GATEWAY_NO_AUTH": "true"})
    assert ended.exit_code == 2
    assert "did you mean GATEWAY_LISTEN?" in ended.stderr
