"""What the learned baselines share: one plain training loop on images in memory.

Legend: B images, C channels, H W pixels, F features.

A budget of images seen bounds it, so that a baseline costs about the same on 600 images as on 60,000; the originals
train for longer, and the budget is the deviation that all of them have in common. Classes weigh the same in the loss
whatever their sizes. The state with the best validation accuracy is kept, of equals the one with the least loss. A
network that validates no better than naming one source for everything is trained once more, at a tenth of the rate,
and validation picks between the two: a rate that is not known, or was found for other images, must not be what a
baseline fails by.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from manifpt.attributor.training import class_weights
from manifpt.baselines.inputs import Shape
from manifpt.errors import ConfigError

__all__ = ["Classifier", "LearnedBaseline", "Training"]

_EVALUATED_EVERY = 2_000  # images seen, or a tenth of the budget; an epoch where that is more
_PIXELS_AT_ONCE = 1 << 18  # of images that are asked together


@dataclass(frozen=True, slots=True)
class Training:
    """How a network is trained.

    Attributes:
        optimizer: `adam` or `sgd`.
        learning_rate: at the start.
        betas, epsilon: of Adam.
        momentum, weight_decay: of SGD; weight decay also of Adam.
        batch: images a step.
        budget_images: images seen, repeats counted, after which training ends in any case.
        patience: evaluations without a gain in validation accuracy before the learning rate drops.
        least_gain: of accuracy, to count as one; twice that after the first drop.
        drops: how often the learning rate is divided by 10 before patience ends the training.
        smoothing: of the average of weights that predicts; 0: the last weights predict.
    """

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch: int = 32
    budget_images: int = 60_000
    patience: int = 10
    least_gain: float = 1e-3
    drops: int = 0
    smoothing: float = 0.0

    def make_optimizer(self, network: nn.Module, slower: float = 1.0) -> torch.optim.Optimizer:
        """Args:
        network: to train.
        slower: what the learning rate is multiplied by.

        Raises:
            ConfigError: an unknown optimizer.
        """
        rate, decay = slower * self.learning_rate, self.weight_decay
        if self.optimizer == "adam":
            # Fused: one pass over the weights, half the time of a step of ResNet50 on small images.
            return torch.optim.Adam(
                network.parameters(), rate, self.betas, self.epsilon, weight_decay=decay, fused=True
            )
        if self.optimizer == "sgd":
            return torch.optim.SGD(network.parameters(), rate, self.momentum, weight_decay=decay)
        raise ConfigError(f"An optimizer is adam or sgd, not {self.optimizer!r}.")


class Classifier(nn.Module):
    """A body that makes features, and the last layer."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, inputs_bchw: torch.Tensor) -> torch.Tensor:
        """float32 [B, C, H, W] -> logits float32 [B, sources]."""
        return self.head(self.body(inputs_bchw))


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A trained network, and how it came to be.

    Attributes:
        network: in its best state.
        slower: what the learning rate was multiplied by.
        history, images_seen: as of `LearnedBaseline`.
    """

    network: Classifier
    slower: float
    history: list[tuple[int, float]]
    images_seen: int

    @property
    def reached(self) -> float:
        """The best accuracy on validation."""
        return max(accuracy for _, accuracy in self.history)


class LearnedBaseline(ABC):
    """A network, trained and asked.

    Attributes:
        training: how.
        history: (images seen, validation accuracy) of every evaluation of the last `fit`.
        images_seen: by the optimizer in the last `fit`.
    """

    name: str

    def __init__(self, sources: int, size_px: tuple[int, int], seed: int, threads: int, training: Training) -> None:
        if not 1 <= training.batch <= training.budget_images:
            raise ConfigError(
                f"{self.name}: a batch of {training.batch} in a budget of {training.budget_images} images; "
                f"budget_images has to hold at least one batch."
            )
        self._shape, self._seed, self._threads, self.training = Shape(sources, size_px), seed, threads, training
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network: Classifier | None = None
        self._slower = 1.0
        self.history: list[tuple[int, float]] = []
        self.images_seen = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """How long it was trained, and whether the budget ended it."""
        if not self.history:
            return ()
        ended = "budget" if self.images_seen + self.training.batch > self.training.budget_images else "validation"
        again = ("trained again at a tenth of the learning rate",) if self._slower < 1 else ()
        return (f"{self.images_seen} images seen, ended by {ended}", *again)

    @abstractmethod
    def _build(self) -> Classifier:
        """A new network; torch's generator is seeded."""

    @abstractmethod
    def _inputs(self, images_bchw: np.ndarray) -> torch.Tensor:
        """What the network sees of uint8 [B, 3, H, W]: float32 [B, C, H', W'] on the CPU."""

    def _augmented(self, images_bchw: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """The same for training; without augmentation unless a baseline has one."""
        return self._inputs(images_bchw)

    def fit(
        self,
        images_bchw: np.ndarray,
        label_b: np.ndarray,
        validation_bchw: np.ndarray,
        validation_label_b: np.ndarray,
    ) -> None:
        """See `Baseline`."""
        self._shape.check_training(images_bchw, label_b, validation_bchw, validation_label_b)
        largest_share = float(np.bincount(validation_label_b).max() / len(validation_label_b))
        with _torch_state(self._seed, self._threads):
            attempts: list[_Attempt] = []
            for slower in (1.0, 0.1):
                attempts.append(self._trained(slower, images_bchw, label_b, validation_bchw, validation_label_b))
                if attempts[-1].reached > largest_share:
                    break
        best = max(attempts, key=lambda attempt: attempt.reached)
        self._network, self._slower = best.network, best.slower
        self.history, self.images_seen = best.history, best.images_seen

    def _trained(
        self,
        slower: float,
        images_bchw: np.ndarray,
        label_b: np.ndarray,
        validation_bchw: np.ndarray,
        validation_label_b: np.ndarray,
    ) -> _Attempt:
        network = self._build().to(self._device).to(memory_format=torch.channels_last)
        # What predicts: the network itself, or an average of its weights over time.
        predicting = copy.deepcopy(network) if self.training.smoothing else network
        training, rng = self.training, np.random.default_rng(self._seed)
        optimizer = training.make_optimizer(network, slower)
        weight_s = class_weights(label_b, self._shape.sources).to(self._device)
        steps = training.budget_images // training.batch
        interval = -(-max(len(images_bchw), min(_EVALUATED_EVERY, training.budget_images // 10)) // training.batch)
        best, best_state, reached, waited, drops = (-1.0, 0.0), {}, -1.0, 0, 0
        history: list[tuple[int, float]] = []
        images_seen = 0
        for step, row_b in zip(range(1, steps + 1), _batches(len(images_bchw), training.batch, rng), strict=False):
            network.train()
            inputs_bchw = self._moved(self._augmented(images_bchw[row_b], rng))
            label = torch.from_numpy(label_b[row_b]).to(self._device)
            loss = F.cross_entropy(network(inputs_bchw), label, weight_s, reduction="none").mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            images_seen = step * training.batch
            if training.smoothing:
                _average(predicting, network, min(training.smoothing, step / (step + 10)))
            if step % interval and step < steps:
                continue
            found = self._evaluate(predicting, validation_bchw, validation_label_b, weight_s)
            history.append((images_seen, found[0]))
            if found[0] >= reached + training.least_gain * (2 if drops else 1):
                reached, waited = found[0], 0
            else:
                waited += 1
            if found > best:
                best, best_state = found, copy.deepcopy(predicting.state_dict())
            if waited >= training.patience:
                if drops == training.drops:
                    break
                drops, waited = drops + 1, 0
                for group in optimizer.param_groups:
                    group["lr"] /= 10
        predicting.load_state_dict(best_state)
        return _Attempt(predicting, slower, history, images_seen)

    def _evaluate(
        self, network: Classifier, images_bchw: np.ndarray, label_b: np.ndarray, weight_s: torch.Tensor
    ) -> tuple[float, float]:
        """Accuracy and minus the loss on the validation images."""
        logits = torch.cat(list(self._run(images_bchw, network)))
        loss = F.cross_entropy(logits, torch.from_numpy(label_b), weight_s.cpu())
        return float((logits.argmax(1).numpy() == label_b).mean()), -float(loss)

    def features(self, images_bchw: np.ndarray) -> np.ndarray:
        """What the last layer sees: float32 [B, F]."""
        return self._answer(images_bchw, "body")

    def predict(self, images_bchw: np.ndarray) -> np.ndarray:
        """Logits: float32 [B, sources]."""
        return self._answer(images_bchw, "")

    def _answer(self, images_bchw: np.ndarray, part: str) -> np.ndarray:
        assert self._network is not None, "fit comes first"
        self._shape.check(images_bchw)
        with _torch_state(self._seed, self._threads):
            return torch.cat(list(self._run(images_bchw, self._network.get_submodule(part)))).numpy()

    def _run(self, images_bchw: np.ndarray, network: nn.Module) -> Iterator[torch.Tensor]:
        network.eval()
        pixels = images_bchw.shape[2] * images_bchw.shape[3]
        step = min(64, max(8, _PIXELS_AT_ONCE // pixels))
        for start in range(0, max(1, len(images_bchw)), step):  # none: an empty batch, for its shape
            with torch.no_grad():
                yield network(self._moved(self._inputs(images_bchw[start : start + step]))).float().cpu()

    def _moved(self, inputs_bchw: torch.Tensor) -> torch.Tensor:
        return inputs_bchw.to(self._device).contiguous(memory_format=torch.channels_last)


def _batches(count: int, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows of full batches, without end: shuffled epochs one after the other, so that no batch is a single image."""
    row_b = np.empty(0, np.int64)
    while True:
        while len(row_b) < batch:
            row_b = np.concatenate([row_b, rng.permutation(count)])
        yield row_b[:batch]
        row_b = row_b[batch:]


def _average(average: nn.Module, network: nn.Module, smoothing: float) -> None:
    with torch.no_grad():
        for mean, now in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(now, 1 - smoothing)
            else:
                mean.copy_(now)


@contextlib.contextmanager
def _torch_state(seed: int, threads: int) -> Iterator[None]:
    """Seeded, deterministic, on so many threads; all as before afterwards, for whoever shares the process."""
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.backends.cudnn.deterministic = before[1]
