"""What an attributor is trained on, and the bundle that it becomes."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt import cluster, distributed, following
from manifpt.artifacts import to_numpy
from manifpt.attributor import finish as finish_module
from manifpt.attributor import train as train_module
from manifpt.attributor.bundle import Attributor, save_bundle
from manifpt.attributor.card import model_card
from manifpt.attributor.choice import Choice, read_labels
from manifpt.attributor.examples import Examples, select_examples
from manifpt.attributor.features import FeatureStatistics
from manifpt.attributor.files import is_finished
from manifpt.attributor.networks import make_network
from manifpt.attributor.splits import SIDES, TEST, TRAIN, VALIDATION
from manifpt.attributor.trackers import make_tracker
from manifpt.attributor.training import Recipe, class_weights
from manifpt.attributor.worker import Job, train
from manifpt.config import TrainConfig
from manifpt.distributed import Worker, told_in
from manifpt.errors import ConfigError, PlanMismatch
from manifpt.plan import publish_facts
from manifpt.reader import ArtifactReader
from manifpt.report.text import cell, say_attributor
from manifpt.storage import store_of
from tests.helpers.runs import SHAPE, artifacts_of, make_run, openset_of, resealed, rewritten, rows_of
from tests.helpers.workers import LoneWorker

SOURCES = {"gan": 40, "vae": 30, "real": 30}
ALL = Choice(labels={})


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(make_run(tmp_path / "run", rows_of(SOURCES)))


def ids(examples: Examples, side: int) -> set[str]:
    return set(examples.table["image_id"].take(pa.array(np.flatnonzero(examples.side_n == side))).to_pylist())


# --- which rows ---


def test_every_image_has_its_label_and_every_label_each_side(run: str) -> None:
    found = select_examples(run, "rgb", ALL)
    assert found.labels == ("gan", "real", "vae")
    assert Counter(found.label_n.tolist()) == {0: 40, 1: 30, 2: 30}
    for side in (TRAIN, VALIDATION, TEST):
        assert set(found.label_n[found.side_n == side].tolist()) == {0, 1, 2}
    assert [found.labels[n] for n in found.label_n] == found.table["source"].to_pylist()
    assert (found.shape, found.left_out) == (SHAPE, {})


def test_parts_find_the_artifacts_of_their_rows(run: str) -> None:
    found = select_examples(run, "rgb", ALL)
    reader = ArtifactReader(run, "rgb")
    rows: list[int] = []
    for side in range(len(SIDES)):
        parts = found.parts(side)
        assert [part.shard for part in parts] == sorted({part.shard for part in parts}), "a shard is read once"
        for part in parts:
            np.testing.assert_array_equal(part.label_n, found.label_n[part.row_n])
            assert (found.side_n[part.row_n] == side).all()
            expected = artifacts_of(found.table.take(pa.array(part.row_n)))
            table = reader.read(part.shard, part.place_n)
            assert table["image_id"].to_pylist() == found.table["image_id"].take(pa.array(part.row_n)).to_pylist()
            np.testing.assert_array_equal(to_numpy(table["artifact"]), expected)
            rows += part.row_n.tolist()
    assert sorted(rows) == list(range(100))


def test_the_order_of_a_manifest_and_its_shards_change_nothing(tmp_path: Path) -> None:
    """Methods are compared and fused image by image, whatever runs their artifacts come from."""
    rows = rows_of(SOURCES)
    mixed = rows.take(pa.array(np.random.default_rng(0).permutation(len(rows))))
    one = select_examples(str(make_run(tmp_path / "one", rows)), "rgb", ALL)
    other = select_examples(str(make_run(tmp_path / "other", mixed, shard_rows=7)), "rgb", ALL)
    assert one.table["image_id"].to_pylist() == other.table["image_id"].to_pylist()
    np.testing.assert_array_equal(one.side_n, other.side_n)
    assert one.digest == other.digest


def test_a_label_map_merges_and_leaves_out(run: str) -> None:
    found = select_examples(run, "rgb", Choice(labels={"gan": "made", "vae": "made"}))
    assert found.labels == ("made", "real")
    assert Counter(found.label_n.tolist()) == {0: 70, 1: 30}
    found = select_examples(run, "rgb", Choice(labels={"real": None}))
    assert (found.labels, found.left_out) == (("gan", "vae"), {"sources left out by the label map": 30})


def test_a_label_of_few_images_is_left_out(run: str) -> None:
    assert len(select_examples(run, "rgb", Choice(labels={}, min_images=30)).labels) == 3
    with pytest.raises(ConfigError, match=r"images of 1 label\(s\) \(gan\)"):
        select_examples(run, "rgb", Choice(labels={}, min_images=31))
    merged = select_examples(run, "rgb", Choice(labels={"vae": "other", "real": "other"}, min_images=31))
    assert merged.labels == ("gan", "other"), "a label is counted, not a source"


def test_the_most_images_of_a_label_are_always_the_same(run: str) -> None:
    found = [select_examples(run, "rgb", Choice(labels={}, most_images=20, seed=seed)) for seed in (0, 0, 1)]
    assert Counter(found[0].label_n.tolist()) == {0: 20, 1: 20, 2: 20}
    assert found[0].left_out == {"beyond the most images of a label": 40}
    of_seed = [of.table["image_id"].to_pylist() for of in found]
    assert of_seed[0] == of_seed[1] == of_seed[2]
    assert of_seed[0][19] != "gan/0019.png", "not the first of a folder, which may be of one kind"
    assert ids(found[0], TRAIN) == ids(found[1], TRAIN) != ids(found[2], TRAIN)
    assert found[0].digest == found[1].digest != found[2].digest
    more = select_examples(run, "rgb", Choice(labels={}, most_images=25)).table["image_id"].to_pylist()
    assert set(of_seed[0]) < set(more), "more images are the same and others"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99))
def test_groups_and_copies_stay_on_one_side(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [None if rng.random() < 0.3 else f"g{rng.integers(0, 25)}" for _ in range(100)]
    hashes = [f"h{rng.integers(0, 60)}" if rng.random() < 0.5 else f"own{n}" for n in range(100)]
    folder = tmp_path_factory.mktemp("groups")
    rows = rows_of(SOURCES, latent=groups, content_hash=hashes)
    try:
        found = select_examples(
            str(make_run(folder, rows, shard_rows=100)), "rgb", Choice(labels={}, group_column="latent")
        )
    except ConfigError:  # so tied that there is no split
        return
    for column in ("latent", "content_hash"):
        sides: dict[str, set[int]] = {}
        for value, side in zip(found.table[column].to_pylist(), found.side_n.tolist(), strict=True):
            sides.setdefault(value, set()).add(side)
        assert all(len(of_value) == 1 for value, of_value in sides.items() if value)


def test_reals_of_which_the_reference_holds_a_copy_are_left_out(tmp_path: Path) -> None:
    """A generator's copy stays: that is its own doing."""
    twin = [None] * 100
    twin[0], twin[50] = "near_copy", "copy"  # of the gan, of the vae
    twin[70], twin[71], twin[72] = "near_copy", "copy", "left_out"
    found = select_examples(str(make_run(tmp_path / "run", rows_of(SOURCES, twin=twin))), "rgb", ALL)
    left = set(found.table["image_id"].to_pylist())
    assert {f"real/{n:04d}.png" for n in range(30)} - left == {"real/0000.png", "real/0001.png"}
    assert found.left_out == {"real near copies of the reference": 2} and len(left) == 98


