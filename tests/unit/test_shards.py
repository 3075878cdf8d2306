from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifpt.artifacts import artifact_table, parquet_bytes, tensor_column, to_numpy
from manifpt.errors import ConfigError, PlanMismatch
from manifpt.packing import pack, unpack
from manifpt.plan import Plan, auto_shard_rows, check_plan, publish_plan
from manifpt.shards import (
    Rejected,
    _reconciled,
    commit_shard,
    committed_shards,
    part_path,
    read_commits,
    write_rejected,
)
from manifpt.spaces import SpaceSpec

PLAN = Plan(
    task="artifacts",
    manifest_uri="m.parquet",
    manifest_digest="a",
    rows=1050,
    shard_rows=100,
    spaces=(SpaceSpec(name="rgb", kind="rgb", height_px=2, width_px=2),),
)
BAD = Rejected("a/1.png", "/x/a/1.png", "a", None, "empty", "zero bytes")


def part(value: int = 0, ids: str = "abc", plan: str = "p") -> pa.Table:
    table = pa.table({"image_id": list(ids), "uri": list(ids), "source": ["g"] * len(ids), "v": [value] * len(ids)})
    return table.replace_schema_metadata({"manifpt.plan_digest": plan})


@given(rows=st.integers(1, 5000), shard_rows=st.integers(1, 700))
def test_shards_cover_every_row_once(rows: int, shard_rows: int) -> None:
    plan = replace(PLAN, rows=rows, shard_rows=shard_rows)
    covered = [row for shard in range(plan.shards) for row in plan.rows_of(shard)]
    assert covered == list(range(rows))


@pytest.mark.parametrize(("view_bytes", "rows"), [(3 * 32 * 32, 1024), (3 * 256 * 256, 512), (3 * 8192**2, 1)])
def test_a_decoded_shard_stays_small(view_bytes: int, rows: int) -> None:
    assert auto_shard_rows(view_bytes) == rows


def test_the_same_plan_is_found_and_another_is_refused(tmp_path: Path) -> None:
    check_plan(PLAN, str(tmp_path))
    assert not list(tmp_path.iterdir())
    publish_plan(PLAN, str(tmp_path))
    moved = replace(PLAN, manifest_uri="elsewhere.parquet", reference_uri="/moved", manifest_etag="later")
    publish_plan(moved, str(tmp_path))
    check_plan(moved, str(tmp_path))
    with pytest.raises(PlanMismatch, match="--dtype.*differs"):
        publish_plan(replace(PLAN, dtype="float32"), str(tmp_path))
    with pytest.raises(PlanMismatch, match="the manifest's content, the number of images differs"):
        publish_plan(replace(PLAN, rows=7, manifest_digest="b"), str(tmp_path))


def test_a_commit_is_the_last_thing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from manifpt import storage

    names: list[str] = []
    publish = storage.LocalStore._publish

    def noted(self: storage.LocalStore, path: bytes, data: bytes, *, new: bool) -> bool:
        names.append(path.decode().removeprefix(f"{tmp_path}/"))
        return publish(self, path, data, new=new)

    monkeypatch.setattr(storage.LocalStore, "_publish", noted)
    parts = {"artifacts/rgb/part-00004.parquet": part(), "artifacts/frequency/part-00004.parquet": part()}
    commit_shard(str(tmp_path), 4, parts, [BAD], {"decode": 0.5})
    assert names[-1] == "commits/00004.json"
    assert committed_shards(str(tmp_path)) == {4}
    commit = json.loads((tmp_path / "commits" / "00004.json").read_text())
    assert commit["parts"]["artifacts/rgb/part-00004.parquet"]["rows"] == 3
    assert not list(tmp_path.rglob("*.tmp"))


PATH = "artifacts/rgb/part-00000.parquet"


def put(tmp_path: Path, data: bytes) -> None:
    (tmp_path / PATH).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / PATH).write_bytes(data)


def sha256_there(tmp_path: Path) -> str:
    return hashlib.sha256((tmp_path / PATH).read_bytes()).hexdigest()


