"""Alterations: what stays, what changes, and that a name and a seed are all of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt.alterations import ALTERATIONS, DRAWN, LADDER, MILD, NONE, altered, altered_as, drawn, reencoded
from manifpt.errors import BadImage, ConfigError
from tests.helpers.images import picture

ids = st.text(min_size=1, max_size=20)


@st.composite
def images(draw: st.DrawFn, least_px: int = 1) -> np.ndarray:
    """uint8 [H, W, 3] of any content: noise, flat, or a picture."""
    height_px, width_px = draw(st.integers(least_px, 40)), draw(st.integers(least_px, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low = draw(st.integers(0, 255))
    return rng.integers(low, draw(st.integers(low, 255)) + 1, (height_px, width_px, 3), dtype=np.uint8)


@settings(max_examples=200, deadline=None)
@given(image_hwc=images(), name=st.sampled_from((NONE, *LADDER)), seed=st.integers(0, 2**64 - 1))
def test_size_and_type_stay_and_the_same_comes_out_again(image_hwc: np.ndarray, name: str, seed: int) -> None:
    before = image_hwc.copy()
    found = altered(image_hwc, name, seed)
    assert (found.shape, found.dtype) == (image_hwc.shape, np.uint8)
    np.testing.assert_array_equal(found, altered(image_hwc, name, seed))
    np.testing.assert_array_equal(image_hwc, before)


@settings(max_examples=50, deadline=None)
@given(image_hwc=images(), seed=st.integers(0, 9))
def test_alterations_without_strength_change_nothing(image_hwc: np.ndarray, seed: int) -> None:
    for name in (NONE, "resize-1", "crop-1", "blur-0.05", "noise-0.0001"):
        np.testing.assert_array_equal(altered(image_hwc, name, seed), image_hwc)


@pytest.mark.parametrize("name", LADDER)
def test_every_step_of_the_ladder_changes_an_image(name: str) -> None:
    image_hwc = np.asarray(picture(32, seed=3))
    assert not np.array_equal(altered(image_hwc, name, 0), image_hwc)


@pytest.mark.parametrize("kind", ["jpeg", "webp", "crop", "blur", "noise"])
def test_later_steps_of_a_kind_change_more(kind: str) -> None:
    noisy_hwc = altered(np.asarray(picture(64, seed=1)), "noise-10", 1)
    steps = [name for name in LADDER if name.startswith(kind)]
    changes = [np.abs(altered(noisy_hwc, name, 2).astype(int) - noisy_hwc).mean() for name in steps]
    assert changes == sorted(changes) and changes[0] < changes[-1]


@given(seed=st.integers(0, 2**64 - 2))
def test_noise_is_as_strong_as_it_says_and_hangs_on_its_seed(seed: int) -> None:
    grey_hwc = np.full((64, 64, 3), 128, np.uint8)
    noise_hwc = altered(grey_hwc, "noise-4", seed).astype(float) - 128
    assert abs(noise_hwc.mean()) < 0.25 and abs(noise_hwc.std() - 4) < 0.25
    assert not np.array_equal(altered(grey_hwc, "noise-4", seed + 1), noise_hwc + 128)


def test_blur_is_a_gaussian_of_its_sigma() -> None:
    point_hwc = np.zeros((21, 21, 3), np.uint8)
    point_hwc[10, 10] = 255
    found_w = altered(point_hwc, "blur-1.0", 0)[10, :, 0].astype(float)
    weight_w = np.exp(-((np.arange(21) - 10.0) ** 2) / 2)
    np.testing.assert_allclose(found_w, 255 * weight_w / weight_w.sum() ** 2, atol=0.6)


def test_a_crop_keeps_the_middle() -> None:
    framed_hwc = np.zeros((40, 40, 3), np.uint8)
    framed_hwc[5:35, 5:35] = 200
    assert (altered(framed_hwc, "crop-0.75", 0) == 200).all()


def test_shrinking_folds_no_frequency() -> None:
    """The finest checkerboard is grey once every second pixel is gone."""
    checker_hw = np.indices((32, 32)).sum(axis=0) % 2 * 255
    found_hwc = altered(np.repeat(checker_hw[:, :, None], 3, axis=2).astype(np.uint8), "resize-0.5", 0)
    assert np.abs(found_hwc[4:-4, 4:-4].astype(int) - 127.5).max() < 2


def test_chroma_is_halved_at_every_quality() -> None:
    """Columns of two colours of one luma, one pixel wide each, get one colour."""
    columns_hwc = np.zeros((16, 16, 3), np.uint8)
    columns_hwc[:, ::2], columns_hwc[:, 1::2] = (150, 74, 128), (74, 113, 128)
    for codec, quality in (("JPEG", 95), ("WEBP", 95)):
        found_hwc = reencoded(columns_hwc, codec, quality).astype(int)
        assert np.abs(np.diff(found_hwc[:, 2:-2, 0], axis=1)).max() < 20 < 150 - 74


def test_what_a_format_can_t_hold_is_a_bad_image() -> None:
    for name, width_px in (("jpeg-95", 65_501), ("webp-95", 16_384)):
        with pytest.raises(BadImage, match="too_large|at most"):
            altered(np.zeros((1, width_px, 3), np.uint8), name, 0)


def test_what_can_t_be_enlarged_is_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manifpt.alterations._MOST_AREA_PX", 63 * 64)
    with pytest.raises(BadImage, match="can't be enlarged"):
        altered(np.zeros((32, 32, 3), np.uint8), "resize-2.0", 0)


@pytest.mark.parametrize("name", ["", "jpeg", "jpeg-", "jpeg-x", "jpeg--5", "sharpen-1", "drawn"])
def test_an_unknown_alteration_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="Unknown alteration"):
        altered(np.zeros((8, 8, 3), np.uint8), name, 0)


@given(image_id=ids, seed=st.integers(0, 1000))
def test_what_is_drawn_can_be_done_and_lies_within_the_ladder(image_id: str, seed: int) -> None:
    name = drawn(image_id, seed)
    assert name == drawn(image_id, seed)
    kind, _, text = name.partition("-")
    if name != NONE:
        of_kind = [float(step.partition("-")[2]) for step in LADDER if step.startswith(kind)]
        least = 0.25 if kind == "blur" else min(of_kind)
        assert least <= float(text) <= max(of_kind)
    altered(np.zeros((8, 8, 3), np.uint8), name, seed)


def test_all_kinds_are_drawn_alike_and_some_images_stay() -> None:
    kinds = Counter(drawn(f"a/{n}.png", 0).partition("-")[0] for n in range(7000))
    assert set(kinds) == {NONE, "jpeg", "webp", "resize", "crop", "blur", "noise"}
    assert all(850 < count < 1150 for count in kinds.values())
    assert sum(drawn(f"a/{n}.png", 0) == drawn(f"a/{n}.png", 1) for n in range(700)) < 200


def test_a_run_s_noise_differs_from_image_to_image() -> None:
    grey_hwc = np.full((16, 16, 3), 128, np.uint8)
    one, other = (altered_as(grey_hwc, "noise-4", image_id) for image_id in ("a", "b"))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(one, altered_as(grey_hwc, "noise-4", "a"))


@given(image_id=ids)
def test_a_run_alters_as_drawn(image_id: str) -> None:
    image_hwc = np.asarray(picture(16, seed=2))
    name = drawn(image_id, 0)
    if not name.startswith("noise"):
        np.testing.assert_array_equal(altered_as(image_hwc, DRAWN, image_id), altered(image_hwc, name, 0))


def test_mild_steps_are_on_the_ladder() -> None:
    assert set(MILD) < set(LADDER) < set(ALTERATIONS)