def test_the_manifests_own_split_is_used(tmp_path: Path) -> None:
    split = [("train", "validation", "test")[n % 3] for n in range(100)]
    rows = rows_of(SOURCES, split=split)
    found = select_examples(str(make_run(tmp_path / "own", rows)), "rgb", Choice(labels={}, seed=5))
    assert [SIDES[side] for side in found.side_n] == found.table["split"].to_pylist()
    for other in ("query", None):  # not of every image, or no such side: a new one
        partly = rows_of(SOURCES, split=[other, *split[1:]])
        found = select_examples(str(make_run(tmp_path / f"{other}", partly)), "rgb", ALL)
        assert [SIDES[side] for side in found.side_n] != found.table["split"].to_pylist()


def test_a_group_that_the_manifests_own_split_cuts_is_refused(tmp_path: Path) -> None:
    """Learnt on one side, it would be asked for on the other."""
    split = [("train", "validation", "test")[n % 3] for n in range(100)]
    groups = [f"g{n % 3}" for n in range(100)]
    whole = rows_of(SOURCES, split=split, latent_group=groups)
    assert len(select_examples(str(make_run(tmp_path / "whole", whole)), "rgb", ALL).label_n) == 100
    cut = rows_of(SOURCES, split=split, latent_group=["g1", *groups[1:]])
    run = str(make_run(tmp_path / "cut", cut))
    with pytest.raises(ConfigError, match=r"images of latent_group 'g1' on (train|validation) and (train|validation)"):
        select_examples(run, "rgb", ALL)
    tested = select_examples(run, "rgb", replace(ALL, is_test=True))
    assert len(tested.label_n) == 100, "nothing is learnt of it"


def test_pixels_on_two_sides_of_the_manifests_own_split_stay_on_the_last(tmp_path: Path) -> None:
    split = [("train", "validation", "test")[n % 3] for n in range(100)]
    pixels = [f"own{n}" for n in range(100)]
    pixels[0] = pixels[3] = pixels[5]  # two to train on, one to test on
    pixels[6] = pixels[7]  # to train on, to choose by
    pixels[9] = pixels[12]  # both to train on
    found = select_examples(
        str(make_run(tmp_path / "run", rows_of(SOURCES, split=split, content_hash=pixels))), "rgb", ALL
    )
    assert found.left_out == {"identical images on two sides of the manifest's own split": 3}
    sides: dict[str, set[int]] = {}
    for value, side in zip(found.table["content_hash"].to_pylist(), found.side_n.tolist(), strict=True):
        sides.setdefault(value, set()).add(side)
    assert all(len(of_pixels) == 1 for of_pixels in sides.values()) and sides["own5"] == {TEST}
    assert len(found.label_n) == 97


