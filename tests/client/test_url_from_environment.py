"""Where a client without a URL looks for Redis: REDIS_URL, or the file that REDIS_URL_FILE names."""

from pathlib import Path

import pytest

from worker import Client, InvalidArgument, State, SyncClient, Unavailable


async def test_a_client_without_a_url_reads_the_file_that_the_environment_names(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "redis_url"
    file.write_text(f"{redis_url}\n")
    monkeypatch.setenv("REDIS_URL_FILE", str(file))
    async with Client() as client:
        await client.ping()
    with SyncClient() as blocking:
        assert blocking.status("unknown").state is State.UNKNOWN
    async with Client("redis://127.0.0.1:1") as client:
        with pytest.raises(Unavailable):
            await client.ping()


@pytest.mark.parametrize(
    ("content", "url", "message"),
    [
        (None, "", "REDIS_URL_FILE names a file that cannot be read: No such file or directory"),
        ("\n", "", "REDIS_URL_FILE names a file that is empty"),
        ("redis://:hunter2@h", "redis://h", "REDIS_URL and REDIS_URL_FILE are both set: remove one of them"),
        ("hunter2", "", "the URL of Redis must be a URL such as"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_without_its_content(
    content: str | None, url: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "redis_url"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("REDIS_URL_FILE", str(file))
    monkeypatch.setenv("REDIS_URL", url)
    for kind in (Client, SyncClient):
        with pytest.raises(InvalidArgument) as caught:
            kind()
        assert str(caught.value).startswith(message)
        assert "hunter2" not in str(caught.value)
