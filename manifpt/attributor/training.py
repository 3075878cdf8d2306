"""Training an attributor: the loop, without Ray. `manifpt.attributor.worker` runs it in workers.

Legend: B artifacts of a batch, S sources.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from manifpt.attributor.networks import AttributorNetwork, make_network
from manifpt.attributor.outputs import Outputs
from manifpt.attributor.spectrum import spectrum_of
from manifpt.errors import ConfigError
from manifpt.learning import State, autocast, cosine
from manifpt.streaming import shuffled

__all__ = [
    "RECIPES",
    "Batch",
    "Diverged",
    "Epoch",
    "Recipe",
    "Trainer",
    "check_network",
    "class_weights",
    "fit",
    "from_arrays",
    "outputs_of",
    "rows_at_once",
]

_EVALUATION_BATCH = 512
_EVALUATION_NUMBERS = 1 << 23  # of them: 42 artifacts of 256 px

# Artifacts [B, ...] in any float format, source numbers int64 [B], row numbers int64 [B].
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a network is trained. The learning rate is for the whole batch, however many workers share it.

    Attributes:
        optimizer: `adamw` or `sgd`.
        learning_rate: at its highest.
        schedule: `cosine` to zero, after a warm-up of `warm_up` of all steps; or `steps`: a tenth from each of
            `milestones` on, which are parts of all epochs.
        epochs: at most.
        batch_size: over all workers.
        patience: epochs without a better validation accuracy before training ends; 0: never early.
        label_smoothing: of the cross-entropy.
        balanced: whether every source counts the same, however many images it has.
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warm_up: float = 0.05
    milestones: tuple[float, ...] = ()
    epochs: int = 40
    batch_size: int = 64
    patience: int = 10
    label_smoothing: float = 0.0
    balanced: bool = True


RECIPES = {
    "resnet50": Recipe(learning_rate=3e-4),
    "small": Recipe(learning_rate=2e-3),
    # The released code's: SGD, a tenth at epochs 100 and 150 of 180, batches of 36, no early stop. With fewer epochs it
    # often stays at chance on raw pixels and nearest-real artifacts, so `small` is the default of short budgets.
    "released": Recipe(
        optimizer="sgd", learning_rate=0.1, weight_decay=1e-4, schedule="steps", warm_up=0.0,
        milestones=(100 / 180, 150 / 180), epochs=180, batch_size=36, patience=0,
    ),
    "head": Recipe(learning_rate=1e-3, weight_decay=0.1, epochs=60, batch_size=128, patience=15),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch showed: a line of `metrics.jsonl`.

    Attributes:
        epoch: from 1.
        loss, accuracy: of the training artifacts, while the weights changed.
        validation_accuracy: the mean of every source's, so that a large source counts no more than a small one.
        images_per_s: of training, over all workers.
        seconds: with validation.
    """

    epoch: int
    loss: float
    accuracy: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    images: int
    images_per_s: float
    seconds: float


class Diverged(ConfigError):
    """A loss that is no finite number."""


NOT_FINITE = "Artifacts hold numbers that are not finite: compute them again."
Reduce = Callable[[np.ndarray], np.ndarray]  # the sum over all workers


