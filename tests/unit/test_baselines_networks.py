"""The learned baselines' networks and the loop that trains them."""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models import resnet50

from manifpt.baselines import make_baseline
from manifpt.baselines.marra18 import _Block, xception
from manifpt.baselines.nataraj19 import Nataraj19
from manifpt.baselines.network import Training, _batches
from manifpt.baselines.wang20 import WEIGHTS, Wang20, blur_jpeg
from manifpt.baselines.yu19 import Yu19, patch_classifier
from manifpt.errors import ConfigError
from manifpt.spaces import weights
from tests.unit.test_baselines import two_sources


def test_yu19_is_the_published_network_written_out() -> None:
    """Reflect padding, weights times sqrt(2 / fan in), leaky ReLU 0.2, mean of 2x2; the last layer 1 / sqrt(fan in)."""
    torch.manual_seed(0)
    sources, network = 3, patch_classifier(16, 3)
    state = {key: value.double().numpy() + 0.01 for key, value in network.state_dict().items()}
    network.load_state_dict({key: torch.from_numpy(value).float() for key, value in state.items()})
    image_chw = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16))

    x = image_chw
    for side_px in (16, 8, 4):
        for name in ("conv0", "conv1") if side_px > 4 else ("conv0",):
            weight, bias = (state[f"body.{side_px}-{name}.{part}"] for part in ("weight", "bias"))
            weight = weight * np.sqrt(2 / (9 * x.shape[0]))
            out = np.zeros((len(weight), side_px, side_px))
            for i in range(side_px):
                for j in range(side_px):
                    total = bias.copy()
                    for di in range(3):
                        for dj in range(3):
                            # -1 is 1 in a mirror, and side is side - 2
                            row, column = (
                                abs(k) if k < side_px else 2 * side_px - 2 - k for k in (i + di - 1, j + dj - 1)
                            )
                            total += np.einsum("oc,c->o", weight[:, :, di, dj], x[:, row, column])
                    out[:, i, j] = total
            x = np.where(out > 0, out, 0.2 * out)
        if side_px > 4:
            x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    dense = np.einsum("of,f->o", state["body.4-dense.weight"], x.reshape(-1)) * np.sqrt(2 / x.size)
    dense = dense + state["body.4-dense.bias"]
    features = np.where(dense > 0, dense, 0.2 * dense)
    logits = np.einsum("of,f->o", state["head.weight"], features) / np.sqrt(len(features)) + state["head.bias"]

    with torch.no_grad():
        found = network.body(torch.from_numpy(image_chw[None]).float())
        np.testing.assert_allclose(found[0].numpy(), features, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(network.head(found)[0].numpy(), logits, rtol=1e-4, atol=1e-5)
    assert logits.shape == (sources,)


@pytest.mark.parametrize(
    ("side_px", "channels"),
    [
        (256, [8, 16, 16, 32, 32, 64, 64, 128, 128, 256, 256, 512, 512]),
        (128, [16, 32, 32, 64, 64, 128, 128, 256, 256, 512, 512]),
        (64, [32, 64, 64, 128, 128, 256, 256, 512, 512]),
        (32, [64, 128, 128, 256, 256, 512, 512]),
    ],
)
def test_yu19_has_the_published_channels(side_px: int, channels: list[int]) -> None:
    with torch.device("meta"):
        state = patch_classifier(side_px, 5).state_dict()
    assert [value.shape[0] for key, value in state.items() if "conv" in key and "weight" in key] == channels
    assert state["body.4-dense.weight"].shape == (512, 8192)


def test_yu19_sees_minus_one_to_one_and_mirrors_in_training_only() -> None:
    images_bchw = np.zeros((200, 3, 32, 32), np.uint8)
    images_bchw[..., :16] = 255
    baseline = Yu19(2, (32, 32))
    plain = baseline._inputs(images_bchw)
    assert plain.min() == -1 and plain.max() == 1 and (plain[..., 0] == 1).all()
    first = baseline._augmented(images_bchw, np.random.default_rng(0))[:, 0, 0, 0]
    assert 70 < int((first == 1).sum()) < 130


@pytest.mark.parametrize(("side_px", "middle_px"), [(32, 8), (64, 8), (128, 8), (256, 16)])
def test_the_middle_flow_of_xception_sees_enough_pixels(side_px: int, middle_px: int) -> None:
    seen = []
    with torch.device("meta"):
        network = xception(side_px, 2).eval()
        for layer in network.body:
            if isinstance(layer, _Block) and isinstance(layer.shortcut, torch.nn.Identity):
                layer.register_forward_hook(lambda layer, inputs, output: seen.append(tuple(output.shape[1:])))
        network(torch.zeros(1, 3, side_px, side_px))
    assert seen == [(728, middle_px, middle_px)] * 8


@pytest.mark.parametrize(("side_px", "before_blocks_px"), [(32, 32), (64, 64), (128, 64), (256, 128)])
def test_xception_halves_small_images_late(side_px: int, before_blocks_px: int) -> None:
    with torch.device("meta"):
        first = xception(side_px, 2).body[:6]
        assert isinstance(first[5], torch.nn.ReLU)
        assert first(torch.zeros(2, 3, side_px, side_px)).shape == (2, 64, before_blocks_px, before_blocks_px)


def test_xception_has_as_many_weights_as_the_original() -> None:
    """20,806,952 without the last layer, as Keras counts the trainable ones of its Xception."""
    with torch.device("meta"):
        network = xception(256, 2)
    assert sum(weight.numel() for weight in network.body.parameters()) == 20_806_952


def test_blur_and_jpeg_come_with_their_probabilities() -> None:
    rng = np.random.default_rng(0)
    image_chw = rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)
    np.testing.assert_array_equal(blur_jpeg(image_chw, 0, 0, rng), image_chw)
    blurred = blur_jpeg(image_chw, 1, 0, rng)
    assert blurred.dtype == np.uint8 and blurred.std() < image_chw.std()
    compressed = blur_jpeg(image_chw, 0, 1, rng)
    assert compressed.shape == image_chw.shape and (compressed != image_chw).any()
    changed = sum((blur_jpeg(image_chw, 0.5, 0.5, rng) != image_chw).any() for _ in range(100))
    assert 60 < changed < 90  # 3 of 4


