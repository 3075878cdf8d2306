"""Training without Ray: networks, the loop, its checkpoints, and how far to believe a probability."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from manifpt.attributor import training
from manifpt.attributor.calibration import fit_temperature, probabilities
from manifpt.attributor.networks import NETWORKS, AttributorNetwork, make_network
from manifpt.attributor.training import Epoch, Recipe, Trainer, check_network, class_weights, fit, from_arrays
from manifpt.errors import ConfigError
from manifpt.learning import State, load_state, save_state

SHAPE = (12,)
PLAIN = Recipe(epochs=6, batch_size=16, learning_rate=1e-2, warm_up=0.0, patience=0)


def toy(images: int = 90, seed: int = 0, sources: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Sources whose means differ: float16 [N, 12] and labels."""
    rng = np.random.default_rng(seed)
    label_n = np.arange(images) % sources
    artifacts = rng.standard_normal((images, *SHAPE)) + 3 * np.eye(sources, *SHAPE)[label_n]
    return artifacts.astype(np.float16), label_n


def network_of(shape: tuple[int, ...] = SHAPE, dropout: float = 0.0, seed: int = 0) -> AttributorNetwork:
    """As `head`, smaller; with as much dropout as asked for."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 16), nn.BatchNorm1d(16), nn.ReLU())
    return AttributorNetwork(shape, nn.Sequential(body, nn.Dropout(dropout)), 16, 3)


def trained(
    recipe: Recipe = PLAIN,
    state: State | None = None,
    stop_after: int | None = None,
    dropout: float = 0.0,
    on_epoch: Callable[[State], None] = lambda state: None,
    parallel: Callable[[nn.Module], nn.Module] = lambda network: network,
    reduce: training.Reduce = lambda sums: sums,
    share: tuple[int, int] = (0, 1),
) -> tuple[State, AttributorNetwork]:
    """`fit` on the toy, or on one worker's share of it."""
    rank, workers = share
    (artifacts, label_n), (held, held_label_n) = toy(), toy(60, seed=1)
    artifacts, label_n = artifacts[rank::workers], label_n[rank::workers]
    network = network_of(dropout=dropout)
    trainer = Trainer(network, recipe, torch.ones(3), len(label_n) // recipe.batch_size, "cpu", parallel, reduce)
    shuffled, whole = from_arrays(artifacts, label_n, recipe.batch_size, 7 + rank), from_arrays(held, held_label_n, 32)

    def until(now: State) -> None:
        on_epoch(now)
        if len(now.history) == stop_after:
            raise InterruptedError

    try:
        state = fit(trainer, shuffled, lambda: whole(0), state, until)
    except InterruptedError:
        pass
    return state or State({}, {}, {}), network


# --- networks ---


def test_small_is_the_released_codes_network() -> None:
    network = make_network("small", (3, 32, 32), 10)
    assert network.state_dict().keys() == make_network("released", (3, 32, 32), 10).state_dict().keys()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(270_000, rel=0.04)
    convolutions = [m for m in network.body.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [m.out_channels for m in convolutions] == [16] * 7 + [32] * 6 + [64] * 6
    assert [n for n, m in enumerate(convolutions) if m.stride == (2, 2)] == [7, 13]
    assert network.features(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("size_px", [28, 32, 64, 128])
def test_resnet50_keeps_a_map_of_four_by_four(size_px: int) -> None:
    seen = []
    with torch.device("meta"):
        network = make_network("resnet50", (3, size_px, size_px), 4)
        network.body.layer4.register_forward_hook(lambda module, given, found: seen.append(found.shape))
        assert network(torch.zeros(1, 3, size_px, size_px)).shape == (1, 4)
    assert seen[0][2] == seen[0][3] == 4


def test_head_takes_vectors_and_images() -> None:
    for shape in ((17,), (3, 8, 9)):
        network = make_network("head", shape, 5)
        assert network(torch.randn(2, *shape)).shape == (2, 5)
        assert network.features(torch.randn(2, *shape)).shape == (2, 512)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"head"}))
