"""What comes from others and means harm: it costs a sentence, not memory, time or a file outside of its folder."""

from __future__ import annotations

import io
import json
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from manifpt.attributor.bundle import Attributor, save_bundle
from manifpt.attributor.networks import make_network
from manifpt.config import run_command
from manifpt.decode import decode
from manifpt.documents import json_of, table_of, tensors_of
from manifpt.errors import BadImage, ConfigError, RejectReason
from manifpt.estimates import Estimate
from manifpt.fetch import fetch
from manifpt.indexing import IndexOptions, _column, index
from manifpt.log import printable
from manifpt.manifest import COLUMNS, Manifest
from manifpt.reader import read_plan
from manifpt.reference import open_bundle
from manifpt.shards import is_part_path, read_commits
from manifpt.spaces import SpaceSpec
from manifpt.storage import store_of
from tests.fuzz.limits import Limits
from tests.helpers.images import encoded, picture
from tests.helpers.runs import SHAPE, make_run, openset_of, resealed, rows_of, sample_reference, without_ray

DEEP = b"[" * 100_000


def within_limits(check: Callable[[], object]) -> None:
    def called(_: bytes) -> int:
        check()
        return 0

    Limits(called)(b"")


# --- documents ---


@pytest.mark.parametrize("data", [DEEP, DEEP + b"]" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"", b"9" * 5000])
def test_json_that_nests_without_end_or_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="x.json is damaged"):
        json_of(data, "x.json")


@pytest.mark.parametrize("length", [1 << 60, (1 << 64) - 1, 1 << 31])
def test_a_safetensors_header_of_an_exbibyte_is_refused(length: int) -> None:
    with pytest.raises(ConfigError, match="no safetensors file"):
        within_limits(lambda: tensors_of(struct.pack("<Q", length) + b'{"a":1}', "x"))


@pytest.mark.parametrize("name", ["../../etc", "..", ".hidden", "a/b", "a\\b", "a\nb", "", "x" * 101, 7, None])
def test_a_space_s_name_can_not_lead_out_of_a_folder(name: Any) -> None:
    with pytest.raises(ConfigError, match="folder's name"):
        SpaceSpec.from_json({"name": name, "kind": "rgb"})


@pytest.mark.parametrize("document", [[], "x", {"nam": 1}, {"name": 1}, {"neighbors": "9"}, {"sigma": True}])
def test_an_estimate_of_other_kinds_is_refused(document: Any) -> None:
    with pytest.raises(ConfigError):
        Estimate.from_json(document)


@pytest.mark.parametrize("path", [
    "../part-00000.parquet", "artifacts/../../part-00000.parquet", "embeddings/../part-00000.parquet",
    "/embeddings/a/part-00000.parquet", "embeddings/a/b/part-00000.parquet", "embeddings/a/part-00000.parquet\n",
])  # fmt: skip
def test_a_part_lies_in_its_folder(path: str) -> None:
    assert not is_part_path(path)
    assert is_part_path("embeddings/native-8x8-min8/part-00000.parquet")


def test_a_name_that_no_file_can_have_is_a_file_that_is_not_there() -> None:
    for name in ("/a\0b", "/\ud800", "file:///a%00b", "/" + "x" * 256, "/x" * 2_048):
        assert store_of(name).stat(name) is None
        with pytest.raises(FileNotFoundError):
            store_of(name).read(name)


def test_a_terminal_obeys_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise ConfigError("no \x1b[2Jkey\r \u202e of yours\nnext line")

    assert run_command(refuse) == 2
    assert capsys.readouterr().err == "error: no \\x1b[2Jkey\\r \\u202e of yours\nnext line\n"
    assert printable("ü 漢字") == "ü 漢字"


# --- a run and its commits ---


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", rows_of({"gan": 8, "real": 8}))


