"""Estimates of the projection, each against its definition written out in float64."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from manifpt.artifacts import to_numpy
from manifpt.decode import decode
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate, make_projector
from manifpt.estimates.controls import BlurControl, NoneControl, RandomControl
from manifpt.estimates.denoiser import Denoiser, DenoiserProjector, denoiser_digest, save_denoiser
from manifpt.estimates.denoising import _share
from manifpt.estimates.gaussian import Moments, SoftProjector, moments_of
from manifpt.estimates.neighbors import HullProjector, MeanProjector, hull_weights
from manifpt.plan import Plan, publish_plan
from manifpt.projecting import Projecting
from manifpt.projection import NearestProjector, Projection
from manifpt.reader import read_artifacts
from manifpt.reference import Codes, Reference, codes_of, finish_bundle, held_codes, open_bundle
from manifpt.spaces import SpaceSpec, make_space
from manifpt.spaces.pixels import log_spectrum, pixels
from manifpt.stages import Encoder, commit_artifacts, commit_codes, decode_rows
from tests.helpers.images import encoded, picture, sample_files
from tests.unit.test_stages import committed, planned, put, run, travelled

SEEDS = st.integers(0, 2**32 - 1)


def nearest(reference_nd: np.ndarray) -> NearestProjector:
    return NearestProjector(lambda rows: reference_nd[rows], *reference_nd.shape)


def soft(reference_nd: np.ndarray, sigma: float) -> SoftProjector:
    return SoftProjector(lambda rows: reference_nd[rows], *reference_nd.shape, sigma)


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Uniform in [0, 1), correlated as an image's pixels are: C is far from a multiple of I."""
    walk = np.random.default_rng(seed).standard_normal(shape).cumsum(axis=-1)
    return ((walk - walk.min()) / (np.ptp(walk) + 1e-9)).astype(np.float32)


def assert_same(one: Projection, other: Projection) -> None:
    """To the bit."""
    for name in ("neighbor_b", "distance_b", "second_b", "near_copy_b", "is_lacking_b"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)
    assert one.artifact_bd.dtype == other.artifact_bd.dtype == np.float32
    assert one.artifact_bd.tobytes() == other.artifact_bd.tobytes()


class TestOneNeighbor:
    """With k = 1, both are the paper's."""

    @settings(max_examples=40)
    @given(seed=SEEDS, count=st.integers(1, 30), levels=st.sampled_from([2, 256, 0]), most=st.integers(0, 30))
    def test_is_the_nearest_to_the_bit(self, seed: int, count: int, levels: int, most: int) -> None:
        rng = np.random.default_rng(seed)
        reference_nd = rng.standard_normal((count, 7)).astype(np.float32)
        if levels:  # duplicates and ties
            reference_nd = (rng.integers(0, levels, (count, 7)) / levels).astype(np.float32)
        query_bd = np.concatenate([rng.standard_normal((6, 7)), reference_nd[rng.integers(0, count, 6)]])
        query_bd = query_bd.astype(np.float32)
        drawn = [rng.permutation(count)[: rng.integers(0, most + 1)] for _ in query_bd]
        excluded = [np.sort(rows) for rows in drawn]
        one = nearest(reference_nd)
        ridge = float(10 ** rng.uniform(-9, 9))
        for left_out in (None, excluded):
            expected = one.project(query_bd, left_out)
            assert_same(MeanProjector(one, 1).project(query_bd, left_out), expected)
            assert_same(HullProjector(one, 1, ridge).project(query_bd, left_out), expected)

    def test_of_digits_too(self) -> None:
        files = list(sample_files("reference"))[:150] + list(sample_files("query", {"gan": 40}))
        images_nd = np.stack([decode(data)[..., 0].reshape(-1) for _, data in files]).astype(np.float32) / 255
        one, query_bd = nearest(images_nd[:150]), images_nd[130:]  # 20 of them are in the reference
        excluded = [np.array([n + 130]) if n < 10 else np.arange(0) for n in range(len(query_bd))]
        expected = one.project(query_bd, excluded)
        assert (expected.distance_b[:10] > 0).all() and (expected.distance_b[10:20] == 0).all()
        assert_same(MeanProjector(one, 1).project(query_bd, excluded), expected)
        assert_same(HullProjector(one, 1, 0.1).project(query_bd, excluded), expected)