def test_a_published_part_is_never_written_again(tmp_path: Path) -> None:
    """A run that died after its part, or a second run with other rounding: first come, first kept; sums stay right."""
    first, second = part(1), part(2)
    put(tmp_path, parquet_bytes(first))
    commit = commit_shard(
        str(tmp_path), 0, {PATH: second}, [], {}, lambda held: {"rgb": {"g": {"v": sum(held[PATH]["v"].to_pylist())}}}
    )
    assert (tmp_path / PATH).read_bytes() == parquet_bytes(first)
    assert commit["parts"][PATH]["sha256"] == sha256_there(tmp_path)
    assert commit["statistics"] == {"rgb": {"g": {"v": 3}}}, "statistics are of what is stored"
    again = commit_shard(str(tmp_path), 0, {PATH: second}, [BAD], {})
    assert again == commit


def test_two_runs_that_read_an_image_differently_agree_on_what_is_stored(tmp_path: Path) -> None:
    """The first could read a and b; ours can't read b any more, but c has come: the commit tells of the stored part."""
    put(tmp_path, parquet_bytes(part(ids="ab")))
    gone = Rejected("b", "b", "g", None, "missing", "404")
    commit = commit_shard(str(tmp_path), 0, {PATH: part(ids="ac")}, [gone], {})
    assert commit["parts"][PATH]["rows"] == 2
    assert [row[0] for row in commit["rejected"]] == ["c"]
    assert commit["rejected"][0][3:5] == [None, "changed"]
    other = "artifacts/frequency/part-00001.parquet"
    put(tmp_path / "x", parquet_bytes(part(ids="ab")))
    small = Rejected("b", "b", "g", "frequency", "too_small", "")
    commit = commit_shard(str(tmp_path / "x"), 0, {PATH: part(ids="abc"), other: part(ids="ac")}, [small], {})
    assert [row[:1] + row[3:5] for row in commit["rejected"]] == [
        ["b", "frequency", "too_small"],
        ["c", "rgb", "changed"],
    ]


def test_a_part_of_another_plan_is_refused(tmp_path: Path) -> None:
    put(tmp_path, parquet_bytes(part(plan="other")))
    with pytest.raises(ConfigError, match="of another run"):
        commit_shard(str(tmp_path), 0, {PATH: part()}, [], {})


def test_a_damaged_part_without_a_commit_is_replaced(tmp_path: Path) -> None:
    put(tmp_path, parquet_bytes(part())[:100])
    commit_shard(str(tmp_path), 0, {PATH: part()}, [], {})
    assert (tmp_path / PATH).read_bytes() == parquet_bytes(part())


def test_many_writers_of_one_shard_agree(tmp_path: Path) -> None:
    commits: list[dict[str, object]] = []

    def write(value: int) -> None:
        commits.append(commit_shard(str(tmp_path), 0, {PATH: part(value, ids="abc"[: 1 + value % 3])}, [], {}))

    threads = [threading.Thread(target=write, args=(value,)) for value in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({json.dumps(commit) for commit in commits}) == 1
    assert commits[0]["parts"][PATH]["sha256"] == sha256_there(tmp_path)  # type: ignore[index]
    assert commits[0]["parts"][PATH]["rows"] == pq.read_metadata(tmp_path / PATH).num_rows  # type: ignore[index]


def test_rejected_rows_in_manifest_order(tmp_path: Path) -> None:
    output = str(tmp_path)
    for shard in (2, 0, 1):
        bad = replace(BAD, image_id=f"{shard}", space="rgb" if shard == 1 else None)
        commit_shard(output, shard, {}, [bad] if shard else [], {})
    write_rejected(output, read_commits(output, sorted(committed_shards(output))))
    table = pq.read_table(tmp_path / "rejected.parquet")
    assert table["image_id"].to_pylist() == ["1", "2"]
    assert table["space"].to_pylist() == ["rgb", None]


def test_committed_shards_of_nothing(tmp_path: Path) -> None:
    assert committed_shards(str(tmp_path / "none")) == set()


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(
            st.sampled_from(["u1", "<f4", "<i4", "<f2"]),
            st.lists(st.integers(0, 4), min_size=0, max_size=4),
        ),
        max_size=5,
    )
)
def test_packing_is_lossless(items: dict[str, tuple[str, list[int]]]) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 99, shape).astype(dtype) for name, (dtype, shape) in items.items()}
    table = pa.table({"id": ["a", None, "c\n"], "n": [1, 2, 3]})
    back = unpack(pack({**arrays, "_table": table}))
    assert back.pop("_table") == table
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype  # type: ignore[union-attr]
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_artifact_files_are_deterministic_and_exact(dtype: str) -> None:
    rng = np.random.default_rng(0)
    rows = pa.table({"image_id": ["a", "b"], "source": ["g", "g"]})
    artifact_bd = rng.standard_normal((2, 12)).astype(dtype)
    rows = rows.append_column("neighbor_id", [["r", "s"]]).append_column("distance", pa.array([1, 2], pa.float32()))
    metadata = {"space": "rgb", "shape": [3, 2, 2]}
    made = [parquet_bytes(artifact_table(rows, artifact_bd, (3, 2, 2), metadata)) for _ in range(2)]
    assert made[0] == made[1]
    table = pq.read_table(pa.BufferReader(made[0]))
    assert table.schema.field("artifact").type == pa.fixed_shape_tensor(pa.from_numpy_dtype(dtype), (3, 2, 2))
    np.testing.assert_array_equal(to_numpy(table["artifact"]), artifact_bd.reshape(2, 3, 2, 2))
    column = pq.ParquetFile(pa.BufferReader(made[0])).metadata.row_group(0)
    encodings = {column.column(i).path_in_schema: column.column(i).encodings for i in range(column.num_columns)}
    assert ("BYTE_STREAM_SPLIT" in encodings["artifact.list.element"]) == (dtype == "float32")