def test_images_without_a_side_that_are_left_out_switch_no_check_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The split counted as none while leaks were sought, and as the manifest's own when they were gone."""
    split: list[str | None] = [("train", "validation", "test")[n % 3] for n in range(100)]
    pixels = [f"own{n}" for n in range(103)]
    pixels[0] = pixels[5]
    more = {**SOURCES, "zz": 3}
    few = replace(ALL, min_images=5)

    def chosen(name: str, **columns: Any) -> Examples:
        rows = rows_of(more, split=[*split, None, None, None], **columns)
        return select_examples(str(make_run(tmp_path / name, rows)), "rgb", few)

    with pytest.raises(ConfigError, match="identical images on two sides, and images without a side"):
        chosen("leaked", content_hash=pixels)
    with pytest.raises(ConfigError, match="images of latent_group 'g'"):
        chosen("cut", latent_group=["g", "g", *(f"{n}" for n in range(101))])
    assert [SIDES[side] for side in chosen("whole").side_n] == split
    assert "split_not_used" not in capsys.readouterr().err
    rows = rows_of(SOURCES, split=["val" if side == "validation" else side for side in split])
    select_examples(str(make_run(tmp_path / "val", rows)), "rgb", ALL)
    assert "split_not_used" in capsys.readouterr().err


def test_other_pixels_under_the_old_names_are_other_examples(tmp_path: Path) -> None:
    """A generator's folder is sampled again: no training of before goes on, and no result of before is shown."""
    rows = rows_of(SOURCES)
    changed = rows.set_column(
        rows.column_names.index("content_hash"), "content_hash", pa.array([f"new{n}" for n in range(100)])
    )
    one, again, other = (
        select_examples(str(make_run(tmp_path / name, of_run)), "rgb", ALL)
        for name, of_run in (("one", rows), ("again", rows), ("other", changed))
    )
    assert one.digest == again.digest != other.digest
    assert replace(one, dtype="float32").digest != one.digest != replace(one, projection="approximate").digest


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (["train"] * 100, r"gan has no image to choose by \(validation\)"),
        ([("train", "test")[n % 2] for n in range(100)], r"gan has no image to choose by"),
        (
            [("train", "validation", "test" if n < 70 else "train")[n % 3] for n in range(100)],
            "real has no image to test on",
        ),
    ],
)
def test_a_split_that_lacks_a_side_is_told_before_training(tmp_path: Path, split: list[str], message: str) -> None:
    run = str(make_run(tmp_path / "run", rows_of(SOURCES, split=split)))
    with pytest.raises(ConfigError, match=message):
        select_examples(run, "rgb", ALL)
    tested = select_examples(run, "rgb", replace(ALL, is_test=True))
    assert (tested.side_n == TEST).all(), "to test on, all images are"


def test_one_label_is_enough_to_test_on(tmp_path: Path) -> None:
    run = str(make_run(tmp_path / "run", rows_of({"gan": 2})))
    found = select_examples(run, "rgb", replace(ALL, is_test=True))
    assert (found.labels, found.side_n.tolist()) == (("gan",), [TEST, TEST])


# --- what can't be ---


def test_one_label_only(run: str) -> None:
    with pytest.raises(ConfigError, match=r"images of 1 label\(s\) \(gan\): an attributor needs two or more"):
        select_examples(run, "rgb", Choice(labels={"real": None, "vae": None}))
    with pytest.raises(ConfigError, match=r"images of 0 label\(s\) \(none\)"):
        select_examples(run, "rgb", Choice(labels=dict.fromkeys(SOURCES)))


def test_a_label_of_one_image(tmp_path: Path) -> None:
    run = str(make_run(tmp_path / "run", rows_of({"gan": 20, "vae": 1, "real": 20})))
    with pytest.raises(ConfigError, match=r"source 'vae' has 1 image\(s\).*too few"):
        select_examples(run, "rgb", ALL)
    assert len(select_examples(run, "rgb", Choice(labels={}, min_images=3)).labels) == 2


def test_no_run_and_no_space(run: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no run at"):
        select_examples(str(tmp_path / "none"), "rgb", ALL)
    with pytest.raises(ConfigError, match="has no space 'frequency'; it has rgb"):
        select_examples(run, "frequency", ALL)


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows_of(SOURCES), shards=5)
    with pytest.raises(ConfigError, match="has 5 of 7 shards"):
        select_examples(str(run), "rgb", ALL)
    whole = make_run(tmp_path / "whole", rows_of(SOURCES))
    (whole / "_SUCCESS").unlink()  # as where too many images were rejected
    with pytest.raises(ConfigError, match="was not ended"):
        select_examples(str(whole), "rgb", ALL)