class TestNeighbors:
    @settings(max_examples=30, deadline=None)
    @given(seed=SEEDS, k=st.integers(2, 64), count=st.integers(1, 80))
    def test_the_mean_of_those_there_are(self, seed: int, k: int, count: int) -> None:
        rng = np.random.default_rng(seed)
        reference_nd, query_bd = numbers(seed, count, 5), numbers(seed + 1, 8, 5)
        excluded = [np.sort(rng.permutation(count)[: rng.integers(0, count)]) for _ in query_bd]
        found = MeanProjector(nearest(reference_nd), k).project(query_bd, excluded)
        assert not found.is_lacking_b.any()
        assert (found.neighbor_b == -1).all(), "x* is no sample"
        for b, x_d in enumerate(query_bd.astype(np.float64)):
            allowed_nd = np.delete(reference_nd, excluded[b], axis=0).astype(np.float64)
            squared_n = ((x_d - allowed_nd) ** 2).sum(axis=1)
            expected_d = x_d - allowed_nd[np.argsort(squared_n, kind="stable")[:k]].mean(axis=0)
            np.testing.assert_allclose(found.artifact_bd[b], expected_d, atol=2e-7)
            np.testing.assert_allclose(found.distance_b[b], np.linalg.norm(expected_d), atol=1e-6)

    @pytest.mark.parametrize("make", [lambda n: MeanProjector(n, 4), lambda n: HullProjector(n, 4, 0.1)])
    def test_nothing_left_and_no_queries(self, make) -> None:  # type: ignore[no-untyped-def]
        reference_nd = numbers(0, 3, 4)
        found = make(nearest(reference_nd)).project(reference_nd[:2], [np.arange(3), np.arange(2)])
        assert found.is_lacking_b.tolist() == [True, False]
        assert np.isnan(found.artifact_bd[0]).all()
        np.testing.assert_array_equal(found.artifact_bd[1], reference_nd[1] - reference_nd[2])
        assert make(nearest(reference_nd)).project(reference_nd[:0]).artifact_bd.shape == (0, 4)

    def test_a_near_copy_is_told_by_the_nearest_real_not_by_the_mean(self) -> None:
        reference_nd = numbers(1, 40, 6)
        query_bd = np.concatenate([reference_nd[:1] + np.float32(1e-4), numbers(2, 1, 6) + 3])
        for found in (MeanProjector(nearest(reference_nd), 8), HullProjector(nearest(reference_nd), 8, 1.0)):
            assert found.project(query_bd).near_copy_b.tolist() == [True, False]

    @pytest.mark.parametrize("k", [2, 64])
    def test_in_several_blocks_as_in_one(self, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
        one, query_bd = nearest(numbers(3, 70, 9)), numbers(4, 20, 9)
        whole = HullProjector(one, k, 0.01).project(query_bd)
        monkeypatch.setattr("manifpt.estimates.neighbors._BLOCK_BYTES", 8 * k * 9 * 3)
        assert_same(HullProjector(one, k, 0.01).project(query_bd), whole)


class TestHull:
    @settings(max_examples=40)
    @given(seed=SEEDS, k=st.integers(1, 64), dim=st.integers(1, 40), ridge=st.sampled_from([1e-9, 1e-3, 1.0, 1e9]))
    def test_weights_sum_to_one(self, seed: int, k: int, dim: int, ridge: float) -> None:
        rng = np.random.default_rng(seed)
        near_bkd = rng.integers(0, 3, (4, k, dim)) / 2.0  # with duplicates
        query_bd = near_bkd[:, 0].astype(np.float32)  # x itself is among them
        near_bkd[3, rng.integers(1, k + 1) :] = np.nan
        weight_bk = hull_weights(query_bd, near_bkd, ridge)
        np.testing.assert_allclose(weight_bk.sum(axis=1), 1, atol=1e-6)
        assert (weight_bk[3][np.isnan(near_bkd[3, :, 0])] == 0).all()

    @settings(max_examples=30, deadline=None)
    @given(seed=SEEDS, k=st.integers(2, 16))
    def test_is_the_minimum_that_its_docstring_states(self, seed: int, k: int) -> None:
        near_bkd, query_bd = numbers(seed, 1, k, 12).astype(np.float64), numbers(seed + 1, 1, 12)
        z_kd = query_bd.astype(np.float64) - near_bkd[0]
        penalty = 0.05 * (z_kd**2).sum(axis=1).mean()

        def cost(w_k: np.ndarray) -> float:
            return float(((w_k @ z_kd) ** 2).sum() + penalty * (w_k**2).sum())

        best_k = hull_weights(query_bd, near_bkd, 0.05)[0]
        for step_k in np.random.default_rng(seed).standard_normal((20, k)) * 0.01:
            assert cost(best_k) <= cost(best_k + step_k - step_k.mean()) * (1 + 1e-9)

    def test_of_fewer_neighbors_than_asked_for_is_that_of_those(self) -> None:
        reference_nd, query_bd = numbers(30, 5, 9), numbers(31, 6, 9)
        few, many = (HullProjector(nearest(reference_nd), k, 0.3).project(query_bd) for k in (5, 64))
        np.testing.assert_allclose(many.artifact_bd, few.artifact_bd, atol=2e-7)

    def test_a_large_ridge_is_the_mean(self) -> None:
        one, query_bd = nearest(numbers(5, 60, 20)), numbers(6, 10, 20)
        mean, hull = MeanProjector(one, 64).project(query_bd), HullProjector(one, 64, 1e9).project(query_bd)
        np.testing.assert_allclose(hull.artifact_bd, mean.artifact_bd, atol=2e-7)

    @pytest.mark.parametrize(("k", "dim"), [(2, 30), (8, 30), (16, 30), (64, 100)])
    def test_a_tiny_ridge_is_the_affine_projection(self, k: int, dim: int) -> None:
        rng = np.random.default_rng(k)
        reference_nd, query_bd = (rng.standard_normal((n, dim)).astype(np.float32) for n in (64, 6))
        found = HullProjector(nearest(reference_nd), k, 1e-9).project(query_bd)
        plain = nearest(reference_nd).project(query_bd)
        for b, x_d in enumerate(query_bd.astype(np.float64)):
            order_k = ((x_d - reference_nd.astype(np.float64)) ** 2).sum(axis=1).argsort()[:k]
            near_kd = reference_nd[order_k].astype(np.float64)
            side_dk = (near_kd[1:] - near_kd[0]).T
            expected_d = x_d - near_kd[0] - side_dk @ np.linalg.lstsq(side_dk, x_d - near_kd[0], rcond=None)[0]
            np.testing.assert_allclose(found.artifact_bd[b], expected_d, atol=2e-6)
        assert (found.distance_b <= plain.distance_b).all()

    def test_a_query_inside_of_the_hull_has_no_artifact(self) -> None:
        reference_nd = numbers(7, 8, 30)
        inside_bd = reference_nd[:4].mean(axis=0, keepdims=True)
        assert HullProjector(nearest(reference_nd), 8, 1e-9).project(inside_bd).distance_b[0] < 1e-5


class TestMoments:
    @settings(max_examples=40)
    @given(
        seed=SEEDS, count=st.integers(1, 40), dim=st.integers(1, 9), blocks=st.integers(1, 6), tile=st.integers(1, 9)
    )
    def test_are_those_of_numpy_in_any_blocks_tiles_and_order(
        self, seed: int, count: int, dim: int, blocks: int, tile: int
    ) -> None:
        rng = np.random.default_rng(seed)
        image_nd = numbers(seed, count, dim) + np.float32(10)  # far from zero: only centred sums are right
        parts = [part for part in np.array_split(rng.permutation(image_nd), blocks) if len(part)]
        found = moments_of(lambda: iter(parts), dim, tile)
        assert found.count == count
        np.testing.assert_allclose(found.mean_d, image_nd.mean(axis=0, dtype=np.float64), rtol=1e-12)
        expected_dd = np.atleast_2d(np.cov(image_nd.T.astype(np.float64), bias=True))
        np.testing.assert_allclose(found.scatter_dd / count, expected_dd, atol=1e-5)
        np.testing.assert_allclose(found.scatter_dd, moments_of(lambda: iter(parts), dim, 99).scatter_dd.T, atol=1e-5)

    @settings(max_examples=40)
    @given(seed=SEEDS, sizes=st.lists(st.integers(1, 12), min_size=2, max_size=5))
    def test_of_parts_merge_into_those_of_the_whole(self, seed: int, sizes: list[int]) -> None:
        image_nd = numbers(seed, sum(sizes), 6)
        whole = moments_of(lambda: iter([image_nd]), 6)
        merged = Moments(0, np.zeros(6), np.zeros((6, 6)))
        for part in np.split(image_nd, np.cumsum(sizes)[:-1]):
            merged = merged.merged(moments_of(lambda part=part: iter([part]), 6))  # type: ignore[misc]
        assert merged.count == whole.count
        np.testing.assert_allclose(merged.mean_d, whole.mean_d, rtol=1e-12)
        np.testing.assert_allclose(merged.scatter_dd, whole.scatter_dd, atol=1e-5)

    def test_of_nothing_merge_with_nothing(self) -> None:
        nothing = Moments(0, np.zeros(2), np.zeros((2, 2)))
        assert nothing.merged(nothing).count == 0


def residual_of(x_d: np.ndarray, mean_d: np.ndarray, covariance_dd: np.ndarray, sigma: float) -> np.ndarray:
    """sigma^2 (C + sigma^2 I)^-1 (x - mu), in float64."""
    return sigma**2 * np.linalg.solve(covariance_dd + sigma**2 * np.eye(len(mean_d)), x_d.astype(np.float64) - mean_d)


class TestSoft:
    @pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
    @pytest.mark.parametrize("count", [12, 300])  # fewer images than dimensions, and more
    def test_is_its_formula(self, sigma: float, count: int) -> None:
        reference_nd, query_bd = numbers(8, count, 48), numbers(9, 10, 48)
        mean_d = reference_nd.mean(axis=0, dtype=np.float64)
        covariance_dd = np.cov(reference_nd.T.astype(np.float64), bias=True)
        found = soft(reference_nd, sigma).project(query_bd)
        for x_d, artifact_d in zip(query_bd, found.artifact_bd, strict=True):
            expected_d = residual_of(x_d, mean_d, covariance_dd, sigma)
            assert np.linalg.norm(artifact_d - expected_d) <= 2e-3 * np.linalg.norm(expected_d)
        assert (found.neighbor_b == -1).all() and not found.is_lacking_b.any() and not found.near_copy_b.any()
        np.testing.assert_allclose(found.distance_b, np.linalg.norm(found.artifact_bd, axis=1), rtol=1e-5)

    @settings(max_examples=20, deadline=None)
    @given(seed=SEEDS, out=st.sampled_from([1, 2, 7, 29]))
    def test_left_out_is_as_if_never_there(self, seed: int, out: int) -> None:
        """But for the normaliser, which stays N."""
        reference_nd, rng = numbers(seed, 30, 16), np.random.default_rng(seed)
        rows = np.sort(rng.permutation(30)[:out])
        query_bd = reference_nd[rows[:1]]
        rest_nd = np.delete(reference_nd, rows, axis=0).astype(np.float64)
        covariance_dd = np.cov(rest_nd.T, bias=True) * len(rest_nd) / 30
        expected_d = residual_of(query_bd[0], rest_nd.mean(axis=0), covariance_dd, 0.05)
        one = soft(reference_nd, 0.05)
        both = one.project(np.repeat(query_bd, 2, axis=0), [rows, np.arange(0)])
        assert np.linalg.norm(both.artifact_bd[0] - expected_d) <= 2e-3 * np.linalg.norm(expected_d)
        np.testing.assert_array_equal(both.artifact_bd[1], one.project(np.repeat(query_bd, 2, axis=0)).artifact_bd[1])
        assert not both.is_lacking_b.any()

    def test_nothing_left_and_no_queries(self) -> None:
        reference_nd = numbers(10, 4, 6)
        found = soft(reference_nd, 0.1).project(reference_nd[:2], [np.arange(4), np.arange(3)])
        assert found.is_lacking_b.tolist() == [True, False]
        assert np.isnan(found.artifact_bd[0]).all() and np.isfinite(found.artifact_bd[1]).all()
        assert soft(reference_nd, 0.1).project(reference_nd[:0]).artifact_bd.shape == (0, 6)

    def test_a_large_sigma_takes_the_mean_for_every_real(self) -> None:
        reference_nd, query_bd = numbers(11, 20, 6), numbers(12, 5, 6)
        found = soft(reference_nd, 1e5).project(query_bd)
        np.testing.assert_allclose(found.artifact_bd, query_bd - reference_nd.mean(axis=0), atol=1e-6)

    def test_the_whole_reference_is_read_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reference_nd, query_bd = numbers(13, 50, 8), numbers(14, 3, 8)
        whole = soft(reference_nd, 0.1).project(query_bd).artifact_bd
        monkeypatch.setattr("manifpt.estimates.gaussian._BLOCK_BYTES", 4 * 8 * 7)
        np.testing.assert_allclose(soft(reference_nd, 0.1).project(query_bd).artifact_bd, whole, atol=1e-6)

    def test_what_can_not_be_had(self) -> None:
        with pytest.raises(ConfigError, match="a matrix of 16,385 x 16,385 numbers"):
            SoftProjector(lambda rows: np.empty((0, 16_385), np.float32), 1, 16_385, 0.1)
        with pytest.raises(ConfigError, match="--sigma 1e-12 is below the rounding"):
            soft(numbers(15, 5, 40), 1e-12)

    @pytest.mark.parametrize("sigma", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    def test_a_real_is_left_out_rightly_or_not_at_all(self, sigma: float) -> None:
        """A direction that it alone spans: of what is left, rounding was all at 1e-5, and nobody was told."""
        reference_nd = np.random.default_rng(0).random((60, 120)).astype(np.float32)
        rest_nd = np.delete(reference_nd, 7, axis=0).astype(np.float64)
        mean_d = rest_nd.mean(axis=0)
        _, scale_r, axes_rd = np.linalg.svd((rest_nd - mean_d) / 60**0.5, full_matrices=False)
        query_d = reference_nd[7] - mean_d
        along_r = axes_rd @ query_d
        expected_d = query_d - axes_rd.T @ (along_r * scale_r**2 / (scale_r**2 + sigma**2))
        one = soft(reference_nd, sigma)
        if sigma < 1e-3:
            with pytest.raises(ConfigError, match="too small to leave a real image of the reference out"):
                one.project(reference_nd[7:8], [np.array([7])])
        else:
            found_d = one.project(reference_nd[7:8], [np.array([7])]).artifact_bd[0]
            assert np.linalg.norm(found_d - expected_d) < 1e-3 * np.linalg.norm(expected_d)
        assert np.isfinite(one.project(reference_nd[7:8] + 0.1).artifact_bd).all(), "which no real is taken out for"


class TestControls:
    def test_none_is_the_embedding(self) -> None:
        query_bd = numbers(16, 4, 6)
        found = NoneControl().project(query_bd, [np.arange(9)] * 4)
        assert found.artifact_bd.tobytes() == query_bd.tobytes()
        assert found.artifact_bd is not query_bd
        assert (found.neighbor_b == -1).all() and not found.is_lacking_b.any()

    @pytest.mark.parametrize("sigma_px", [0.6, 1.0])
    def test_blur_is_a_convolution(self, sigma_px: float) -> None:
        """Written out as a 2-D sum over a window of four sigmas, which no channel leaves."""
        height_px, width_px, reach = 15, 18, int(4 * sigma_px + 0.5)
        query_bd = numbers(17, 2, 3 * height_px * width_px)
        image_bchw = query_bd.astype(np.float64).reshape(2, 3, height_px, width_px)
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        kernel = np.exp(-(y**2 + x**2) / (2 * sigma_px**2))
        kernel /= kernel.sum()
        found = BlurControl((3, height_px, width_px), sigma_px).project(query_bd)
        artifact_bchw = found.artifact_bd.reshape(image_bchw.shape)
        for h in range(reach, height_px - reach):
            for w in range(reach, width_px - reach):
                window = image_bchw[:, :, h - reach : h + reach + 1, w - reach : w + reach + 1]
                expected_bc = image_bchw[:, :, h, w] - (window * kernel).sum(axis=(2, 3))
                np.testing.assert_allclose(artifact_bchw[:, :, h, w], expected_bc, atol=1e-6)
        flat = BlurControl((3, 8, 8), sigma_px).project(np.full((1, 192), 0.7, np.float32))
        assert np.abs(flat.artifact_bd).max() < 1e-6, "a flat image has no edge, at the border neither"
        assert BlurControl((3, 8, 8), sigma_px).project(np.empty((0, 192), np.float32)).artifact_bd.shape == (0, 192)

    @settings(max_examples=40)
    @given(seed=SEEDS, count=st.integers(1, 20))
    def test_random_is_some_real_that_is_not_excluded(self, seed: int, count: int) -> None:
        rng = np.random.default_rng(seed)
        reference_nd, query_bd = numbers(seed, count, 3), numbers(seed + 1, 12, 3)
        excluded = [np.sort(rng.permutation(count)[: rng.integers(0, count + 1)]) for _ in query_bd]
        control = RandomControl(lambda rows: reference_nd[rows], count, 0)
        found = control.project(query_bd, excluded)
        for b, rows in enumerate(excluded):
            assert found.is_lacking_b[b] == (len(rows) == count) == np.isnan(found.artifact_bd[b]).all()
            if len(rows) < count:
                assert found.neighbor_b[b] not in rows
                near_d = reference_nd[found.neighbor_b[b]]
                np.testing.assert_array_equal(found.artifact_bd[b], query_bd[b] - near_d)
                np.testing.assert_allclose(found.distance_b[b], np.linalg.norm(query_bd[b] - near_d), rtol=1e-5)
        again = control.project(query_bd[::-1], excluded[::-1])
        np.testing.assert_array_equal(again.neighbor_b[::-1], found.neighbor_b, "drawn by the image, not by its place")

    def test_random_is_uniform_and_differs_by_seed(self) -> None:
        reference_nd, query_bd = numbers(18, 20, 3), np.random.default_rng(19).random((4000, 3), dtype=np.float32)
        left_out = np.array([0, 7, 8, 19])
        drawn = [
            RandomControl(lambda rows: reference_nd[rows], 20, seed).project(query_bd, [left_out] * 4000).neighbor_b
            for seed in (0, 1)
        ]
        counts = np.bincount(drawn[0], minlength=20)
        assert (counts[left_out] == 0).all()
        kept = np.delete(counts, left_out)
        assert ((kept - 250) ** 2 / 250).sum() < chi2.ppf(0.999, 15)
        assert (drawn[0] == drawn[1]).mean() < 0.1

    def test_random_without_queries(self) -> None:
        reference_nd = numbers(20, 4, 3)
        assert RandomControl(lambda rows: reference_nd[rows], 4, 0).project(reference_nd[:0]).artifact_bd.shape == (
            0,
            3,
        )


RGB = SpaceSpec(name="rgb", kind="rgb", height_px=16, width_px=16)


@pytest.fixture
def denoiser(tmp_path: Path) -> str:
    """One that was never trained, of RGB."""
    torch.manual_seed(0)
    uri = str(tmp_path / "denoiser")
    save_denoiser(Denoiser(width=6, depth=3), uri, {"color": "rgb", "reference_digest": "x"})
    return uri


class TestDenoiser:
    def test_comes_back_as_it_was(self, denoiser: str, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        model = Denoiser(width=6, depth=3)
        query_bd = numbers(21, 5, 768)
        projector = DenoiserProjector(denoiser, denoiser_digest(denoiser), RGB)
        found = projector.project(query_bd, [np.arange(0)] * 5)
        x_bchw = torch.from_numpy(query_bd).reshape(5, 3, 16, 16)
        with torch.inference_mode():
            artifact_bchw = x_bchw - model(x_bchw)
        np.testing.assert_allclose(found.artifact_bd, artifact_bchw.reshape(5, -1).numpy(), atol=1e-6)
        assert np.abs(found.artifact_bd).max() > 1e-3
        assert (found.neighbor_b == -1).all() and not found.is_lacking_b.any()
        monkeypatch.setattr("manifpt.estimates.denoiser._BATCH_PX", 512)
        np.testing.assert_allclose(projector.project(query_bd).artifact_bd, found.artifact_bd, atol=1e-6)
        assert projector.project(query_bd[:0]).artifact_bd.shape == (0, 768)

    @settings(max_examples=20, deadline=None)
    @given(seed=SEEDS, scale=st.floats(1e-3, 1e3))
    def test_scales_with_its_input(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        model, x_bchw = Denoiser(width=4, depth=3), torch.rand(1, 3, 8, 8)
        with torch.inference_mode():
            torch.testing.assert_close(model(scale * x_bchw), scale * model(x_bchw), rtol=1e-4, atol=1e-5 * scale)
        assert not any("bias" in name for name in model.state_dict())

    @pytest.mark.parametrize("workers", range(1, 33))
    def test_as_many_images_a_step_whatever_the_workers(self, workers: int) -> None:
        shares = [_share(rank, workers) for rank in range(workers)]
        assert sum(shares) == 32 and max(shares) - min(shares) <= 1 and min(shares) > 0

    def test_other_pixels_are_refused(self, denoiser: str) -> None:
        digest = denoiser_digest(denoiser)
        with pytest.raises(ConfigError, match="was trained on rgb pixels, not on ycbcr"):
            DenoiserProjector(denoiser, digest, replace(RGB, color="ycbcr"))
        with pytest.raises(ConfigError, match="was trained with codec '', and the space has 'jpeg'"):
            DenoiserProjector(denoiser, digest, replace(RGB, codec="jpeg"))

    def test_changed_weights_are_refused(self, denoiser: str) -> None:
        digest = denoiser_digest(denoiser)
        save_denoiser(Denoiser(width=6, depth=3), denoiser, {"color": "rgb"})
        with pytest.raises(ConfigError, match="was changed since this run was planned"):
            DenoiserProjector(denoiser, digest, RGB)
        assert denoiser_digest(denoiser) != digest

    def test_the_digest_is_of_the_file(self, denoiser: str) -> None:
        data = Path(denoiser, "model.safetensors").read_bytes()
        assert denoiser_digest(denoiser) == hashlib.sha256(data).hexdigest()

    def test_what_is_no_denoiser(self, denoiser: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="There is no finished denoiser at"):
            denoiser_digest(str(tmp_path / "none"))
        digest = denoiser_digest(denoiser)
        Path(denoiser, "model.safetensors").unlink()
        with pytest.raises(ConfigError, match="has lost its weights"):
            DenoiserProjector(denoiser, digest, RGB)
        for text in ('{"format": 1}', "{", "[]"):
            Path(denoiser, "config.json").write_text(text)
            with pytest.raises(ConfigError, match=r"holds no denoiser|The denoiser .* is damaged"):
                denoiser_digest(denoiser)


SPACES = (
    SpaceSpec(name="rgb", kind="rgb", height_px=16, width_px=16),
    SpaceSpec(name="frequency", kind="frequency", height_px=16, width_px=16),
    SpaceSpec(name="ycbcr", kind="rgb", color="ycbcr", height_px=16, width_px=16),
)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Six queries onto ten reals: three generated, one a copy; and a shard of two, one of them a real of the
    reference and one a real that is not."""
    for n in range(10):
        put(tmp_path / f"reals/real/{n}.png", encoded(picture(16, seed=n), "PNG"))
    for n in range(3):
        put(tmp_path / f"queries/a/{n}.png", encoded(picture(16, seed=20 + n), "PNG"))
    put(tmp_path / "queries/a/copy.png", encoded(picture(16, seed=3), "PNG"))
    put(tmp_path / "queries/real/in.png", encoded(picture(16, seed=5), "PNG"))
    put(tmp_path / "queries/real/out.png", encoded(picture(16, seed=30), "PNG"))
    reals = planned(tmp_path, "reals", SPACES)
    for shard in range(reals.shards):
        commit_codes(reals, str(tmp_path / "reference"), Encoder(reals.spaces)(decode_rows(reals, shard)))
    bundle = finish_bundle(reals, str(tmp_path / "reference"))
    queries = planned(tmp_path, "queries", SPACES)
    return replace(queries, task="artifacts", reference_uri=bundle.uri, reference_digest=bundle.digest, dtype="float32",
                   inline=tuple(spec.name for spec in SPACES))  # fmt: skip


def test_a_real_without_a_finite_embedding_is_rejected_and_no_reference(tmp_path: Path) -> None:
    for n in range(4):
        put(tmp_path / f"reals/real/{n}.png", encoded(picture(16, seed=n), "PNG"))
    reals = planned(tmp_path, "reals", SPACES[:1])
    rejected = kept = 0
    for number in range(reals.shards):
        shard = Encoder(reals.spaces)(decode_rows(reals, number))
        key = f"code:{SPACES[0].code_key}"
        codes = shard[key].astype(np.float32)  # as a network's
        if not number:
            codes[0, 0, 0, 0] = np.nan
        done = commit_codes(reals, str(tmp_path / "reference"), shard | {key: codes})
        rejected, kept = rejected + done["rejected_images"], kept + sum(p["rows"] for p in done["parts"].values())
    assert (rejected, kept) == (1, 3)
    assert done is not None and finish_bundle(reals, str(tmp_path / "reference")).images == 3


@pytest.mark.parametrize("shares", [1, 3])
def test_a_share_of_a_reference_holds_its_own_codes_alone(
    plan: Plan, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(plan.reference_uri)
    key = SPACES[0].code_key
    whole = Codes(bundle, key)
    parts = len(bundle.parts[key])
    looked_at: list[int] = []
    monkeypatch.setattr("manifpt.reference.codes_of", lambda table: (looked_at.append(len(table)), codes_of(table))[1])
    found = [Codes(bundle, key, share, shares) for share in range(shares)]
    assert len(looked_at) == parts, "each part's codes are made once, in one share"
    assert np.array_equal(np.concatenate([codes.array for codes in found]), whole.array)
    assert all(codes.image_ids.equals(whole.image_ids) for codes in found)
    assert [codes.rows.start for codes in found] == np.cumsum([0, *(len(c.array) for c in found[:-1])]).tolist()
    assert held_codes(bundle, key) is held_codes(open_bundle(plan.reference_uri), key)


def test_a_bundle_of_more_rows_than_memory_holds_is_told(plan: Plan) -> None:
    bundle = open_bundle(plan.reference_uri)
    key = SPACES[0].code_key
    parts = [{**part, "rows": part["rows"] if n == 0 else 1 << 60} for n, part in enumerate(bundle.parts[key])]
    with pytest.raises(ConfigError, match="more than this machine's memory holds: raise --reference-shards"):
        Codes(replace(bundle, parts={key: parts}), key)


def with_denoiser(plan: Plan, uri: str) -> Plan:
    estimate = Estimate(name="denoiser", weights=uri, weights_sha256=denoiser_digest(uri))
    return replace(plan, estimate=estimate, spaces=SPACES[:1], inline=("rgb",))


def artifacts(folder: Path, space: str) -> dict[str, np.ndarray]:
    table = pq.read_table(folder / "artifacts" / space)
    return dict(zip(table["image_id"].to_pylist(), to_numpy(table["artifact"]), strict=True))


def embedded(tmp_path: Path, image_id: str, spec: SpaceSpec, folder: str = "queries") -> np.ndarray:
    image_hwc = decode((tmp_path / folder / image_id).read_bytes())
    return make_space(spec).embed(image_hwc.transpose(2, 0, 1)[None])[0]


class TestInARun:
    def test_a_denoiser_rejects_the_reals_that_it_learned(self, plan: Plan, denoiser: str, tmp_path: Path) -> None:
        plan = with_denoiser(plan, denoiser)
        run(plan, tmp_path / "run")
        assert sorted(artifacts(tmp_path / "run", "rgb")) == [
            "a/0.png", "a/1.png", "a/2.png", "a/copy.png", "real/out.png"
        ]  # fmt: skip
        shard = Projecting(plan)(travelled(Encoder(plan.spaces)(travelled(decode_rows(plan, 1)))))
        rows = shard["rejected"].to_pylist()
        assert [(row["image_id"], row["space"], row["reason"]) for row in rows] == [
            ("real/in.png", "rgb", "in_reference")
        ]
        assert shard["rows:rgb"]["twin"].to_pylist() == [None]

    @pytest.mark.parametrize("name", ["mean", "hull", "soft", "none", "blur"])
    def test_there_is_no_neighbor_where_x_star_is_none(self, plan: Plan, tmp_path: Path, name: str) -> None:
        estimate = Estimate(name=name, neighbors=4, sigma=0.5)
        plan = replace(plan, estimate=estimate, spaces=(SPACES[0], SPACES[2]), inline=("rgb", "ycbcr"))
        run(plan, tmp_path / "run")
        for space in ("rgb", "ycbcr"):
            table = pq.read_table(tmp_path / "run/artifacts" / space)
            assert table["neighbor_id"].null_count == len(table) == 6
            norm_b = np.linalg.norm(to_numpy(table["artifact"]).reshape(6, -1), axis=1)
            np.testing.assert_allclose(table["distance"].to_numpy(), norm_b, rtol=1e-4)
            twins = dict(zip(table["image_id"].to_pylist(), table["twin"].to_pylist(), strict=True))
            known = (None, None) if name in ("none", "blur") else ("copy", "left_out")
            assert (twins["a/copy.png"], twins["real/in.png"]) == known
        part = pq.read_schema(tmp_path / "run/artifacts/rgb/part-00000.parquet")
        assert json.loads(part.metadata[b"manifpt.estimate"]) == estimate.identity()

    def test_a_real_is_left_out_of_its_own_soft_projection(self, plan: Plan, tmp_path: Path) -> None:
        plan = replace(plan, estimate=Estimate(name="soft", sigma=0.1), spaces=SPACES[:1])
        run(plan, tmp_path / "run")
        rest_nd = np.stack([embedded(tmp_path, f"real/{n}.png", RGB, "reals") for n in range(10) if n != 5]).reshape(
            9, -1
        )
        x_d = embedded(tmp_path, "real/in.png", RGB).reshape(-1)
        covariance_dd = np.cov(rest_nd.T.astype(np.float64), bias=True) * 9 / 10
        expected_d = residual_of(x_d, rest_nd.mean(axis=0, dtype=np.float64), covariance_dd, 0.1)
        artifact_d = artifacts(tmp_path / "run", "rgb")["real/in.png"].reshape(-1)
        assert np.linalg.norm(artifact_d - expected_d) <= 1e-3 * np.linalg.norm(expected_d)

    def test_residual_first_is_the_spectrum_of_the_difference_of_pixels(self, plan: Plan, tmp_path: Path) -> None:
        plan = replace(plan, estimate=Estimate(residual_first=True))
        run(plan, tmp_path / "run")
        frequency = pq.read_table(tmp_path / "run/artifacts/frequency")
        among_pixels = pq.read_table(tmp_path / "run/artifacts/rgb")
        assert frequency["neighbor_id"].equals(among_pixels["neighbor_id"])
        assert frequency["distance"].equals(among_pixels["distance"])
        found = artifacts(tmp_path / "run", "frequency")
        for image_id, neighbor_id in zip(found, frequency["neighbor_id"].to_pylist(), strict=True):
            difference_chw = embedded(tmp_path, image_id, RGB) - embedded(tmp_path, neighbor_id, RGB, "reals")
            np.testing.assert_array_equal(found[image_id], log_spectrum(difference_chw[None])[0])
        plain = replace(plan, estimate=Estimate())
        run(plain, tmp_path / "plain")
        np.testing.assert_equal(artifacts(tmp_path / "plain", "rgb"), artifacts(tmp_path / "run", "rgb"))
        assert plain.digest != plan.digest

    def test_residual_first_in_parts_and_lazy_gives_the_same(self, plan: Plan, tmp_path: Path) -> None:
        plan = replace(plan, estimate=Estimate(residual_first=True))
        run(plan, tmp_path / "whole")
        run(replace(plan, reference_shards=2), tmp_path / "parts")
        assert committed(tmp_path / "whole") == committed(tmp_path / "parts")
        lazy = replace(plan, inline=())
        publish_plan(lazy, str(tmp_path / "lazy"))
        run(lazy, tmp_path / "lazy")
        for space in ("rgb", "frequency"):
            for table in read_artifacts(str(tmp_path / "lazy"), space):
                for image_id, artifact in zip(table["image_id"].to_pylist(), to_numpy(table["artifact"]), strict=True):
                    np.testing.assert_array_equal(artifact, artifacts(tmp_path / "whole", space)[image_id])

    def test_random_lazy_and_inline_agree(self, plan: Plan, tmp_path: Path) -> None:
        plan = replace(plan, estimate=Estimate(name="random"))
        run(plan, tmp_path / "inline")
        lazy = replace(plan, inline=())
        publish_plan(lazy, str(tmp_path / "lazy"))
        run(lazy, tmp_path / "lazy")
        for table in read_artifacts(str(tmp_path / "lazy"), "ycbcr"):
            for image_id, artifact in zip(table["image_id"].to_pylist(), to_numpy(table["artifact"]), strict=True):
                np.testing.assert_array_equal(artifact, artifacts(tmp_path / "inline", "ycbcr")[image_id])

    @pytest.mark.parametrize("name", ["nearest", "mean", "hull", "soft", "none", "random"])
    def test_a_shard_of_which_nothing_is_left(self, plan: Plan, tmp_path: Path, name: str) -> None:
        """In every space, also where numbers are computed from codes before they are projected."""
        for residual_first in (False, True):
            one = replace(plan, estimate=Estimate(name=name, sigma=0.5, residual_first=residual_first))
            shard = Encoder(one.spaces)(decode_rows(one, 0))
            shard["rows"] = shard["rows"].slice(0, 0)
            for key in [key for key in shard if key.startswith(("code:", "index:"))]:
                shard[key] = np.empty((0, 1), np.float32) if key.startswith("code:") else np.empty(0, np.int32)
            commit_artifacts(one, str(tmp_path / f"{name}-{residual_first}"), Projecting(one)(shard))
            for spec in SPACES:
                part = tmp_path / f"{name}-{residual_first}/artifacts/{spec.name}/part-00000.parquet"
                assert pq.read_metadata(part).num_rows == 0

    @pytest.mark.parametrize("name", ["blur", "denoiser"])
    def test_what_works_on_pixels_only(self, plan: Plan, denoiser: str, name: str) -> None:
        bundle = open_bundle(plan.reference_uri)
        frequency = Reference(Codes(bundle, SPACES[1].code_key), SPACES[1])
        estimate = Estimate(name=name, sigma=1.0, weights=denoiser, weights_sha256=denoiser_digest(denoiser))
        with pytest.raises(ConfigError, match=f"--estimate {name} works on pixels, not on the space 'frequency'"):
            make_projector(estimate, frequency)
        residual_first = replace(plan, estimate=replace(estimate, residual_first=True), spaces=SPACES[1:2])
        found = Projecting(residual_first)(Encoder(SPACES[1:2])(decode_rows(plan, 0)))
        assert len(found["artifact:frequency"]) == 4


class TestSpec:
    @pytest.mark.parametrize(
        ("estimate", "identity"),
        [
            (Estimate(), {"name": "nearest"}),
            (Estimate(neighbors=3, ridge=7.0, sigma=2.0, seed=9), {"name": "nearest"}),
            (Estimate(name="mean", neighbors=4, ridge=7.0), {"name": "mean", "neighbors": 4}),
            (Estimate(name="hull", neighbors=4), {"name": "hull", "neighbors": 4, "ridge": 0.1}),
            (Estimate(name="soft", sigma=0.01, neighbors=4), {"name": "soft", "sigma": 0.01}),
            (Estimate(name="denoiser", weights="/a", weights_sha256="f"), {"name": "denoiser", "weights_sha256": "f"}),
            (Estimate(name="none", sigma=1.0), {"name": "none"}),
            (Estimate(name="random", seed=3), {"name": "random", "seed": 3}),
            (Estimate(name="blur", sigma=1.5, residual_first=True),
             {"name": "blur", "sigma": 1.5, "residual_first": True}),
        ],
    )  # fmt: skip
    def test_identity_is_what_makes_the_numbers(self, estimate: Estimate, identity: dict[str, object]) -> None:
        assert estimate.identity() == identity
        assert Estimate.from_json(json.loads(json.dumps(identity))).identity() == identity

    def test_none_is_the_papers(self) -> None:
        assert Estimate.from_json(None) == Estimate()

    def test_only_one_image_is_a_sample(self) -> None:
        names = ("nearest", "random", "mean", "hull", "soft", "none", "blur", "denoiser")
        assert [Estimate(name=name, sigma=1.0).is_sample for name in names] == [True] * 2 + [False] * 6

    def test_labels_for_tables(self) -> None:
        assert Estimate(name="soft", sigma=0.01, residual_first=True).label == "soft sigma=0.01, residual first"
        assert Estimate(name="denoiser", weights_sha256="f").label == "denoiser"

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"name": "closest"}, "Unknown estimate 'closest'; known: nearest, mean"),
            ({"name": "mean", "neighbors": 0}, "--neighbors is 1 to 64, not 0"),
            ({"name": "hull", "neighbors": 65}, "--neighbors is 1 to 64, not 65"),
            ({"name": "soft"}, "--estimate soft needs a --sigma above 0, such as 0.01"),
            ({"name": "blur", "sigma": -1.0}, "--estimate blur needs a --sigma above 0, such as 1.0 px"),
            ({"name": "soft", "sigma": math.inf}, "--sigma above 0"),
            ({"name": "soft", "sigma": math.nan}, "--sigma above 0"),
            ({"name": "hull", "ridge": 0.0}, "--ridge is 1e-09 to 1e[+]09, not 0"),
            ({"name": "hull", "ridge": 1e-17}, "not 1e-17"),
            ({"name": "hull", "ridge": math.nan}, "not nan"),
        ],
    )  # fmt: skip
    def test_what_can_be_wrong(self, fields: dict[str, object], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            Estimate(**fields)  # type: ignore[arg-type]


def test_ycbcr_pixels_of_no_image() -> None:
    assert pixels(np.empty((0, 3, 8, 9), np.uint8), "ycbcr").shape == (0, 3, 8, 9)