def edited(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("change", [
    lambda d: d["parts"].update({"../x": {"rows": 1, "bytes": 1, "sha256": ""}}), lambda d: d["parts"].update(a=1),
    lambda d: d.update(shard=5), lambda d: d.update(rejected=[["a"]]), lambda d: d.update(rejected=[[None] * 6]),
    lambda d: d.update(rejected_images="3"), lambda d: d.update(seconds={"a": "x"}),
    lambda d: d.update(statistics={"rgb": {"gan": {"images": None}}}), lambda d: d.pop("parts"),
])  # fmt: skip
def test_a_commit_that_says_other_things_is_refused(run: Path, change: Callable[[Any], object]) -> None:
    edited(run / "commits/00000.json", change)
    with pytest.raises(ConfigError, match=r"00000\.json.* is damaged"):
        list(read_commits(str(run), [0]))


@pytest.mark.parametrize("change", [
    lambda d: d.update(rows="1"), lambda d: d.update(shard_rows=0), lambda d: d.update(spaces=[1]), lambda d: d.clear(),
    lambda d: d.update(estimate=7), lambda d: d["spaces"][0].update(name="../x"), lambda d: d.update(rows=True),
    lambda d: d.update(reference_uri="s3://"), lambda d: d.update(manifest_uri="gs://bucket/a"),
])  # fmt: skip
def test_a_plan_that_says_other_things_is_refused(run: Path, change: Callable[[Any], object]) -> None:
    edited(run / "plan.json", change)
    with pytest.raises(ConfigError):
        read_plan(str(run))


# --- references and attributors ---


@pytest.mark.parametrize("change", [
    lambda d: next(iter(d["parts"].values()))[0].update(path="../../secret.parquet"), lambda d: d.update(parts=[]),
    lambda d: d["spaces"][0].update(name="../../x"), lambda d: d.pop("weights"), lambda d: d.update(images="9"),
    lambda d: d["searches"].update(rgb={"method": "pruned", "dims": 0, "estimated_us": {}}),
    lambda d: d["searches"].update(rgb={"metod": 1}), lambda d: d.update(versions={}), lambda d: d.update(decoder=None),
])  # fmt: skip
def test_a_reference_bundle_that_says_other_things_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object]
) -> None:
    without_ray(monkeypatch)
    uri = sample_reference(tmp_path, 4, {"real": 1})
    assert open_bundle(uri).images == 4
    edited(Path(uri, "bundle.json"), change)
    with pytest.raises(ConfigError):
        open_bundle(uri)


@pytest.fixture
def attributor(tmp_path: Path) -> Path:
    network = make_network("head", SHAPE, 2)
    config = {"space": {"name": "rgb"}, "estimate": {"name": "nearest"}, "reference_digest": "r", "network": "head"}
    openset = openset_of(2)
    save_bundle(
        str(tmp_path / "a"), network.state_dict(), ("gan", "real"), config | {"shape": SHAPE}, {}, openset, {}, ""
    )
    return tmp_path / "a"


@pytest.mark.parametrize("shape", [[3, 100_000, 100_000], [1 << 40], [3, 4, True], [3, -4, 4], []])
def test_an_attributor_gets_no_memory_for_a_shape_that_its_weights_do_not_have(attributor: Path, shape: Any) -> None:
    edited(attributor / "config.json", lambda d: d.update(shape=shape))
    with pytest.raises(ConfigError, match="is damaged"):
        within_limits(lambda: Attributor.load(str(attributor)))


@pytest.mark.parametrize(("name", "change"), [
    ("labels.json", lambda d: d.__setitem__(0, 5)), ("labels.json", lambda d: d.__setitem__(0, d[1])),
    ("config.json", lambda d: d.update(space=[])), ("calibration.json", lambda d: d.update(temperature=0)),
    ("calibration.json", lambda d: d.update(temperature="nan")),
])  # fmt: skip
def test_an_attributor_that_says_other_things_is_refused(
    attributor: Path, name: str, change: Callable[[Any], object]
) -> None:
    assert Attributor.load(str(attributor)).labels == ("gan", "real")
    edited(attributor / name, change)
    if name != "config.json":
        resealed(attributor)
    with pytest.raises(ConfigError, match="is damaged"):
        Attributor.load(str(attributor))


