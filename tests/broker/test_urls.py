"""What the URLs of Redis are read into."""

from traceback import format_exception

import pytest
from redis.asyncio.connection import SSLConnection

from worker.broker.urls import RedisUrl, parse_redis_url


def test_a_sentinel_url_names_sentinels_and_the_master_and_what_its_connections_take() -> None:
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
def test_what_is_wrong_is_told_without_the_url(url: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        parse_redis_url(url)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in "".join(format_exception(caught.value))
