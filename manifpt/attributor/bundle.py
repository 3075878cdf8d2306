"""The attributor bundle: a trained network, what its artifacts are, and how far to believe it. One call loads it.

Legend: B artifacts, S labels.

    config.json        space, estimate, reference digest, shape, network, recipe; the weights' SHA-256; written last
    labels.json        S names, in the order of the network's outputs
    model.safetensors  weights, and the training artifacts' mean and standard deviation
    calibration.json   the temperature that makes probabilities of logits, fitted on validation
    metrics.json       what it reached on the test images
    README.md          model card
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from manifpt.attributor.networks import AttributorNetwork, make_network
from manifpt.attributor.outputs import Outputs
from manifpt.attributor.training import from_arrays, outputs_of
from manifpt.errors import ConfigError
from manifpt.storage import join, normalize, store_of

__all__ = ["Attribution", "Attributor", "save_bundle"]

_FORMAT = 1
_BATCH = 256


@dataclass(frozen=True, slots=True)
class Attribution:
    """What an attributor says of B artifacts.

    Attributes:
        source: B labels, the most probable ones.
        probability_bs: float32 [B, S], calibrated.
    """

    source: tuple[str, ...]
    probability_bs: np.ndarray


class Attributor:
    """A loaded bundle: `Attributor.load(path).predict(artifacts)`."""

    def __init__(
        self, network: AttributorNetwork, labels: Sequence[str], temperature: float, config: Mapping[str, Any]
    ) -> None:
        self.network, self.labels, self.temperature, self.config = network.eval(), tuple(labels), temperature, config
        self.shape = tuple(int(n) for n in config["shape"])

    @classmethod
    def load(cls, path: str) -> Attributor:
        """Reads and verifies a bundle, from a path or `s3://`.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        uri = normalize(path)
        store = store_of(uri)
        try:
            config, labels, calibration = (
                json.loads(store.read(join(uri, name))) for name in ("config.json", "labels.json", "calibration.json")
            )
            data = store.read(join(uri, "model.safetensors"))
        except FileNotFoundError as error:
            raise ConfigError(
                f"There is no finished attributor at {uri}; train one: jobs/train_attributor.py."
            ) from error
        except ValueError as error:
            raise ConfigError(f"The attributor {uri} is damaged ({error}); train it again.") from error
        if not isinstance(config, dict) or not isinstance(labels, list):
            raise ConfigError(f"The attributor {uri} is damaged (config or labels are none); train it again.")
        if config.get("format") != _FORMAT:
            raise ConfigError(
                f"The attributor {uri} has format {config.get('format')!r}; this version reads {_FORMAT}."
            )
        if hashlib.sha256(data).hexdigest() != config.get("weights_sha256"):
            raise ConfigError(f"The weights of {uri} are not those that its config names; train it again.")
        try:
            network = make_network(config["network"], tuple(config["shape"]), len(labels))
            network.load_state_dict(load(data))
            return cls(network, labels, float(calibration["temperature"]), config)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:  # such as weights for other labels
            why = str(error).strip().splitlines()
            raise ConfigError(f"The attributor {uri} is damaged ({why[-1].strip()}); train it again.") from error

    def predict(self, artifacts: np.ndarray, device: str = "cpu") -> Attribution:
        """Names the sources of artifacts, float [B, *shape].

        Raises:
            ConfigError: artifacts of another shape, or with numbers that are not finite.
        """
        found = self._outputs(artifacts, device)
        logits_bs = np.concatenate([each.logits_bs for each in found] or [np.empty((0, len(self.labels)), np.float32)])
        probability_bs = torch.softmax(torch.from_numpy(logits_bs) / self.temperature, 1).numpy()
        return Attribution(tuple(self.labels[n] for n in logits_bs.argmax(1)), probability_bs)

    def features(self, artifacts: np.ndarray, device: str = "cpu") -> np.ndarray:
        """What comes before the last layer, of artifacts float [B, *shape], B at least 1: float32 [B, F].

        Raises:
            ConfigError: as of `predict`.
        """
        return np.concatenate([each.features_bf for each in self._outputs(artifacts, device)])

    def fits(self, space: Mapping[str, Any], estimate: Mapping[str, Any], reference_digest: str) -> bool:
        """Whether it was trained on such artifacts: of this space and estimate, onto this reference."""
        of_config = (self.config["space"], self.config["estimate"], self.config["reference_digest"])
        return of_config == (space, estimate, reference_digest)

    def _outputs(self, artifacts: np.ndarray, device: str) -> list[Outputs]:
        artifacts = np.asarray(artifacts)
        if artifacts.shape[1:] != self.shape:
            raise ConfigError(
                f"This attributor takes artifacts of shape {list(self.shape)}, not {list(artifacts.shape[1:])}."
            )
        if not np.isfinite(artifacts).all():
            raise ConfigError("Artifacts hold numbers that are not finite: compute them again.")
        batches = from_arrays(artifacts, np.zeros(len(artifacts), np.int64), _BATCH)
        return list(outputs_of(self.network.to(device), batches(0), device))

    def label_numbers(self, sources: Sequence[str]) -> np.ndarray:
        """int64 [B]: the numbers of labels.

        Raises:
            ConfigError: a label that this attributor does not know.
        """
        known = {label: n for n, label in enumerate(self.labels)}
        unknown = sorted(set(sources) - set(known))
        if unknown:
            raise ConfigError(
                f"This attributor does not know {', '.join(unknown[:3])}{' and others' if len(unknown) > 3 else ''}; "
                f"it knows {', '.join(self.labels)}. Map them with --labels, or train it with them."
            )
        return np.array([known[source] for source in sources], np.int64)


def save_bundle(
    output: str,
    state: Mapping[str, torch.Tensor],
    labels: Sequence[str],
    config: Mapping[str, Any],
    calibration: Mapping[str, Any],
    metrics: Mapping[str, Any],
    card: str,
) -> None:
    """Writes a bundle; `config.json`, without which it is none, comes last."""
    store = store_of(output)
    data = save({name: tensor.contiguous() for name, tensor in state.items()})
    store.write(join(output, "model.safetensors"), data)
    documents = {"labels.json": list(labels), "calibration.json": calibration, "metrics.json": metrics}
    for name, document in documents.items():
        store.write(join(output, name), (json.dumps(document, indent=2) + "\n").encode())
    store.write(join(output, "README.md"), card.encode())
    config = {"format": _FORMAT, **config, "weights_sha256": hashlib.sha256(data).hexdigest()}
    store.write(join(output, "config.json"), (json.dumps(config, indent=2) + "\n").encode())
