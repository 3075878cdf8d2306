"""Bytes by URI: plain paths, `file://` and `s3://`. All effects on storage pass here.

A written object is whole or absent, on every back end: a temporary name and a rename (or a hard link, where the name
must be new) on a file system, one PUT on S3. Reads raise `BadImage`-ready errors: `FileNotFoundError` for what is gone,
`PermissionError` for what is forbidden, `StorageError` for what still fails after the retries.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import socket
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import quote, unquote

from manifpt.errors import ConfigError, StorageError
from manifpt.log import event

__all__ = ["Entry", "Store", "is_local", "is_of_storage", "join", "normalize", "sha256_of", "store_of"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored object, as a listing shows it.

    Attributes:
        key: relative to the listed root, "/" between levels, any character that a name may have.
        uri: where `Store.read` finds it.
        size_bytes: its length.
        etag: S3's ETag without quotes; modification time and size of a file.
    """

    key: str
    uri: str
    size_bytes: int
    etag: str


class Store(Protocol):
    """What the project needs of a storage system. URIs are those of `normalize`."""

    def read(self, uri: str, offset: int | None = None, length: int | None = None, etag: str | None = None) -> bytes:
        """All bytes, or `length` bytes from `offset`. With `etag`, a changed object raises `BlockingIOError`."""
        ...

    def write(self, uri: str, data: bytes) -> None:
        """Publishes an object under a name, replacing what has it."""
        ...

    def create(self, uri: str, data: bytes) -> bool:
        """Publishes an object under a name that must be free. False, and nothing done, where it isn't."""
        ...

    def upload(self, path: Path, uri: str) -> None:
        """`write` for a local file that is too large for memory."""
        ...

    def open(self, uri: str, etag: str | None = None) -> IO[bytes]:
        """A seekable reader, for Parquet and tar. With `etag`, as `read`, also where the object changes meanwhile; of
        files, that can't be told."""
        ...

    def stat(self, uri: str) -> Entry | None:
        """The object of exactly this name, its key the last part of the name; None where there is none."""
        ...

    def list(self, uri: str) -> Iterator[Entry]:
        """Every object under a prefix, streamed, in no promised order."""
        ...

    def remove(self, uri: str) -> None:
        """Takes an object away; nothing where there is none."""
        ...

    def clean(self, uri: str) -> None:
        """Removes what writers that died have left under a prefix."""
        ...


def normalize(uri: str) -> str:
    """One spelling a place: `s3://bucket/key` as it is, a local path absolute, `file://` as the path it names.

    Raises:
        ConfigError: another scheme or host, no bucket, nothing at all.
    """
    if not uri:
        raise ConfigError("An empty path; is a shell variable unset?")  # abspath would make the working folder of it
    if uri.startswith("s3://"):
        if not uri[len("s3://") :].partition("/")[0]:
            raise ConfigError(f"{uri!r} names no bucket; write s3://bucket/prefix.")
        return uri.rstrip("/")
    if uri.startswith("file://"):
        uri = uri.replace("file://localhost/", "file:///", 1)
        if not uri.startswith("file:///"):
            raise ConfigError(f"{uri!r} names another host; write file:///path, with three slashes.")
        return os.path.abspath(os.fsdecode(_unquote_bytes(uri[len("file://") :])))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", uri):
        raise ConfigError(f"{uri!r}: unknown scheme; use a path, file:// or s3://.")
    return os.path.abspath(os.path.expanduser(uri))


def _unquote_bytes(path: str) -> bytes:
    return unquote(path, encoding="utf-8", errors="surrogateescape").encode("utf-8", "surrogateescape")


def is_local(uri: str) -> bool:
    """Whether a URI of `normalize` is a file's."""
    return not uri.startswith("s3://")


def is_of_storage(error: BaseException) -> bool:
    """Whether an error from below pyarrow is storage's. Damaged data are an `OSError` too, but have no number.

    s3fs gives none to what is forbidden.
    """
    return isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError)


def join(uri: str, *parts: str) -> str:
    """The URI of what lies below."""
    return "/".join((uri.rstrip("/"), *parts))


def sha256_of(uri: str, block_bytes: int = 16 << 20) -> str:
    """Hex SHA-256 of an object, streamed."""
    digest = hashlib.sha256()
    with store_of(uri).open(uri) as stream:
        while block := stream.read(block_bytes):
            digest.update(block)
    return digest.hexdigest()


@functools.cache
def _s3() -> Store:
    from manifpt.storage_s3 import S3Store  # boto3 costs half a second: only where it is used

    return S3Store()


def store_of(uri: str) -> Store:
    """The back end of a URI; one a process."""
    return _LOCAL if is_local(uri) else _s3()


# Deleted since its folder was listed; a link to nothing, or to itself; a path that the system can't be asked for.
_VANISHED = {errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG}
_NO_FILE = _VANISHED | {errno.ENOTDIR, errno.ENXIO}  # the last: a socket


def _tell_too_long(error: OSError, path: bytes) -> None:
    if error.errno == errno.ENAMETOOLONG:
        event("path_too_long", begins=os.fsdecode(path[:200]), bytes=len(path), hint="nothing below it is listed")


