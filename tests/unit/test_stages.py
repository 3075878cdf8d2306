"""The steps of a shard without Ray: what each space takes or rejects, and shards of which nothing is left."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from manifpt.artifacts import to_numpy
from manifpt.decode import DECODER
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate
from manifpt.indexing import IndexOptions, index
from manifpt.manifest import Manifest, records, write_manifest
from manifpt.packing import pack, unpack
from manifpt.plan import Plan, publish_plan
from manifpt.projecting import Projecting
from manifpt.reader import read_artifacts, read_plan
from manifpt.reference import finish_bundle
from manifpt.report.preview import draw_preview
from manifpt.shards import read_commits, write_rejected
from manifpt.spaces import SpaceSpec
from manifpt.stages import Encoder, Shard, commit_artifacts, commit_codes, decode_rows
from tests.helpers.images import encoded, picture

NATIVE = SpaceSpec(name="rgb", kind="rgb", height_px=32, width_px=32)
SMALL = SpaceSpec(name="small", kind="frequency", size_px=16, height_px=16, width_px=16)


def travelled(shard: Shard) -> Shard:
    """As between two stages."""
    return unpack(pack(shard))


def planned(folder: Path, name: str, spaces: tuple[SpaceSpec, ...], shard_rows: int = 4) -> Plan:
    uri = str(folder / f"{name}.parquet")
    write_manifest(index([str(folder / name)], IndexOptions(), Counter()), uri)
    manifest = Manifest(uri)
    return Plan(
        task="reference", manifest_uri=uri, manifest_digest=manifest.digest(), manifest_etag=manifest.etag,
        rows=manifest.rows, shard_rows=shard_rows, spaces=spaces, decoder=DECODER, inline=("rgb", "small"),
    )  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A run over a reference of ten images: of four good queries, four bad ones, and one only for `small`."""
    for n in range(10):
        put(tmp_path / f"reals/real/{n}.png", encoded(picture(seed=n), "PNG"))
    for n in range(4):
        put(tmp_path / f"queries/a/{n}.png", encoded(picture(seed=20 + n), "PNG"))
        put(tmp_path / f"queries/b/{n}.png", b"nothing")
    put(tmp_path / "queries/c/large.png", encoded(picture(64, seed=30), "PNG"))
    put(tmp_path / "queries/c/tiny.png", encoded(picture(12, seed=31), "PNG"))
    reals = planned(tmp_path, "reals", (NATIVE, SMALL))
    for shard in range(reals.shards):
        codes = travelled(Encoder(reals.spaces)(travelled(decode_rows(reals, shard))))
        commit_codes(reals, str(tmp_path / "reference"), codes)
    bundle = finish_bundle(reals, str(tmp_path / "reference"))
    queries = planned(tmp_path, "queries", (NATIVE, SMALL))
    return replace(queries, task="artifacts", reference_uri=bundle.uri, reference_digest=bundle.digest)


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def run(plan: Plan, output: Path) -> None:
    stages = [Projecting(plan, share=share) for share in range(plan.reference_shards)]
    for number in range(plan.shards):
        shard = travelled(Encoder(plan.spaces)(travelled(decode_rows(plan, number))))
        for projecting in stages:
            shard = travelled(projecting(shard))
        commit_artifacts(plan, str(output), shard)
    put(output / "_SUCCESS", b"")


def committed(output: Path) -> dict[str, object]:
    """Bytes of every part, and what the commits say but for their timings."""
    parts = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.parquet")}
    commits = {path.name: json.loads(path.read_text()) | {"seconds": {}} for path in output.rglob("commits/*.json")}
    return parts | commits


def test_each_space_takes_what_it_can_and_the_rest_is_listed(plan: Plan, tmp_path: Path) -> None:
    run(plan, tmp_path / "run")
    ids = {name: pq.read_table(tmp_path / "run/artifacts" / name)["image_id"].to_pylist() for name in ("rgb", "small")}
    good = [f"a/{n}.png" for n in range(4)]
    assert ids == {"rgb": good, "small": [*good, "c/large.png"]}
    write_rejected(str(tmp_path / "run"), read_commits(str(tmp_path / "run"), range(plan.shards)))
    rows = pq.read_table(tmp_path / "run/rejected.parquet").to_pylist()
    found = [(row["image_id"], row["space"], row["reason"]) for row in rows]
    assert found == [
        *((f"b/{n}.png", None, "not_an_image") for n in range(4)),
        ("c/large.png", "rgb", "size_mismatch"),
        ("c/tiny.png", None, "size_mismatch"),
    ]


