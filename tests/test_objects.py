"""Object storage in a real S3 server, and with a proxy before it that refuses, is busy or away."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmagent.objects import Objects, ObjectsError
from tests import s3


@pytest.fixture
def proxy(object_storage: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Proxy]:
    made = s3.Proxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    yield made
    made.close()


def test_what_is_written_is_listed_read_moved_and_deleted(object_storage: str, tmp_path: Path) -> None:
    objects = Objects(object_storage)
    (tmp_path / "large").write_bytes(os.urandom(11 << 20))  # in several parts
    assert objects.put(tmp_path / "large", "a/b/large") == 11 << 20
    objects.write("a/small", b"hello")
    assert {each.key: each.size for each in objects.list("a")} == {"a/b/large": 11 << 20, "a/small": 5}
    assert [each.key for each in objects.list("a/small")] == ["a/small"]
    assert objects.list("nothing") == []
    objects.fetch(objects.about("a/b/large"), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()
    with objects.open("a/b/large") as file:
        file.seek(10 << 20)
        assert file.read(4) == (tmp_path / "large").read_bytes()[10 << 20 :][:4]
    objects.move("a/small", "c/small")
    assert objects.read("c/small") == b"hello"
    assert abs(objects.about("c/small").mtime_ns / 1e9 - time.time()) < 60
    objects.delete("c/small")
    objects.delete("c/small")
    assert [each.key for each in objects.list("")] == ["a/b/large"]
    with pytest.raises(FileNotFoundError):
        objects.about("c/small")


def test_a_url_may_name_the_server(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    Objects(f"s3://{s3.BUCKET}/named?endpoint_override={s3_server}").write("x", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert Objects(f"s3://{s3.BUCKET}/named").read("x") == b"1"


def test_busy_storage_is_asked_again(proxy: s3.Proxy, object_storage: str) -> None:
    objects = Objects(object_storage)
    proxy.answers = [(503, "SlowDown")] * 3 + [(500, "InternalError")] * 2
    objects.write("x", b"1")
    assert proxy.answers == []
    proxy.answers = [(503, "SlowDown")] * 3
    assert objects.read("x") == b"1"


def test_storage_that_is_away_is_given_up(proxy: s3.Proxy, object_storage: str) -> None:
    objects = Objects(object_storage)
    proxy.away = True
    began = time.monotonic()
    with pytest.raises(ObjectsError, match="away or busy"):
        objects.write("x", b"1", patience_s=1.0)
    assert time.monotonic() - began < 60
    proxy.away = False
    objects.write("x", b"1")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("AccessDenied", "none with the right to list, read, write and delete"),
        ("InvalidAccessKeyId", "the credentials are wrong"),
        ("SignatureDoesNotMatch", "the credentials are wrong"),
    ],
)
def test_refusals_name_what_to_do(proxy: s3.Proxy, object_storage: str, code: str, says: str) -> None:
    proxy.refuse_writes = code
    with pytest.raises(ObjectsError, match=says) as caught:
        Objects(object_storage).write("x", b"1")
    assert object_storage in str(caught.value)


def test_a_bucket_that_is_not_there(object_storage: str) -> None:
    with pytest.raises(ObjectsError, match="make the bucket, or correct MMAGENT_STORAGE"):
        Objects("s3://no-such-bucket/x").write("x", b"1")


@pytest.mark.parametrize(
    ("url", "says"), [("wrong://x/y", "wrong"), ("s3://b/x?speed=11", "'speed'"), ("s3://b/x?region=", "")]
)
def test_urls_that_nothing_speaks(url: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not says:
        Objects(url)
        return
    with pytest.raises(ObjectsError, match=says):
        Objects(url)


def test_any_url_that_fsspec_knows(tmp_path: Path) -> None:
    objects = Objects("memory://somewhere/deep")
    objects.write("a/x", b"hello")
    assert [(each.key, each.size) for each in objects.list("a")] == [("a/x", 5)]
    assert objects.read("a/x") == b"hello"
