from __future__ import annotations

import errno
import hashlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import quote

import pytest

from manifpt import storage
from manifpt.errors import ConfigError, StorageError
from manifpt.storage import is_local, join, normalize, sha256_of, store_of

STORE = store_of("/")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class TestNormalize:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("/a/b", "/a/b"),
            ("/a/b/", "/a/b"),
            ("/a//b/../c/.", "/a/c"),
            ("file:///a/b", "/a/b"),
            ("file:///a%20b/%23/%C3%A4", "/a b/#/ä"),
            ("file:///100%2525", "/100%25"),
            ("file://localhost/a", "/a"),
            ("/a%20b", "/a%20b"),  # a plain path is not decoded
            ("s3://bucket/a%20b", "s3://bucket/a%20b"),
            ("s3://bucket/a//b/../c", "s3://bucket/a//b/../c"),  # keys have no folders
            ("s3://bucket/prefix/", "s3://bucket/prefix"),
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket/[a]#?x", "s3://bucket/[a]#?x"),
        ],
    )
    def test_one_spelling(self, given: str, expected: str) -> None:
        assert normalize(given) == expected
        assert normalize(normalize(given)) == expected

    def test_relative(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert normalize("a/b") == str(tmp_path / "a" / "b")
        assert normalize(".") == str(tmp_path)
        assert normalize("~a:b") == str(tmp_path / "~a:b")

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert normalize("~/a") == str(tmp_path / "a")
        assert normalize("/a/~") == "/a/~"

    @pytest.mark.parametrize(
        "given",
        ["gs://b/k", "http://h/p", "S3://b/k", "s3a://b/k", "s3://", "s3:///k", "file://host/a", "file://a", ""],
    )
    def test_refused(self, given: str) -> None:
        with pytest.raises(ConfigError):
            normalize(given)

    def test_a_name_that_is_no_utf_8(self, tmp_path: Path) -> None:
        raw = os.fsencode(tmp_path) + b"/\xff\xfe.png"
        Path(os.fsdecode(raw)).write_bytes(b"x")
        assert STORE.read(normalize("file://" + quote(raw))) == b"x"

    def test_kinds(self) -> None:
        assert is_local("/a")
        assert is_local("file:///a")
        assert not is_local("s3://b/k")
        assert join("s3://b/k/", "c", "d") == "s3://b/k/c/d"


class TestReadAndWrite:
    def test_whole_and_ranges(self, tmp_path: Path) -> None:
        uri = str(tmp_path / "deep" / "er" / "x")
        STORE.write(uri, b"0123456789")
        assert STORE.read(uri) == b"0123456789"
        assert STORE.read(uri, 3, 4) == b"3456"
        assert STORE.read(uri, 0, 2) == b"01"
        assert STORE.read(uri, 8, 100) == b"89"
        assert STORE.read(uri, 3, 0) == b""
        assert sha256_of(uri, block_bytes=3) == hashlib.sha256(b"0123456789").hexdigest()
        with STORE.open(uri) as stream:
            stream.seek(-1, os.SEEK_END)
            assert stream.read() == b"9"

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"x")
        for path in (tmp_path / "none", tmp_path, tmp_path / "file" / "below"):
            with pytest.raises(FileNotFoundError):
                STORE.read(str(path))
            with pytest.raises(FileNotFoundError):
                STORE.open(str(path))
            assert STORE.stat(str(path)) is None

    def test_stat(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"123")
        entry = STORE.stat(str(tmp_path / "a.png"))
        assert entry is not None
        assert (entry.key, entry.uri, entry.size_bytes) == ("a.png", str(tmp_path / "a.png"), 3)
        (tmp_path / "a.png").write_bytes(b"1234")
        assert STORE.stat(str(tmp_path / "a.png")).etag != entry.etag  # type: ignore[union-attr]

    def test_write_replaces(self, tmp_path: Path) -> None:
        uri = str(tmp_path / "x")
        STORE.write(uri, b"old")
        STORE.write(uri, b"new")
        assert STORE.read(uri) == b"new"
        assert names(tmp_path) == ["x"]

    def test_upload(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(os.urandom(1 << 20))
        STORE.upload(source, str(tmp_path / "to" / "x"))
        assert (tmp_path / "to" / "x").read_bytes() == source.read_bytes()

    def test_a_failed_write_leaves_what_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        uri = str(tmp_path / "x")
        STORE.write(uri, b"old")

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(storage.os, "fsync", full)
        with pytest.raises(StorageError, match="No space"):
            STORE.write(uri, b"new")
        with pytest.raises(StorageError, match="No space"):
            STORE.create(str(tmp_path / "y"), b"new")
        assert STORE.read(uri) == b"old"
        assert names(tmp_path) == ["x"]

    def test_readers_see_old_or_new_and_nothing_between(self, tmp_path: Path) -> None:
        uri, versions = str(tmp_path / "x"), [bytes([n]) * 300_000 for n in range(2)]
        STORE.write(uri, versions[0])
        stop, seen = threading.Event(), []

        def reader() -> None:
            while not stop.is_set():
                seen.append(STORE.read(uri) in versions)

        thread = threading.Thread(target=reader)
        thread.start()
        for n in range(60):
            STORE.write(uri, versions[n % 2])
        stop.set()
        thread.join()
        assert seen
        assert all(seen)

    def test_very_long_names(self, tmp_path: Path) -> None:
        uri = str(tmp_path / ("n" * 255))
        STORE.write(uri, b"x")
        assert STORE.create(uri, b"y") is False
        assert STORE.read(uri) == b"x"


class TestCreate:
    def test_only_where_nothing_is(self, tmp_path: Path) -> None:
        uri = str(tmp_path / "a" / "x")
        assert STORE.create(uri, b"one") is True
        assert STORE.create(uri, b"two") is False
        assert STORE.read(uri) == b"one"
        assert names(tmp_path) == ["a/x"]

    @pytest.mark.parametrize("round_", range(8))
    def test_race_has_one_winner(self, tmp_path: Path, round_: int) -> None:
        uri, barrier = str(tmp_path / "x"), threading.Barrier(12)
        won: list[int] = []

        def racer(number: int) -> None:
            barrier.wait()
            if STORE.create(uri, bytes([number]) * 200_000):
                won.append(number)

        threads = [threading.Thread(target=racer, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert STORE.read(uri) == bytes([won[0]]) * 200_000
        assert names(tmp_path) == ["x"]

    def test_without_hard_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_links(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(storage.os, "link", no_links)
        uri = str(tmp_path / "x")
        assert STORE.create(uri, b"one") is True
        assert STORE.create(uri, b"two") is False
        assert STORE.read(uri) == b"one"
        assert names(tmp_path) == ["x"]


class TestList:
    def test_keys_are_relative(self, tmp_path: Path) -> None:
        for name in ("a/b/c.png", "a/d.png", "e.png"):
            STORE.write(str(tmp_path / name), b"x")
        entries = {entry.key: entry for entry in STORE.list(str(tmp_path))}
        assert sorted(entries) == ["a/b/c.png", "a/d.png", "e.png"]
        assert all(STORE.read(entry.uri) == b"x" for entry in entries.values())

    def test_links(self, tmp_path: Path) -> None:
        STORE.write(str(tmp_path / "a" / "x.png"), b"x")
        (tmp_path / "a" / "up").symlink_to(tmp_path)
        (tmp_path / "a" / "here").symlink_to(".")
        (tmp_path / "itself.png").symlink_to("itself.png")
        (tmp_path / "nothing.png").symlink_to("none")
        (tmp_path / "file.png").symlink_to("a/x.png")
        (tmp_path / "other").symlink_to("a")
        # An image below two names is listed below both; a folder is never entered from within itself.
        keys = sorted(entry.key for entry in STORE.list(str(tmp_path)))
        assert keys == ["a/x.png", "file.png", "other/x.png"]

    def test_pipes_and_sockets_are_no_objects(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.png")
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(tmp_path)  # the paths of sockets have a limit
            try:
                server.bind("s.png")
            finally:
                os.chdir(here)
            assert list(STORE.list(str(tmp_path))) == []
        assert STORE.stat(str(tmp_path / "pipe.png")) is None

    def test_what_is_no_file_any_more_is_not_there(self, tmp_path: Path) -> None:
        """A pipe would be waited for, for ever; of the others the system has errors of its own."""
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "itself").symlink_to("itself")
        (tmp_path / "folder").mkdir()
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(tmp_path)
            try:
                server.bind("socket")
            finally:
                os.chdir(here)
            for name in ("pipe", "itself", "folder", "socket", "none", "folder/none/x", "n" * 300):
                with pytest.raises(FileNotFoundError):
                    STORE.read(str(tmp_path / name))
                with pytest.raises(FileNotFoundError):
                    STORE.open(str(tmp_path / name))

    @pytest.mark.parametrize("step", ["stat", "scandir"])
    def test_a_folder_that_goes_does_not_end_the_list(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        for n in range(6):
            STORE.write(str(tmp_path / f"{n}" / "x.png"), b"x")
        real = getattr(os, step)

        def racing(path: bytes) -> object:
            if path.endswith(b"/3"):
                raise FileNotFoundError(errno.ENOENT, "gone")
            return real(path)

        monkeypatch.setattr(storage.os, step, racing)
        assert sorted(entry.key for entry in STORE.list(str(tmp_path))) == [f"{n}/x.png" for n in (0, 1, 2, 4, 5)]

    def test_a_file_that_goes_does_not_end_the_list(self, tmp_path: Path) -> None:
        for n in range(6):
            STORE.write(str(tmp_path / f"{n}.png"), b"x")
        listing = STORE.list(str(tmp_path))
        first = next(listing).key
        next(path for path in tmp_path.iterdir() if path.name != first).unlink()
        assert len([first, *listing]) == 5

    def test_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            list(STORE.list(str(tmp_path / "none")))


class TestClean:
    def left_by(self, folder: Path, host: str, pid: int, name: str = "part-0.parquet") -> Path:
        path = folder / f".{name}.{host}~{pid}~0123abcd.tmp"
        path.write_bytes(b"half")
        return path

    def dead_pid(self) -> int:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        return process.pid

    def test_of_the_dead_and_not_of_the_living(self, tmp_path: Path) -> None:
        host = storage._host().decode()
        (tmp_path / "deep").mkdir()
        dead = self.left_by(tmp_path / "deep", host, self.dead_pid())
        alive = self.left_by(tmp_path, host, os.getpid())
        elsewhere = self.left_by(tmp_path, "another-host", self.dead_pid())
        own = tmp_path / ".notes.tmp"
        own.write_bytes(b"a user's")
        STORE.write(str(tmp_path / "x.tmp"), b"x")
        STORE.clean(str(tmp_path))
        assert not dead.exists()
        assert alive.exists()
        assert elsewhere.exists()
        assert own.exists()
        assert (tmp_path / "x.tmp").exists()

    def test_of_a_writer_that_was_killed(self, tmp_path: Path) -> None:
        code = (
            "import os, sys\nfrom manifpt import storage\n"
            "storage.os.fsync = lambda _: os._exit(9)\n"
            "storage.store_of('/').write(sys.argv[1], b'half')"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.y.z")], check=False)
        assert done.returncode == 9
        assert len(names(tmp_path)) == 1
        assert not (tmp_path / "x.y.z").exists()
        STORE.clean(str(tmp_path))
        assert names(tmp_path) == []

    def test_hosts_of_one_domain_are_several(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a shared file system, a process of another host must not be taken for dead."""
        monkeypatch.setattr(storage.socket, "gethostname", lambda: "a.example.com")
        name = b".x.%s.tmp" % storage._writer_tag()
        name = name.replace(b"~%d~" % os.getpid(), b"~%d~" % self.dead_pid())
        (tmp_path / name.decode()).write_bytes(b"half")
        for other in ("b.example.com", "com", "example.com", "a"):
            monkeypatch.setattr(storage.socket, "gethostname", lambda other=other: other)
            STORE.clean(str(tmp_path))
            assert names(tmp_path) == [name.decode()]
        monkeypatch.setattr(storage.socket, "gethostname", lambda: "a.example.com")
        STORE.clean(str(tmp_path))
        assert names(tmp_path) == []

    def test_while_others_write(self, tmp_path: Path) -> None:
        stop = threading.Event()

        def cleaner() -> None:
            while not stop.is_set():
                STORE.clean(str(tmp_path))

        thread = threading.Thread(target=cleaner)
        thread.start()
        for n in range(60):
            STORE.write(str(tmp_path / f"{n}"), b"x")
        stop.set()
        thread.join()
        assert len(names(tmp_path)) == 60

    def test_nothing_there(self, tmp_path: Path) -> None:
        STORE.clean(str(tmp_path / "none"))
