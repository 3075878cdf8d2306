from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt import indexing
from manifpt.errors import ConfigError
from manifpt.fetch import fetch
from manifpt.indexing import IndexOptions, entries, index
from manifpt.manifest import COLUMNS, Manifest, write_manifest
from manifpt.storage import LocalStore, store_of
from tests.helpers.cluster import ROOT

REAL = IndexOptions(source="real")


def rows_of(*inputs: object, skipped: Counter[str] | None = None, **options: Any) -> list[dict[str, Any]]:
    counted = Counter() if skipped is None else skipped
    batches = index(map(str, inputs), IndexOptions(**options), counted)
    return [row for batch in batches for row in batch.to_pylist()]


def round_trip(folder: Path, *inputs: object, **options: Any) -> dict[str, bytes]:
    """Bytes by image id, through a manifest."""
    uri = str(folder / "of all.parquet")
    write_manifest(index(map(str, inputs), IndexOptions(**options), Counter()), uri)
    rows = Manifest(uri).read(0, 10**9).to_pylist()
    found = dict(zip([row["image_id"] for row in rows], fetch(rows), strict=True))
    assert all(isinstance(data, bytes) for data in found.values()), found
    return found  # type: ignore[return-value]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def put(root: Path, *names: str) -> None:
    """Files whose content is their name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))


class TestFolders:
    def test_source_is_the_first_level(self, root: Path) -> None:
        put(root, "dcgan/a.png", "dcgan/deep/er/b.JPG", "real/c.webp")
        rows = {row["image_id"]: row for row in rows_of(root, split="test")}
        assert {key: row["source"] for key, row in rows.items()} == {
            "dcgan/a.png": "dcgan",
            "dcgan/deep/er/b.JPG": "dcgan",
            "real/c.webp": "real",
        }
        row = rows["dcgan/deep/er/b.JPG"]
        assert row["uri"] == str(root / "dcgan/deep/er/b.JPG")
        assert (row["format"], row["size_bytes"], row["split"], row["container"]) == ("jpeg", 19, "test", None)
        assert row["etag"]

    def test_schema(self, root: Path) -> None:
        put(root, "g/a.png")
        (batch,) = index([str(root)], IndexOptions(), Counter())
        assert batch.schema.names == COLUMNS.names
        assert [field.type for field in batch.schema] == [field.type for field in COLUMNS]

    def test_an_image_in_no_folder(self, root: Path) -> None:
        put(root, "a.png")
        for given_ in (root, root / "a.png"):
            with pytest.raises(ConfigError, match="--source"):
                rows_of(given_)
            assert [row["source"] for row in rows_of(given_, source="real")] == ["real"]

    def test_source_for_all(self, root: Path) -> None:
        put(root, "dcgan/a.png", "b.png")
        assert {row["source"] for row in rows_of(root, source="x")} == {"x"}

    def test_skipped_is_counted(self, root: Path) -> None:
        put(root, "g/a.png", "g/b.txt", "g/c.TXT", "README.md", "g/guitar.gz", "g/d", ".DS_Store", "g/._a.png")
        put(root, "g/.thumbnails/a.png", ".cache/b.png")
        skipped: Counter[str] = Counter()
        assert {row["image_id"] for row in rows_of(root, skipped=skipped)} == {"g/a.png", "g/d"}
        assert skipped == {"txt": 2, "md": 1, "gz": 1, "hidden": 4}

    def test_links(self, root: Path) -> None:
        put(root, "g/a.png")
        (root / "g" / "up").symlink_to(root)
        (root / "g" / "loop.png").symlink_to("loop.png")
        (root / "g" / "gone.png").symlink_to("none.png")
        (root / "h").symlink_to("g")
        assert sorted(row["image_id"] for row in rows_of(root)) == ["g/a.png", "h/a.png"]

    def test_nothing_there(self, root: Path) -> None:
        put(root, "g/a.png")
        for given_ in (root / "none", root / "g" / "a.png" / "b"):
            with pytest.raises(ConfigError, match="nothing at"):
                rows_of(given_)
        (root / "empty").mkdir()
        with pytest.raises(ConfigError, match="nothing at"):
            rows_of(root, root / "empty")

    def test_no_permission(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbidden(_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("manifpt.storage.os.scandir", forbidden)
        with pytest.raises(ConfigError, match="No permission to list"):
            rows_of(root)

    def test_columns_are_for_tables(self, root: Path) -> None:
        put(root, "g/a.png")
        for options in ({"source_column": "x"}, {"split_column": "x"}, {"keep_columns": ("x",)}, {"where": ("x", "y")}):
            with pytest.raises(ConfigError, match="has no columns"):
                rows_of(root, **options)

    @pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "A.TAR.BZ2"])
    def test_compressed_tars(self, root: Path, name: str) -> None:
        put(root, f"g/{name}")
        with pytest.raises(ConfigError, match="compressed"):
            rows_of(root)

    def test_a_column_of_the_manifest_can_not_be_kept(self, root: Path) -> None:
        with pytest.raises(ConfigError, match="uri"):
            rows_of(root, keep_columns=("uri",))


class TestSeveralInputs:
    def test_keys_are_relative_to_each(self, root: Path) -> None:
        put(root, "one/g/a.png", "two/g/b.png", "c.png")
        found = rows_of(root / "one", root / "two", root / "c.png", source="x")
        assert [row["image_id"] for row in found] == ["g/a.png", "g/b.png", "c.png"]

    def test_the_same_id_twice(self, root: Path, tmp_path: Path) -> None:
        put(root, "one/g/a.png", "two/g/a.png")
        for inputs in ((root / "one", root / "two"), (root / "one", root / "one")):
            with pytest.raises(ConfigError, match=re.escape("'g/a.png'")):
                round_trip(tmp_path, *inputs)
        assert len(round_trip(tmp_path, root)) == 2  # the way out that the message names


ODD = [
    "a..b.png", "..png.png", "it's \"quoted\".png", "line\nfeed.png", "tab\t.png", "\x01.png", "ä/ü😀.png", "%41.png",
    "A.png", "#1.png", "a#b?c=d&e.png", " lead and trail .png", "a\\b.png", "*.png", "[x].png", "-rf.png", "~.png",
    "file:/x.png", "s3:/b/x.png", "C:\\x.png", "a.png.png", "e\u0301.png", "é.png", "noending", "\u202ereversed.png",
]  # fmt: skip


class TestOddNames:
    def test_round_trip(self, root: Path, tmp_path: Path) -> None:
        names = [f"g/{name}" for name in ODD if not name.startswith(".")] + [
            f"{name} dir/x.png" for name in ODD if name[0] != "."
        ]
        put(root, *names)
        found = round_trip(tmp_path, root)
        assert found == {name: os.fsencode(name) for name in names}

    def test_names_that_are_no_utf_8(self, root: Path, tmp_path: Path) -> None:
        for raw in (b"g\xff/a\xfe.png", b"g\xff/%FE#?.png", b"h/\xc3\x28.png"):
            path = os.fsencode(root) + b"/" + raw
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(raw)
        found = round_trip(tmp_path, root)
        assert found == {
            "g\\xff/a\\xfe.png": b"g\xff/a\xfe.png",
            "g\\xff/%FE#?.png": b"g\xff/%FE#?.png",
            "h/\\xc3(.png": b"h/\xc3\x28.png",
        }

    def test_below_a_root_that_is_no_utf_8(self, tmp_path: Path) -> None:
        folder = os.fsencode(tmp_path) + b"/\xff/g"
        os.makedirs(folder)
        with open(folder + b"/a.png", "wb") as file:
            file.write(b"x")
        assert round_trip(tmp_path, f"file://{tmp_path}/%FF") == {"g/a.png": b"x"}

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
                lambda name: not name.startswith(".") and len(name.encode()) < 200
            ),
            min_size=1,
            max_size=6,
            unique=True,
        )
    )
    def test_any_name(self, tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
        root = tmp_path_factory.mktemp("names")
        put(root, *[f"in/{name}/{name}.png" for name in names])
        found = round_trip(root, root / "in")
        assert found == {f"{name}/{name}.png": os.fsencode(f"in/{name}/{name}.png") for name in names}


Member = tuple[str, bytes]


def tar_of(path: Path, *members: Member, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def webdataset(path: Path, count: int = 6) -> Path:
    members: list[Member] = []
    for n in range(count):
        fields = {"gm": ["dcgan", "vae"][n % 2], "step": n, "lossy": n % 3 == 0, "note": None if n == 4 else f"n{n}"}
        members += [
            (f"{n:03}.json", json.dumps(fields).encode()),
            (f"{n:03}.png", b"png %d" % n),
            (f"{n:03}.cls", b"1"),
        ]
    return tar_of(path, *members)


def header(name: str, size: bytes = b"", kind: bytes = tarfile.REGTYPE) -> bytes:
    """Of a tar, with such bytes as its size."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124 : 124 + len(size)] = size
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]  # type: ignore[attr-defined]
    return bytes(block)