@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 8)])
def test_a_network_for_images_refuses_what_is_none(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="use head"):
        check_network(name, shape)


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="Unknown network 'large'; known: resnet50, small, released, head"):
        check_network("large", (3, 32, 32))


@settings(max_examples=50, deadline=None)
@given(constant=st.floats(0, 1), scale=st.sampled_from([1e-6, 1.0, 1e4]), seed=st.integers(0, 999))
def test_standardisation_bears_coordinates_that_hardly_vary(constant: float, scale: float, seed: int) -> None:
    """A black border has no variance in training; one other pixel there must not drown out all of the image."""
    rng = np.random.default_rng(seed)
    seen = scale * rng.standard_normal((200, 40)) * np.geomspace(1, 100, 40)
    dead_d = rng.random(40) < constant
    seen[:, dead_d] = scale * 0.5
    network = make_network("head", (40,), 2)
    network.standardize(torch.from_numpy(seen.mean(0)).float(), torch.from_numpy(seen.std(0)).float())
    standard = (torch.from_numpy(seen).float() - network.mean) / network.std
    assert torch.isfinite(standard).all()
    if not dead_d.all():
        assert torch.allclose(standard[:, ~dead_d].std(0), torch.ones(int((~dead_d).sum())), atol=0.02)
        unseen = (torch.full((40,), scale) - network.mean) / network.std
        assert (unseen[dead_d].abs() < 10).all()


# --- batches ---


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 90), size=st.integers(2, 40), seed=st.integers(0, 5))
def test_every_row_comes_once_an_epoch_but_the_remainder(count: int, size: int, seed: int) -> None:
    batches = from_arrays(*toy(count), size, seed)
    epochs = [[batch[2].tolist() for batch in batches(epoch)] for epoch in (1, 2, 1)]
    size = min(size, count)
    for epoch in epochs:
        rows = [row for batch in epoch for row in batch]
        assert len(set(rows)) == len(rows) == count - count % size
        assert {len(batch) for batch in epoch} == {size}, "batch normalisation can't take a single image"
    assert epochs[0] == epochs[2]
    if count > 12:
        assert epochs[0] != epochs[1], "each epoch has an order of its own"
        assert epochs[0] != [batch[2].tolist() for batch in from_arrays(*toy(count), size, seed + 1)(1)]
    whole = [row for batch in from_arrays(*toy(count), size)() for row in batch[2].tolist()]
    assert whole == list(range(count))


def test_batches_hold_what_belongs_together() -> None:
    artifacts, label_n = toy(40)
    for found, label_b, row_b in from_arrays(artifacts, label_n, 8, 3)(1):
        np.testing.assert_array_equal(found, artifacts[row_b])
        np.testing.assert_array_equal(label_b, label_n[row_b])
    assert not list(from_arrays(artifacts[:0], label_n[:0], 8)())


def test_weights_make_sources_count_the_same() -> None:
    label_n = np.array([0] * 6 + [1] * 3 + [2])
    weight_s = class_weights(label_n, 3).numpy()
    np.testing.assert_allclose(np.bincount(label_n, weight_s[label_n]), [10 / 3] * 3, rtol=1e-6)
    np.testing.assert_array_equal(class_weights(label_n, 3, balanced=False), [1, 1, 1])
    assert torch.isfinite(class_weights(label_n, 4)).all()


# --- the loop ---


def one_epoch(artifacts: np.ndarray, label_b: list[int], weight_s: list[float]) -> float:
    """The loss of a network that says nothing, on one batch."""
    network = make_network("head", artifacts.shape[1:], 2)
    torch.nn.init.zeros_(network.classifier.weight)
    torch.nn.init.zeros_(network.classifier.bias)
    trainer = Trainer(network, PLAIN, torch.tensor(weight_s), 1, "cpu")
    batch = torch.from_numpy(artifacts), torch.tensor(label_b), torch.arange(len(label_b))
    return trainer.train_epoch([batch], 1)[0]


