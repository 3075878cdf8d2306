"""The hand-crafted baselines and fingerprints, against their formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import griddata
from scipy.optimize import minimize
from scipy.signal import wiener

from manifpt.baselines import make_baseline
from manifpt.baselines.dzanic20 import decay
from manifpt.baselines.inputs import grey, reflected
from manifpt.baselines.marra19 import correlations, residual
from manifpt.baselines.mccloskey18 import exposure, rg_histogram
from manifpt.baselines.nataraj19 import co_occurrence


def some_images(count: int, size_px: int, channels: int = 3) -> np.ndarray:
    """Noise with a spectrum that decays, as images have."""
    rng = np.random.default_rng(size_px)
    y, x = np.fft.fftfreq(size_px)[:, None], np.fft.fftfreq(size_px)[None]
    noise = np.fft.fft2(rng.normal(size=(count, channels, size_px, size_px)))
    image = np.fft.ifft2(noise / (0.02 + np.hypot(x, y))).real
    return np.clip(128 + 40 * image / image.std(), 0, 255).astype(np.uint8)


def test_grey_is_the_weighted_sum_and_keeps_equal_channels() -> None:
    images_bchw = some_images(4, 32)
    exact = 0.299 * images_bchw[:, 0] + 0.587 * images_bchw[:, 1] + 0.114 * images_bchw[:, 2]
    assert abs(grey(images_bchw) - exact).max() <= 0.5 + 1e-2
    np.testing.assert_array_equal(grey(np.repeat(images_bchw[:, :1], 3, axis=1)), images_bchw[:, 0])


@pytest.mark.parametrize("size_px", [28, 32, 64])
def test_durall20_is_the_mean_over_rings_written_out(size_px: int) -> None:
    image_chw = some_images(1, size_px)[0]
    grey_hw = grey(image_chw[None])[0].astype(float)
    log_hw = 20 * np.log(abs(np.fft.fftshift(np.fft.fft2(grey_hw)) + 1e-8))
    middle, rings = (size_px - 1) / 2, {}
    for i in range(size_px):
        for j in range(size_px):
            rings.setdefault(int(np.sqrt((i - middle) ** 2 + (j - middle) ** 2)), []).append(log_hw[i, j])
    values = np.array([np.mean(rings[r]) for r in range(1, max(rings))])  # without the first and the last ring
    assert len(values) == int((size_px - 1) / np.sqrt(2)) - 1
    expected = griddata(np.linspace(0, 80, len(values)), values, np.linspace(0, 80, 80), method="cubic")
    found = make_baseline("durall20", 2, (size_px, size_px), 0).features(image_chw[None])[0]
    np.testing.assert_allclose(found, expected / expected[0], rtol=1e-5)


def test_durall20_of_large_images_is_the_profile_as_it_is() -> None:
    found = make_baseline("durall20", 2, (256, 256), 0).features(some_images(2, 256))
    assert found.shape == (2, 179) and (found[:, 0] > 50).all()


@pytest.mark.parametrize("size_px", [28, 32, 33, 64, 128])
def test_dzanic20_is_the_fit_to_bins_written_out(size_px: int) -> None:
    images_bchw = some_images(2, size_px)
    found_bf = decay(grey(images_bchw))
    for image_chw, found_f in zip(images_bchw, found_bf, strict=True):
        spectrum_hw = np.fft.fftshift(np.fft.fft2(grey(image_chw[None])[0].astype(float)))
        middle = int(np.floor(size_px / 2 + 0.5))  # int32 of MATLAB rounds
        radii, values = [], []
        for i in range(1, size_px + 1):
            for j in range(1, size_px + 1):
                radius = np.sqrt((i - middle) ** 2 + (j - middle) ** 2)
                if radius > 0.5 * np.sqrt(2 * middle**2):
                    radii.append(radius)
                    values.append(abs(spectrum_hw[i - 1, j - 1]))
        edges = np.linspace(min(radii), max(radii), 201)
        total, count = np.zeros(200), np.zeros(200)
        for radius, value in zip(radii, values, strict=True):
            for k in range(200):
                if edges[k] <= radius <= edges[k + 1]:
                    total[k] += value
                    count[k] += 1
                    break
        y = np.empty(200)
        for k in range(200):
            left, right = k, k
            while count[left] == 0:
                left -= 1
            while count[right] == 0:
                right += 1
            share = (k - left) / (right - left) if right > left else 0.0
            y[k] = (1 - share) * total[left] / count[left] + share * total[right] / count[right]
        smooth = np.empty(200)
        for k in range(200):
            half = min(2, k, 199 - k)
            smooth[k] = np.mean(y[k - half : k + half + 1])
        x, y = ((edges[1:] + edges[:-1]) / 2)[140:], smooth[140:]

        def error(c: np.ndarray, x: np.ndarray = x, y: np.ndarray = y) -> float:
            return float(np.sqrt(((y - y[0] * (x / x[0]) ** c[0]) ** 2).sum()))

        best = minimize(error, [-2.0], method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-4})
        np.testing.assert_allclose(found_f, [best.x[0], y[0], y[-1]], rtol=1e-9, atol=1e-7)


def test_dzanic20_finds_a_decay_that_is_there() -> None:
    """|F| ~ r^-p, made by hand, has exponent -p, but for the origin that is a pixel off."""
    size_px = 256
    rng = np.random.default_rng(0)
    y, x = np.fft.fftfreq(size_px)[:, None], np.fft.fftfreq(size_px)[None]
    radius = np.maximum(np.hypot(x, y), 1 / size_px)
    phase = np.fft.fft2(rng.normal(size=(size_px, size_px)))
    for power in (0.5, 1.0, 2.0):
        image = np.fft.ifft2(phase / abs(phase) / radius**power).real
        assert decay(image[None])[0, 0] == pytest.approx(-power, abs=0.1)


def test_a_constant_image_has_no_decay() -> None:
    np.testing.assert_array_equal(decay(np.full((1, 32, 32), 9, np.uint8))[0, :1], [-2])


def test_mccloskey18_counts_pixels_near_white_and_black() -> None:
    grey_p = np.array([0, 0, 3, 5, 12, 15, 16, 239, 240, 246, 250, 254, 255, 255, 100, 128], np.uint8)
    image_bchw = np.broadcast_to(grey_p.reshape(1, 1, 4, 4), (1, 3, 4, 4))
    expected = np.array([6, 5, 4, 2, 2, 4, 4, 6]) / 16
    np.testing.assert_allclose(exposure(image_bchw)[0], expected)


def test_chromaticity_counts_every_pixel_once() -> None:
    images_bchw = some_images(3, 32)
    images_bchw[0] = 0
    found = rg_histogram(images_bchw, 6)
    np.testing.assert_allclose(found.sum(1), 1)
    assert found[0, 2 * 6 + 2] == 1  # black counts as (1/3, 1/3)
    assert make_baseline("mccloskey18", 2, (32, 32), 0, chromaticity_bins=6).features(images_bchw).shape == (3, 44)


@pytest.mark.parametrize("levels", [64, 256])
def test_co_occurrence_is_counted_pair_by_pair(levels: int) -> None:
    images_bchw = some_images(2, 16)
    expected = np.zeros((2, 3, levels, levels))
    for b in range(2):
        for c in range(3):
            for i in range(16):
                for j in range(15):
                    one, other = (int(images_bchw[b, c, i, j + d]) // (256 // levels) for d in (0, 1))
                    expected[b, c, one, other] += 1
                    expected[b, c, other, one] += 1
    np.testing.assert_allclose(co_occurrence(images_bchw, levels), expected / (2 * 16 * 15), rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 64, 256]))
@settings(max_examples=15, deadline=None)
def test_co_occurrence_is_symmetric_and_sums_to_one(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    size = rng.integers(2, 9, 2)
    matrix = co_occurrence(rng.integers(0, 256, (2, 3, *size), dtype=np.uint8), levels)
    np.testing.assert_array_equal(matrix, matrix.transpose(0, 1, 3, 2))
    np.testing.assert_allclose(matrix.sum((2, 3)), 1, rtol=1e-5)


def test_residual_is_what_the_local_wiener_filter_takes_away() -> None:
    images_bchw = some_images(1, 24)
    found = residual(images_bchw, 10.0)[0, 0, 1:-1, 1:-1]  # scipy's own pads with zeros
    image = images_bchw[0, 0].astype(float)
    np.testing.assert_allclose(found, (image - wiener(image, 3, 100.0))[1:-1, 1:-1], atol=1e-6)


def test_correlation_is_pearsons() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(2, 3, (4, 50)), rng.normal(-1, 1, (3, 50))
    np.testing.assert_allclose(correlations(one, other), np.corrcoef(one, other)[:4, 4:], atol=1e-12)
    assert (correlations(np.full((1, 50), 3.0), other) == 0).all()


def test_marra19_takes_so_many_residuals_of_a_source() -> None:
    images_bchw = some_images(24, 32)
    label_b = np.arange(24) % 2
    found = []
    for residuals in (12, 3):
        baseline = make_baseline("marra19", 2, (32, 32), 0, residuals=residuals, noise=(10.0,))
        baseline.fit(images_bchw, label_b, images_bchw, label_b)
        found.append(baseline.fingerprint_sp)
    expected = residual(images_bchw[label_b == 1], 10.0).mean(0).reshape(-1)
    np.testing.assert_allclose(found[0][1], expected, atol=1e-9)
    assert found[1][1].std() > 1.5 * expected.std()  # the mean of fewer is rougher


def test_reflection_adds_no_new_pixels_and_moves_none() -> None:
    images_bchw = some_images(2, 28)
    found = reflected(images_bchw, 32)
    np.testing.assert_array_equal(found[:, :, 2:-2, 2:-2], images_bchw)
    np.testing.assert_array_equal(found[:, :, 1, 2:-2], images_bchw[:, :, 1])
    assert reflected(images_bchw, 28).shape == images_bchw.shape