def test_a_shard_of_which_nothing_is_left_has_an_empty_part(plan: Plan, tmp_path: Path) -> None:
    run(plan, tmp_path / "run")
    for name, shape in (("rgb", (3, 32, 32)), ("small", (3, 16, 16))):
        full, empty = (pq.read_table(tmp_path / f"run/artifacts/{name}/part-0000{n}.parquet") for n in (0, 1))
        assert len(empty) == 0
        assert empty.schema.equals(full.schema)
        assert to_numpy(full["artifact"]).shape == (4, *shape)


def test_a_reference_survives_a_shard_of_bad_images(tmp_path: Path) -> None:
    for n in range(4):
        put(tmp_path / f"reals/a/{n}.png", b"nothing")
        put(tmp_path / f"reals/b/{n}.png", encoded(picture(seed=n), "PNG"))
    reals = planned(tmp_path, "reals", (NATIVE,))
    for shard in range(reals.shards):
        codes = travelled(Encoder(reals.spaces)(travelled(decode_rows(reals, shard))))
        commit_codes(reals, str(tmp_path / "reference"), codes)
    bundle = finish_bundle(reals, str(tmp_path / "reference"))
    assert bundle.images == 4
    listed = pq.read_table(tmp_path / "reference/reference.parquet")["image_id"].to_pylist()
    assert listed == [f"b/{n}.png" for n in range(4)]


def test_lazy_and_inline_agree(plan: Plan, tmp_path: Path) -> None:
    for name, inline in (("inline", ("rgb", "small")), ("lazy", ())):
        of_run = replace(plan, inline=inline)
        publish_plan(of_run, str(tmp_path / name))
        run(of_run, tmp_path / name)
    for space in ("rgb", "small"):
        tables = [list(read_artifacts(str(tmp_path / name), space)) for name in ("inline", "lazy")]
        for one, other in zip(*tables, strict=True):
            assert one["image_id"] == other["image_id"]
            np.testing.assert_array_equal(to_numpy(one["artifact"]), to_numpy(other["artifact"]))


