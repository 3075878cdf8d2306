"""What an analysis measures: overlap with the reals, structure of fingerprints, and which rows it looks at."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt.analysis.designs import Designs
from manifpt.analysis.overlap import Reals, overlap
from manifpt.analysis.sample import few, open_sample
from manifpt.analysis.structure import (
    alignments,
    arrangements,
    fingerprint_distances,
    images_for_pairs,
    principal,
    separability,
)
from manifpt.analysis.tasks import Work, _made_apart, _maps, _separability, measure
from manifpt.attributor.choice import Choice
from manifpt.errors import ConfigError
from manifpt.report.drawing import shown
from manifpt.report.fingerprints import _siblings
from tests.helpers.cluster import ROOT
from tests.helpers.runs import artifacts_of, make_run, rows_of

RNG = np.random.default_rng(0)
REALS = RNG.standard_normal((60, 8)).astype(np.float32)


def test_a_generator_that_copies_two_reals_has_precision_1_no_fingerprint_and_little_recall() -> None:
    copies = np.repeat(REALS[:2], 20, axis=0)
    distance_m = np.linalg.norm(copies[:, None] - REALS, axis=2).min(axis=1)
    found = overlap(Reals.of(REALS, 0), copies, distance_m)
    assert (found["precision"], found["mean_artifact_norm"]) == (1.0, 0.0)
    assert found["recall"] < 0.1
    assert found["wasserstein_bound"] == found["mean_reverse_norm"] > 0


def test_what_is_far_from_the_reals_is_far_by_every_measure() -> None:
    reals = Reals.of(REALS, 0)
    near, far = (RNG.standard_normal((50, 8)).astype(np.float32) + shift for shift in (0, 3))
    norms = [np.linalg.norm(rows[:, None] - REALS, axis=2).min(axis=1) for rows in (near, far)]
    one, other = overlap(reals, near, norms[0]), overlap(reals, far, norms[1])
    larger = ("energy_distance", "kid", "mmd_gaussian", "frechet_distance", "sliced_wasserstein", "wasserstein_bound")
    assert all(one[name] < other[name] for name in larger)
    assert all(one[name] > other[name] for name in ("precision", "density", "coverage"))


def test_the_bound_is_one_sided_where_the_distance_to_the_nearest_real_is_not_known() -> None:
    found = overlap(Reals.of(REALS, 0), REALS[:20], None)
    assert found["mean_artifact_norm"] is None
    assert found["wasserstein_bound"] == found["mean_reverse_norm"]


def test_fingerprints_of_generators_that_copy_have_distances() -> None:
    artifact_bd, label_b = fingerprints([[0, 0], [5, 0]])
    artifact_bd[label_b == 0] = 0
    copied = np.concatenate([artifact_bd, np.zeros((60, 2), np.float32)])
    label_b = np.concatenate([label_b, np.zeros(60, np.int64)])
    assert fingerprint_distances(copied, label_b, 2)["mmd_gaussian"][0, 1] > 0
    zeros = fingerprint_distances(np.zeros((20, 2), np.float32), np.repeat([0, 1], 10), 2)
    assert all((distance_ss == 0).all() for distance_ss in zeros.values())


@given(st.lists(st.integers(0, 3), min_size=1, max_size=7))
def test_arrangements_are_as_many_as_permutations_make(values: list[int]) -> None:
    divided = {
        tuple(sorted(tuple(np.flatnonzero(np.array(order) == v)) for v in set(order))) for order in permutations(values)
    }
    assert arrangements([values.count(value) for value in set(values)]) == len(divided)


def test_a_source_of_few_images_is_only_counted() -> None:
    assert overlap(Reals.of(REALS, 0), REALS[:5], np.zeros(5)) == {"images": 5}
    with pytest.raises(ConfigError, match="The reference has 5 images"):
        Reals.of(REALS[:5], 0)


def fingerprints(means: list[list[float]], images: int = 20) -> tuple[np.ndarray, np.ndarray]:
    label_b = np.repeat(np.arange(len(means)), images)
    noise = np.random.default_rng(1).standard_normal((len(label_b), len(means[0])))
    return (noise * 0.1 + np.array(means)[label_b]).astype(np.float32), label_b


LABELS = ("a", "b", "c", "d", "real")


def test_clusters_that_follow_a_choice_are_found_and_others_are_not() -> None:
    artifact_bd, label_b = fingerprints([[5, 0, 0], [5, 1, 0], [-5, 0, 0], [-5, 1, 0], [0, 0, 9]])
    distances = fingerprint_distances(artifact_bd, label_b, 5)
    for distance_ss in distances.values():
        assert distance_ss[0, 1] < distance_ss[0, 2]
        np.testing.assert_array_equal(distance_ss, distance_ss.T)
    values = {"a": "xxp1", "b": "xxq2", "c": "yxp3", "d": "yxq4", "e": "yzq5"}
    value = {label: dict(zip(("up", "one", "norm", "own"), word, strict=True)) for label, word in values.items()}
    designs = Designs(("up", "norm", "one", "own"), value, {})
    found = alignments(distances["energy_distance"], principal(artifact_bd, 0), label_b, LABELS, designs, 0)
    assert found["up"]["generators"] == 4, "reals have no design"
    assert found["up"]["images"]["at_values"]["nmi"]["value"] == pytest.approx(1)
    assert found["up"]["tree"]["at_values"]["nmi"]["value"] == pytest.approx(1)
    assert found["norm"]["images"]["at_values"]["nmi"]["value"] == pytest.approx(0)
    assert found["one"]["why_not"] == "all share one value"
    assert found["own"]["why_not"] == "each generator has a value of its own"


def test_a_choice_known_of_few_generators_is_not_judged() -> None:
    artifact_bd, label_b = fingerprints([[5, 0], [0, 5], [-5, 0], [0, -5]])
    designs = Designs(("up",), {"a": {"up": "x"}, "b": {"up": "y"}, "c": {"up": "y"}, "d": {"up": None}}, {})
    distance_ss = fingerprint_distances(artifact_bd, label_b, 4)["energy_distance"]
    found = alignments(distance_ss, artifact_bd, label_b, LABELS[:4], designs, 0)
    assert found["up"]["why_not"] == "known of 3 generators, 4 are needed"


def test_a_large_label_is_looked_at_evenly() -> None:
    """Its first images are of one folder, and would be farther from a smaller label than they all are."""
    rng = np.random.default_rng(0)
    folders = 3 * rng.standard_normal((10, 8))
    large = np.concatenate([one + rng.standard_normal((100, 8)) for one in folders])
    small = np.concatenate([one + rng.standard_normal((10, 8)) for one in folders])
    label_b = np.repeat([0, 1, 2], [1000, 100, 1000])
    same = np.concatenate([one + rng.standard_normal((100, 8)) for one in folders])
    found = fingerprint_distances(np.concatenate([large, small, same]).astype(np.float32), label_b, 3)
    frechet_ss = found["frechet_distance"]
    assert frechet_ss[0, 1] < 3 * frechet_ss[0, 2]


def test_images_that_were_made_together_are_no_others(tmp_path: Path) -> None:
    """Two sources alike, of 20 latents with 6 images each: the nearest other image is of the same latent."""
    latents = [f"{n // 6}" for n in range(240)]

    def artifacts(rows: pa.Table) -> np.ndarray:
        rng = np.random.default_rng(0)
        of_latent = {(s, g): rng.standard_normal(48) for s in ("gan", "vae") for g in latents}
        pairs = zip(rows["source"].to_pylist(), rows["latent_group"].to_pylist(), strict=True)
        found = [of_latent[pair] + 0.01 * rng.standard_normal(48) for pair in pairs]
        return np.reshape(found, (-1, 3, 4, 4)).astype(np.float16)

    rows = rows_of({"gan": 120, "vae": 120}, latent_group=latents)
    run = make_run(tmp_path / "run", rows, shard_rows=300, artifacts=artifacts)
    sample = open_sample(str(run), "rgb", Choice(labels={}, is_test=True))
    assert separability(sample.artifact_bd, sample.label_b, 0)["leave_one_out_accuracy"] == 1
    apart = _separability(sample, 0)
    assert apart is not None and apart["images"] == 40 and (apart["leave_one_out_accuracy"] or 1) < 0.8
    latents[:120] = ["one"] * 120
    rows = rows_of({"gan": 120, "vae": 120, "real": 30}, latent_group=[*latents, *[""] * 30])
    sample = open_sample(str(make_run(tmp_path / "one", rows)), "rgb", Choice(labels={}, is_test=True))
    apart = _separability(sample, 0)
    assert apart is not None and apart["left_out"] == ["gan"] and apart["images"] == 20 + 30
    found = {"made_apart": _made_apart(sample), "images": {"gan": 120, "real": 30, "vae": 120}}
    assert found["made_apart"] == {"gan": 1, "real": 30, "vae": 20}
    (told,) = _siblings(found)
    assert "Groups of images: gan (1 of 120), vae (20 of 120)." in told
    assert _siblings({"made_apart": {"a": 3}, "images": {"a": 3}}) == []


def test_equal_artifacts_are_no_map(tmp_path: Path) -> None:
    """Principal components of them are rounding."""
    same = np.full((1, 3, 4, 4), 0.3, np.float16)
    rows = rows_of({"gan": 20, "vae": 20})
    run = make_run(tmp_path / "run", rows, artifacts=lambda rows: same.repeat(len(rows), axis=0))
    sample = open_sample(str(run), "rgb", Choice(labels={}, is_test=True))
    work = SimpleNamespace(seed=0)
    assert _maps(sample, work, None)[0] == {"maps": []}  # type: ignore[arg-type]


def test_names_that_are_cut_stay_apart() -> None:
    names = shown([f"stylegan2-ffhq256-config-f-psi{n}" for n in (5, 7)] + ["real$"], 20)
    assert len(set(names)) == 3 and names[0].endswith("#1") and names[2] == r"real\$"


def test_separable_fingerprints_are_called_so() -> None:
    apart = separability(*fingerprints([[5.0, 0.0], [-5.0, 0.0]]), seed=0)
    mixed = separability(*fingerprints([[0.0, 0.0], [0.0, 0.0]]), seed=0)
    assert apart["leave_one_out_accuracy"] == 1
    assert abs((mixed["leave_one_out_accuracy"] or 0) - 0.5) < 0.25
    assert (apart["silhouette"] or 0) > 0.9 > 0.1 > (mixed["silhouette"] or 0)


@given(st.integers(1, 30), st.integers(1, 200_000))
def test_pairs_are_few_enough_to_be_looked_at(labels: int, dims: int) -> None:
    images = images_for_pairs(labels, dims)
    assert images == 16 or (images * labels) ** 2 * dims <= 4e11


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 20))
def test_few_rows_are_as_many_as_asked_for_and_do_not_depend_on_their_order(labels: list[int], most: int) -> None:
    label_b, ids = np.array(labels), [f"{n:03d}" for n in range(len(labels))]
    kept = few(label_b, ids, most)
    for label in set(labels):
        assert (label_b[kept] == label).sum() == min(most, labels.count(label))
    assert len(set(kept.tolist())) == len(kept)
    turned = few(label_b[::-1], ids[::-1], most)
    assert {ids[row] for row in kept} == {ids[::-1][row] for row in turned}


def test_a_sample_has_its_rows_in_order_whatever_shards_they_lie_in(tmp_path: Path) -> None:
    rows = rows_of({"gan": 20, "vae": 13})
    one, other = (make_run(tmp_path / name, rows, shard_rows=size) for name, size in (("one", 5), ("other", 33)))
    samples = [open_sample(str(run), "rgb", Choice(labels={}, is_test=True)) for run in (one, other)]
    assert samples[0].image_ids == samples[1].image_ids
    np.testing.assert_array_equal(samples[0].artifact_bd, samples[1].artifact_bd)
    by_id = dict(zip(rows["image_id"].to_pylist(), artifacts_of(rows), strict=True))
    for image_id, artifact_d in zip(samples[0].image_ids, samples[0].artifact_bd, strict=True):
        np.testing.assert_array_equal(artifact_d, by_id[image_id].reshape(-1))


def test_a_label_of_one_image_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows_of({"gan": 8, "vae": 1}))
    work = Work(run=str(run), space="rgb", stage="structure", choice=Choice(labels={}), group_column=None, designs=None,
                attributor=None, seed=0)  # fmt: skip
    with pytest.raises(ConfigError, match="vae has one image, and a fingerprint needs two: --min-images 2"):
        measure(work)


def test_rows_are_read_only_where_they_are_looked_at(tmp_path: Path) -> None:
    sample = open_sample(str(make_run(tmp_path / "run", rows_of({"gan": 20, "vae": 13}))), "rgb", Choice(labels={}))
    some = sample.at_most(4)
    assert np.bincount(some.label_b).tolist() == [4, 4]
    for image_id, artifact_d in zip(some.image_ids, some.artifact_bd, strict=True):
        np.testing.assert_array_equal(artifact_d, sample.artifact_bd[sample.image_ids.index(image_id)])


PEAK = """
import os, sys
from manifpt.analysis.sample import open_sample
from manifpt.attributor.choice import Choice
from tests.helpers.memory import peak_rss_bytes
assert open_sample(sys.argv[1], "rgb", Choice(labels={}, is_test=True)).artifact_bd.shape == (2000, 3072)
print(peak_rss_bytes(os.getpid()))
"""


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    """Eight times as many shards, 103 MB of artifacts more, of which no more are looked at."""

    def artifacts(rows: pa.Table) -> np.ndarray:
        return np.random.default_rng(0).standard_normal((len(rows), 3, 32, 32)).astype(np.float16)

    peaks_bytes = []
    for images in (1200, 9600):
        rows = rows_of({"gan": images, "vae": images})
        run = make_run(tmp_path / str(images), rows, shard_rows=600, artifacts=artifacts)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(run)], capture_output=True, text=True, cwd=ROOT, check=True
        )
        peaks_bytes.append(int(done.stdout.split()[-1]))
    assert peaks_bytes[1] < peaks_bytes[0] + 60e6
