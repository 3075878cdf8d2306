"""The S3 back end: obstore moves bytes, boto3 lists and says who we are, s3fs seeks in large files.

Credentials, region and endpoint are those of the standard AWS chain, as boto3 finds them: environment, profile, web
identity, instance role; `AWS_ENDPOINT_URL` or the profile's `endpoint_url` names another service than AWS.
"""

from __future__ import annotations

import functools
import io
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import boto3
import obstore
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store as ObstoreBucket

from manifpt.errors import StorageError, StorageRefused
from manifpt.storage import Entry

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import RetryConfig

__all__ = ["S3Store"]

T = TypeVar("T")

# A throttled prefix needs tens of seconds to recover: both clients back off with jitter, up to 15 s a step.
_OBSTORE_RETRY: RetryConfig = {
    "max_retries": 12,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=15), "base": 2},
    "retry_timeout": timedelta(minutes=5),
}
_CREATE_ATTEMPTS = 5
_OTHER_VERSION = {"412", "PreconditionFailed"}
_BOTO = Config(
    retries={"mode": "standard", "total_max_attempts": 12}, connect_timeout=10, read_timeout=60, max_pool_connections=64
)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri[len("s3://") :].partition("/")
    return bucket, key


def _is_trimmed(key: str) -> bool:
    """Whether obstore would take a slash off a key, and so name another object, without a word."""
    return key.startswith("/") or key.endswith("/")