def test_tensor_column_round_trip_of_no_rows() -> None:
    assert to_numpy(pa.chunked_array([tensor_column(np.empty((0, 3, 2), np.float16))])).shape == (0, 3, 2)


def test_a_part_of_a_scan_that_was_killed_is_adopted_with_its_images_without_a_verdict() -> None:
    """Their source is null, and a commit that says so was refused as damaged, again and again."""
    path = part_path("attributions", "rgb", 0)
    held = pa.table({"image_id": ["a"], "uri": ["a"], "source": pa.array(["gan"])})
    ours = pa.table({"image_id": ["a", "b"], "uri": ["a", "b"], "source": pa.array(["gan", None])})
    (found,) = _reconciled({path: ours}, {path: held}, [], {})
    assert (found.image_id, found.source, found.reason) == ("b", "", "changed")


def test_a_reference_that_is_resumed_keeps_the_reasons() -> None:
    """Its parts have codes' names, and rejections have spaces'."""
    rows = {name: pa.table({"image_id": list(ids), "uri": list(ids)}) for name, ids in (("ab", "ab"), ("a", "a"))}
    part_of = {"rgb": "native-8x8", "frequency": "native-8x8", "supervised": "net", "mine": "none-came-through"}
    paths = [part_path("embeddings", name, 0) for name in ("native-8x8", "net")]
    rejected = [
        Rejected("b", "b", "real", "rgb", "size_mismatch", "9 x 9 px"),
        Rejected("b", "b", "real", "frequency", "size_mismatch", "9 x 9 px"),
        Rejected("a", "a", "real", "mine", "too_small", ""),
        Rejected("c", "c", "real", None, "missing", "404"),
    ]
    held = {paths[0]: rows["a"], paths[1]: rows["ab"]}
    found = _reconciled(held, held, rejected, part_of)
    assert [(r.image_id, r.space, r.reason) for r in found] == [
        ("a", "mine", "too_small"), ("b", "rgb", "size_mismatch"), ("b", "frequency", "size_mismatch"),
        ("c", None, "missing"),
    ]  # fmt: skip


def test_every_part_that_lacks_an_image_is_told() -> None:
    names = ("rgb", "frequency", "supervised")
    paths = [part_path("artifacts", name, 0) for name in names]
    both, one = (pa.table({"image_id": list(ids), "uri": list(ids), "source": list(ids)}) for ids in ("ab", "a"))
    held = dict(zip(paths, (one, one, both), strict=True))
    found = _reconciled(dict.fromkeys(paths, both), held, [Rejected("a", "a", "a", "dino", "too_small", "")], {})
    assert [(r.image_id, r.space, r.reason) for r in found] == [
        ("a", "dino", "too_small"), ("b", "rgb", "changed"), ("b", "frequency", "changed"),
    ]  # fmt: skip
    none = pa.table({"image_id": ["b"], "uri": ["b"], "source": ["b"]})
    gone = [Rejected("a", "a", "a", "dino", "too_small", "8 px")]
    (found,) = [r for r in _reconciled({paths[0]: both}, {paths[0]: none}, gone, {}) if r.image_id == "a"]
    assert (found.space, found.reason, found.detail) == (None, "too_small", "8 px")