class LocalStore:
    """A file system. Also a shared one (NFS, Lustre): only `rename` and `link` need to be atomic."""

    def read(self, uri: str, offset: int | None = None, length: int | None = None, etag: str | None = None) -> bytes:
        with self.open(uri) as file:
            if offset:
                file.seek(offset)
            return file.read(-1 if length is None else length)

    def write(self, uri: str, data: bytes) -> None:
        self._publish(_path(uri), data, new=False)

    def create(self, uri: str, data: bytes) -> bool:
        return self._publish(_path(uri), data, new=True)

    def upload(self, path: Path, uri: str) -> None:
        with open(path, "rb") as file:
            self._publish(_path(uri), file, new=False)

    def open(self, uri: str, etag: str | None = None) -> IO[bytes]:
        try:
            return open(_path(uri), "rb", opener=_regular)  # the caller's `with` closes it
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            raise FileNotFoundError(error.errno, error.strerror, error.filename) from error

    def stat(self, uri: str) -> Entry | None:
        try:
            path = _path(uri)
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _entry(os.path.basename(path), path, status) if stat.S_ISREG(status.st_mode) else None

    def list(self, uri: str) -> Iterator[Entry]:
        """Without recursion: a tree may be deeper than Python's stack."""
        # Of each folder where it is, how its names begin, and the device and number of all above it.
        left: list[tuple[bytes, bytes, frozenset[tuple[int, int]]]] = [(_path(uri), b"", frozenset())]
        while left:
            folder, prefix, above = left.pop()
            try:
                here = os.stat(folder)
                if (here.st_dev, here.st_ino) in above:
                    continue  # a symbolic link to a folder above
                entries = os.scandir(folder)
            except OSError as error:
                if not above or error.errno not in _VANISHED:
                    raise
                _tell_too_long(error, folder)
                continue  # which must not end the whole listing
            below = above | {(here.st_dev, here.st_ino)}
            with entries:
                for entry in entries:
                    try:
                        status = entry.stat()
                    except OSError as error:
                        if error.errno not in _VANISHED:
                            raise
                        _tell_too_long(error, entry.path)
                        continue
                    if stat.S_ISDIR(status.st_mode):
                        left.append((entry.path, prefix + entry.name + b"/", below))
                    elif stat.S_ISREG(status.st_mode):  # to read a pipe would wait forever
                        yield _entry(prefix + entry.name, entry.path, status)

    def remove(self, uri: str) -> None:
        try:
            os.unlink(_path(uri))
        except FileNotFoundError:
            pass

    def clean(self, uri: str) -> None:
        folder = _path(uri)
        if not os.path.isdir(folder):
            return
        for parent, _, names in os.walk(folder):
            for name in names:
                if name.startswith(b".") and name.endswith(b".tmp") and _owner_is_gone(name):
                    try:
                        os.unlink(os.path.join(parent, name))
                    except FileNotFoundError:
                        pass

    def _publish(self, path: bytes, data: bytes | IO[bytes], *, new: bool) -> bool:
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        # Host and process in the name tell `clean` whether somebody is still writing it.
        temporary = os.path.join(folder, b".%s.%s.tmp" % (name[:100], _writer_tag()))
        try:
            with open(temporary, "wb") as file:
                if isinstance(data, bytes):
                    file.write(data)
                else:
                    while block := data.read(16 << 20):
                        file.write(block)
                file.flush()
                os.fsync(file.fileno())
            if not new:
                os.replace(temporary, path)
            else:
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
                except OSError:  # a file system without hard links: the check and the rename can't be one step
                    if os.path.exists(path):
                        return False
                    os.replace(temporary, path)
            _sync_folder(folder)
            return True
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            raise StorageError(f"{os.fsdecode(path)}: {error.strerror}") from error
        finally:
            try:
                os.unlink(temporary)
            except FileNotFoundError:
                pass


def _regular(path: str | bytes, flags: int) -> int:
    """Opens a file that has bytes of its own: to open a pipe would wait for whoever writes into it, for ever."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "no file, but something else of this name", os.fsdecode(path))
    return descriptor


def _writer_tag() -> bytes:
    return b"%s~%d~%s" % (_host(), os.getpid(), uuid.uuid4().hex[:8].encode())


def _host() -> bytes:
    """Whole, since on a shared file system `a.example.com` must not judge for `b.example.com`; without its dots, which
    separate the parts of a temporary name."""
    return socket.gethostname().replace(".", "_").encode()


def _owner_is_gone(name: bytes) -> bool:
    host, _, rest = name.removesuffix(b".tmp").rpartition(b".")[2].partition(b"~")
    pid = rest.partition(b"~")[0]
    if host != _host() or not pid.isdigit():
        return False  # another host's: not ours to judge
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _sync_folder(folder: bytes) -> None:
    """A rename survives a power cut only when its folder is synced too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(key: bytes, path: bytes, status: os.stat_result) -> Entry:
    """Bytes of a name that are no UTF-8 are shown as escapes in the key, since Parquet strings can't hold them."""
    etag = f"{status.st_mtime_ns:x}-{status.st_size:x}"
    return Entry(key.decode("utf-8", "backslashreplace"), _uri(path), status.st_size, etag)


def _uri(path: bytes) -> str:
    """The plain path; percent-encoded `file://` for the rare name that is no UTF-8."""
    try:
        return path.decode("utf-8")
    except UnicodeDecodeError:
        return "file://" + quote(path)


_MOST_PATH, _MOST_NAME = 4_095, 255  # bytes, of Linux and of its file systems


def _path(uri: str) -> bytes:
    try:
        path = _unquote_bytes(uri[len("file://") :]) if uri.startswith("file://") else os.fsencode(uri)
    except UnicodeEncodeError:
        path = b"\0"
    # No file system has such a name, and a manifest or a run's plan may.
    if b"\0" in path or len(path) > _MOST_PATH or max(map(len, path.split(b"/"))) > _MOST_NAME:
        raise FileNotFoundError(errno.ENOENT, "a name that no file can have", uri)
    return path


_LOCAL = LocalStore()