class S3Store:
    """One a process; clients are made at the first use and shared by threads."""

    @functools.cached_property
    def _session(self) -> boto3.Session:
        return boto3.Session()

    @functools.cached_property
    def client(self) -> Any:
        return self._session.client("s3", config=_BOTO, region_name=self._session.region_name or "us-east-1")

    @functools.cached_property
    def _files(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(config_kwargs={"retries": {"mode": "standard", "total_max_attempts": 12}})

    @functools.cache  # noqa: B019  (one store a process)
    def _bucket(self, name: str) -> ObstoreBucket:
        endpoint = self.client.meta.endpoint_url
        options: dict[str, Any] = {}
        region = self.client.meta.region_name
        if not endpoint.endswith("amazonaws.com"):
            options = {"endpoint": endpoint, "virtual_hosted_style_request": False}
        else:  # obstore follows no redirect to the bucket's region
            region = _region_of(self.client, name) or region
        return ObstoreBucket(
            name,
            region=region,
            credential_provider=Boto3CredentialProvider(self._session),
            client_options={"allow_http": urlsplit(endpoint).scheme == "http", "timeout": timedelta(seconds=120)},
            retry_config=_OBSTORE_RETRY,
            **options,
        )

    def _call(self, uri: str, direct: Callable[[ObstoreBucket, str], T], fallback: Callable[[str, str], T]) -> T:
        """Runs a call through obstore, or through boto3 for the keys that obstore can't name (`a//b`, a line feed)."""
        bucket, key = _split(uri)
        try:
            if _is_trimmed(key):
                return fallback(bucket, key)
            try:
                return direct(self._bucket(bucket), key)
            except ValueError:  # obstore's word for such a key
                return fallback(bucket, key)
        except (PermissionError, BlockingIOError, AlreadyExistsError):
            raise
        except (FileNotFoundError, BaseError) as error:
            raise _by_code(_code_in(error), uri, error) from error
        except (ClientError, BotoCoreError) as error:
            raise _translated(error, uri) from error

    def read(self, uri: str, offset: int | None = None, length: int | None = None, etag: str | None = None) -> bytes:
        if length == 0:
            return b""  # HTTP has no empty range

        def direct(bucket: ObstoreBucket, key: str) -> bytes:
            options: GetOptions = {"if_match": f'"{etag}"'} if etag else {}
            if offset is not None and length is not None:
                options["range"] = (offset, offset + length)
            try:
                answer = obstore.get(bucket, key, options=options)
            except PreconditionError as error:
                raise BlockingIOError(f"{uri}: changed since it was indexed") from error
            return bytes(answer.bytes())

        def fallback(bucket: str, key: str) -> bytes:
            extra: dict[str, str] = {"IfMatch": f'"{etag}"'} if etag else {}
            if offset is not None and length is not None:
                extra["Range"] = f"bytes={offset}-{offset + length - 1}"
            body: bytes = self.client.get_object(Bucket=bucket, Key=key, **extra)["Body"].read()
            return body

        try:
            return self._call(uri, direct, fallback)
        except EOFError:  # it ends before the first byte that is asked for, as an empty object does
            return b""

    def write(self, uri: str, data: bytes) -> None:
        def fallback(bucket: str, key: str) -> None:
            self.client.put_object(Bucket=bucket, Key=key, Body=data)

        self._call(uri, lambda bucket, key: obstore.put(bucket, key, data) and None, fallback)

    def create(self, uri: str, data: bytes) -> bool:
        def direct(bucket: ObstoreBucket, key: str) -> bool:
            obstore.put(bucket, key, data, mode="create", use_multipart=False)
            return True

        def fallback(bucket: str, key: str) -> bool:
            self.client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            return True

        for attempt in range(1, _CREATE_ATTEMPTS + 1):
            try:
                return self._call(uri, direct, fallback)
            except (AlreadyExistsError, BlockingIOError):
                try:
                    # A PUT whose answer was lost is sent again, and then meets its own object.
                    return self.read(uri) == data
                except FileNotFoundError:  # somebody else's PUT of this name was under way, and failed
                    time.sleep(0.2 * attempt)
        raise StorageError(f"{uri}: can't be created, and isn't there")

    def upload(self, path: Path, uri: str) -> None:
        bucket, key = _split(uri)
        try:
            self.client.upload_file(str(path), bucket, key)
        except (ClientError, BotoCoreError, boto3.exceptions.S3UploadFailedError) as error:
            cause = error.__context__ if isinstance(error.__context__, ClientError) else error
            raise _translated(cause, uri) from error

    def open(self, uri: str, etag: str | None = None) -> IO[bytes]:
        self.read(uri, 0, 1, etag)  # tells why an object can't be read; s3fs would later, in other words
        file = self._files.open(uri, "rb")
        if etag and file.details["ETag"].strip('"') != etag:
            raise BlockingIOError(f"{uri}: changed since it was indexed")
        stream: IO[bytes] = io.BufferedReader(_OneVersion(file, uri), 1 << 20)
        return stream

    def stat(self, uri: str) -> Entry | None:
        bucket, key = _split(uri)
        if not key:
            return None
        try:
            head = self.client.head_object(Bucket=bucket, Key=key)
        except (ClientError, BotoCoreError) as error:
            translated = _translated(error, uri)
            if isinstance(translated, FileNotFoundError):
                return None
            raise translated from error
        return Entry(key.rpartition("/")[2], uri, head["ContentLength"], head["ETag"].strip('"'))

    def list(self, uri: str) -> Iterator[Entry]:
        bucket, prefix = _split(uri)
        prefix = prefix.rstrip("/") + "/" if prefix else ""
        try:
            if prefix.startswith("/") or (not prefix and self._is_rooted(bucket)):
                yield from self._list_from(bucket, prefix, "")
            else:
                yield from self._list_fast(bucket, prefix)
        except BaseError as error:  # a bucket that isn't there is generic to obstore
            raise _by_code(_code_in(error), uri, error) from error
        except (ClientError, BotoCoreError) as error:
            raise _translated(error, uri) from error

    def _is_rooted(self, bucket: str) -> bool:
        """Whether a bucket has keys that begin with a slash, which obstore would take off."""
        return bool(self.client.list_objects_v2(Bucket=bucket, Prefix="/", MaxKeys=1).get("Contents"))

    def _list_fast(self, bucket: str, prefix: str) -> Iterator[Entry]:
        """20 times as fast as boto3, and a bucket has millions of keys."""
        last = ""
        try:
            for page in obstore.list(self._bucket(bucket), prefix or None, chunk_size=1000):
                for item in page:
                    last = item["path"]
                    if item["size"] or self._is_empty(bucket, prefix, last):
                        etag = (item["e_tag"] or "").strip('"')
                        yield Entry(last[len(prefix) :], f"s3://{bucket}/{last}", item["size"], etag)
            return
        except (InvalidPathError, ValueError):  # a key that obstore can't name: boto3 goes on from here
            pass
        yield from self._list_from(bucket, prefix, last)

    def _is_empty(self, bucket: str, prefix: str, key: str) -> bool:
        """Whether a key is an empty object and no folder's marker: obstore lists `a/` as `a`, which may be another.

        By a listing, in which a key comes before those that it begins: of a key that isn't there, a role that may list
        only below a prefix is told that it is forbidden.
        """
        if f"{key}/" == prefix:
            return False
        found = self.client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", ())
        return any(item["Key"] == key and not item["Size"] for item in found)

    def _list_from(self, bucket: str, prefix: str, last: str) -> Iterator[Entry]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, StartAfter=last)
        for page in pages:
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # the empty objects by which consoles draw folders
                    key = item["Key"][len(prefix) :]
                    yield Entry(key, f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))

    def remove(self, uri: str) -> None:
        bucket, key = _split(uri)
        try:
            self.client.delete_object(Bucket=bucket, Key=key)
        except (ClientError, BotoCoreError) as error:
            raise _translated(error, uri) from error

    def clean(self, uri: str) -> None:
        """Nothing: a PUT that does not finish leaves nothing, and parts of an upload are for a bucket's own rules."""