def test_a_source_has_its_whole_weight_alone_in_a_batch() -> None:
    """By the sum of a batch's own weights, a small source alone in one weighed as much as a large one: with 8 workers
    its share of the loss was a third of what was said."""
    artifacts = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    assert one_epoch(artifacts, [1, 1, 1, 1], [0.5, 2.0]) == pytest.approx(2 * math.log(2))
    assert one_epoch(artifacts, [0, 0, 0, 1], [0.5, 2.0]) == pytest.approx((3 * 0.5 + 2) / 4 * math.log(2))


def test_a_training_that_diverged_says_so() -> None:
    with pytest.raises(ConfigError, match=r"The loss is nan in epoch 1: .* another --network or --seed"):
        one_epoch(np.full((4, 6), np.inf, np.float32), [0, 1, 0, 1], [1.0, 1.0])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_learns_what_can_be_told_apart(optimizer: str) -> None:
    state, network = trained(dataclasses.replace(PLAIN, optimizer=optimizer))
    assert state.history[-1].validation_accuracy > 0.9
    assert state.history[-1].loss < state.history[0].loss
    assert [epoch.epoch for epoch in state.history] == list(range(1, 7))
    assert {epoch.images for epoch in state.history} == {80}
    (held, held_label_n) = toy(60, seed=1)
    network.eval()
    assert (network(torch.from_numpy(held).float()).argmax(1).numpy() == held_label_n).mean() > 0.9


def test_early_stopping_stops_at_patience_and_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.5, 0.6, 0.9, 0.7, 0.9, 0.8, 0.9, 1.0])
    monkeypatch.setattr(Trainer, "measure", lambda self, batches: (0.0, next(accuracies)))
    weights: list[dict[str, torch.Tensor]] = []
    recipe = dataclasses.replace(PLAIN, epochs=8, patience=4)
    state, network = trained(recipe, on_epoch=lambda state: weights.append(dict(state.network)))
    assert len(state.history) == 7, "the best was the third; four more were no better"
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[2][name]), "an equal accuracy is no better one"
    assert any(not torch.equal(weights[2][name], weights[-1][name]) for name in weights[2])
    again, _ = trained(recipe, state)
    assert len(again.history) == 7, "what has stopped early doesn't go on"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("after", [1, 4, 6])
def test_a_resumed_training_gives_the_same_bits(tmp_path: Path, optimizer: str, after: int) -> None:
    recipe = dataclasses.replace(PLAIN, optimizer=optimizer, warm_up=0.3)
    whole, whole_network = trained(recipe)
    trained(recipe, stop_after=after, on_epoch=lambda state: save_state(state, tmp_path))
    resumed, network = trained(recipe, load_state(tmp_path, Epoch))
    assert [epoch.loss for epoch in resumed.history] == [epoch.loss for epoch in whole.history]
    for name, value in whole_network.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)
    for name, value in whole.network.items():
        assert torch.equal(resumed.network[name], value)


def test_with_dropout_the_same_bits_need_a_seed_an_epoch(tmp_path: Path) -> None:
    """What `worker.train` does; a checkpoint doesn't hold the state of the random numbers."""

    def losses(is_seeded: bool) -> list[list[float]]:
        def seed(state: State) -> None:
            save_state(state, tmp_path)
            if is_seeded:
                torch.manual_seed(len(state.history))

        whole, _ = trained(dropout=0.5, on_epoch=seed)
        trained(dropout=0.5, stop_after=3, on_epoch=seed)
        torch.manual_seed(3 if is_seeded else 999)
        state, network = load_state(tmp_path, Epoch), network_of(dropout=0.5)
        torch.manual_seed(3 if is_seeded else 999)
        trainer = Trainer(network, PLAIN, torch.ones(3), 5)
        resumed = fit(trainer, from_arrays(*toy(), 16, 7), lambda: from_arrays(*toy(60, 1), 32)(0), state, seed)
        return [[epoch.loss for epoch in of.history] for of in (whole, resumed)]

    whole, resumed = losses(is_seeded=True)
    assert whole == resumed
    whole, resumed = losses(is_seeded=False)
    assert whole[:3] == resumed[:3] and whole[3:] != resumed[3:]


