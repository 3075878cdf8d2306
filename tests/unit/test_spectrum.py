"""Rings of an artifact's power: against a plain transform, and what they leave out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt.attributor.spectrum import spectrum_of, spectrum_size


def by_hand(artifact_hw: np.ndarray) -> np.ndarray:
    """Mean power in twelve rings of equal width, of the whole complex transform; rings without a frequency left out."""
    power_hw = np.abs(np.fft.fft2(artifact_hw.astype(np.float64), norm="ortho")) ** 2
    radius_hw = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in artifact_hw.shape), indexing="ij"))
    ring_hw = np.minimum((radius_hw / max(radius_hw.max(), 1e-30) * 12).astype(int), 11)
    return np.array([power_hw[ring_hw == ring].mean() for ring in range(12) if (ring_hw == ring).any()])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), height_px=st.integers(1, 40), width_px=st.integers(1, 40))
def test_rings_hold_the_mean_power_of_their_frequencies(seed: int, height_px: int, width_px: int) -> None:
    artifacts = np.random.default_rng(seed).standard_normal((2, 3, height_px, width_px)).astype(np.float32)
    found_bk = spectrum_of(torch.from_numpy(artifacts)).numpy()
    assert found_bk.shape == (2, spectrum_size((3, height_px, width_px))) and found_bk.dtype == np.float32
    expected_bk = np.stack([np.concatenate([by_hand(channel) for channel in artifact]) for artifact in artifacts])
    np.testing.assert_allclose(np.exp(found_bk), expected_bk, rtol=2e-4, atol=1e-6)


def test_a_wave_lies_in_its_ring_wherever_it_starts() -> None:
    column_w = np.arange(32)
    waves = np.stack([np.cos(2 * np.pi * (8 * column_w + start) / 32) for start in (0, 5)])
    artifacts = np.broadcast_to(waves[:, None, None], (2, 1, 32, 32)).astype(np.float32)
    one_k, other_k = spectrum_of(torch.from_numpy(artifacts.copy())).numpy()
    assert one_k.argmax() == other_k.argmax() == int(0.25 / np.hypot(0.5, 0.5) * 12)
    assert one_k.max() == pytest.approx(other_k.max(), abs=1e-4)


def test_nothing_has_a_spectrum_and_a_vector_has_one_number() -> None:
    assert np.isfinite(spectrum_of(torch.zeros(2, 3, 8, 8)).numpy()).all()
    found_bk = spectrum_of(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).numpy()
    assert found_bk.shape == (2, spectrum_size((2,))) == (2, 1)
    assert found_bk[0, 0] == pytest.approx(np.log(12.5)) and np.isfinite(found_bk[1, 0])


def test_an_image_alone_and_in_a_batch_has_one_spectrum() -> None:
    artifacts = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    alone_bk = torch.cat([spectrum_of(artifact[None]) for artifact in artifacts])
    np.testing.assert_allclose(spectrum_of(artifacts).numpy(), alone_bk.numpy(), rtol=1e-5, atol=1e-5)