def test_wang20_crops_and_never_resizes() -> None:
    baseline = Wang20(2, (256, 256), pretrained=False)
    images_bchw = np.arange(256, dtype=np.uint8).reshape(1, 1, 1, 256).repeat(3, 1).repeat(256, 2)
    inputs = baseline._inputs(images_bchw)
    assert inputs.shape == (1, 3, 224, 224)
    red = inputs[0, 0, 0] * 0.229 * 255 + 0.485 * 255
    np.testing.assert_allclose(red, np.arange(16, 240), atol=1e-3)
    assert baseline._augmented(images_bchw, np.random.default_rng(0)).shape == (1, 3, 224, 224)


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MANIFPT_WEIGHTS", str(tmp_path))
    return tmp_path / weights.REGISTRY[WEIGHTS].file


def test_wang20_without_weights_says_that_it_starts_from_scratch(no_cache: Path) -> None:
    assert "from scratch" in Wang20(2, (32, 32)).notes[-1]


def test_wang20_refuses_weights_that_are_not_the_published_ones(no_cache: Path) -> None:
    no_cache.write_bytes(b"something else")
    images_bchw, label_b = two_sources(4, 32, 0)
    with pytest.raises(ConfigError, match="refused"):
        Wang20(2, (32, 32)).fit(images_bchw, label_b, images_bchw, label_b)


def test_wang20_starts_from_the_weights_at_hand(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = resnet50(weights=None).state_dict()
    torch.save(state, no_cache)
    digest = hashlib.sha256(no_cache.read_bytes()).hexdigest()
    monkeypatch.setitem(
        weights.REGISTRY, WEIGHTS, weights.Published(no_cache.name, "https://nowhere.invalid/weights", digest)
    )
    baseline = Wang20(2, (32, 32))
    assert baseline.notes == ("ImageNet weights",)
    network = baseline._build()
    for key, value in network.body.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert network.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    with torch.no_grad():
        features_bf = network.eval().body(baseline._inputs(two_sources(2, 32, 0)[0]))
    assert features_bf.shape == (2, 2048) and features_bf.isfinite().all()


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 100))
@settings(max_examples=30)
def test_batches_are_full_and_show_every_image_once_an_epoch(count: int, batch: int, seed: int) -> None:
    rows = list(islice(_batches(count, batch, np.random.default_rng(seed)), 3 * count))
    assert {len(row_b) for row_b in rows} == {batch}
    seen = np.concatenate(rows).reshape(-1, count)
    assert (np.sort(seen, axis=1) == np.arange(count)).all()


def test_training_ends_when_validation_stops_to_gain() -> None:
    images_bchw, label_b = two_sources(16, 32, 0)
    baseline = make_baseline("nataraj19", 2, (32, 32), 0, levels=8, budget_images=1600, batch=16, patience=3,
                             learning_rate=0.0)  # fmt: skip
    baseline.fit(images_bchw, label_b, images_bchw, label_b)
    assert [images for images, _ in baseline.history] == [160, 320, 480, 640]  # the first one gains
    assert baseline.images_seen == 640