class Trainer:
    """A network, its optimiser, and one epoch of both."""

    def __init__(
        self,
        network: AttributorNetwork,
        recipe: Recipe,
        weight_s: torch.Tensor,
        steps: int,
        device: str = "cpu",
        parallel: Callable[[nn.Module], nn.Module] = lambda network: network,
        reduce: Reduce = lambda sums: sums,
    ) -> None:
        """Args:
        network: standardised.
        recipe: it.
        weight_s: float [S], of each source in the loss.
        steps: an epoch has, on each worker.
        device: `cpu` or `cuda`.
        parallel: wraps the network so that workers share gradients.
        reduce: sums over workers.
        """
        self.network = network.to(device)
        self.recipe, self.device, self._reduce, self._steps = recipe, device, reduce, steps
        self._parallel = parallel(self.network)
        self._weight_s = weight_s.to(device)
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        if recipe.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters, recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
            )
        else:
            self.optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.learning_rate = recipe.learning_rate

    def train_epoch(self, batches: Iterable[Batch], epoch: int) -> tuple[float, float, int, float]:
        """One pass. Returns loss, accuracy, images over all workers, and seconds."""
        self._parallel.train()
        begin = time.perf_counter()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for step, (artifacts, label_b, _) in enumerate(batches):
            self._set_learning_rate((epoch - 1) + step / max(1, self._steps))
            artifacts, label_b = self._moved(artifacts), label_b.to(self.device, non_blocking=True)
            with autocast(self.device):
                logits_bs = self._parallel(artifacts)
            # The mean over images, not over their weights: a batch holds few of a small source, or none, and by the sum
            # of its own weights each would count as if all sources were in it.
            loss = F.cross_entropy(
                logits_bs.float(),
                label_b,
                self._weight_s,
                reduction="none",
                label_smoothing=self.recipe.label_smoothing,
            ).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            right = (logits_bs.detach().argmax(1) == label_b).sum()
            sums += torch.stack([loss.detach().double() * len(label_b), right.double(), right.new_tensor(len(label_b))])
        self._share_statistics()
        loss_sum, right_sum, images = self._reduce(sums.cpu().numpy())
        images = max(images, 1)
        if not math.isfinite(loss_sum):
            raise Diverged(
                f"The loss is {loss_sum} in epoch {epoch}: look at the artifacts' norms, and try another --network or "
                f"--seed."
            )
        return float(loss_sum / images), float(right_sum / images), int(images), time.perf_counter() - begin

    def _share_statistics(self) -> None:
        """Gives all workers the mean of what their batch normalisations have seen. Each has its own after an epoch, and
        they would measure, and predict with, networks that differ from the one that is saved."""
        seen = [buffer for name, buffer in self.network.named_buffers() if "running_" in name]
        if seen:
            own = torch.cat([buffer.flatten() for buffer in seen]).cpu().numpy().astype(np.float64)
            total = self._reduce(np.append(own, 1))
            mean = torch.from_numpy(total[:-1] / total[-1]).float()
            for buffer, values in zip(seen, mean.split([buffer.numel() for buffer in seen]), strict=True):
                buffer.copy_(values.view_as(buffer))

    def measure(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """Cross-entropy and accuracy, each the mean of the sources' means, over all workers."""
        sources = len(self._weight_s)
        sums_3s = np.zeros((3, sources))
        for found in outputs_of(self.network, batches, self.device):
            logits, label = torch.from_numpy(found.logits_bs), torch.from_numpy(found.label_b)
            loss_b = F.cross_entropy(logits, label, reduction="none").numpy()
            is_right_b = found.logits_bs.argmax(1) == found.label_b
            for row, values in enumerate((np.ones(len(label)), is_right_b, loss_b)):
                sums_3s[row] += np.bincount(found.label_b, values, sources)
        count_s, right_s, loss_s = self._reduce(sums_3s)
        there_s = count_s > 0
        return float((loss_s[there_s] / count_s[there_s]).mean()), float((right_s[there_s] / count_s[there_s]).mean())

    def _moved(self, artifacts: torch.Tensor) -> torch.Tensor:
        return artifacts.to(self.device, non_blocking=True).float()

    def _set_learning_rate(self, epochs_done: float) -> None:
        recipe, part = self.recipe, epochs_done / self.recipe.epochs
        if recipe.schedule == "steps":
            factor = 0.1 ** sum(math.floor(epochs_done) >= m * recipe.epochs for m in recipe.milestones)
        else:
            factor = cosine(part, recipe.warm_up, 1 / (recipe.epochs * max(1, self._steps)))
        self.learning_rate = recipe.learning_rate * min(1.0, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate


def fit(
    trainer: Trainer,
    train: Callable[[int], Iterable[Batch]],
    validation: Callable[[], Iterable[Batch]],
    state: State | None = None,
    on_epoch: Callable[[State], None] = lambda state: None,
) -> State:
    """Trains until the recipe's end, or until validation gets no better; the network then has its best weights.

    Args:
        trainer: it.
        train: the epoch's number, from 1 -> its batches, shuffled.
        validation: all validation batches.
        state: to go on from.
        on_epoch: called after each epoch, by every worker.
    """
    network, optimizer = trainer.network, trainer.optimizer
    if state is None:
        state = State(_copied(network.state_dict()), optimizer.state_dict(), {})
    else:
        network.load_state_dict(state.network)
        optimizer.load_state_dict(state.optimizer)
    while not _is_over(trainer.recipe, state.history):
        begin, epoch = time.perf_counter(), len(state.history) + 1
        loss, accuracy, images, train_s = trainer.train_epoch(train(epoch), epoch)
        validation_loss, validation_accuracy = trainer.measure(validation())
        is_best = all(validation_accuracy > earlier.validation_accuracy for earlier in state.history)
        seconds = time.perf_counter() - begin
        done = Epoch(epoch, loss, accuracy, validation_loss, validation_accuracy, trainer.learning_rate, images,
                     images / train_s, seconds)  # fmt: skip
        state.network, state.optimizer = _copied(network.state_dict()), optimizer.state_dict()
        state.best = state.network if is_best else state.best
        state.history = [*state.history, done]
        on_epoch(state)
    network.load_state_dict(state.best)
    return state


def _is_over(recipe: Recipe, history: list[Epoch]) -> bool:
    if len(history) >= recipe.epochs:
        return True
    accuracies = [epoch.validation_accuracy for epoch in history]
    since_best = len(history) - 1 - accuracies.index(max(accuracies)) if history else 0
    return bool(recipe.patience) and since_best >= recipe.patience


def _copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def rows_at_once(shape: Sequence[int]) -> int:
    """Artifacts of a forward pass outside training: large ones would need more memory than training does."""
    return max(16, min(_EVALUATION_BATCH, _EVALUATION_NUMBERS // math.prod(shape)))


def outputs_of(network: AttributorNetwork, batches: Iterable[Batch], device: str = "cpu") -> Iterator[Outputs]:
    """Batch by batch, in float32: a verdict must not hang on whether the machine multiplies bfloat16."""
    network.eval()
    with torch.inference_mode():
        for artifacts, label_b, row_b in batches:
            artifacts = artifacts.to(device, non_blocking=True).float()
            features = network.features(artifacts)
            said = (network.classifier(features), features, spectrum_of(artifacts))
            logits_bs, features_bf, spectrum_bk = (tensor.float().cpu().numpy() for tensor in said)
            yield Outputs(logits_bs, features_bf, spectrum_bk, label_b.numpy(), row_b.numpy())


def check_network(name: str, shape: tuple[int, ...]) -> None:
    """Raises:
    ConfigError: there is no such network, or it takes artifacts of another shape.
    """
    with torch.device("meta"):
        make_network(name, shape, 2)


def mean_and_std(
    blocks: Iterable[np.ndarray], shape: tuple[int, ...], reduce: Reduce = lambda sums: sums
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every coordinate of the artifacts in blocks [M, *shape], over all workers: float [*shape] both.

    Blocks are merged by their moments (Chan, Golub and LeVeque 1979): sums of squares alone would lose the small
    deviations of coordinates with large means.

    Raises:
        ConfigError: an artifact holds a number that is not finite.
    """
    count, mean, squares = 0, np.zeros(shape), np.zeros(shape)
    for block in blocks:
        block = block.astype(np.float64)
        of_block, total = block.mean(axis=0), count + len(block)
        squares += np.square(block - of_block).sum(axis=0) + (of_block - mean) ** 2 * (count * len(block) / total)
        mean, count = mean + (of_block - mean) * (len(block) / total), total
    all_count = np.maximum(reduce(np.array([float(count)])), 1)
    all_mean = reduce(count * mean) / all_count
    all_squares = reduce(squares + count * (mean - all_mean) ** 2)
    if not np.isfinite(all_squares).all():
        raise ConfigError(NOT_FINITE)
    return torch.from_numpy(all_mean).float(), torch.from_numpy(np.sqrt(all_squares / all_count)).float()


def class_weights(label_b: np.ndarray, sources: int, balanced: bool = True) -> torch.Tensor:
    """float [S]: weights in the loss, mean 1 over the images; equal for all sources together where balanced."""
    count_s = np.maximum(np.bincount(label_b, minlength=sources), 1)
    weight_s = count_s.sum() / (sources * count_s) if balanced else np.ones(sources)
    return torch.from_numpy(weight_s).float()


def from_arrays(
    artifacts: np.ndarray, label_b: np.ndarray, batch_size: int, seed: int | None = None
) -> Callable[[int], Iterator[Batch]]:
    """Batches of arrays in memory, [N, ...] and int64 [N]: an epoch's number -> its batches.

    With a seed, in an order that follows from seed and epoch, all of one size: batch normalisation can't take a single
    image. Without, all of them in their order.
    """

    def batches(epoch: int = 0) -> Iterator[Batch]:
        count = len(label_b)
        size = max(1, min(batch_size, count))
        ordered = (np.arange(start, min(start + size, count)) for start in range(0, count, size))
        for row_b in ordered if seed is None else shuffled(count, size, seed, epoch):
            yield torch.from_numpy(artifacts[row_b]), torch.from_numpy(label_b[row_b]), torch.from_numpy(row_b)

    return batches