def test_a_column_that_was_not_kept(run: str) -> None:
    with pytest.raises(ConfigError, match="no column 'latent': index the images again with --keep-columns latent"):
        select_examples(run, "rgb", Choice(labels={}, group_column="latent"))
    with pytest.raises(ConfigError, match="too few"):  # each source is one group
        select_examples(run, "rgb", Choice(labels={}, group_column="source"))


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    rows = rows_of(SOURCES)
    both = make_run(tmp_path / "both", rows, spaces=("rgb", "frequency"))
    shutil.copy(both / "artifacts/frequency/part-00001.parquet", both / "artifacts/rgb/part-00001.parquet")
    with pytest.raises(ConfigError, match="is of space 'frequency', not 'rgb': shards of two spaces are mixed"):
        select_examples(str(both), "rgb", ALL)
    other = make_run(tmp_path / "other", rows, reference_digest="s" * 64)
    mixed = make_run(tmp_path / "mixed", rows)
    shutil.copy(other / "artifacts/rgb/part-00002.parquet", mixed / "artifacts/rgb/part-00002.parquet")
    with pytest.raises(ConfigError, match="projected onto another reference"):
        select_examples(str(mixed), "rgb", ALL)
    rewritten(mixed / "artifacts/rgb/part-00002.parquet", metadata={"reference_digest": "r" * 64})
    with pytest.raises(ConfigError, match="of another run than its folder's"):
        select_examples(str(mixed), "rgb", ALL)
    shapes = make_run(tmp_path / "shapes", rows)
    rewritten(shapes / "artifacts/rgb/part-00003.parquet", metadata={"shape": "[3, 2, 2]"})
    with pytest.raises(ConfigError, match="artifacts of 2 shapes"):
        select_examples(str(shapes), "rgb", ALL)


@pytest.mark.parametrize("text", ["- gan", "gan: 3", "3: gan", "{", "gan: [a]"])
def test_a_label_map_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.yaml").write_text(text)
    with pytest.raises(ConfigError, match="--labels"):
        read_labels(str(tmp_path / "labels.yaml"))


def test_a_label_map(tmp_path: Path) -> None:
    (tmp_path / "labels.yaml").write_text("gan: made\nreal: null\n")
    assert read_labels(str(tmp_path / "labels.yaml")) == {"gan": "made", "real": None}
    (tmp_path / "labels.yaml").write_text("")
    assert read_labels(str(tmp_path / "labels.yaml")) == read_labels(None) == {}
    with pytest.raises(ConfigError, match="Can't read --labels"):
        read_labels(str(tmp_path / "none.yaml"))


# --- the bundle ---