def of_bytes(size: int) -> bytes:
    """A size as GNU tar writes those that octal digits can't: negative ones too."""
    return tarfile.itn(size, 12, tarfile.GNU_FORMAT) if size >= 0 else b"\xff" + size.to_bytes(11, "big", signed=True)  # type: ignore[attr-defined]


def pax(**values: str) -> bytes:
    """A header that says more of the next one."""
    info = tarfile.TarInfo("g/p.png")
    info.pax_headers = {name.replace("__", "."): value for name, value in values.items()}
    return info.tobuf(tarfile.PAX_FORMAT)


WHOLE = header("g/a.png", b"%011o\0" % 3) + b"png".ljust(512, b"\0")


class TestTars:
    @pytest.mark.parametrize(
        "damage",
        [
            header("g/b.png", of_bytes(-1024)),
            header("g/b.png", of_bytes(-1536)),
            header("g/b.png", of_bytes(2**62)),
            header("g/b.png", b"\x80" + (2**80).to_bytes(11, "big")),
            header("g/b.png", of_bytes(2**40), tarfile.GNUTYPE_LONGNAME),
            header("g/b.png", b"\x80" + (2**80).to_bytes(11, "big"), tarfile.GNUTYPE_LONGNAME),
            pax(size="-2048"),
            pax(GNU__sparse__map="x,y"),
            pax(GNU__sparse__size="abc"),
            b"".join(header("g/b.png", b"%011o\0" % 0, tarfile.XHDTYPE) for _ in range(1200)),
        ],
    )
    @pytest.mark.parametrize("before", [b"", WHOLE, 2 * WHOLE])
    def test_headers_that_say_what_can_not_be(self, root: Path, damage: bytes, before: bytes) -> None:
        """A negative size led back to an earlier member for ever, and the others ended every scan of the bucket."""
        (root / "s.tar").write_bytes(before + damage + WHOLE + bytes(1024))
        with pytest.raises(ConfigError, match=r"s\.tar is (damaged|no plain tar)"):
            rows_of(root)

    def test_folders_name_sources(self, root: Path, tmp_path: Path) -> None:
        tar_of(root / "set.tar", ("dcgan/a.png", b"1"), ("./real/b.jpg", b"22"), ("dcgan/c.txt", b"3"))
        skipped: Counter[str] = Counter()
        rows = rows_of(root / "set.tar", skipped=skipped)
        assert [(row["image_id"], row["source"]) for row in rows] == [
            ("set.tar#dcgan/a.png", "dcgan"),
            ("set.tar#./real/b.jpg", "real"),
        ]
        assert skipped == {"txt": 1}
        assert (rows[1]["container"], rows[1]["size_bytes"], rows[1]["format"]) == ("tar", 2, "jpeg")
        assert round_trip(tmp_path, root / "set.tar") == {"set.tar#dcgan/a.png": b"1", "set.tar#./real/b.jpg": b"22"}

    def test_a_tar_that_seems_to_end_before_its_end(self, root: Path) -> None:
        """Its other images would be missing without a word."""
        for name in ("a", "b"):
            tar_of(root / f"{name}.tar", (f"g/{name}.png", b"1"))
        joined = (root / "a.tar").read_bytes() + (root / "b.tar").read_bytes()
        emptied = bytearray(tar_of(root / "c.tar", *((f"g/{n}.png", bytes([n])) for n in range(4))).read_bytes())
        emptied[1024:1536] = bytes(512)  # the second header
        for damaged in (joined, bytes(emptied)):
            (root / "d.tar").write_bytes(damaged)
            with pytest.raises(ConfigError, match=r"d\.tar is damaged .*several tars joined"):
                rows_of(root / "d.tar")
        (root / "d.tar").write_bytes((root / "a.tar").read_bytes() + bytes(3 << 20))
        assert len(rows_of(root / "d.tar")) == 1, "writers may pad as much as they like"

    def test_the_folder_of_a_tar_names_the_source(self, root: Path) -> None:
        tar_of(root / "vae" / "0.tar", ("x/a.png", b"1"))
        assert [(row["image_id"], row["source"]) for row in rows_of(root)] == [("vae/0.tar#x/a.png", "vae")]

    def test_members_without_folder_or_fields(self, root: Path) -> None:
        tar_of(root / "set.tar", ("a.png", b"1"))
        with pytest.raises(ConfigError, match="--source"):
            rows_of(root / "set.tar")
        assert rows_of(root / "set.tar", source="x")[0]["source"] == "x"

    def test_fields_of_a_sample(self, root: Path, tmp_path: Path) -> None:
        path = webdataset(root / "set.tar")
        rows = rows_of(path, source_column="gm", split_column="step", keep_columns=("note", "step", "lossy", "none"))
        assert [row["source"] for row in rows] == ["dcgan", "vae"] * 3
        assert [row["split"] for row in rows] == list("012345")
        assert [row["step"] for row in rows] == list(range(6))
        assert [row["lossy"] for row in rows] == [True, False, False] * 2
        assert [row["note"] for row in rows] == ["n0", "n1", "n2", "n3", None, "n5"]
        assert [row["none"] for row in rows] == [None] * 6
        found = round_trip(tmp_path, path, source_column="gm", keep_columns=("step",))
        assert found == {f"set.tar#{n:03}.png": b"png %d" % n for n in range(6)}

    def test_fields_after_the_image(self, root: Path) -> None:
        tar_of(root / "s.tar", ("a.png", b"1"), ("a.json", b'{"gm": "x"}'), ("b.png", b"2"), ("b.json", b'{"gm": "y"}'))
        assert [row["source"] for row in rows_of(root / "s.tar", source_column="gm")] == ["x", "y"]

    def test_fields_are_of_their_own_sample(self, root: Path) -> None:
        tar_of(root / "s.tar", ("a/1.json", b'{"gm": "x"}'), ("b/1.png", b"2"))
        with pytest.raises(ConfigError, match="no value"):
            rows_of(root / "s.tar", source_column="gm")

    @pytest.mark.parametrize(
        ("where", "expected"),
        [
            (("gm", "vae"), [1, 3, 5]),
            (("step", "2"), [2]),
            (("lossy", "true"), [0, 3]),
            (("note", "None"), []),
            (("none", "x"), []),
        ],
    )
    def test_where(self, root: Path, where: tuple[str, str], expected: list[int]) -> None:
        rows = rows_of(webdataset(root / "set.tar"), source="x", where=where)
        assert [row["image_id"] for row in rows] == [f"set.tar#{n:03}.png" for n in expected]

    def test_two_images_a_sample(self, root: Path) -> None:
        tar_of(root / "s.tar", ("a.mask.png", b"1"), ("a.jpg", b"2"), ("a.json", b'{"gm": "x"}'))
        rows = rows_of(root / "s.tar", source_column="gm")
        assert [row["image_id"] for row in rows] == ["s.tar#a.mask.png", "s.tar#a.jpg"]

    def test_hidden_members_links_and_long_names(self, root: Path, tmp_path: Path) -> None:
        """macOS adds `._a.png`; a name of over 100 characters comes with a header of its own."""
        long = "g/" + "n" * 200 + ".png"
        for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            path = tar_of(root / "s.tar", ("g/._a.png", b"x"), (long, b"long"), ("g/ä.png", b"umlaut"), format=kind)
            with tarfile.open(path, "a") as tar:
                link = tarfile.TarInfo("g/link.png")
                link.type, link.linkname = tarfile.LNKTYPE, long
                tar.addfile(link)
                folder = tarfile.TarInfo("g/folder.png")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
            skipped: Counter[str] = Counter()
            assert len(rows_of(path, skipped=skipped)) == 2
            assert skipped == {"hidden": 1, "link or special file in a tar": 1}
            assert round_trip(tmp_path, path) == {f"s.tar#{long}": b"long", "s.tar#g/ä.png": b"umlaut"}

    def test_names_that_are_no_utf_8(self, root: Path, tmp_path: Path) -> None:
        path = tar_of(root / "s.tar", (os.fsdecode(b"g\xff/a\xfe.png"), b"1"), format=tarfile.GNU_FORMAT)
        assert rows_of(path)[0]["source"] == "g\\xff"
        assert round_trip(tmp_path, path) == {"s.tar#g\\xff/a\\xfe.png": b"1"}

    def test_images_of_any_size(self, root: Path, tmp_path: Path) -> None:
        dice = random.Random(0)
        members = [(f"g/{n}.png", dice.randbytes(dice.choice([0, 1, 511, 512, 513, 10_000]))) for n in range(60)]
        found = round_trip(tmp_path, tar_of(root / "s.tar", *members))
        assert found == {f"s.tar#{name}": data for name, data in members}

    @pytest.mark.parametrize("content", [b"", b"hello" * 500, b"\x1f\x8b\x08" + bytes(600), b"P6 1 1 255\nabc"])
    def test_not_a_tar(self, root: Path, content: bytes) -> None:
        (root / "s.tar").write_bytes(content)
        with pytest.raises(ConfigError, match="no plain tar"):
            rows_of(root / "s.tar", source="x")

    def test_cut(self, root: Path) -> None:
        """Wherever a tar ends within a member, images are missing, and that must not pass in silence."""
        path = tar_of(root / "s.tar", *[(f"g/{n}.png", bytes([n]) * 700) for n in range(5)])
        data = path.read_bytes()
        member = 512 + 1024
        for end in [*range(1, 5 * member + 1, 97), 4 * member + 512 + 700]:
            path.write_bytes(data[:end])
            if end % member == 0 or end >= 5 * member - 324:  # between two members, or in the last one's filling
                continue
            with pytest.raises(ConfigError, match=r"no plain tar|is damaged"):
                rows_of(path)

    def test_without_an_end_mark(self, root: Path) -> None:
        path = tar_of(root / "s.tar", ("g/a.png", b"1" * 512))
        path.write_bytes(path.read_bytes()[:1024])
        assert len(rows_of(path)) == 1

    def test_damaged_header_in_the_middle(self, root: Path) -> None:
        path = tar_of(root / "s.tar", *[(f"g/{n}.png", bytes(512)) for n in range(5)])
        data = bytearray(path.read_bytes())
        data[2 * 1024 + 150] ^= 0xFF
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="is damaged"):
            rows_of(path)

    def test_damaged_json(self, root: Path) -> None:
        for text in (b"{", b"\xff\xfe\xff", b""):
            path = tar_of(root / "s.tar", ("a.json", text), ("a.png", b"1"))
            with pytest.raises(ConfigError, match=r"a\.json is damaged"):
                rows_of(path, source_column="gm")

    @pytest.mark.parametrize("fields", [{}, {"gm": None}, {"gm": ""}, [1], "x", {"other": 1}])
    def test_no_source(self, root: Path, fields: Any) -> None:
        path = tar_of(root / "s.tar", ("a.json", json.dumps(fields).encode()), ("a.png", b"1"))
        with pytest.raises(ConfigError, match="no value in 'gm'"):
            rows_of(path, source_column="gm")

    @pytest.mark.parametrize("pair", [(1, "x"), ("x", [1]), ("\ud800", "x"), (2**70, 1)])
    def test_kept_values_without_a_common_type(self, root: Path, pair: tuple[Any, Any]) -> None:
        members: list[Member] = []
        for n, value in enumerate(pair):
            members += [(f"{n}.json", json.dumps({"k": value}).encode()), (f"{n}.png", b"1")]
        with pytest.raises(ConfigError, match="--keep-columns k"):
            rows_of(tar_of(root / "s.tar", *members), source="x", keep_columns=("k",))


