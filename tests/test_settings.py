"""Settings from options, the environment and .env: which value holds, which are refused, and which are not shown."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from worker.gateway.settings import GATEWAY_SOURCE
from worker.settings import PREFIX, WORKER_SOURCE, ConfigError, Settings, load_settings, redacted_url, variable
from worker.settings_source import SettingsSource

NO_REDIS_URL = (
    "must be a URL such as redis://127.0.0.1:6379/0, rediss://… or unix:///path, "
    "redis+sentinel://host,host2/<master name> or redis+cluster://host,host2"
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No .env, and none of the variables that may be set where the tests run."""
    for name in list(os.environ):
        if name.upper().startswith((PREFIX, "REDIS_", "VLLM_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def problems(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[str]:
    """The problems with these variables, a sentence each."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return problems_of({})


def problems_of(options: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(**options)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


# Where settings come from


def test_without_any_setting_the_defaults_hold() -> None:
    settings = load_settings()
    assert settings.redis_url.get_secret_value() == "redis://127.0.0.1:6379/0"
    assert settings.vllm_urls == ("http://127.0.0.1:8000",)
    assert settings.vllm_api_key.get_secret_value() == ""
    assert (settings.prefix, settings.queues, settings.slots) == ("chat", ("default",), 256)
    assert (settings.lease, settings.drain_timeout, settings.retention, settings.remember) == (15, 25, 3600, 86400)
    assert (settings.connect_timeout, settings.first_token_timeout, settings.gap_timeout) == (5, 120, 30)
    assert (settings.tries, settings.max_request_bytes) == (3, 4 * 1024 * 1024)
    assert (settings.log_format, settings.log_level) == ("auto", "info")


def test_the_environment_sets_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "REDIS_URL": "rediss://:secret@redis:6380/1",
        "VLLM_URLS": "http://a:1, https://b:2/v1 ,",
        "VLLM_API_KEY": "key",
        "WORKER_PREFIX": "test",
        "WORKER_QUEUES": "fast, slow",
        "WORKER_SLOTS": "7",
        "WORKER_LEASE": "2.5",
        "worker_log_level": "debug",
    }.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.redis_url.get_secret_value() == "rediss://:secret@redis:6380/1"
    assert settings.vllm_urls == ("http://a:1", "https://b:2/v1")
    assert settings.vllm_api_key.get_secret_value() == "key"
    assert (settings.prefix, settings.queues, settings.slots) == ("test", ("fast", "slow"), 7)
    assert (settings.lease, settings.log_level) == (2.5, "debug")


def test_options_come_before_the_environment_and_that_before_dotenv(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text(
        "WORKER_SLOTS=1\nWORKER_TRIES=1\nWORKER_LEASE=1\nVLLM_URLS=http://dotenv:1\nREDIS_URL=redis://dotenv\n"
        "OTHER_PROGRAM=x\n"
    )
    monkeypatch.setenv("WORKER_SLOTS", "2")
    monkeypatch.setenv("WORKER_TRIES", "2")
    monkeypatch.setenv("VLLM_URL", "http://environment:1")
    settings = load_settings(slots=3, tries=None, redis_url="redis://option")
    assert (settings.slots, settings.tries, settings.lease) == (3, 2, 1)
    assert settings.vllm_urls == ("http://environment:1",)
    assert settings.redis_url.get_secret_value() == "redis://option"


@pytest.mark.parametrize("name", ["VLLM_URL", "VLLM_URLS"])
def test_vllm_servers_have_two_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://a:1,http://b:1/v1")
    assert load_settings().vllm_urls == ("http://a:1", "http://b:1/v1")
    assert load_settings(vllm_urls="http://option:1").vllm_urls == ("http://option:1",)
    assert load_settings(vllm_urls=("http://x:1", "http://y:1")).vllm_urls == ("http://x:1", "http://y:1")


def test_of_both_names_the_plural_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_URL", "http://one:1")
    monkeypatch.setenv("VLLM_URLS", "http://many:1")
    assert load_settings().vllm_urls == ("http://many:1",)


@pytest.mark.parametrize("name", [*map(variable, Settings.model_fields), "VLLM_URL"])
def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Compose writes it for `${X:-}`, in the environment or in .env."""
    default = load_settings()
    monkeypatch.setenv(name, "")
    assert load_settings() == default
    (tmp_path / ".env").write_text(f"{name}=")
    assert load_settings() == default
    monkeypatch.delenv(name)
    assert load_settings() == default


def test_an_empty_variable_leaves_the_value_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WORKER_SLOTS=7")
    monkeypatch.setenv("WORKER_SLOTS", "")
    assert load_settings().slots == 7


def test_an_empty_option_is_an_error() -> None:
    for option, message in (("redis_url", "REDIS_URL must be a URL"), ("slots", "WORKER_SLOTS is ''")):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_settings(**{option: ""})


def test_an_empty_key_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert load_settings().vllm_api_key.get_secret_value() == ""


def test_an_env_file_that_is_not_utf8_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_bytes(b"WORKER_SLOTS=\xff")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_settings()


def test_every_setting_has_a_variable_and_a_description() -> None:
    own = {name: name.upper() for name in Settings.model_fields if name.startswith(("redis_", "vllm_"))}
    for name, field in Settings.model_fields.items():
        assert variable(name) == own.get(name, f"WORKER_{name.upper()}")
        assert field.description


# Problems


def test_all_problems_are_reported_at_once_by_the_names_of_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    found = problems(
        monkeypatch,
        REDIS_URL="http://redis",
        VLLM_URLS="localhost:8000",
        WORKER_PREFIX="a b",
        WORKER_SLOTS="0",
        WORKER_SLOT="4",
        WORKER_LEASE="soon",
        WORKER_QUEUES="a,a",
        WORKER_LOG_LEVEL="loud",
        WORKER_TRIES="1.5",
    )
    assert sorted(found) == [
        f"REDIS_URL {NO_REDIS_URL}",
        "VLLM_URLS holds 'localhost:8000', which is not a URL such as http://127.0.0.1:8000",
        "WORKER_LEASE is 'soon': it should be a valid number, unable to parse string as a number",
        "WORKER_LOG_LEVEL is 'loud': it should be 'debug', 'info', 'warning' or 'error'",
        "WORKER_PREFIX is 'a b': String should match pattern '^[A-Za-z0-9_.:-]{1,64}$'",
        "WORKER_QUEUES contains a queue twice",
        "WORKER_SLOT is not a setting: did you mean WORKER_SLOTS?",
        "WORKER_SLOTS is '0': it should be greater than or equal to 1",
        "WORKER_TRIES is '1.5': it should be a valid integer, unable to parse string as an integer",
    ]


def test_a_bad_option_is_reported_by_the_same_name() -> None:
    found = problems_of({"slots": 0, "vllm_urls": "", "redis_url": "x"})
    assert sorted(found) == [
        f"REDIS_URL {NO_REDIS_URL}",
        "VLLM_URLS is empty: set it to the base URL of a vLLM server, such as http://127.0.0.1:8000",
        "WORKER_SLOTS is '0': it should be greater than or equal to 1",
    ]


VARIABLES = [
    # a variable, and the setting that it is nearly; "pass" for one of Kubernetes, "warn" for one that is unknown
    ("WORKER_SLOT", "WORKER_SLOTS"),
    ("WORKER_QUEUE", "WORKER_QUEUES"),
    ("worker_leese", "WORKER_LEASE"),
    ("WORKER_LEAES", "WORKER_LEASE"),
    ("WORKER_LOGLEVEL", "WORKER_LOG_LEVEL"),
    ("WORKER_GAP_TIMOUT", "WORKER_GAP_TIMEOUT"),
    ("WORKER_DRAIN_TIMEOUT_S", "WORKER_DRAIN_TIMEOUT"),
    ("WORKER_REDIS_URL", "REDIS_URL"),
    ("WORKER_VLLM_URLS", "VLLM_URLS"),
    ("WORKER_XYZZY_PLUGH_42", "warn"),
    ("WORKER_CONCURRENCY", "warn"),
    ("WORKER_TIMEOUT", "warn"),
    ("WORKER_RETRIES", "warn"),
    ("WORKER_CLASS", "warn"),
    ("WORKER_NAME", "warn"),
    # Kubernetes sets these in every pod beside a service that is called `worker`, or `worker-lease`.
    ("WORKER_SERVICE_HOST", "pass"),
    ("WORKER_SERVICE_PORT", "pass"),
    ("WORKER_SERVICE_PORT_HTTP", "pass"),
    ("WORKER_PORT", "pass"),
    ("WORKER_PORT_8000_TCP", "pass"),
    ("WORKER_PORT_8000_TCP_ADDR", "pass"),
    ("WORKER_LEASE_SERVICE_HOST", "pass"),
    ("WORKER_LEASE_PORT_80_TCP_PROTO", "pass"),
]


@pytest.mark.parametrize(("name", "verdict"), VARIABLES)
def test_only_a_name_that_is_nearly_a_settings_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, verdict: str
) -> None:
    if verdict in ("warn", "pass"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:8000")
        assert load_settings().unknown == ((name,) if verdict == "warn" else ())
    else:
        assert problems(monkeypatch, **{name: "1"})[0] == f"{name} is not a setting: did you mean {verdict}?"


def test_a_bad_variable_in_dotenv_is_reported_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("WORKER_SLOTZ=4\nSLOTZ=4\nWORKER_CONCURRENCY=2\n")
    assert problems(monkeypatch) == ["WORKER_SLOTZ (in .env) is not a setting: did you mean WORKER_SLOTS?"]
    Path(".env").write_text("WORKER_CONCURRENCY=2\n")
    assert load_settings().unknown == ("WORKER_CONCURRENCY (in .env)",)


def test_a_command_that_needs_few_settings_checks_only_these(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WORKER_SLOTS": "many",
        "WORKER_SLOT": "3",
        "VLLM_URLS": "nowhere",
        "VLLM_API_KEY": "clé",
        "WORKER_PREFIX": "mine",
        "REDIS_URL": "redis://h",
    }.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(("redis_url", "prefix"), redis_url=None)
    assert (settings.prefix, settings.redis_url.get_secret_value(), settings.slots) == ("mine", "redis://h", 256)
    monkeypatch.setenv("WORKER_PREFX", "other")
    with pytest.raises(ConfigError, match=r"^WORKER_PREFX is not a setting: did you mean WORKER_PREFIX\?$"):
        load_settings(("redis_url", "prefix"))


def test_variables_of_other_programs_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_LOGGING_LEVEL", "REDIS_PASSWORD", "WORKERS", "SLOTS"):
        monkeypatch.setenv(name, "x")
    assert load_settings().slots == 256


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORKER_GAP_TIMEOUT", "0"),
        ("WORKER_GAP_TIMEOUT", "-1"),
        ("WORKER_GAP_TIMEOUT", "nan"),
        ("WORKER_GAP_TIMEOUT", "inf"),
        ("WORKER_LEASE", "0.1"),
        ("WORKER_DRAIN_TIMEOUT", "-1"),
        ("WORKER_RETENTION", "0"),
        ("WORKER_SLOTS", "1000000"),
        ("WORKER_MAX_REQUEST_BYTES", "10"),
        ("WORKER_LOG_FORMAT", "xml"),
        ("WORKER_QUEUES", ","),
        ("WORKER_QUEUES", "a b"),
        ("WORKER_QUEUES", "a:b"),
        ("WORKER_QUEUES", "x" * 65),
        ("WORKER_PREFIX", "{chat}"),
        ("VLLM_URLS", ","),
        ("VLLM_URLS", "ftp://host"),
        ("VLLM_URLS", "http://"),
        ("VLLM_URLS", "http://good:1,bad"),
        ("VLLM_URLS", "http://[::1"),
        ("VLLM_URLS", "http://host:port"),
        ("VLLM_URLS", "http://host:99999"),
        ("VLLM_URLS", "http://host..local"),
        ("VLLM_URLS", "http://xn--a"),
        ("VLLM_URLS", "http://h/v1?key=1"),
        ("VLLM_URLS", "http://h/#v1"),
        ("VLLM_URLS", "http://h/openai/chat/completions"),
        ("REDIS_URL", "127.0.0.1:6379"),
        ("REDIS_URL", "redis:127.0.0.1"),
        ("REDIS_URL", "redis://host:port"),
        ("REDIS_URL", "redis+sentinel://host"),
        ("REDIS_URL", "redis+sentinel:///mymaster"),
        ("REDIS_URL", "redis+sentinel://host,/mymaster"),
        ("REDIS_URL", "redis+sentinel://host/mymaster/x"),
        ("REDIS_URL", "redis+cluster://"),
        ("REDIS_URL", "redis+cluster://host/1"),
        ("REDIS_URL", "redis+cluster://host:port"),
        ("REDIS_URL", "redis+sharded://host"),
        ("VLLM_API_KEY", "a\nb"),
        ("VLLM_API_KEY", "clé"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    (found,) = problems(monkeypatch, **{name: value})
    assert found.startswith(f"{name} ")


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "rediss://u:p@h:6380/2?protocol=3",
        "unix:///run/redis.sock",
        "redis+sentinel://h/m",
        "rediss+sentinel://u:p@h:1,[::1]:2/m/3?ssl_cert_reqs=none",
        "redis+cluster://h",
        "rediss+cluster://u:p@h:1,h2:2/",
    ],
)
def test_each_kind_of_redis_url_is_accepted(url: str) -> None:
    assert load_settings(redis_url=url).redis_url.get_secret_value() == url


@pytest.mark.parametrize(
    "url", ["http://h", "https://u:p@h/llm/v1", "http://[::1]:8000", "http://h/v1/chat/completions"]
)
def test_each_kind_of_vllm_url_is_accepted(url: str) -> None:
    assert load_settings(vllm_urls=url).vllm_urls == (url,)


# Secrets


def test_a_key_from_a_file_may_end_in_a_newline() -> None:
    assert load_settings(vllm_api_key=" key\n").vllm_api_key.get_secret_value() == "key"


def test_secrets_are_not_shown() -> None:
    settings = load_settings(redis_url="redis://:hunter2@h", vllm_api_key="hunter2")
    for text in (str(settings), repr(settings), settings.model_dump_json()):
        assert "hunter2" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", "http://:hunter2@h"),
        ("REDIS_URL", "redis://:hunter2@h:port"),
        ("REDIS_URL", "redis://:hunter2[@h"),
        ("REDIS_URL", "redis://:hunter2\u2100@h"),
        ("REDIS_URL", ":hunter2@h"),
        ("REDIS_URL", "redis+sentinel://:hunter2@h"),
        ("REDIS_URL", "redis+cluster://:hunter2@h:port"),
        ("REDIS_URL", "redis+cluster://:hunter2[@h"),
        ("VLLM_API_KEY", "hunter2\nhunter2"),
        ("VLLM_API_KEY", "hunter2é"),
        ("VLLM_URLS", "ftp://user:hunter2@h"),
        ("VLLM_URLS", "user:hunter2@h:80"),
        ("VLLM_URLS", "http://user:hunter2@h:port"),
        ("VLLM_URLS", "http://user:hunter2\u2100@h"),
        ("VLLM_URLS", "http://user:hunter2[@h"),
        ("VLLM_URLS", "http://user:hunter2/@h:port"),
        ("VLLM_URLS", "http://h:port?key=hunter2"),
    ],
)
def test_an_error_about_a_secret_does_not_contain_it(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "hunter2" not in repr(caught.value)
    assert caught.value.problems[0].startswith(name)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://h:8000/v1", "http://h:8000/v1"),
        ("https://user:pass@h:8000/v1?key=x#y", "https://***@h:8000/v1"),
        ("http://user@h", "http://***@h"),
        ("redis://:pass@h:6379/0", "redis://***@h:6379/0"),
        ("redis://:p@ss@h", "redis://***@h"),
        ("redis+sentinel://u:p@h:26379,h2:26379/m/1", "redis+sentinel://***@h:26379,h2:26379/m/1"),
        ("rediss+cluster://:p@h,h2?ssl_password=x", "rediss+cluster://***@h,h2"),
        ("http://u:p/a?s#s@h/x", "http://***@h/x"),
        ("http://u:p@[::1]:8000", "http://***@[::1]:8000"),
        ("http://u:p@[::1", "http://***@[::1"),
        ("user:pass@h:80", "***@h:80"),
        ("http://u:p://s@h", "http://***@h"),
        ("u:p://s@h", "***@h"),
        ("h:80?key=x", "h:80"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert redacted_url(url) == shown


# Secrets in files


SECRET = "hunter2-0123456789-0123456789-0123456789"
SOURCES: list[tuple[SettingsSource[Any], str, str, dict[str, str]]] = [
    (WORKER_SOURCE, "redis_url", f"redis://:{SECRET}@h/1", {}),
    (GATEWAY_SOURCE, "redis_url", f"redis://:{SECRET}@h/1", {"GATEWAY_NO_AUTH": "1"}),
    (GATEWAY_SOURCE, "token_secret", SECRET, {"GATEWAY_KEYS_FILE": "/dev/null"}),
    (GATEWAY_SOURCE, "token_secret_2", SECRET, {"GATEWAY_NO_AUTH": "1"}),
]
in_files = pytest.mark.parametrize(
    ("source", "name", "secret", "others"), SOURCES, ids=[f"{row[0].prefix}{row[1]}" for row in SOURCES]
)


def set_file(
    monkeypatch: pytest.MonkeyPatch, source: SettingsSource[Any], name: str, others: dict[str, str], path: Path
) -> str:
    """Set the variable for the file of a secret, and others; returns the name of that variable."""
    file = source.variable(f"{name}_file")
    for variable_name, value in {**others, file: str(path)}.items():
        monkeypatch.setenv(variable_name, value)
    return file


@in_files
def test_a_secret_may_be_in_a_file_that_ends_in_a_newline(
    source: SettingsSource[Any], name: str, secret: str, others: dict[str, str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    file = tmp_path / "secret"
    file.write_text(f"{secret}\n")
    set_file(monkeypatch, source, name, others, file)
    settings = source.load()
    assert getattr(settings, name).get_secret_value() == secret
    assert SECRET not in repr(settings)


@in_files
def test_a_file_without_a_usable_secret_is_an_error_that_does_not_show_it(
    source: SettingsSource[Any], name: str, secret: str, others: dict[str, str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    file = tmp_path / "secret"
    variable_name = set_file(monkeypatch, source, name, others, file)
    invalid = f"http://:{SECRET}@h" if name == "redis_url" else SECRET[:20]
    for content, words in (
        (None, "names a file that cannot be read: No such file or directory"),
        (b" \n", "names a file that is empty"),
        (secret.encode() + b"\xff", "names a file that is not UTF-8, or is no path"),
        (invalid.encode(), NO_REDIS_URL if name == "redis_url" else "is too short"),
    ):
        if content is not None:
            file.write_bytes(content)
        (problem,) = problems_with(source)
        assert problem.startswith(f"{variable_name} {words}")
        assert "hunter2" not in problem
    file.unlink()
    file.mkdir()
    assert problems_with(source) == [f"{variable_name} names a file that cannot be read: Is a directory"]


@in_files
def test_a_secret_in_place_of_its_files_path_is_not_shown(
    source: SettingsSource[Any], name: str, secret: str, others: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_file(monkeypatch, source, name, others, Path(secret))
    (problem,) = problems_with(source)
    assert "hunter2" not in problem


@in_files
def test_a_secret_and_its_file_exclude_each_other(
    source: SettingsSource[Any], name: str, secret: str, others: dict[str, str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    file = tmp_path / "secret"
    file.write_text(secret)
    variable_name = set_file(monkeypatch, source, name, others, file)
    monkeypatch.setenv(source.variable(name), secret)
    assert problems_with(source) == [f"{source.variable(name)} and {variable_name} are both set: remove one of them"]


def problems_with(source: SettingsSource[Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        source.load()
    return list(caught.value.problems)


def test_an_option_takes_the_place_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL_FILE", "/nowhere")
    assert load_settings(redis_url="redis://option").redis_url.get_secret_value() == "redis://option"


def test_a_command_with_few_settings_reads_the_files_of_these_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text("redis://file")
    monkeypatch.setenv("REDIS_URL_FILE", str(file))
    assert load_settings(("redis_url",)).redis_url.get_secret_value() == "redis://file"
    file.unlink()
    assert load_settings(("prefix",)).redis_url.get_secret_value() == "redis://127.0.0.1:6379/0"


def test_the_keys_of_a_gateway_are_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"KEYS": "[[keys]]", "KEYS_FILE": "/dev/null", "TOKEN_SECRET": SECRET}.items():
        monkeypatch.setenv(f"GATEWAY_{name}", value)
    assert problems_with(GATEWAY_SOURCE) == ["GATEWAY_KEYS and GATEWAY_KEYS_FILE are both set: remove one of them"]