def metrics_of(labels: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    each: list[Any] = [0.5] * len(labels)
    measured = {"accuracy": 0.5, "balanced_accuracy": 0.5, "calibration_error": 0.1, "fd_ratio": 2.0}
    measured |= {"calibration_error_by_chance": 0.02}
    of_labels = {"test_images": [4] * len(labels), "precision": each, "recall": each, "labels": list(labels)}
    return measured | of_labels | {"trained": True, "epochs": 2, "training_s": 3.0, "images_per_s": 9.0} | changes


LABELS = ("gan", "real", "vae")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = make_network("head", SHAPE, 3)
    network.standardize(torch.randn(SHAPE), torch.rand(SHAPE) + 0.5)
    config = {
        "space": {"name": "rgb"}, "estimate": {"name": "nearest"}, "reference_digest": "r" * 64, "shape": list(SHAPE),
        "network": "head", "seed": 0,
    }  # fmt: skip
    metrics = metrics_of(LABELS)
    openset, unknown = openset_of(3, temperature=2.0), {"rate": 0.05, "measured_rate": 0.04}
    card = model_card(LABELS, config, metrics, unknown | openset.chosen())
    save_bundle(str(tmp_path / "b"), network.state_dict(), LABELS, config, {"unknown": unknown}, openset, metrics, card)
    return tmp_path / "b"


def test_a_bundle_predicts_what_its_network_says(bundle: Path) -> None:
    torch.manual_seed(0)
    network = make_network("head", SHAPE, 3)
    network.standardize(torch.randn(SHAPE), torch.rand(SHAPE) + 0.5)
    artifacts = np.random.default_rng(0).standard_normal((300, *SHAPE)).astype(np.float16)
    with torch.inference_mode():
        logits = network.eval()(torch.from_numpy(artifacts).float())
    found = Attributor.load(str(bundle)).predict(artifacts)
    np.testing.assert_allclose(found.probability_bs, torch.softmax(logits / 2.0, 1), atol=1e-5)
    assert found.source == tuple(LABELS[n] for n in logits.argmax(1))
    assert Attributor.load(str(bundle)).predict(artifacts[:1]).source == found.source[:1]


def test_verdicts_are_what_score_and_threshold_say(bundle: Path) -> None:
    attributor = Attributor.load(str(bundle))
    artifacts = np.random.default_rng(1).standard_normal((300, *SHAPE)).astype(np.float16)
    found, features_bf = attributor.verdicts(artifacts), attributor.features(artifacts)
    predicted = attributor.predict(artifacts)
    assert found.label == predicted.source and found.probability_bs.dtype == np.float32
    np.testing.assert_array_equal(found.probability_bs, predicted.probability_bs)
    apart_bsf = features_bf[:, None] - openset_of(3).statistics.mean_sf
    np.testing.assert_allclose(found.unknown_score_b, np.square(apart_bsf).sum(axis=2).min(axis=1), rtol=1e-4)
    assert found.unknown_score_b.dtype == np.float32 and found.is_unknown_b.dtype == np.bool_
    assert not found.is_unknown_b.any(), "nothing is over 1e9"
    calibration = json.loads((bundle / "calibration.json").read_text())
    calibration["unknown"]["threshold"] = float(np.median(found.unknown_score_b))
    (bundle / "calibration.json").write_text(json.dumps(calibration))
    resealed(bundle)
    stricter = Attributor.load(str(bundle))
    is_over_b = found.unknown_score_b > np.median(found.unknown_score_b)
    np.testing.assert_array_equal(stricter.verdicts(artifacts).is_unknown_b, is_over_b)
    assert is_over_b.sum() == 150 and attributor.digest != stricter.digest == Attributor.load(str(bundle)).digest


def test_no_artifacts_have_no_sources(bundle: Path) -> None:
    found = Attributor.load(f"file://{bundle}").predict(np.empty((0, *SHAPE), np.float16))
    assert found.source == () and found.probability_bs.shape == (0, 3)
    none = Attributor.load(str(bundle)).verdicts(np.empty((0, *SHAPE), np.float16))
    assert (
        none.label == ()
        and none.feature_ba.shape == (0, 33)
        and none.spectrum_bk.shape[0] == 0
        and none.unknown_score_b.shape == (0,)
    )


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 48), SHAPE, (2, 1, *SHAPE)])
def test_artifacts_of_another_shape_are_refused(bundle: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"takes artifacts of shape \[3, 4, 4\], not"):
        Attributor.load(str(bundle)).predict(np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_artifacts_that_are_no_numbers_are_refused(bundle: Path, value: float) -> None:
    artifacts = np.zeros((5, *SHAPE), np.float16)
    artifacts[3, 1, 2, 0] = value
    with pytest.raises(ConfigError, match="not finite"):
        Attributor.load(str(bundle)).predict(artifacts)


def test_a_bundle_of_an_earlier_version_is_trained_again_by_the_same_command(bundle: Path, tmp_path: Path) -> None:
    assert is_finished(str(bundle)) and not is_finished(str(tmp_path / "none"))
    edited(lambda config: config | {"format": 2})(bundle / "config.json")
    assert not is_finished(str(bundle))


@pytest.mark.parametrize(
    "name", ["labels.json", "calibration.json", "metrics.json", "model.safetensors", "openset.safetensors"]
)
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_bundle_of_which_a_file_is_another_is_refused_and_made_anew_by_the_same_command(
    bundle: Path, name: str, damage: Callable[[Path], object]
) -> None:
    """As a copy is that was cut off, or made over an older bundle."""
    assert Attributor.load(str(bundle)).labels == LABELS
    damage(bundle / name)
    with pytest.raises(ConfigError, match=rf"is damaged \({re.escape(name)} is .*train it again, by the same command"):
        Attributor.load(str(bundle))
    assert not is_finished(str(bundle))


def test_labels_that_it_does_not_know_are_refused(bundle: Path) -> None:
    attributor = Attributor.load(str(bundle))
    assert attributor.label_numbers(["vae", "gan"]).tolist() == [2, 0]
    assert attributor.label_numbers([]).tolist() == []
    with pytest.raises(ConfigError, match="does not know dalle; it knows gan, real, vae"):
        attributor.label_numbers(["gan", "dalle"])
    with pytest.raises(ConfigError, match="does not know a, b, c and others"):
        attributor.label_numbers(["d", "c", "b", "a"])


def edited(change: Callable[[Any], Any]) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(change(json.loads(path.read_text()))))


