from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torchvision.models.resnet import Bottleneck, ResNet

from manifpt.baselines import BASELINES, make_baseline
from manifpt.errors import ConfigError

# Small enough for a test: the originals' networks, narrower or for a few steps.
LEARNS: dict[str, dict[str, Any]] = {
    "nataraj19": {"levels": 16, "budget_images": 320, "batch": 8},
    "wang20": {"budget_images": 480, "batch": 16, "learning_rate": 1e-3, "pretrained": False},
    "marra18": {"budget_images": 480, "batch": 8, "learning_rate": 3e-3, "width": 0.125, "middle": 1},
    "yu19": {"budget_images": 64, "batch": 8, "smoothing": 0.5},
}
ONE_STEP: dict[str, dict[str, Any]] = {
    "nataraj19": {"levels": 16, "budget_images": 4, "batch": 4},
    "wang20": {"budget_images": 4, "batch": 4, "pretrained": False},
    "marra18": {"budget_images": 4, "batch": 4, "width": 0.125},
    "yu19": {"budget_images": 4, "batch": 4},
}
FEATURES = {
    "mccloskey18": 8, "nataraj19": 256, "durall20": 80, "dzanic20": 3, "wang20": 2048, "marra18": 256, "marra19": 3,
    "yu19": 512,
}  # fmt: skip


def two_sources(images: int, size_px: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth images that never saturate, and noisy ones that do; each source has its own faint pattern."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size_px, :size_px] / size_px
    label_b = np.arange(images) % 2
    images_bchw = np.empty((images, 3, size_px, size_px), np.uint8)
    pattern = np.random.default_rng(0).choice([-8.0, 8.0], (2, 3, size_px, size_px))
    for b, source in enumerate(label_b):
        slope_y, slope_x, level = rng.uniform(-60, 60), rng.uniform(-60, 60), rng.uniform(100, 150)
        image = level + slope_y * (y - 0.5) + slope_x * (x - 0.5) + pattern[source]
        image = image + source * rng.normal(0, 60, image.shape)
        images_bchw[b] = np.clip(np.rint(image), 0, 255)
    return images_bchw, label_b.astype(np.int64)


@pytest.fixture(autouse=True)
def shorter_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block a stage: ResNet50's 23 million weights cost a third of a second a step, however small the images.

    The whole network is in test_baselines_networks.py.
    """
    monkeypatch.setattr("torchvision.models.resnet50", lambda weights: ResNet(Bottleneck, [1, 1, 1, 1]))


@pytest.mark.parametrize("name", BASELINES)
def test_learns_two_sources_that_are_easy_to_tell_apart(name: str) -> None:
    train, validation, test = two_sources(80, 32, 1), two_sources(20, 32, 2), two_sources(40, 32, 3)
    baseline = make_baseline(name, 2, (32, 32), 0, **LEARNS.get(name, {}))
    baseline.fit(*train, *validation)
    scores_bs = baseline.predict(test[0])
    assert baseline.name == name
    assert scores_bs.dtype == np.float32 and scores_bs.shape == (40, 2)
    assert (scores_bs.argmax(1) == test[1]).mean() > 0.8
    assert baseline.notes


@pytest.mark.parametrize("size_px", [28, 32, 64])
@pytest.mark.parametrize("name", BASELINES)
def test_features_and_scores_are_finite_and_the_same_for_the_same_seed(name: str, size_px: int) -> None:
    rng = np.random.default_rng(0)
    images_bchw = rng.integers(0, 256, (9, 3, size_px, size_px), dtype=np.uint8)
    images_bchw[:3] = images_bchw[:3, :1]  # grey ones: three equal channels
    images_bchw[8] = 7  # nothing to see in a constant image, and no reason to fail
    label_b = np.array([0, 1, 2] * 3)
    found = []
    for _ in range(2):
        baseline = make_baseline(name, 3, (size_px, size_px), 5, **ONE_STEP.get(name, {}))
        baseline.fit(images_bchw, label_b, images_bchw[:3], label_b[:3])
        found.append((baseline.features(images_bchw), baseline.predict(images_bchw)))
        assert len(baseline.predict(images_bchw[:0])) == len(baseline.features(images_bchw[:0])) == 0
    (features_bf, scores_bs), again = found
    assert features_bf.dtype == scores_bs.dtype == np.float32
    assert features_bf.shape == (9, FEATURES[name]) and scores_bs.shape == (9, 3)
    assert np.isfinite(features_bf).all() and np.isfinite(scores_bs).all()
    np.testing.assert_array_equal(features_bf, again[0])
    np.testing.assert_array_equal(scores_bs, again[1])


@pytest.mark.parametrize("name", ["nataraj19", "marra18"])
def test_another_seed_is_another_network(name: str) -> None:
    images_bchw, label_b = two_sources(8, 32, 0)
    scores = []
    for seed in (0, 1):
        baseline = make_baseline(name, 2, (32, 32), seed, **ONE_STEP[name])
        baseline.fit(images_bchw, label_b, images_bchw, label_b)
        scores.append(baseline.predict(images_bchw))
    assert not np.array_equal(*scores)


@pytest.mark.parametrize("name", ["durall20", "marra19", "dzanic20"])
def test_two_or_more_sources_of_unequal_sizes(name: str) -> None:
    images_bchw, label_b = two_sources(40, 28, 0)
    rows = np.flatnonzero((label_b == 0) | (np.arange(40) < 14))  # 20 and 7
    baseline = make_baseline(name, 2, (28, 28), 0)
    baseline.fit(images_bchw[rows], label_b[rows], images_bchw, label_b)
    assert (baseline.predict(images_bchw).argmax(1) == label_b).mean() > 0.8


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'durall21'; known: mccloskey18, nataraj19, durall20, .*yu19"):
        make_baseline("durall21", 2, (32, 32), 0)


def test_an_unknown_setting_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no setting 'budget'; known: budget_images, learning_rate"):
        make_baseline("yu19", 2, (32, 32), 0, budget=3)


def test_a_budget_holds_a_batch() -> None:
    with pytest.raises(ConfigError, match="at least one batch"):
        make_baseline("yu19", 2, (32, 32), 0, budget_images=31)


@pytest.mark.parametrize("name", BASELINES)
def test_one_source_and_tiny_images_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="at least 2 sources"):
        make_baseline(name, 1, (32, 32), 0)
    with pytest.raises(ConfigError, match="at least 16 px"):
        make_baseline(name, 2, (15, 32), 0)


@pytest.mark.parametrize("name", ["durall20", "marra19", "yu19"])  # one of each kind
def test_what_does_not_fit_is_refused(name: str) -> None:
    images_bchw, label_b = two_sources(8, 32, 0)
    baseline = make_baseline(name, 3, (32, 32), 0, **ONE_STEP.get(name, {}))
    with pytest.raises(ConfigError, match=r"Sources \[2\] have no training image"):
        baseline.fit(images_bchw, label_b, images_bchw, label_b)
    with pytest.raises(ConfigError, match="outside 0 to 2"):
        baseline.fit(images_bchw, label_b + 2, images_bchw, label_b)
    with pytest.raises(ConfigError, match="8 validation images and labels"):
        baseline.fit(images_bchw, label_b, images_bchw, label_b[:5])
    with pytest.raises(ConfigError, match="float32"):
        baseline.fit(images_bchw.astype(np.float32), label_b, images_bchw, label_b)
    with pytest.raises(ConfigError, match=r"uint8 \[8, 3, 28, 32\]"):
        baseline.fit(images_bchw[:, :, :28], label_b, images_bchw, label_b)
