"""Newcomers: clusters are found where they were put, and nowhere else."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from manifpt.errors import ConfigError
from manifpt.monitoring.drift import Sample
from manifpt.monitoring.newcomers import Newcomer, newcomers

SOURCES, FEATURES = 6, 32


class World:
    """Sources as clouds behind a ReLU, like an attributor's features; an image too far from all centres is unknown."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self._centre = 2 * self.rng.normal(size=(SOURCES + 2, FEATURES))
        self._mixing = self.rng.normal(size=(FEATURES, FEATURES)) / np.sqrt(FEATURES)
        self._threshold = np.inf
        self.baseline = self.draw([200] * SOURCES)[0]
        far_b = self._distances(self.baseline.feature_ba).min(axis=1)
        self._threshold = float(np.quantile(far_b, 0.95))
        self.baseline = replace(self.baseline, is_unknown_b=far_b > self._threshold)

    def _distances(self, feature_ba: np.ndarray) -> np.ndarray:
        return np.linalg.norm(feature_ba[:, None] - np.maximum(self._centre[:SOURCES], 0), axis=2)

    def draw(self, images: list[int]) -> tuple[Sample, np.ndarray]:
        """Images of each source; what comes after the known ones is new. Ids say the source."""
        source_b = np.repeat(np.arange(len(images)), images)
        noise_ba = self.rng.normal(size=(len(source_b), FEATURES)) @ self._mixing
        feature_ba = np.maximum(self._centre[source_b] + noise_ba, 0).astype(np.float32)
        gap_bs = self._distances(feature_ba)
        label_b = np.array([f"gan{place}" for place in gap_bs.argmin(axis=1)], object)
        ids = np.array([f"{source}/{number}" for number, source in enumerate(source_b)], object)
        return Sample(label_b, np.ones(len(ids)), feature_ba, feature_ba, gap_bs.min(axis=1) > self._threshold), ids


def sources_of(newcomer: Newcomer) -> set[str]:
    return {name.partition("/")[0] for name in newcomer.examples}


@pytest.mark.parametrize("seed", range(4))
def test_one_new_generator_is_one_newcomer_and_its_images_are_the_examples(seed: int) -> None:
    world = World(seed)
    window, ids = world.draw([60] * SOURCES + [80])
    (found,) = newcomers(window, ids, world.baseline, 0)
    assert sources_of(found) == {"6"}
    assert len(found.examples) == 12
    assert 40 <= found.images <= 90
    assert found.of_unknown == window.is_unknown_b.sum()
    assert found.compactness < 1.8
    assert found.separation > 1.5
    assert found.nearest_source in set(world.baseline.label_b)


@pytest.mark.parametrize("seed", range(4))
def test_two_new_generators_are_two_newcomers(seed: int) -> None:
    world = World(seed)
    window, ids = world.draw([60] * SOURCES + [120, 70])
    first, second = newcomers(window, ids, world.baseline, 0)
    assert (sources_of(first), sources_of(second)) == ({"6"}, {"7"})
    assert first.images > second.images


@pytest.mark.parametrize("images", [30, 300, 3000])
@pytest.mark.parametrize("seed", range(4))
def test_unknown_images_at_the_edges_of_known_sources_are_no_newcomer(seed: int, images: int) -> None:
    world = World(seed)
    window, ids = world.draw([images] * SOURCES)
    assert window.is_unknown_b.sum() > images // 10
    assert newcomers(window, ids, world.baseline, 0) == []


def test_unknown_images_of_many_kinds_are_no_newcomer() -> None:
    world = World(0)
    window, ids = world.draw([60] * SOURCES + [60])
    wild = window.feature_ba.copy()
    wild[-60:] = 6 * np.abs(world.rng.standard_t(1.5, size=(60, FEATURES)))
    assert newcomers(replace(window, feature_ba=wild), ids, world.baseline, 0) == []


def test_too_few_unknown_images_are_no_newcomer() -> None:
    world = World(0)
    window, ids = world.draw([0] * SOURCES + [7])
    assert newcomers(window, ids, world.baseline, 0) == []
    assert newcomers(window.take(np.arange(0)), ids[:0], world.baseline, 0) == []


def test_the_order_of_images_and_the_seed_change_nothing() -> None:
    world = World(1)
    window, ids = world.draw([60] * SOURCES + [80])
    order_b = world.rng.permutation(len(ids))
    (one,), (other,) = (
        newcomers(window, ids, world.baseline, 0),
        newcomers(window.take(order_b), ids[order_b], world.baseline, 7),
    )
    assert one.examples == other.examples
    assert one.images == other.images
    assert one.compactness == pytest.approx(other.compactness, rel=1e-6)


def test_a_flood_of_unknown_images_is_drawn_from_and_takes_seconds() -> None:
    world = World(2)
    window, ids = world.draw([100] * SOURCES + [8000])
    begin = time.monotonic()
    (found,) = newcomers(window, ids, world.baseline, 0)
    assert time.monotonic() - begin < 30  # 2 on a core of its own
    assert found.of_unknown == 5000
    assert newcomers(window, ids, world.baseline, 0) == [found]


def test_features_that_are_not_finite_are_refused() -> None:
    world = World(0)
    window, ids = world.draw([10] * SOURCES + [20])
    window.feature_ba[0, 0] = np.nan
    with pytest.raises(ConfigError, match="finite"):
        newcomers(window, ids, world.baseline, 0)


def test_dead_features_and_a_single_known_source_are_no_trouble() -> None:
    world = World(3)
    window, ids = world.draw([60] * SOURCES + [80])
    for sample in (window, world.baseline):
        sample.feature_ba[:, 3] = 0
    only = world.baseline.take(np.flatnonzero(world.baseline.label_b == "gan0"))
    assert all(np.isfinite(found.separation) for found in newcomers(window, ids, only, 0))
    (found,) = newcomers(window, ids, world.baseline, 0)
    assert sources_of(found) == {"6"}


def test_a_source_of_one_known_image_makes_no_number_infinite() -> None:
    """JSON has no infinity, and the webhook refused the whole alert."""
    world = World(0)
    window, ids = world.draw([60] * SOURCES + [80])
    newcomer_a = window.feature_ba[60 * SOURCES :].mean(axis=0, keepdims=True)
    rare = Sample(np.array(["rare"], object), np.ones(1), *[newcomer_a + 1] * 2, np.zeros(1, bool))
    parts = [(getattr(world.baseline, name), getattr(rare, name)) for name in ("label_b", "distance_b", "feature_ba",
                                                                            "spectrum_bk", "is_unknown_b")]  # fmt: skip
    (found,) = newcomers(window, ids, Sample(*map(np.concatenate, parts)), 0)
    assert found.nearest_source == "rare"
    assert np.isfinite([found.separation, found.compactness]).all()
