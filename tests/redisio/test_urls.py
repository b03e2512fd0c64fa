"""Parsing the URLs of Redis."""

import re
from pathlib import Path
from traceback import format_exception

import pytest
import trustme
from redis.asyncio.connection import SSLConnection

from worker.redisio.urls import RedisUrl, parse_redis_url


def test_a_sentinel_url_names_the_sentinels_the_master_and_options_of_connections() -> None:
    url = "rediss+sentinel://us%40er:p%2Fw@one,two:5,[::1]:6/my%20master/3?ssl_cert_reqs=none"
    assert parse_redis_url(url) == RedisUrl(
        "sentinel",
        {
            "username": "us@er",
            "password": "p/w",
            "db": 3,
            "ssl_cert_reqs": "none",
            "connection_class": SSLConnection,
        },
        (("one", 26379), ("two", 5), ("::1", 6)),
        "my master",
    )


@pytest.mark.parametrize("path", ["", "/", "/0"])
def test_a_cluster_url_names_nodes(path: str) -> None:
    assert parse_redis_url(f"redis+cluster://:pw@one,two:5{path}") == RedisUrl(
        "cluster", {"password": "pw"}, (("one", 6379), ("two", 5))
    )


@pytest.mark.parametrize("url", ["redis+cluster://:hunter2@h/1", "redis+sentinel://:hunter2@h", "ftp://:hunter2@h"])
def test_an_error_does_not_quote_the_url(url: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        parse_redis_url(url)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in "".join(format_exception(caught.value))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://h?family=0", "has the unknown option 'family': known are client_name, db, password, username"),
        ("redis://h?single_connection_client", "has the unknown option 'single_connection_client': known are"),
        ("redis://h?max_conections=99", "has the unknown option 'max_conections': did you mean max_connections?"),
        ("redis://h?ssl=true", "has the unknown option 'ssl': for TLS begin the URL with rediss, not redis"),
        ("redis+sentinel://h/m?tls=true", "has the unknown option 'tls': for TLS begin the URL with rediss, not redis"),
        ("redis://h?ssl_ca_certs=/ca.pem", "has the option ssl_ca_certs, which needs TLS: begin the URL with"),
        ("redis://h?sentinel_password=pw", "has the unknown option 'sentinel_password'"),
        ("redis+cluster://h?db=1", "has the unknown option 'db'"),
        ("redis://h?client_name=", "has the option client_name without a value"),
        ("rediss://h?ssl_ca_certs=/no/ca.pem", "has the option ssl_ca_certs, but that file does not exist"),
        ("rediss://h?ssl_cert_reqs=maybe", "has invalid options of TLS: Invalid SSL Certificate Req"),
        ("rediss://h?ssl_ciphers=none", "has invalid options of TLS: "),
        ("redis://h?db=x", "has an invalid value for the option db"),
        ("rediss://h?ssl_min_version=new", "has an invalid value for the option ssl_min_version"),
        ("redis://h/prod", "ends in '/prod', which is not the number of a database, as in redis://127.0.0.1:6379/0"),
        ("redis://h/-1", "ends in '/-1', which is not the number of a database"),
        ("redis://h/0/1", "ends in '/0/1', which is not the number of a database"),
        ("redis+sentinel://h/m/prod", "ends in 'prod', which is not the number of a database"),
        # A part that may be a password without percent-encoding is not quoted.
        ("redis://:hun?ter2@h", "must be a URL such as"),
        ("redis://:hun/ter2@h", "must be a URL such as"),
        ("redis://:1#ter2@h", "must be a URL such as"),
        ("redis+sentinel://:hun/ter2@h/m", "must be like redis+sentinel://"),
    ],
)
def test_an_error_names_what_is_wrong_with_a_url_and_quotes_no_password(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}") as caught:
        parse_redis_url(url)
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["redis://h", "redis+sentinel://h/m", "redis+cluster://h", "unix:///run/u@1/redis.sock"]
)
def test_options_that_the_worker_sets_itself_are_ignored(kind: str) -> None:
    parsed = parse_redis_url(f"{kind}?max_connections=2&protocol=3&decode_responses=x&client_name=ours&client_name=b")
    assert parsed.ignored == ("decode_responses", "max_connections", "protocol")
    assert parsed.options.items() >= {"client_name": "ours"}.items()
    assert not parsed.options.keys() & {*parsed.ignored}


@pytest.mark.parametrize("url", ["redis://h:1/2\n", " redis://h:1/2", "redis://h:1/2/", "redis://h:1?db=2"])
def test_equivalent_urls_are_parsed_alike(url: str) -> None:
    assert parse_redis_url(url).options == {"host": "h", "port": 1, "db": 2}


def test_options_of_tls_are_parsed(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(authority))
    parsed = parse_redis_url(f"rediss://h/2?ssl_ca_certs={authority}&ssl_check_hostname=no")
    assert (parsed.options["ssl_ca_certs"], parsed.options["ssl_check_hostname"], parsed.options["db"]) == (
        str(authority), False, 2,
    )  # fmt: skip