def test_weights_that_are_no_numbers_make_no_verdict(attributor: Path) -> None:
    weights = attributor / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40] + np.full(10, np.nan, np.float32).tobytes())
    resealed(attributor)
    with pytest.raises(ConfigError, match="not finite"):
        Attributor.load(str(attributor)).predict(np.ones((1, *SHAPE), np.float32))


# --- Parquet ---


def cells(path: Path, count: int) -> list[bytes | BadImage]:
    rows = [{"uri": str(path), "container": "parquet", "offset": n, "size_bytes": None} for n in range(count)]
    return list(fetch(rows))


def repeated_value(value: bytes | str, count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


def test_one_image_in_every_row_of_a_kilobyte_is_not_written_out(tmp_path: Path) -> None:
    table = pa.table({"image": repeated_value(bytes(16 << 20), 2000)})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 4096
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "first.parquet")
    cells(tmp_path / "first.parquet", 1)  # what the first file of a process loads is not this one's
    within_limits(lambda: cells(tmp_path / "a.parquet", 2))


def test_a_cell_larger_than_any_image_is_rejected_before_it_is_read(tmp_path: Path) -> None:
    table = pa.table({"image": [bytes(257 << 20)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False, write_statistics=False)
    del table
    (found,) = cells(tmp_path / "a.parquet", 1)
    assert isinstance(found, BadImage)
    assert found.reason is RejectReason.TOO_LARGE


def test_a_file_whose_statistics_contradict_its_schema_ends_no_process(tmp_path: Path) -> None:
    """Found by fuzzing: Arrow throws where Python can't catch it, when asked for the metadata of such a column."""
    pq.write_table(pa.table({"image": [b"x"] * 3}), tmp_path / "a.parquet")
    optional, required = b"\x25\x02\x18\x05image", b"\x25\x00\x18\x05image"  # the column's repetition and name
    data = (tmp_path / "a.parquet").read_bytes()
    assert data.count(optional) == 1
    (tmp_path / "a.parquet").write_bytes(data.replace(optional, required))
    found = cells(tmp_path / "a.parquet", 3)
    assert {one.reason for one in found if isinstance(one, BadImage)} == {RejectReason.CORRUPT}


def test_one_long_label_in_every_row_is_refused_before_it_is_written_out(tmp_path: Path) -> None:
    table = pa.table({"image": [b"x"] * 5000, "gm": repeated_value("x" * (1 << 20), 5000)})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", store_schema=False)
    options = IndexOptions(source_column="gm")
    with pytest.raises(ConfigError, match="a text of 1048576 bytes"):
        within_limits(lambda: list(index([str(tmp_path / "a.parquet")], options, Counter())))


def test_a_dictionary_of_which_a_number_has_no_text_is_refused() -> None:
    numbers = pa.array([0, 5], pa.int32())
    labels = pa.DictionaryArray.from_arrays(numbers, pa.array(["gan"]), safe=False)
    with pytest.raises(ConfigError, match="column 'gm' can't be read"):
        _column(pa.table({"gm": labels}), "gm", pa.string(), "x.parquet")


def test_columns_that_are_there_twice_are_refused_or_left_out(tmp_path: Path) -> None:
    twice = pa.table([[b"x"], ["a"], ["b"]], names=["image", "gm", "gm"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="several columns 'gm'"):
        list(index([str(tmp_path / "a.parquet")], IndexOptions(source_column="gm"), Counter()))
    pq.write_table(pa.table([[b"x"], [1], [2]], names=["image", "width", "width"]), tmp_path / "a.parquet")
    (batch,) = index([str(tmp_path / "a.parquet")], IndexOptions(source="g"), Counter())
    assert batch["width_px"].to_pylist() == [None]
    images, skipped = pa.table([[b"x"], [b"y"]], names=["image", "image"]), Counter[str]()
    pq.write_table(images, tmp_path / "a.parquet")
    assert list(index([str(tmp_path / "a.parquet")], IndexOptions(source="g"), skipped)) == []
    assert skipped == {"parquet without an image column": 1}


def with_rows(data: bytes, before: int, claimed: int) -> bytes:
    """A Parquet file whose footer claims other numbers of rows, as zigzag varints of as many bytes."""
    length = struct.unpack("<I", data[-8:-4])[0]
    footer = data[-8 - length : -8].replace(varint(before), varint(claimed))
    return data[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def varint(number: int) -> bytes:
    number, out = number << 1, bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def test_a_manifest_of_rows_that_its_bytes_can_not_hold_is_refused(tmp_path: Path) -> None:
    count = 1_234_567
    columns = {f.name: pa.array([""] * 3, f.type) if f.type == pa.string() else pa.nulls(3, f.type) for f in COLUMNS}
    pq.write_table(pa.table(columns, COLUMNS), tmp_path / "m.parquet")
    claimed = with_rows((tmp_path / "m.parquet").read_bytes(), 3, count << 40)
    (tmp_path / "m.parquet").write_bytes(claimed)
    with pytest.raises(ConfigError):
        within_limits(lambda: Manifest(str(tmp_path / "m.parquet")))


def test_a_manifest_with_columns_of_other_types_is_refused(tmp_path: Path) -> None:
    columns = {f.name: pa.nulls(1, pa.string()) for f in COLUMNS}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    with pytest.raises(ConfigError, match="'offset' is string, not int64"):
        Manifest(str(tmp_path / "m.parquet"))


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": broken}), sink)
    with pytest.raises(ConfigError, match="is damaged"):
        table_of(sink.getvalue(), "x")


# --- images ---


def refused_in_time(data: bytes) -> RejectReason:
    begin = time.process_time()
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert time.process_time() - begin < 1
    return caught.value.reason


def test_a_jpeg_that_says_everything_again_and_again_is_refused() -> None:
    data = encoded(Image.new("L", (2048, 2048), 128), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xc4") : -2]
    assert refused_in_time(data[:-2] + scan * 1000 + b"\xff\xd9") is RejectReason.TOO_LARGE
    assert decode(data[:-2] + scan * 3 + b"\xff\xd9").shape == (2048, 2048, 3)


def test_a_bitmap_of_many_runs_is_refused_and_a_small_one_is_not() -> None:
    def bitmap(side_px: int) -> bytes:
        runs, start = (bytes([1, 7]) * side_px + b"\0\0") * side_px, 14 + 40 + 1024
        header = struct.pack("<IiiHHIIiiII", 40, side_px, side_px, 1, 8, 1, len(runs), 0, 0, 256, 0)
        return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + header + bytes(1024) + runs

    assert refused_in_time(bitmap(1024)) is RejectReason.TOO_LARGE
    assert decode(bitmap(16)).shape == (16, 16, 3)


def test_numbers_written_out_are_refused_beyond_a_megabyte() -> None:
    assert refused_in_time(b"P3 1000 500 255\n" + b"0 0 0 " * 500_000) is RejectReason.TOO_LARGE


def test_frames_are_not_counted_one_by_one() -> None:
    data = encoded(Image.new("P", (1, 1)), "GIF")
    frame = data[data.index(b",") : -1]
    assert refused_in_time(data[:-1] + frame * 300_000 + b";") is RejectReason.ANIMATED


def test_a_webp_of_34_bytes_does_not_get_a_gigabyte() -> None:
    data = encoded(Image.new("RGBA", (8192, 8192)), "WEBP", lossless=True, method=0)
    assert len(data) < 100
    assert refused_in_time(data) is RejectReason.TOO_LARGE


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "L", "1", "I;16"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_image_is_decoded_in_bands_to_the_same_pixels(
    mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    grey16 = Image.fromarray((np.arange(35 * 24, dtype=np.uint16) * 63).reshape(24, 35))
    image = grey16 if mode == "I;16" else picture(35, 1).resize((35, 24)).convert(mode)
    data = encoded(image, "PNG", exif=exif)
    whole = decode(data)
    monkeypatch.setattr("manifpt.decode._BAND_PX", 100)
    np.testing.assert_array_equal(decode(data), whole)
    assert whole.shape == ((24, 35, 3) if orientation == 1 else (35, 24, 3))
