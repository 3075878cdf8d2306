"""The S3 back end against a real server: what obstore can't name, conditional writes, and errors by their kind."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from manifpt.errors import BadImage, ConfigError, RejectReason, StorageError
from manifpt.fetch import fetch
from manifpt.storage_s3 import S3Store
from tests.helpers.s3 import BUCKET, flaky_proxy

ROOT = f"s3://{BUCKET}/storage"
ODD_KEYS = [
    "plain",
    "a//b",
    "line\nfeed",
    "tab\t",
    "per%41cent",
    "qu'o\"te",
    "漢字 ü",
    "pl+us#h?",
    "star*{x}",
    "back\\slash",
]


@pytest.fixture
def store(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> S3Store:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    return S3Store()


@pytest.mark.parametrize("key", ODD_KEYS)
def test_any_key_round_trips(store: S3Store, key: str) -> None:
    uri = f"{ROOT}/odd/{key}"
    data = key.encode() * 3
    store.write(uri, data)
    assert store.read(uri) == data
    assert store.read(uri, offset=2, length=5) == data[2:7]
    found = store.stat(uri)
    assert found is not None
    assert found.size_bytes == len(data)
    assert store.read(uri, etag=found.etag) == data
    with pytest.raises(BlockingIOError):
        store.read(uri, etag="0" * 32)
    with store.open(uri) as stream:
        stream.seek(1)
        assert stream.read(2) == data[1:3]


def test_a_reader_is_of_one_version(store: S3Store) -> None:
    """Footer of one, rows of another: a Parquet file that is replaced under its reader."""
    uri, size_bytes = f"{ROOT}/replaced", 70 << 20  # more than s3fs reads ahead
    store.write(uri, b"a" * size_bytes)
    listed = store.stat(uri)
    assert listed is not None
    with store.open(uri, listed.etag) as stream:
        assert stream.read(3) == b"aaa"
        store.write(uri, b"b" * size_bytes)
        stream.seek(65 << 20)
        with pytest.raises(BlockingIOError, match="changed while it was read"):
            stream.read(3)
    with pytest.raises(BlockingIOError, match="changed since it was indexed"):
        store.open(uri, listed.etag)
    with store.open(uri) as stream:
        assert stream.read(3) == b"bbb"


@pytest.mark.parametrize("code", ["SlowDown", "503", "ServiceUnavailable", "InvalidToken", "InternalError"])
def test_a_storage_that_is_throttled_has_changed_nothing(
    store: S3Store, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To s3fs they have the number of an object that was replaced; its images were rejected for good."""
    uri = f"{ROOT}/throttled"
    store.write(uri, b"a" * 10)
    said = ClientError({"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {}}, "GetObject")

    def refuse(*_: object, **__: object) -> bytes:
        raise translate_boto_error(said)

    monkeypatch.setattr("s3fs.core.S3File._fetch_range", refuse)
    with store.open(uri) as stream, pytest.raises(OSError, match="no") as caught:
        stream.read()
    assert not isinstance(caught.value, BlockingIOError)


def test_a_row_of_a_parquet_file_that_was_replaced_is_none_of_the_new_one(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(word: str) -> str:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"image": [f"{word} {n}".encode() for n in range(6)]}), sink)
        store.write(f"{ROOT}/rows.parquet", sink.getvalue().to_pybytes())
        found = store.stat(f"{ROOT}/rows.parquet")
        assert found is not None
        return found.etag

    old = written("old")
    row = {"uri": f"{ROOT}/rows.parquet", "container": "parquet", "offset": 3, "size_bytes": None, "etag": old}
    assert list(fetch([row])) == [b"old 3"]
    opened = S3Store.open

    def replacing(self: S3Store, uri: str, etag: str | None = None) -> IO[bytes]:
        written("new")  # between the listing and the first byte
        return opened(self, uri, etag)

    monkeypatch.setattr(S3Store, "open", replacing)
    (found,) = fetch([row])
    assert isinstance(found, BadImage) and found.reason is RejectReason.CHANGED


@pytest.mark.parametrize("key", ["create/plain", "create//odd"])
def test_create_has_one_winner(store: S3Store, key: str) -> None:
    won: list[int] = []

    def create(number: int) -> None:
        if store.create(f"{ROOT}/{key}", b"%d" % number * 1000):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read(f"{ROOT}/{key}") == b"%d" % won[0] * 1000
    assert store.create(f"{ROOT}/{key}", b"%d" % won[0] * 1000), "a PUT sent again meets its own object"


def test_upload_and_list_more_than_a_page(store: S3Store, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(9 << 20))  # over the size at which boto3 uploads in parts
    store.upload(path, f"{ROOT}/large")
    assert store.read(f"{ROOT}/large") == path.read_bytes()
    for number in range(1100):
        store.write(f"{ROOT}/many/{number:04d}", b"x")
    assert [entry.key for entry in store.list(f"{ROOT}/many")] == [f"{number:04d}" for number in range(1100)]
    assert not list(store.list(f"{ROOT}/man")), "a prefix is a folder, not the beginning of a name"


def test_errors_say_what_they_are(store: S3Store, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("none", "no//ne"):
        with pytest.raises(FileNotFoundError):
            store.read(f"{ROOT}/{key}")
        assert store.stat(f"{ROOT}/{key}") is None
        with pytest.raises(FileNotFoundError):
            store.open(f"{ROOT}/{key}")
    with pytest.raises(ConfigError, match="There is no bucket 'not-there'"):
        list(store.list("s3://not-there/x"))
    with flaky_proxy(s3["AWS_ENDPOINT_URL"], 0, forbidden="secret") as (endpoint, *_):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        for key in ("secret", "sec//secret"):
            with pytest.raises(PermissionError):
                S3Store().read(f"{ROOT}/{key}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("manifpt.storage_s3._OBSTORE_RETRY", {"max_retries": 1})
    with pytest.raises(StorageError):
        S3Store().read(f"{ROOT}/plain")
