"""One step of the robustness ladder: attributors on their own test images, all altered alike. Knows no Ray.

Legend: B images.

Images go the way of a run: `stages.decode_rows`, `Encoder`, `Projecting`, and then to each attributor that takes such
artifacts. An attributor's result at a step is a file of its own, so that what was measured is not measured again.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from manifpt.alterations import NONE
from manifpt.attributor.bundle import Attributor
from manifpt.errors import ConfigError
from manifpt.metrics.attribution import accuracy, balanced_accuracy
from manifpt.plan import Plan
from manifpt.projecting import Projecting
from manifpt.stages import Encoder, decode_rows
from manifpt.storage import join, store_of

__all__ = ["Climber", "Rung", "climb"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Climber:
    """An attributor on its way up.

    Attributes:
        uri: of the bundle.
        folder: of its results.
        key: what decides them, for people who look into the folder.
        labels: by source, its label; sources that aren't named keep their name.
    """

    uri: str
    folder: str
    key: Mapping[str, Any]
    labels: Mapping[str, str | None]

    def done(self, step: str) -> dict[str, Any] | None:
        """Its result at a step, if it is there."""
        try:
            found: dict[str, Any] = json.loads(store_of(self.folder).read(self._uri(step)))
        except FileNotFoundError:
            return None
        return found

    def end(self, step: str, result: Mapping[str, Any]) -> None:
        """Leaves a result."""
        document = {"key": self.key, "step": step, **result}
        store_of(self.folder).write(self._uri(step), (json.dumps(document, indent=2) + "\n").encode())

    def _uri(self, step: str) -> str:
        return join(self.folder, f"{step}.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """A step, and who takes it.

    Attributes:
        plan: of the test images in one space, altered by the step.
        climbers: attributors of such artifacts.
        gpus: that it takes, where there are some.
        memory_bytes: that it reserves; a reference and a shard are those of any run.
        threads, device: to compute with.
    """

    plan: Plan
    climbers: Sequence[Climber]
    gpus: float = 1.0
    memory_bytes: int = 0
    threads: int = 1
    device: str = "cpu"


def climb(rung: Rung) -> dict[str, Any]:
    """Measures every attributor at a step and leaves the results. Returns the step, the space and the accuracies.

    Raises:
        ConfigError: a reference, an attributor or a manifest that was replaced meanwhile.
    """
    torch.set_num_threads(rung.threads)
    begin = time.perf_counter()
    plan, (spec,) = rung.plan, rung.plan.spaces
    encoder, projecting = _stages(replace(plan, alter=NONE), rung.threads, rung.device)
    said = [_Said(_attributor(climber), climber.labels, rung.device) for climber in rung.climbers]
    rejected = 0
    for number in range(plan.shards):
        shard = projecting(encoder(decode_rows(plan, number)))
        rejected += len(shard["rejected"])
        sources = shard[f"rows:{spec.name}"]["source"].to_pylist()
        if sources:
            shape = tuple(int(n) for n in shard[f"shape:{spec.name}"])
            artifacts = shard[f"artifact:{spec.name}"].reshape(-1, *shape)
            for of_climber in said:
                of_climber.add(artifacts, sources)
    seconds = round(time.perf_counter() - begin, 2)
    results = [of_climber.result() | {"rejected": rejected, "seconds": seconds} for of_climber in said]
    for climber, result in zip(rung.climbers, results, strict=True):
        climber.end(plan.alter, result)
    return {"step": plan.alter, "space": spec.name, "accuracies": [result["accuracy"] for result in results]}


@functools.lru_cache(1)  # the next step of the same images finds its reference loaded; two might not fit in memory
def _stages(plan: Plan, threads: int, device: str) -> tuple[Encoder, Projecting]:
    return Encoder(plan.spaces, threads, device, plan.rows), Projecting(plan, threads, device=device)


def _attributor(climber: Climber) -> Attributor:
    found = Attributor.load(climber.uri)
    if found.digest != climber.key["attributor"]:
        raise ConfigError(f"The attributor {climber.uri} was replaced while it was measured: run the same again.")
    return found


class _Said:
    """What one attributor says of the images of a step."""

    def __init__(self, attributor: Attributor, labels: Mapping[str, str | None], device: str) -> None:
        self._attributor, self._labels, self._device = attributor, labels, device
        self._label: list[np.ndarray] = []
        self._predicted: list[np.ndarray] = []
        self._is_unknown: list[np.ndarray] = []

    def add(self, artifacts: np.ndarray, sources: Sequence[str]) -> None:
        """Of artifacts [B, ...] of B sources."""
        verdicts = self._attributor.verdicts(artifacts, self._device)
        named = [self._labels.get(source) or source for source in sources]
        self._label.append(self._attributor.label_numbers(named))
        self._predicted.append(self._attributor.label_numbers(verdicts.label))
        self._is_unknown.append(verdicts.is_unknown_b)

    def result(self) -> dict[str, Any]:
        """Of all images; what can't be told of none is null."""
        if not self._label:
            return {"images": 0, "accuracy": None, "balanced_accuracy": None, "unknown_rate": None}
        label_b, predicted_b, is_unknown_b = map(np.concatenate, (self._label, self._predicted, self._is_unknown))
        return {
            "images": len(label_b),
            "accuracy": accuracy(label_b, predicted_b),
            "balanced_accuracy": balanced_accuracy(label_b, predicted_b),
            "unknown_rate": float(is_unknown_b.mean()),
        }