def unknown_as(**changes: Any) -> Callable[[Path], object]:
    return edited(lambda found: found | {"unknown": found["unknown"] | changes})


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", Path.unlink, "There is no finished attributor"),
        *((name, lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged")
          for name in ("config.json", "labels.json", "calibration.json")),
        *((name, lambda path: path.write_bytes(path.read_bytes()[:-9]), "safetensors|is damaged")
          for name in ("model.safetensors", "openset.safetensors")),
        ("labels.json", edited(lambda labels: labels[:2]), "is damaged"),
        ("labels.json", edited(lambda labels: {"a": 1}), "is damaged"),
        ("calibration.json", edited(lambda found: {}), "is damaged"),
        ("calibration.json", edited(lambda found: {"temperature": None}), "is damaged"),
        ("calibration.json", edited(lambda found: found | {"unknown": {"score": "x", "threshold": 1}}), "is damaged"),
        ("calibration.json", edited(lambda found: found | {"unknown": {"score": "energy"}}), "is damaged"),
        ("calibration.json", unknown_as(score=None), "is damaged"),
        ("calibration.json", unknown_as(usual=3), "is damaged"),
        ("calibration.json", unknown_as(score="energy+spectrum", usual={"energy": [0, 1]}), "is damaged"),
        ("calibration.json", unknown_as(usual={"energy": [0, 1], "spectrum": [0, 0]}), "usual"),
        ("config.json", edited(lambda config: config | {"format": 1}), "has format 1; this version reads 4: train it"),
        ("config.json", edited(lambda config: {"format": 1}), "has format 1"),
        ("config.json", edited(lambda config: config | {"shape": [3, 5, 5]}), "is damaged"),
        ("config.json", edited(lambda config: [1]), "is damaged"),
        ("config.json", edited(lambda config: {"format": 4}), "files is missing"),
        ("config.json", edited(lambda config: config | {"files": {"../x": "0"}}), "files of other folders"),
        ("config.json", edited(lambda config: config | {"files": {}}), "names no model.safetensors"),
        ("config.json", edited(lambda config: {k: v for k, v in config.items() if k != "network"}), "is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_bundle_is_refused_in_a_sentence(
    bundle: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(bundle / name)
    if name != "config.json":
        resealed(bundle)
    with pytest.raises(ConfigError, match=message) as caught:
        Attributor.load(str(bundle))
    assert "\n" not in str(caught.value)


def test_the_model_card_tells_how_to_load_it(bundle: Path) -> None:
    card = (bundle / "README.md").read_text()
    assert "| gan | 4 | 50.0 % | 50.0 % |" in card and "FD ratio 2.00" in card
    (line,) = [line for line in card.splitlines() if line.startswith("from ")]
    exec(line)


def test_a_label_is_text_in_a_model_card() -> None:
    assert cell("a|b\n# c <img src=x> ![t](u) `d` *e*") == "a\\|b?# c \\<img src=x> !\\[t](u) \\`d\\` \\*e\\*"
    assert cell("style_gan-2 (ema)") == "style_gan-2 (ema)"


def test_what_could_not_be_measured_is_a_dash_or_left_out() -> None:
    """Nothing was said to be of a source; or it has too few test images for an FD ratio."""
    metrics = metrics_of(LABELS, fd_ratio=None, precision=[None, 0.5, 0.5])
    assert "FD ratio" not in say_attributor(metrics, "out")
    config = {
        "space": {"name": "rgb"},
        "estimate": {"name": "nearest"},
        "network": "head",
        "seed": 0,
        "reference_digest": "r",
    }
    unknown = {"score": "energy", "threshold": None, "rate": 0.05}
    card = model_card(LABELS, config, metrics, unknown)
    assert "| gan | 4 | - | 50.0 % |" in card and "No image is called unknown: there were too few" in card
    assert "Trained for 2 epochs" in say_attributor(metrics, "out")
    assert "Was trained before" in say_attributor(metrics | {"trained": False}, "out")


# --- a worker, without Ray ---


class Alone(LoneWorker):
    """Of the other workers it hears nothing but that they hold as much as it does."""

    def __init__(
        self,
        run: str,
        examples: Examples,
        folder: Path,
        others_keep: bool = True,
        reversed: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(folder, **settings)
        self._run, self._examples, self._others_keep, self._reversed = run, examples, others_keep, reversed

    def columns(self) -> dict[str, np.ndarray]:
        reader, parts = ArtifactReader(self._run, "rgb"), self._examples.parts(TRAIN)
        blocks = [(to_numpy(reader.read(p.shard, p.place_n)["artifact"]), p.label_n, p.row_n) for p in parts]
        found = zip(*(blocks[::-1] if self._reversed else blocks), strict=True)
        return {name: np.concatenate(values) for name, values in zip(("artifact", "label", "row"), found, strict=True)}

    def summed(self, sums: np.ndarray) -> np.ndarray:
        return sums * self.count if sums.shape != (1,) or self._others_keep else sums


def job_of(run: str, examples: Examples, output: Path) -> Job:
    train_n = examples.label_n[examples.side_n == TRAIN]
    return Job(
        output=str(output), run=run, space="rgb", shape=examples.shape, labels=examples.labels, train_rows=len(train_n),
        validation=examples.parts(VALIDATION), test=examples.parts(TEST), network="head",
        recipe=Recipe(epochs=3, batch_size=16, weight_decay=0.1), weight_s=class_weights(train_n, 3), weights=None,
        seed=1,
    )  # fmt: skip


def worked(run: str, output: Path, **settings: Any) -> tuple[bytes, Alone]:
    """The network of a training by one worker, as a file."""
    examples = select_examples(run, "rgb", ALL)
    worker = Alone(run, examples, output.parent / f"{output.name}-checkpoint", **settings)
    train(cast(Worker, worker), job_of(run, examples, output))
    return (output / "network.safetensors").read_bytes(), worker


def test_a_worker_that_died_goes_on_to_the_same_bits(run: str, tmp_path: Path) -> None:
    """With dropout, in a network of which a checkpoint holds everything."""
    whole, _ = worked(run, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        worked(run, tmp_path / "killed", stop_after=2)
    torch.randn(99)
    resumed, _ = worked(run, tmp_path / "killed")
    assert resumed == whole
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    of_run = [[json.loads(line) for line in of] for of in lines]
    assert [line["epoch"] for line in of_run[1]] == [1, 2, 3]
    assert [line["loss"] for line in of_run[0]] == [line["loss"] for line in of_run[1]]


def test_the_order_in_which_shards_arrive_changes_nothing(run: str, tmp_path: Path) -> None:
    one, worker = worked(run, tmp_path / "one")
    assert worker.streamed == 1, "what fits in memory is read once"
    assert one == worked(run, tmp_path / "other", reversed=True)[0]


def test_all_workers_keep_their_rows_or_none_does(run: str, tmp_path: Path) -> None:
    """One that asks for the stream again waits for all others to ask; one that kept its rows never would."""
    _, worker = worked(run, tmp_path / "mixed", count=2, others_keep=False)
    assert worker.streamed == 1 + 3 + 1, "for mean and deviation, once an epoch, and for what features look like"
    assert worked(run, tmp_path / "kept", count=2)[1].streamed == 1


def test_every_image_of_a_side_is_predicted_once(run: str, tmp_path: Path) -> None:
    """Also where an earlier attempt had more workers."""
    examples, output = select_examples(run, "rgb", ALL), tmp_path / "many"
    for count in (3, 1, 8):
        for rank in range(count):
            worked(run, output, rank=rank, count=count)
        for side, number in (("validation", VALIDATION), ("test", TEST)):
            found = finish_module._said(str(output), side, count)
            assert found.row_b.tolist() == np.flatnonzero(examples.side_n == number).tolist()
            assert (found.label_b == examples.label_n[found.row_b]).all()


def test_a_training_ends_in_a_bundle_that_tells_what_is_unknown(tmp_path: Path) -> None:
    """Its verdicts are those of the file of held-out images, and of the rates that it states."""
    latents = [f"l{n // 4}" if n < 200 else "" for n in range(520)]  # the GAN's, at four steps each
    rows = rows_of(
        {"gan": 200, "vae": 160, "real": 160}, distance=np.arange(520, dtype=np.float32), latent_group=latents
    )
    run, output = str(make_run(tmp_path / "run", rows)), tmp_path / "out"
    worked(run, output)
    examples = select_examples(run, "rgb", ALL)
    facts = {"space": {"name": "rgb"}, "estimate": {"name": "nearest"}, "reference_digest": "r", "shape": list(SHAPE),
             "network": "head", "seed": 0, "false_alarms": 0.1}  # fmt: skip
    finish_module.finish(str(output), examples, facts, 1)
    attributor, calibration = Attributor.load(str(output)), json.loads((output / "calibration.json").read_text())
    table, unknown = pq.read_table(output / "baseline.parquet"), calibration["unknown"]
    assert set(table["image_id"].to_pylist()) == ids(examples, VALIDATION) | ids(examples, TEST), "none that it learnt"
    row_n = [examples.table["image_id"].to_pylist().index(name) for name in table["image_id"].to_pylist()]
    taken = examples.table.take(pa.array(row_n))
    said = attributor.verdicts(artifacts_of(taken))
    assert [SIDES[examples.side_n[n]] for n in row_n] == table["side"].to_pylist()
    assert table["label"].to_pylist() == taken["source"].to_pylist()
    assert table["group"].to_pylist() == [group or None for group in taken["latent_group"].to_pylist()]
    assert table["distance"].to_pylist() == taken["distance"].to_pylist()
    assert tuple(table["predicted"].to_pylist()) == said.label
    # The threshold is some image's own score, and another batch rounds it otherwise.
    apart_b = np.abs(said.unknown_score_b - attributor.openset.threshold) > 1e-4
    np.testing.assert_array_equal(
        table["is_unknown"].to_numpy(zero_copy_only=False)[apart_b], said.is_unknown_b[apart_b]
    )
    assert apart_b.sum() >= len(apart_b) - 1
    np.testing.assert_allclose(table["unknown_score"].to_numpy(), said.unknown_score_b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_numpy(table["feature"]), said.feature_ba, rtol=2e-3, atol=2e-3)
    assert to_numpy(table["feature"]).dtype == np.float16 and said.feature_ba.shape == (len(table), 33)

    areas = {name: area for name, area in unknown["validation_auroc"].items() if name != "spectrum"}
    assert unknown["score"] == max(areas, key=areas.get) + "+spectrum"
    is_test_n = np.array(table["side"].to_pylist()) == "test"
    for label, rate in unknown["measured_rate_by_label"].items():
        of_label_n = is_test_n & (np.array(table["label"].to_pylist()) == label)
        assert rate == pytest.approx(said.is_unknown_b[of_label_n].mean())
    assert unknown["measured_rate"] == pytest.approx(np.mean(list(unknown["measured_rate_by_label"].values())))
    assert unknown["rate"] == 0.1 and 0 < unknown["measured_rate"] < 0.25
    assert sum(calibration["reliability"]["after"]["images"]) == is_test_n.sum()
    assert (output / "calibration.png").read_bytes().startswith(b"\x89PNG")
    far = attributor.verdicts(np.full((1, *SHAPE), 300.0))
    near = attributor.verdicts(np.zeros((1, *SHAPE)))
    assert far.is_unknown_b[0] and far.unknown_score_b[0] > near.unknown_score_b[0]
    seen = pq.read_table(output / "seen.parquet")["content_hash"].to_pylist()
    assert seen == examples.table.filter(pa.array(examples.side_n != TEST))["content_hash"].to_pylist()


def test_a_label_that_no_worker_saw_makes_no_bundle(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remainder of the images goes to no worker; the bundle would be refused whenever it is loaded."""
    output, known = tmp_path / "out", FeatureStatistics.from_bytes
    worked(run, output)
    monkeypatch.setattr(FeatureStatistics, "from_bytes", lambda data: replace(
        known(data), count_s=known(data).count_s * [1, 0, 1]))  # fmt: skip
    with pytest.raises(ConfigError, match="None of the 1 workers saw an image of real.*--min-images"):
        finish_module.finish(str(output), select_examples(run, "rgb", ALL), {"false_alarms": 0.1, "seed": 0}, 1)
    assert not (output / "config.json").exists()


@pytest.mark.parametrize("side", [TRAIN, VALIDATION, TEST])
def test_a_number_that_is_none_ends_the_training_with_a_sentence(run: str, tmp_path: Path, side: int) -> None:
    examples = select_examples(run, "rgb", ALL)
    part = examples.parts(side)[0]
    path = Path(run) / f"artifacts/rgb/part-{part.shard:05d}.parquet"
    artifacts = to_numpy(pq.read_table(path)["artifact"]).copy()
    artifacts[part.place_n[0], 0, 0, 0] = np.nan
    rewritten(path, artifacts)
    with pytest.raises(ConfigError, match="not finite: compute them again"):
        worked(run, tmp_path / "nan")


def test_a_sentence_survives_ray_data() -> None:
    """Else a training would start again, 16 times, what can't succeed."""
    text = "ray::MapBatches(_read_part)()\nmanifpt.errors.ConfigError: a.png was changed.\n\nThe above exception was\n"
    assert told_in(RuntimeError(text)) == "a.png was changed."
    assert told_in(ConfigError("No.")) == told_in(PlanMismatch("No.")) == "No."
    assert told_in(RuntimeError("died")) is None


def test_another_training_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    facts = {"recipe": {"epochs": 3, "milestones": []}, "seed": 0}
    for _ in range(2):
        publish_facts(str(tmp_path / "training.json"), facts, "training")
    changed = facts | {"recipe": {"epochs": 4, "milestones": []}}
    with pytest.raises(PlanMismatch, match="holds another training: recipe differs"):
        publish_facts(str(tmp_path / "training.json"), changed, "training")


def test_epochs_are_told_once_also_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_POLL_S", 0.02)
    told: list[int] = []

    def write(epochs: int) -> None:
        fields = {"loss": 1.0, "accuracy": 0.5, "validation_accuracy": 0.5, "images_per_s": 9.0, "seconds": 1.0}
        lines = [json.dumps({"epoch": n + 1, **fields}) + "\n" for n in range(epochs)]
        store_of(str(tmp_path)).write(str(tmp_path / "metrics.jsonl"), "".join(lines).encode())

    for before, after in ((0, 2), (2, 5), (5, 5)):  # as if killed between
        tell = train_module._tell(5, lambda epoch: told.append(epoch["epoch"]))
        with following.followed(str(tmp_path / "metrics.jsonl"), tell):
            for epochs in range(max(1, before - 1), after + 1):  # the last epoch is trained again
                write(epochs)
                time.sleep(0.05)
    assert told == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 31}, "31 workers can't share 60 training images, since each needs two: --workers 30 or fewer"),
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"network": "small", "space": "frequency"}, "has no space 'frequency'"),
        ({"min_images": 99}, "images of 0 label"),
    ],
)
def test_what_a_training_can_not_do_is_told_before_it_begins(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "cluster", lambda: (64.0, 0.0, 1))
    monkeypatch.setattr(distributed, "run_workers", lambda *arguments: pytest.fail("it began"))
    fields: dict[str, Any] = {
        "artifacts": run,
        "space": "rgb",
        "network": "head",
        "output": str(tmp_path / "t"),
        **changes,
    }
    with pytest.raises(ConfigError, match=message):
        train_module.train_attributor(TrainConfig(**fields))


def test_mlflow_gets_one_run_whatever_thread_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An active run is a thread's own there: without its id, metrics of another thread opened a second run."""
    active, logged = threading.local(), []

    class Run:
        info = SimpleNamespace(run_id="the-run")

    def start_run(run_name: str) -> Run:
        active.run = run_name
        return Run()

    def log_metrics(values: dict[str, float], step: int, run_id: str | None = None) -> None:
        logged.append((run_id or getattr(active, "run", "another run"), step, values))

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(start_run=start_run, log_metrics=log_metrics))
    track = make_tracker("mlflow", "runs/attributor")
    thread = threading.Thread(target=track, args=({"epoch": 1, "loss": 2},))
    thread.start()
    thread.join()
    assert logged == [("the-run", 1, {"loss": 2.0})]