def test_an_embedding_that_is_not_finite_is_rejected(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    projecting = Projecting(plan)
    space = projecting.references["rgb"].space
    embed = space.embed

    def broken(codes: np.ndarray) -> np.ndarray:
        embedding = embed(codes)
        if len(codes) == 4:
            embedding[1, 0, 0, 0] = np.nan
        return embedding

    monkeypatch.setattr(space, "embed", broken)
    shard = projecting(travelled(Encoder(plan.spaces)(travelled(decode_rows(plan, 0)))))
    commit = commit_artifacts(plan, str(tmp_path / "run"), travelled(shard))
    assert [(row[0], row[3], row[4]) for row in commit["rejected"]] == [("a/1.png", "rgb", "not_finite")]
    assert pq.read_metadata(tmp_path / "run/artifacts/rgb/part-00000.parquet").num_rows == 3
    assert pq.read_metadata(tmp_path / "run/artifacts/small/part-00000.parquet").num_rows == 4


def test_artifacts_too_large_for_float16_are_an_error_not_infinite(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    projecting = Projecting(plan)
    reference = projecting.references["rgb"]
    codes = travelled(Encoder(plan.spaces)(travelled(decode_rows(plan, 0))))
    embed = reference.space.embed
    monkeypatch.setattr(reference.space, "embed", lambda c: embed(c) * np.float32(1e6 if len(c) == 4 else 1))
    with pytest.raises(ConfigError, match="use --dtype float32"):
        projecting(codes)


def test_a_lazy_artifact_too_large_for_float16_is_an_error_too(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = replace(plan, inline=())
    publish_plan(lazy, str(tmp_path / "run"))
    run(lazy, tmp_path / "run")
    monkeypatch.setattr("manifpt.reader.artifacts_of", lambda residual_bd, *_: residual_bd + np.float32(1e6))
    with pytest.raises(ConfigError, match="use --dtype float32"):
        list(read_artifacts(str(tmp_path / "run"), "rgb"))


def test_a_part_that_is_not_what_its_commit_says_is_not_read(plan: Plan, tmp_path: Path) -> None:
    publish_plan(plan, str(tmp_path / "run"))
    run(plan, tmp_path / "run")
    parts = sorted((tmp_path / "run/artifacts/rgb").iterdir())
    whole = parts[0].read_bytes()
    for damaged in (parts[1].read_bytes(), whole[:-1], bytes([*whole[:200], whole[200] ^ 1, *whole[201:]])):
        parts[0].write_bytes(damaged)
        with pytest.raises(ConfigError, match="is not what the commit of shard 0 says"):
            list(read_artifacts(str(tmp_path / "run"), "rgb"))


def test_an_unfinished_run_is_not_read_as_if_it_were_whole(plan: Plan, tmp_path: Path) -> None:
    publish_plan(plan, str(tmp_path / "run"))
    run(plan, tmp_path / "run")
    assert len(list(read_artifacts(str(tmp_path / "run"), "rgb"))) == plan.shards
    (tmp_path / "run/_SUCCESS").unlink()
    with pytest.raises(ConfigError, match="was not ended"):
        list(read_artifacts(str(tmp_path / "run"), "rgb"))
    publish_plan(replace(plan, task="reference"), str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="has no artifacts"):
        read_plan(str(tmp_path / "other"))


def test_a_kept_column_may_hold_what_python_can_not(plan: Plan, tmp_path: Path) -> None:
    manifest = pq.read_table(plan.manifest_uri)
    times = pa.array([10 * 253_402_300_800_000] * len(manifest), pa.timestamp("ms"))  # the year 80000
    uri = str(tmp_path / "kept.parquet")
    write_manifest(manifest.append_column("taken", times).to_batches(), uri)
    of_run = replace(plan, manifest_uri=uri, manifest_digest=Manifest(uri).digest(), manifest_etag=Manifest(uri).etag)
    run(of_run, tmp_path / "run")
    part = pq.read_table(tmp_path / "run/artifacts/rgb/part-00000.parquet")
    assert len(part) == 4 and part["taken"].type == pa.timestamp("ms")
    draw_preview(of_run, str(tmp_path / "run"))
    assert (tmp_path / "run/preview.png").exists()


@pytest.mark.parametrize("held", ["jpeg", "jpeg and png"])
def test_a_real_whose_copy_was_encoded_again_is_told_even_if_it_is_left_out(tmp_path: Path, held: str) -> None:
    """Leave-one-out hides its own pixels, and not those of its JPEG."""
    for n in range(8):
        image = smooth(n)
        put(tmp_path / f"reals/real/{n}.jpg", encoded(image, "JPEG", quality=95))
        put(tmp_path / f"queries/real/{n}.png", encoded(image, "PNG"))
        if held == "jpeg and png":
            put(tmp_path / f"reals/real/{n}.png", encoded(image, "PNG"))
    reals = planned(tmp_path, "reals", (NATIVE,))
    for shard in range(reals.shards):
        commit_codes(reals, str(tmp_path / "reference"), Encoder(reals.spaces)(decode_rows(reals, shard)))
    bundle = finish_bundle(reals, str(tmp_path / "reference"))
    queries = replace(planned(tmp_path, "queries", (NATIVE,)), task="artifacts", reference_uri=bundle.uri,
                      reference_digest=bundle.digest)  # fmt: skip
    run(queries, tmp_path / "run")
    found = [
        row for table in sorted((tmp_path / "run/artifacts/rgb").iterdir()) for row in records(pq.read_table(table))
    ]
    assert {row["twin"] for row in found} == {"near_copy"}
    said = json.loads((tmp_path / "run/commits/00000.json").read_text())["statistics"]["rgb"]["real"]
    assert (said["near_copies"], said["left_out"]) == (4, 0)
    soft = replace(queries, estimate=Estimate(name="soft", sigma=0.1))
    run(soft, tmp_path / "soft")
    said = json.loads((tmp_path / "soft/commits/00000.json").read_text())["statistics"]["rgb"]["real"]
    assert "near_copies" not in said, "it was not looked for"
    assert said["left_out"] == (4 if held == "jpeg and png" else 0)


def smooth(seed: int) -> Image.Image:
    """Of 32 px, which JPEG changes little."""
    corner_hwc = np.random.default_rng(seed).integers(40, 215, (4, 4, 3), np.uint8)
    return Image.fromarray(corner_hwc).resize((32, 32), Image.Resampling.BICUBIC)


def test_a_manifest_replaced_meanwhile_is_noticed(plan: Plan, tmp_path: Path) -> None:
    put(tmp_path / "queries/a/9.png", encoded(picture(seed=99), "PNG"))
    planned(tmp_path, "queries", plan.spaces)
    with pytest.raises(ConfigError, match="was replaced while the job ran"):
        decode_rows(plan, 0)


def test_a_part_says_what_it_is(plan: Plan, tmp_path: Path) -> None:
    run(plan, tmp_path / "run")
    metadata = pq.read_schema(tmp_path / "run/artifacts/small/part-00000.parquet").metadata
    assert metadata[b"manifpt.plan_digest"].decode() == plan.digest
    assert json.loads(metadata[b"manifpt.shape"]) == [3, 16, 16]
    assert json.loads(metadata[b"manifpt.spec"])["size_px"] == 16
    assert pa.types.is_string(pq.read_schema(tmp_path / "run/artifacts/small/part-00001.parquet").field("twin").type)


def test_a_reference_in_parts_gives_the_same_bytes(plan: Plan, tmp_path: Path) -> None:
    """Also for reals that are themselves in one part, and for copies: what is left out must be known to all parts."""
    for name, source in (("real/again.png", "reals/real/6.png"), ("d/copy.png", "reals/real/2.png")):
        put(tmp_path / "queries" / name, (tmp_path / source).read_bytes())
    queries = planned(tmp_path, "queries", plan.spaces)
    both = {"manifest_digest": queries.manifest_digest, "manifest_etag": queries.manifest_etag, "rows": queries.rows}
    run(replace(plan, **both), tmp_path / "whole")  # type: ignore[arg-type]
    whole = committed(tmp_path / "whole")
    twins = pq.read_table(tmp_path / "whole/artifacts/rgb")
    kinds = dict(zip(twins["image_id"].to_pylist(), twins["twin"].to_pylist(), strict=True))
    assert (kinds["real/again.png"], kinds["d/copy.png"]) == ("left_out", "copy")
    for parts in (2, 3):
        run(replace(plan, **both, reference_shards=parts), tmp_path / f"parts-{parts}")  # type: ignore[arg-type]
        assert committed(tmp_path / f"parts-{parts}") == whole


def test_more_parts_than_a_reference_has(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="has 3 parts and can't be held in 4"):
        Projecting(replace(plan, reference_shards=4))


def test_flat_projection_gives_the_same_bytes(plan: Plan, tmp_path: Path) -> None:
    run(plan, tmp_path / "exact")
    run(replace(plan, projection="flat"), tmp_path / "flat")
    assert committed(tmp_path / "exact") == committed(tmp_path / "flat")


def test_approximate_projection_counts_what_it_missed(plan: Plan, tmp_path: Path) -> None:
    run(replace(plan, projection="approximate"), tmp_path / "run")
    commit = next(iter(read_commits(str(tmp_path / "run"), [0])))
    sums = commit["statistics"]["rgb"]["a"]
    assert (sums["checked"], sums["right"]) == (4, 4), "one list of ten rows can't miss"
    assert replace(plan, projection="approximate").digest != plan.digest
    assert replace(plan, projection="flat").digest == plan.digest


def test_a_measured_search_is_recorded_and_gives_the_same_bytes(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manifpt.search.choose.FEW", 0)
    monkeypatch.setattr("manifpt.search.choose.SMALL", 0)
    monkeypatch.setattr("manifpt.search.choose._us_a_query", lambda call, queries: 0.0 if call() is None else 1.0)
    from manifpt.reference import open_bundle
    from manifpt.search import Choice

    reals = planned(tmp_path, "reals", plan.spaces)
    for shard in range(reals.shards):
        codes = travelled(Encoder(reals.spaces)(travelled(decode_rows(reals, shard))))
        commit_codes(reals, str(tmp_path / "measured"), codes)
    bundle = finish_bundle(reals, str(tmp_path / "measured"))
    assert bundle.digest == plan.reference_digest, "how it is searched is no part of what it is"
    assert set(bundle.searches["rgb"].estimated_us) == {"flat", "128", "256", "384", "512", "3072"}
    pruned = {name: Choice("pruned", 128) for name in bundle.searches}
    monkeypatch.setattr("manifpt.projecting.open_bundle", lambda uri: replace(open_bundle(uri), searches=pruned))
    run(plan, tmp_path / "pruned")
    monkeypatch.undo()
    run(plan, tmp_path / "flat")
    assert committed(tmp_path / "pruned") == committed(tmp_path / "flat")