def table_of(path: Path, count: int = 10, group: int = 4, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [b"image %d" % n for n in range(count)]
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary()), **columns}), path, row_group_size=group)
    return path


GM = ["dcgan", "vae"] * 5


class TestParquet:
    def test_binary_column(self, root: Path, tmp_path: Path) -> None:
        path = table_of(
            root / "set.parquet", gm=GM, split=["a"] * 10, width=[32] * 10, height=[33] * 10, format=["PNG"] * 10
        )
        rows = rows_of(path, source_column="gm", split_column="split")
        assert [row["image_id"] for row in rows] == [f"set.parquet#{n}" for n in range(10)]
        assert [row["offset"] for row in rows] == list(range(10))
        assert [row["source"] for row in rows] == GM
        first = rows[0]
        assert (first["container"], first["size_bytes"], first["split"]) == ("parquet", None, "a")
        assert (first["format"], first["width_px"], first["height_px"]) == ("png", 32, 33)
        found = round_trip(tmp_path, path, source_column="gm")
        assert found == {f"set.parquet#{n}": b"image %d" % n for n in range(10)}

    def test_hugging_face_column(self, root: Path, tmp_path: Path) -> None:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        cells = pa.array([{"bytes": b"image %d" % n, "path": f"{n}.png"} for n in range(10)], kind)
        pq.write_table(pa.table({"label": GM, "image": cells}), root / "train.parquet", row_group_size=3)
        found = round_trip(tmp_path, root, source_column="label")
        assert found == {f"train.parquet#{n}": b"image %d" % n for n in range(10)}

    def test_folder_names_the_source(self, root: Path) -> None:
        table_of(root / "vae" / "0.parquet", 2)
        table_of(root / "dcgan" / "0.parquet", 2)
        assert {(row["image_id"], row["source"]) for row in rows_of(root)} == {
            (f"{source}/0.parquet#{n}", source) for source in ("vae", "dcgan") for n in range(2)
        }
        with pytest.raises(ConfigError, match="--source"):
            rows_of(root / "vae" / "0.parquet")

    def test_kept_columns_keep_their_types(self, root: Path, tmp_path: Path) -> None:
        path = table_of(
            root / "s.parquet",
            step=pa.array(range(10), pa.int16()),
            flag=[True, None] * 5,
            tags=[["a", "b"]] * 10,
            kind=pa.array(GM).dictionary_encode(),
            width=[float(n) for n in range(10)],
        )
        kept = ("step", "flag", "tags", "kind", "width")
        write_manifest(index([str(path)], IndexOptions(source="x", keep_columns=kept), Counter()), str(tmp_path / "m"))
        table = Manifest(str(tmp_path / "m")).read(0, 10)
        assert table.schema.names == [*COLUMNS.names, *kept]
        assert [table.schema.field(name).type for name in kept] == [
            pa.int16(), pa.bool_(), pa.list_(pa.string()), pa.string(), pa.float64(),
        ]  # fmt: skip
        assert table["kind"].to_pylist() == GM
        assert table["flag"].to_pylist() == [True, None] * 5
        assert table["width_px"].to_pylist() == list(range(10))

    @pytest.mark.parametrize(
        "column",
        [
            pa.array(GM).dictionary_encode(),
            pa.array(GM, pa.large_string()),
            pa.array([value.encode() for value in GM], pa.binary()),
        ],
        ids=["dictionary", "large", "binary"],
    )
    def test_source_column_of_any_text_type(self, root: Path, column: pa.Array) -> None:
        assert [row["source"] for row in rows_of(table_of(root / "s.parquet", gm=column), source_column="gm")] == GM

    def test_numbers_as_sources(self, root: Path) -> None:
        rows = rows_of(table_of(root / "s.parquet", seed=range(10)), source_column="seed", split_column="seed")
        assert [row["source"] for row in rows] == [row["split"] for row in rows] == list("0123456789")

    @pytest.mark.parametrize("missing", [None, ""])
    def test_no_source(self, root: Path, missing: str | None) -> None:
        path = table_of(root / "s.parquet", gm=[*GM[:-1], missing])
        with pytest.raises(ConfigError, match=r"rows? among 8 to 9.*no value in 'gm'"):
            rows_of(path, source_column="gm")
        assert len(rows_of(path, source="x")) == 10
        # A row that is not asked for needs none.
        assert len(rows_of(path, source_column="gm", where=("gm", "dcgan"))) == 5

    @pytest.mark.parametrize(
        "options", [{"source_column": "x"}, {"split_column": "x"}, {"keep_columns": ("x",)}, {"where": ("x", "1")}]
    )
    def test_no_such_column(self, root: Path, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="no column 'x'; it has image, gm"):
            rows_of(table_of(root / "s.parquet", gm=GM), **{"source": "g", **options})

    @pytest.mark.parametrize("options", [{"source_column": "x"}, {"split_column": "x"}, {"where": ("x", "1")}])
    def test_columns_that_are_no_text(self, root: Path, options: dict[str, Any]) -> None:
        path = table_of(root / "s.parquet", x=[{"a": 1}] * 10)
        with pytest.raises(ConfigError, match="'x' can't be read as string"):
            rows_of(path, **options if "source_column" in options else {"source": "g", **options})

    def test_text_that_is_no_utf_8(self, root: Path) -> None:
        words = pa.array([b"\xff\xfe"] * 10, pa.binary())
        column = pa.Array.from_buffers(pa.string(), 10, words.buffers())
        path = table_of(root / "s.parquet", x=column)
        with pytest.raises(ConfigError, match="'x' can't be read as string"):
            rows_of(path, source_column="x")
        with pytest.raises(ConfigError, match="'x' can't be read as string"):
            rows_of(path, source="g", keep_columns=("x",))

    @pytest.mark.parametrize(
        ("where", "expected"),
        [(("gm", "vae"), [1, 3, 5, 7, 9]), (("step", "7"), [7]), (("flag", "true"), [0, 5]), (("gm", "none"), [])],
    )
    def test_where(self, root: Path, tmp_path: Path, where: tuple[str, str], expected: list[int]) -> None:
        path = table_of(root / "s.parquet", gm=GM, step=range(10), flag=[True, False, None, False, False] * 2)
        rows = rows_of(path, source="x", where=where, keep_columns=("step",))
        assert [row["step"] for row in rows] == [row["offset"] for row in rows] == expected
        if expected:
            found = round_trip(tmp_path, path, source="x", where=where)
            assert found == {f"s.parquet#{n}": b"image %d" % n for n in expected}

    def test_known_names_with_another_meaning(self, root: Path) -> None:
        """`width`, `height` and `format` may be anything in a user's table."""
        path = table_of(root / "s.parquet", width=["wide"] * 10, height=[2**40] * 10, format=[{"a": 1}] * 10)
        (row, *_) = rows_of(path, source="x", keep_columns=("width",))
        assert (row["width_px"], row["height_px"], row["format"], row["width"]) == (None, None, None, "wide")

    def test_one_column_for_everything(self, root: Path) -> None:
        path = table_of(root / "s.parquet", format=["png", "jpeg"] * 5)
        rows = rows_of(path, source_column="format", split_column="format", where=("format", "png"))
        assert {(row["source"], row["split"], row["format"]) for row in rows} == {("png", "png", "png")}

    def test_no_image_column(self, root: Path) -> None:
        pq.write_table(pa.table({"x": [1]}), root / "labels.parquet")
        skipped: Counter[str] = Counter()
        assert rows_of(root, skipped=skipped) == []
        assert skipped == {"parquet without an image column": 1}

    def test_no_rows(self, root: Path) -> None:
        assert rows_of(table_of(root / "s.parquet", 0), source="x") == []

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"no table" * 30])
    def test_no_parquet_file(self, root: Path, content: bytes) -> None:
        (root / "s.parquet").write_bytes(content)
        with pytest.raises(ConfigError, match="no Parquet file"):
            rows_of(root, source="x")

    def test_any_damage_is_one_sentence(self, root: Path) -> None:
        path = table_of(root / "s.parquet", gm=GM)
        data, dice = path.read_bytes(), random.Random(0)
        for _ in range(300):
            changed = bytearray(data)
            for _ in range(dice.choice([1, 3, 10])):
                changed[dice.randrange(len(data))] = dice.randrange(256)
            path.write_bytes(changed)
            try:
                rows_of(path, source_column="gm")
            except ConfigError:
                pass  # the only error there may be

    def test_more_rows_than_a_batch(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(indexing, "BATCH_ROWS", 3)
        path = table_of(root / "s.parquet", gm=GM)
        put(root, *[f"g/{n}.png" for n in range(10)])
        batches = list(index([str(path)], IndexOptions(source_column="gm"), Counter()))
        assert [len(batch) for batch in batches] == [3, 1, 3, 1, 2]
        assert [n for batch in batches for n in batch["offset"].to_pylist()] == list(range(10))
        assert [len(batch) for batch in index([str(root / "g")], REAL, Counter())] == [3, 3, 3, 1]

    def test_tables_and_files_together(self, root: Path, tmp_path: Path) -> None:
        put(root, "g/a.png")
        table_of(root / "g" / "s.parquet", 2)
        tar_of(root / "g" / "s.tar", ("b.png", b"tar"))
        found = round_trip(tmp_path, root)
        assert found == {
            "g/a.png": b"g/a.png", "g/s.parquet#0": b"image 0", "g/s.parquet#1": b"image 1", "g/s.tar#b.png": b"tar",
        }  # fmt: skip

    def test_a_file_that_can_not_be_opened(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        table_of(root / "g" / "s.parquet", 2)
        for error, says in (
            (PermissionError(13, "no"), "No permission to read"),
            (FileNotFoundError(2, "no"), "is gone"),
            (BlockingIOError("no"), "is another one since it was listed"),
        ):

            def refuse(*_: object, error: OSError = error) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(store_of("/"), "open", refuse, raising=False)
                with pytest.raises(ConfigError, match=says):
                    rows_of(root)


class TestPublishedSets:
    def test_one_generator(self, cifar: Path, tmp_path: Path) -> None:
        kept = ("latent_group", "went_through_jpeg")
        options = IndexOptions(source_column="gm", keep_columns=kept)
        uri = str(tmp_path / "m")
        assert write_manifest(index([str(cifar / "duke_dcgan.parquet")], options, Counter()), uri) == 1600
        manifest = Manifest(uri)
        assert manifest.kept_columns == list(kept)
        assert [manifest.schema.field(name).type for name in kept] == [pa.string(), pa.bool_()]
        rows = manifest.read(700, 760).to_pylist()
        assert {(row["width_px"], row["height_px"], row["format"]) for row in rows} == {(32, 32, "png")}
        images = pq.read_table(cifar / "duke_dcgan.parquet", columns=["image", "gm"]).to_pylist()
        for row, data in zip(rows, fetch(rows), strict=True):
            assert row["image_id"] == f"duke_dcgan.parquet#{row['offset']}"
            assert {"image": data, "gm": row["source"]} == images[row["offset"]]

    def test_only_real_ones(self, cifar: Path) -> None:
        given_ = [str(cifar / "duke_dcgan.parquet"), str(cifar / "real_cifar10_png_lossless.parquet")]
        batches = list(index(given_, IndexOptions(source_column="gm", where=("is_real", "true")), Counter()))
        assert sum(map(len, batches)) == 1600
        assert {row["uri"] for batch in batches for row in batch.to_pylist()} == {given_[1]}


MILLION = """if True:
    import re, sys, time
    from collections import Counter
    from manifpt import indexing
    from manifpt.indexing import IndexOptions, index
    from manifpt.manifest import Manifest, write_manifest
    from manifpt.storage import Entry, store_of

    def peak_kib():
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

    class Bucket:
        def stat(self, uri):
            return None

        def list(self, uri):
            for n in range(1_000_000):
                n = n * 7919 % 1_000_000  # in no order
                key = f"generator-{n % 20:02}/images/{n:07}.png"
                yield Entry(key, f"s3://bucket/{key}", 20_000 + n % 999, f"{n:032x}")

    indexing.store_of = lambda uri: Bucket()
    before, begin = peak_kib(), time.monotonic()
    rows = write_manifest(index(["s3://bucket"], IndexOptions(), Counter()), sys.argv[1])
    seconds, grown = time.monotonic() - begin, peak_kib() - before
    manifest = Manifest(sys.argv[1])
    ids = manifest.read(499_990, 500_010)["image_id"].to_pylist()
    assert rows == manifest.rows == 1_000_000
    assert ids == sorted(ids) and ids[0].startswith("generator-09/") and ids[-1].startswith("generator-10/")
    print(seconds, grown / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_keys(tmp_path: Path) -> None:
    """About 5 s and 350 MiB (mapped files included) where this was written. VmHWM, since a child's `ru_maxrss` starts
    at its parent's."""
    done = subprocess.run(
        [sys.executable, "-c", MILLION, str(tmp_path / "m")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    seconds, grown_mib = map(float, done.stdout.split())
    assert seconds < 120
    assert grown_mib < 400


def test_a_prefix_is_listed_by_a_role_that_may_not_ask_for_an_object_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped policy grants the objects below a prefix, and S3 says 403 of one that may not be listed."""
    (tmp_path / "a.png").write_bytes(b"x")

    def stat(self: object, uri: str) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(LocalStore, "stat", stat)
    assert [entry.key for entry in entries(str(tmp_path), Counter())] == ["a.png"]
    with pytest.raises(ConfigError, match="No permission to read .*a.png, and there is nothing below it"):
        list(entries(str(tmp_path / "a.png"), Counter()))