class Scripted(Nataraj19):
    """Finds the accuracies that it is told, and remembers the weights that it had."""

    def _evaluate(self, network: torch.nn.Module, *unused: object) -> tuple[float, float]:
        self.states.append({key: value.clone() for key, value in network.state_dict().items()})
        return self.script[len(self.states) - 1]


@pytest.mark.parametrize(
    ("script", "kept"),
    [
        ([(0.5, -1.0), (0.9, -1.0), (0.6, -0.1), (0.6, -0.1), (0.7, -0.1)], 1),  # the most accurate, not the last
        ([(0.5, -1.0), (0.9, -1.0), (0.9, -0.5), (0.9, -0.7), (0.9, -0.6)], 2),  # of equals the one with the least loss
    ],
)
def test_the_best_state_on_validation_is_kept(script: list[tuple[float, float]], kept: int) -> None:
    images_bchw, label_b = two_sources(8, 32, 0)
    baseline = Scripted(2, (32, 32), levels=8, budget_images=800, batch=8, patience=3)
    baseline.script, baseline.states = script, []
    baseline.fit(images_bchw, label_b, images_bchw, label_b)
    assert len(baseline.states) == 5 and "ended by validation" in baseline.notes[0]
    for key, value in baseline._network.state_dict().items():
        assert torch.equal(value, baseline.states[kept][key])
    assert not torch.equal(baseline.states[kept]["head.weight"], baseline.states[4]["head.weight"])


@pytest.mark.parametrize(
    ("script", "images", "kept", "is_again"),
    [
        ([0.5, 0.5, 0.25, 0.8], [8, 16], 3, True),  # one source for everything, then not
        ([0.5, 0.5, 0.25, 0.25], [8, 16], 0, False),  # no better: the rate that is known
        ([0.75, 0.25], [8, 16], 0, False),  # it has learned something
    ],
)
def test_a_network_that_names_one_source_for_everything_gets_a_second_chance(
    script: list[float], images: list[int], kept: int, is_again: bool
) -> None:
    images_bchw, label_b = two_sources(8, 32, 0)
    baseline = Scripted(2, (32, 32), levels=8, budget_images=16, batch=8)
    baseline.script, baseline.states = [(accuracy, -1.0) for accuracy in script], []
    baseline.fit(images_bchw, label_b, images_bchw, label_b)
    assert len(baseline.states) == len(script) and [seen for seen, _ in baseline.history] == images
    for key, value in baseline._network.state_dict().items():
        assert torch.equal(value, baseline.states[kept][key])
    assert ("trained again at a tenth of the learning rate" in baseline.notes) == is_again


def test_a_rare_source_weighs_as_much_as_a_common_one() -> None:
    """With nothing to learn from the images, the answer is the prior of the loss: equal, not 9 to 1."""
    images_bchw = np.full((40, 3, 32, 32), 100, np.uint8)
    label_b = (np.arange(40) % 10 == 0).astype(np.int64)
    baseline = make_baseline("nataraj19", 2, (32, 32), 0, levels=8, budget_images=1200, batch=40, learning_rate=3e-3)
    baseline.fit(images_bchw, label_b, images_bchw[:2], np.array([0, 1]))
    score = baseline.predict(images_bchw[:1])[0]
    assert abs(score[0] - score[1]) < 0.5  # log 9 = 2.2


def test_the_process_is_left_as_it_was() -> None:
    images_bchw, label_b = two_sources(8, 32, 0)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    baseline = make_baseline("nataraj19", 2, (32, 32), 0, threads=2, levels=8, budget_images=8, batch=8)
    baseline.fit(images_bchw, label_b, images_bchw, label_b)
    assert torch.rand(1) == expected and torch.get_num_threads() == threads


def test_optimizers_get_their_settings() -> None:
    network = torch.nn.Linear(2, 2)
    adam = Training(betas=(0.0, 0.99), learning_rate=0.5).make_optimizer(network)
    assert adam.defaults["betas"] == (0.0, 0.99) and adam.defaults["lr"] == 0.5
    sgd = Training(optimizer="sgd", momentum=0.9, weight_decay=1e-4).make_optimizer(network)
    assert isinstance(sgd, torch.optim.SGD) and (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.9, 1e-4)
    with pytest.raises(ConfigError, match="adam or sgd, not 'adamw'"):
        Training(optimizer="adamw").make_optimizer(network)
