"""On an accelerator: the same neighbours as brute force, the same features as the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from manifpt.attributor.networks import make_network
from manifpt.attributor.training import Recipe, Trainer, class_weights, fit, from_arrays, outputs_of
from manifpt.projection import NearestProjector
from manifpt.search import Choice
from manifpt.spaces import make_space, spec_of
from manifpt.spaces.weights import resolve_weights
from tests.helpers.weights import ARCHITECTURE, lite0_safetensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_neighbors_are_those_of_float64_brute_force() -> None:
    """Of a reference large enough to be searched on the device."""
    rng = np.random.default_rng(0)
    reference_nd = rng.standard_normal((5000, 2048)).astype(np.float32)
    query_bd = rng.standard_normal((256, 2048)).astype(np.float32)
    found = NearestProjector(lambda rows: reference_nd[rows], *reference_nd.shape).project(query_bd)
    nearest_b = [((reference_nd.astype(np.float64) - x_d) ** 2).sum(axis=1).argmin() for x_d in query_bd]
    assert (found.neighbor_b == nearest_b).all()


@pytest.mark.parametrize(("dims", "noise"), [(128, 0.02), (3072, 0.02), (128, 1.0)])
def test_pruned_search_on_the_device_is_exact(dims: int, noise: float) -> None:
    """Few axes, all of them, and what no bound helps with."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((40, 3072)).astype(np.float32)

    def images(count: int) -> np.ndarray:
        mixed = rng.standard_normal((count, 40)).astype(np.float32) @ basis
        return mixed + noise * rng.standard_normal((count, 3072)).astype(np.float32)

    reference_nd, query_bd = images(5000), images(300)
    choice = Choice("pruned", dims)
    found = NearestProjector(lambda rows: reference_nd[rows], *reference_nd.shape, choice=choice).project(query_bd)
    nearest_b = [((reference_nd.astype(np.float64) - x_d) ** 2).sum(axis=1).argmin() for x_d in query_bd]
    assert (found.neighbor_b == nearest_b).all()


def test_features_are_those_of_the_cpu(tmp_path: Path) -> None:
    path = lite0_safetensors(tmp_path / "lite0.safetensors")
    spec = resolve_weights(replace(spec_of("lite0", {"lite0": {"architecture": ARCHITECTURE}}), weights=str(path)))
    views_bchw = np.random.default_rng(0).integers(0, 256, (32, 3, 224, 224), dtype=np.uint8)
    on_cpu, on_gpu = (make_space(spec, 2, device).encode(views_bchw) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


def test_an_attributor_learns_on_the_device_and_says_the_same_on_the_cpu() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    label_n = np.arange(256) % 2
    artifacts = rng.standard_normal((256, 3, 32, 32)).astype(np.float16)
    artifacts[label_n == 1, :, ::2] += 1
    network = make_network("small", (3, 32, 32), 2)
    recipe = Recipe(epochs=4, learning_rate=3e-3)
    trainer = Trainer(network, recipe, class_weights(label_n, 2), 4, "cuda")
    state = fit(trainer, from_arrays(artifacts, label_n, 64, seed=0), lambda: from_arrays(artifacts, label_n, 64)(0))
    assert max(epoch.validation_accuracy for epoch in state.history) > 0.95
    batches = list(from_arrays(artifacts, label_n, 64)(0))
    on_gpu = np.concatenate([found.logits_bs for found in outputs_of(network, batches, "cuda")])
    on_cpu = np.concatenate([found.logits_bs for found in outputs_of(network.cpu(), batches)])
    assert (on_gpu.argmax(1) == on_cpu.argmax(1)).mean() > 0.99
