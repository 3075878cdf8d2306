from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import boto3
import obstore
import pytest
from botocore.exceptions import ClientError
from botocore.stub import Stubber
from obstore.exceptions import GenericError, InvalidPathError, PermissionDeniedError

from manifpt.errors import StorageRefused
from manifpt.storage_s3 import S3Store, _region_of


def asked(status: int, headers: dict[str, str]) -> str | None:
    """What `_region_of` finds in an answer."""
    client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s")
    meta = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    with Stubber(client) as stubber:
        if status == 200:
            stubber.add_response("head_bucket", {"ResponseMetadata": meta}, {"Bucket": "images"})
        else:
            stubber.add_client_error("head_bucket", str(status), http_status_code=status, response_meta=meta)
        return _region_of(client, "images")


@pytest.mark.parametrize("status", [200, 403])
def test_a_bucket_tells_its_region_even_to_a_role_that_may_list_a_prefix_alone(status: int) -> None:
    assert asked(status, {"x-amz-bucket-region": "eu-central-1"}) == "eu-central-1"


def test_a_service_that_names_no_region_leaves_the_session_its_own() -> None:
    assert asked(403, {}) is None


def test_a_bucket_that_is_not_there_is_an_error() -> None:
    """Not one whose objects are all gone, as a scan took it for."""
    with pytest.raises(StorageRefused, match="There is no bucket 'images'"):
        asked(404, {"x-amz-bucket-region": "eu-central-1"})
    with pytest.raises(ClientError, match="500"):
        asked(500, {})


class Client:
    """boto3's, of a bucket; what it is asked stays."""

    def __init__(self, keys: tuple[str, ...] = (), refuses_pages: bool = False) -> None:
        self.keys, self.refuses_pages, self.asked = keys, refuses_pages, []  # type: tuple[str, ...], bool, list[Any]

    def get_object(self, Bucket: str, Key: str, **_: Any) -> dict[str, Any]:  # noqa: N803
        self.asked.append(Key)
        return {"Body": io.BytesIO(Key.encode())}

    def put_object(self, Bucket: str, Key: str, **_: Any) -> None:  # noqa: N803
        self.asked.append(Key)

    def list_objects_v2(self, Bucket: str, Prefix: str, MaxKeys: int) -> dict[str, Any]:  # noqa: N803
        return {"Contents": [{"Key": key} for key in self.keys if key.startswith(Prefix)]}

    def get_paginator(self, name: str) -> Client:
        return self

    def paginate(self, Bucket: str, Prefix: str, StartAfter: str) -> Iterator[dict[str, Any]]:  # noqa: N803
        if self.refuses_pages:
            raise ClientError({"Error": {"Code": "AccessDenied"}}, "ListObjectsV2")
        found = [key for key in self.keys if key.startswith(Prefix) and key > StartAfter]
        yield {"Contents": [{"Key": key, "Size": 1, "ETag": '"e"'} for key in found]}


def store(monkeypatch: pytest.MonkeyPatch, client: Client, fails: Exception | None = None) -> S3Store:
    """With obstore that lists what it would, or fails."""
    found = S3Store()
    monkeypatch.setattr(S3Store, "client", client)
    monkeypatch.setattr(S3Store, "_bucket", lambda self, name: name)

    def listed(bucket: str, prefix: str | None, chunk_size: int) -> Iterator[list[dict[str, Any]]]:
        if fails is not None:
            raise fails
        yield [{"path": key.strip("/"), "size": 1, "e_tag": "e"} for key in client.keys]

    def get(bucket: str, key: str, options: Any) -> Any:
        raise fails or AssertionError("obstore would read another key")

    def put(*_: Any, **__: Any) -> None:
        raise AssertionError("obstore would write another key")

    for name, fake in (("list", listed), ("get", get), ("put", put)):
        monkeypatch.setattr(obstore, name, fake)
    return found


def test_keys_that_begin_or_end_with_a_slash_are_not_those_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore takes the slash off: a run into `s3://b//run` wrote half of its files into `s3://b/run`."""
    client = Client(("/a.png", "a.png"))
    s3 = store(monkeypatch, client)
    assert s3.read("s3://b//a.png") == b"/a.png"
    s3.write("s3://b//run/_SUCCESS", b"")
    assert s3.create("s3://b/run/", b"x")
    assert client.asked == ["/a.png", "/run/_SUCCESS", "run/"]
    assert [entry.uri for entry in s3.list("s3://b")] == ["s3://b//a.png", "s3://b/a.png"]
    assert [entry.key for entry in s3.list("s3://b//")] == ["a.png"]
    assert [entry.uri for entry in store(monkeypatch, Client(("b.png",))).list("s3://b")] == ["s3://b/b.png"]


@pytest.mark.parametrize(
    "error",
    [
        PermissionDeniedError("<Error><Code>InvalidObjectState</Code></Error>"),  # in an archive
        GenericError("<Error><Code>KMS.DisabledException</Code></Error>"),
        GenericError("<Error><Code>InvalidRequest</Code></Error>"),  # encrypted with its owner's key
    ],
)
def test_what_no_retry_makes_readable_is_one_image_less_and_no_end(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with pytest.raises(PermissionError, match="can't be read as it is"):
        store(monkeypatch, Client(), error).read("s3://b/a.png")


def test_a_listing_that_boto3_goes_on_with_fails_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    s3 = store(monkeypatch, Client(refuses_pages=True), InvalidPathError("a//b"))
    with pytest.raises(PermissionError, match="access denied"):
        list(s3.list("s3://b/run"))


def test_the_marker_of_a_folder_is_not_listed_as_the_object_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore lists `a/` as `a`, of 0 bytes, beside the object `a`; scans took that for an image that changed."""
    keys = {"in/": 0, "in/a": 7, "in/a/": 0, "in/a/b": 7, "in/c/": 0, "in/c/x": 7, "in/d": 0}

    class Bucket(Client):
        def list_objects_v2(self, Bucket: str, Prefix: str, MaxKeys: int) -> dict[str, Any]:  # noqa: N803
            found = [key for key in sorted(keys) if key.startswith(Prefix)][:MaxKeys]
            return {"Contents": [{"Key": key, "Size": keys[key]} for key in found]}

        def head_object(self, **_: Any) -> None:
            raise AssertionError("a role that may list below a prefix alone is refused this")

    s3 = store(monkeypatch, Bucket())

    def listed(bucket: str, prefix: str | None, chunk_size: int) -> Iterator[list[dict[str, Any]]]:
        yield [{"path": key.rstrip("/"), "size": size_bytes, "e_tag": "e"} for key, size_bytes in keys.items()]

    monkeypatch.setattr(obstore, "list", listed)
    assert [(entry.key, entry.size_bytes) for entry in s3.list("s3://b/in")] == [
        ("a", 7), ("a/b", 7), ("c/x", 7), ("d", 0),
    ]  # fmt: skip


def test_an_empty_object_is_read_as_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 has no range of it, and containers are asked for their first byte before they are opened."""
    answer = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>InvalidRange</Code></Error>'
    s3 = store(monkeypatch, Client(), GenericError(f"416 Range Not Satisfiable: {answer}"))
    assert s3.read("s3://b/empty.tar", 0, 1) == b""
