"""Runs of altered images: what they are taken for, lazy artifacts of them, and what a training takes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifpt.alterations import DRAWN, LADDER, altered_as
from manifpt.analysis.explain import explain_image
from manifpt.artifacts import to_numpy
from manifpt.attributor.altered import _refuse_other, read_altered
from manifpt.attributor.card import model_card
from manifpt.attributor.choice import Choice
from manifpt.attributor.examples import Examples, select_examples
from manifpt.attributor.splits import TRAIN
from manifpt.attributor.train import _facts
from manifpt.attributor.training import RECIPES
from manifpt.config import ExplainConfig, TrainConfig
from manifpt.decode import content_hash, decode
from manifpt.errors import ConfigError, PlanMismatch
from manifpt.estimates import Estimate
from manifpt.evaluation.methods import candidates_of
from manifpt.plan import Plan, check_plan, publish_plan
from manifpt.reader import ArtifactReader, read_artifacts, read_plan
from manifpt.report.preview import _examples
from manifpt.stages import Encoder, decode_rows
from tests.helpers.images import encoded, picture
from tests.helpers.runs import artifacts_of, make_run, openset_of, rows_of
from tests.unit.test_attributor import metrics_of
from tests.unit.test_stages import plan, put, run, travelled  # noqa: F401  the fixture `plan` among them

SOURCES = {"gan": 40, "vae": 30, "real": 30}


# --- a run ---


def test_a_run_sees_altered_images_and_knows_them_by_their_own_pixels(plan: Plan) -> None:  # noqa: F811
    for alter in ("blur-1.0", "noise-4", DRAWN):
        shard = decode_rows(replace(plan, alter=alter), 0)
        ids = shard["rows"]["image_id"].to_pylist()
        images = [decode(Path(uri).read_bytes()) for uri in shard["rows"]["uri"].to_pylist()]
        expected = [altered_as(image, alter, name).transpose(2, 0, 1) for name, image in zip(ids, images, strict=True)]
        np.testing.assert_array_equal(shard[f"view:{plan.spaces[0].view.key}"], np.stack(expected))
        assert shard["rows"]["content_hash"].to_pylist() == [content_hash(image) for image in images]


def test_only_a_run_that_alters_has_another_identity(plan: Plan, tmp_path: Path) -> None:  # noqa: F811
    assert "alter" not in plan.semantic()
    plans = [plan, *(replace(plan, alter=alter) for alter in (*LADDER, DRAWN))]
    assert len({of_run.digest for of_run in plans}) == len(plans)
    publish_plan(plans[1], str(tmp_path / "run"))
    assert read_plan(str(tmp_path / "run")).alter == plans[1].alter
    for other in (plan, plans[2]):
        with pytest.raises(PlanMismatch, match=r"how images are altered first \(--alter\) differs"):
            check_plan(other, str(tmp_path / "run"))


def test_an_altered_shard_says_so_and_a_plain_one_is_as_it_was(plan: Plan, tmp_path: Path) -> None:  # noqa: F811
    for name, of_run in (("plain", plan), ("altered", replace(plan, alter="jpeg-50"))):
        run(of_run, tmp_path / name)
    metadata = [
        pq.read_schema(tmp_path / name / "artifacts/rgb/part-00000.parquet").metadata for name in ("plain", "altered")
    ]
    assert b"manifpt.alter" not in metadata[0] and metadata[1][b"manifpt.alter"] == b"jpeg-50"


def test_an_altered_real_is_still_not_projected_onto_itself(plan: Plan, tmp_path: Path) -> None:  # noqa: F811
    """Nor onto its copy under another name: what is left out is known by the pixels before."""
    for name, source in (("real/again.png", "reals/real/6.png"), ("d/copy.png", "reals/real/2.png")):
        put(tmp_path / "queries" / name, (tmp_path / source).read_bytes())
    from tests.unit.test_stages import planned

    queries = planned(tmp_path, "queries", plan.spaces)
    of_run = replace(
        plan, manifest_digest=queries.manifest_digest, manifest_etag=queries.manifest_etag, rows=queries.rows,
        alter="jpeg-95",
    )  # fmt: skip
    run(of_run, tmp_path / "run")
    rows = pq.read_table(tmp_path / "run/artifacts/rgb").to_pylist()
    of_image = {row["image_id"]: row for row in rows}
    assert of_image["real/again.png"]["twin"] == "left_out"
    assert of_image["real/again.png"]["neighbor_id"] != "real/6.png"
    assert of_image["d/copy.png"]["twin"] == "copy" and of_image["d/copy.png"]["neighbor_id"] == "real/2.png"


def test_lazy_artifacts_are_made_again_from_altered_images(plan: Plan, tmp_path: Path) -> None:  # noqa: F811
    for name, inline in (("inline", ("rgb", "small")), ("lazy", ())):
        of_run = replace(plan, inline=inline, alter="noise-4")
        publish_plan(of_run, str(tmp_path / name))
        run(of_run, tmp_path / name)
    for space in ("rgb", "small"):
        tables = [list(read_artifacts(str(tmp_path / name), space)) for name in ("inline", "lazy")]
        for one, other in zip(*tables, strict=True):
            np.testing.assert_array_equal(to_numpy(one["artifact"]), to_numpy(other["artifact"]))


def test_the_preview_shows_what_was_measured(plan: Plan, tmp_path: Path) -> None:  # noqa: F811
    of_run = replace(plan, alter="blur-1.0")
    run(of_run, tmp_path / "run")
    for row in _examples(of_run, str(tmp_path / "run")):
        for example in row.values():
            image_hwc = decode(Path(example["uri"]).read_bytes())
            np.testing.assert_array_equal(example["x"], altered_as(image_hwc, "blur-1.0", example["image_id"]))


def test_what_can_t_be_altered_is_rejected(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("manifpt.alterations._MOST_AREA_PX", 32 * 32)
    shard = decode_rows(replace(plan, alter="resize-2.0"), 0)
    assert [row["reason"] for row in shard["rejected"].to_pylist()] == ["too_large"] * 4
    assert len(travelled(Encoder(plan.spaces)(travelled(shard)))["rows"]) == 0


# --- a training ---


def made(folder: Path, alter: str, rows: pa.Table | None = None, **settings: Any) -> str:
    """A run by `alter`, whose artifacts are 100 more than those of the plain run."""

    def artifacts(of_shard: pa.Table) -> np.ndarray:
        return artifacts_of(of_shard) + np.float16(100)

    table = rows_of(SOURCES) if rows is None else rows
    return str(make_run(folder, table, alter=alter, artifacts=artifacts, **settings))


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    return select_examples(str(make_run(tmp_path / "plain", rows_of(SOURCES))), "rgb", Choice(labels={}))


def test_copies_of_training_images_alone_are_trained_on(examples: Examples, tmp_path: Path) -> None:
    """Also where the other run has other shards, and rejected some images."""
    kept = np.random.default_rng(0).permutation(100)[:80]
    runs = [
        made(tmp_path / "jpeg", "jpeg-50", shard_rows=7),
        made(tmp_path / "drawn", DRAWN, rows_of(SOURCES).take(pa.array(kept))),
    ]
    found = read_altered(runs, examples)
    train_ids = examples.table["image_id"].take(pa.array(np.flatnonzero(examples.side_n == TRAIN))).to_pylist()
    label_of = dict(zip(examples.table["image_id"].to_pylist(), examples.label_n.tolist(), strict=True))
    some_ids = set(rows_of(SOURCES)["image_id"].take(pa.array(kept)).to_pylist())
    numbers: list[int] = list(range(len(examples.label_n)))
    for of_run, expected in zip(found, (set(train_ids), set(train_ids) & some_ids), strict=True):
        reader, ids = ArtifactReader(of_run.run, "rgb"), []
        for part in of_run.parts:
            table = reader.read(part.shard, part.place_n)
            ids += table["image_id"].to_pylist()
            assert [label_of[name] for name in table["image_id"].to_pylist()] == part.label_n.tolist()
            np.testing.assert_array_equal(to_numpy(table["artifact"]), artifacts_of(table) + np.float16(100))
            numbers += part.row_n.tolist()
        assert set(ids) == expected and len(ids) == len(expected) == len(of_run.label_n)
    assert len(set(numbers)) == len(numbers), "rows are sorted by their numbers, which must differ"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [str(make_run(folder, rows_of(SOURCES)))], "is of images as they are"),
        (lambda folder: [made(folder / "a", DRAWN), made(folder / "b", DRAWN)], "are by --alter drawn: name one"),
        (lambda folder: [made(folder, DRAWN, manifest_digest="n")], "in its manifest, not only"),
        (lambda folder: [made(folder, DRAWN, spaces=("frequency",))], "in its space, not only"),
        (lambda folder: [made(folder, DRAWN, estimate=Estimate(name="none"))], "in its estimate, not only"),
        (lambda folder: [made(folder, DRAWN, reference_digest="q" * 64)], "in its reference, not only"),
        (lambda folder: [made(folder, DRAWN, shards=2)], "has 2 of 7 shards"),
    ],
)
def test_a_run_that_differs_in_more_is_refused(
    examples: Examples, tmp_path: Path, make: Callable[[Path], list[str]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_altered(make(tmp_path / "other"), examples)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"dtype": "float32"}, "number format"),
        ({"projection": "approximate"}, "projection"),
        ({"decoder": "e"}, "decoder"),
    ],
)
def test_a_run_of_other_numbers_is_refused(examples: Examples, changes: dict[str, str], what: str) -> None:
    """Mixed blocks failed in every worker; unproved neighbours would have gone in without a word."""
    plain = read_plan(examples.run)
    with pytest.raises(ConfigError, match=rf"differs from .* in its {what}"):
        _refuse_other(replace(plain, **changes), plain, "other", examples)  # type: ignore[arg-type]


def test_augmentation_is_part_of_what_an_attributor_is(examples: Examples, tmp_path: Path) -> None:
    altered = read_altered([made(tmp_path / "drawn", DRAWN)], examples)
    config = TrainConfig(artifacts=examples.run, space="rgb", output="o")
    plain, augmented = (_facts(config, examples, of, "head", RECIPES["head"], None) for of in ((), altered))
    assert plain["altered"] is None
    (said,) = augmented["altered"]
    assert (said["alter"], said["plan_digest"]) == (DRAWN, read_plan(str(tmp_path / "drawn")).digest)
    assert said["images"] == (examples.side_n == TRAIN).sum()
    assert plain["examples_digest"] == augmented["examples_digest"], "its test images are those of the plain run"
    labels = ("gan", "real", "vae")
    unknown = {"rate": 0.05, "measured_rate": 0.04} | openset_of(3).chosen()
    cards = [model_card(labels, facts, metrics_of(labels), unknown) for facts in (plain, augmented)]
    assert "by `--alter drawn`" in cards[1] and "alter" not in cards[0]


def test_a_choice_is_found_again(tmp_path: Path) -> None:
    choice = Choice(labels={"a": "b", "c": None}, min_images=3, most_images=9, group_column="g", seed=5)
    assert Choice.from_facts(json.loads(json.dumps(choice.facts()))) == choice


# --- nobody else takes an altered run ---


def test_an_altered_run_is_taken_for_no_other(examples: Examples, tmp_path: Path) -> None:
    other = made(tmp_path / "drawn", DRAWN)
    config = ExplainConfig(image=str(tmp_path / "x.png"), attributor="a", artifacts=other, output="o")
    put(tmp_path / "x.png", encoded(picture(), "PNG"))
    for take in (
        lambda: select_examples(other, "rgb", Choice(labels={})),
        lambda: candidates_of([examples.run], [], (), (), None, control_runs=[other]),
        lambda: explain_image(config),
    ):
        with pytest.raises(ConfigError, match=r"altered its images first \(--alter drawn\)"):
            take()