class _OneVersion(io.RawIOBase):
    """An object by s3fs, which asks for the version that it opened, and has no error of its own for another one."""

    def __init__(self, file: Any, uri: str) -> None:
        super().__init__()
        self._file, self._uri = file, uri

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._file.readinto(buffer))
        except OSError as error:
            if _is_of_another_version(error):
                raise BlockingIOError(f"{self._uri}: changed while it was read") from error
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


def _is_of_another_version(error: OSError) -> bool:
    """By S3's code below s3fs's error, whose number says the same of much else; of AWS's words s3fs makes a type."""
    cause = error.__cause__
    code = cause.response["Error"].get("Code") if isinstance(cause, ClientError) else None
    return code in _OTHER_VERSION or type(error).__name__ == "FileExpired"


def _region_of(client: Any, bucket: str) -> str | None:
    """Where a bucket is. S3's refusal says so too: a role that may list a prefix alone may not ask for its bucket."""
    try:
        answer = client.head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        if status == 404:  # of which no key says more than that it isn't there
            raise _no_bucket(bucket) from error
        if status != 403:
            raise
    region: str | None = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    return region


def _no_bucket(name: str) -> StorageRefused:
    return StorageRefused(f"There is no bucket {name!r} at this endpoint; create it, or correct its name.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300]


def _translated(error: BaseException, uri: str) -> Exception:
    """boto3's errors by what a caller can do about them."""
    code = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
    return _by_code(code, uri, error)


def _code_in(error: BaseException) -> str:
    """S3's own code in an error of obstore's, which quotes the answer."""
    found = re.search(r"<Code>([\w.]+)</Code>", str(error))
    kinds = {FileNotFoundError: "404", PermissionDeniedError: "403", UnauthenticatedError: "403"}
    return found[1] if found else next((code for kind, code in kinds.items() if isinstance(error, kind)), "")


def _by_code(code: str, uri: str, error: BaseException) -> Exception:
    bucket, _ = _split(uri)
    if code == "NoSuchBucket":
        return _no_bucket(bucket)
    if code in {"404", "NoSuchKey", "NotFound", "ParamValidationError"}:  # the last: of no name that S3 can have
        return FileNotFoundError(f"{uri}: no such object")
    if code in {"403", "AccessDenied", "Forbidden", "AllAccessDisabled"}:
        return PermissionError(f"{uri}: access denied")
    # In an archive, or encrypted with a key that is off or that only its owner has: none of our doing can read it.
    if code in {"InvalidObjectState", "InvalidRequest"} or code.startswith("KMS."):
        return PermissionError(f"{uri}: can't be read as it is ({code})")
    if code in {"416", "InvalidRange"}:
        return EOFError(f"{uri}: shorter than that")
    if code in _OTHER_VERSION:
        return BlockingIOError(f"{uri}: changed since it was indexed")
    if code in {"NoCredentialsError", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}:
        return StorageRefused(
            f"S3 does not accept our credentials for {bucket!r} ({code}); check AWS variables or role."
        )
    return StorageError(f"{uri}: {_first_line(error)}")