def rates(recipe: Recipe, steps: int) -> list[float]:
    """The learning rate of every step."""
    trainer = Trainer(network_of(), recipe, torch.ones(3), steps)
    found = []
    for epoch in range(1, recipe.epochs + 1):
        for step in range(steps):
            trainer._set_learning_rate(epoch - 1 + step / steps)
            found.append(trainer.optimizer.param_groups[0]["lr"])
    return found


def test_cosine_warms_up_and_falls_to_zero() -> None:
    found = rates(Recipe(learning_rate=2.0, warm_up=0.1, epochs=10), steps=10)
    np.testing.assert_allclose(found[:10], 0.2 * np.arange(1, 11), err_msg="a tenth of all steps, from more than 0 up")
    expected = 2.0 * 0.5 * (1 + np.cos(np.pi * (np.arange(10, 100) - 10) / 90))
    np.testing.assert_allclose(found[10:], expected)
    assert found[-1] < 0.001
    assert rates(Recipe(learning_rate=2.0, warm_up=0.0, epochs=1), steps=1) == [2.0]


def test_steps_take_a_tenth_at_each_milestone() -> None:
    found = rates(dataclasses.replace(training.RECIPES["released"], learning_rate=1.0), steps=2)
    np.testing.assert_allclose(found, [1.0] * 200 + [0.1] * 100 + [0.01] * 60)


def test_workers_end_an_epoch_with_the_same_network() -> None:
    """Gradients are shared by DDP, but what batch normalisation has seen is each worker's own."""
    workers = 2
    barrier, sums = threading.Barrier(workers, timeout=60), {}
    found: dict[int, list[State]] = {rank: [] for rank in range(workers)}

    def reduce_of(rank: int) -> training.Reduce:
        def reduce(own: np.ndarray) -> np.ndarray:
            sums[rank] = np.asarray(own, np.float64)
            barrier.wait()
            total = sum(sums.values())
            barrier.wait()
            return np.asarray(total)

        return reduce

    def run(rank: int) -> None:
        recipe = dataclasses.replace(PLAIN, epochs=1, learning_rate=0.0, batch_size=15)
        found[rank].append(trained(recipe, reduce=reduce_of(rank), share=(rank, workers))[0])

    torch.manual_seed(0)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, other = (found[rank][0] for rank in range(workers))
    seen = [name for name in one.best if "running_" in name]
    assert len(seen) == 2
    for name in seen:
        assert torch.equal(one.best[name], other.best[name])
    assert one.history[0].images == 90 and one.history[0].validation_accuracy == other.history[0].validation_accuracy


def test_validation_counts_every_source_the_same() -> None:
    trainer = Trainer(network_of(), PLAIN, torch.ones(3), 1)
    with torch.no_grad():
        trainer.network.classifier.weight.zero_()
        trainer.network.classifier.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))  # says 0, always
    artifacts, label_n = toy(30)[0], np.array([0] * 27 + [1] * 3)
    loss, accuracy = trainer.measure(from_arrays(artifacts, label_n, 8)())
    assert accuracy == 0.5
    of_sources = [F.cross_entropy(torch.tensor([[1.0, 0, 0]]), torch.tensor([label])) for label in (0, 1)]
    assert loss == pytest.approx(float(sum(of_sources) / 2), rel=1e-5)


# --- checkpoints ---


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    state, _ = trained(dataclasses.replace(PLAIN, epochs=2))
    save_state(state, tmp_path)
    found = load_state(tmp_path, Epoch)
    assert found.history == state.history
    for kind in ("network", "best"):
        mine, theirs = getattr(found, kind), getattr(state, kind)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(path.suffix in (".json", ".safetensors") for path in tmp_path.iterdir()), "no pickle"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.safetensors", cut),
        ("state.safetensors", flip),
        ("state.safetensors", Path.unlink),
        ("state.json", cut),
        ("state.json", Path.unlink),
        ("state.json", lambda path: path.write_text("{}")),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", lambda path: path.write_text(path.read_text().replace('"epoch": 1', '"epoch": 2'))),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str, damage: Callable[[Path], object]) -> None:
    save_state(trained(dataclasses.replace(PLAIN, epochs=1))[0], tmp_path)
    damage(tmp_path / name)
    with pytest.raises(ConfigError, match="checkpoint .* is damaged"):
        load_state(tmp_path, Epoch)


# --- calibration ---


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_known_temperature_is_found(temperature: float) -> None:
    """Labels drawn from softmax(z); a network that says T z is too sure of itself by T."""
    rng = np.random.default_rng(0)
    true_ns = 1.5 * rng.standard_normal((20_000, 4))
    label_n = np.array([rng.choice(4, p=p) for p in probabilities(true_ns, 1.0)])
    found = fit_temperature((temperature * true_ns).astype(np.float32), label_n)
    assert found == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("images", [20, 100, 1000])
def test_images_that_are_all_told_rightly_make_nobody_sure(images: int) -> None:
    """The least cross-entropy has none: T fell to its bound, and made what is wrong on other images certain."""
    rng, label_n = np.random.default_rng(0), np.arange(images) % 4
    logits_ns = rng.standard_normal((images, 4)).astype(np.float32)
    logits_ns[np.arange(images), label_n] = logits_ns.max(axis=1) + rng.gamma(2, 1.0, images)
    found_ns = probabilities(logits_ns, fit_temperature(logits_ns, label_n))
    wrong = 1 - found_ns.max(axis=1).mean()
    assert 0.1 / (images + 2) < wrong < 10 / (images + 2)


@given(seed=st.integers(0, 99), temperature=st.floats(0.05, 20))
def test_a_temperature_changes_no_attribution(seed: int, temperature: float) -> None:
    logits_ns = np.random.default_rng(seed).standard_normal((20, 5)).astype(np.float32)
    found = probabilities(logits_ns, temperature)
    np.testing.assert_array_equal(found.argmax(1), logits_ns.argmax(1))
    np.testing.assert_allclose(found.sum(1), 1)


def test_the_temperature_is_of_the_images_that_come() -> None:
    """Of a source that is easy and one that is hard, the one with more images decides how sure one may be."""
    rng = np.random.default_rng(0)
    label_n = np.repeat([0, 1], [9_000, 1_000])
    is_right_n = rng.random(10_000) < np.where(label_n == 0, 0.95, 0.55)
    logits_ns = np.zeros((10_000, 2), np.float32)
    logits_ns[np.arange(10_000), np.where(is_right_n, label_n, 1 - label_n)] = 5
    found_ns = probabilities(logits_ns, fit_temperature(logits_ns, label_n))
    assert found_ns.max(axis=1).mean() == pytest.approx(is_right_n.mean(), abs=0.005)


def test_a_loss_is_in_the_history_as_json(tmp_path: Path) -> None:
    state, _ = trained(dataclasses.replace(PLAIN, epochs=1))
    save_state(state, tmp_path)
    (epoch,) = json.loads((tmp_path / "state.json").read_text())["history"]
    assert epoch == dataclasses.asdict(state.history[0])


def test_precision_of_training_changes_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict must be the same on a GPU, which trains in bfloat16, and on a CPU."""
    torch.manual_seed(0)
    network = make_network("small", (3, 16, 16), 2)
    artifacts, label_n = torch.randn(64, 3, 16, 16).numpy(), np.arange(64) % 2
    said = [next(iter(training.outputs_of(network, from_arrays(artifacts, label_n, 64)(0)))).logits_bs]
    monkeypatch.setattr(training, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    said.append(next(iter(training.outputs_of(network, from_arrays(artifacts, label_n, 64)(0)))).logits_bs)
    np.testing.assert_array_equal(*said)
