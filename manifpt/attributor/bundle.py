"""The attributor bundle: a trained network, what its artifacts are, and how far to believe it. One call loads it.

Legend: B artifacts, S labels, F features, A principal axes, K numbers of a spectrum.

    config.json          space, estimate, reference digest, shape, network, recipe; SHA-256 of all files below but the
                         card; written last
    labels.json          S names, in the order of the network's outputs
    model.safetensors    weights, and the training artifacts' mean and standard deviation
    openset.safetensors  what features and spectra of the training artifacts look like, and the features' principal axes
    calibration.json     the temperature that makes probabilities of logits, fitted on validation; reliability on test;
                         `unknown`: the score of unknownness, what is usual of its parts, its threshold, the rate it was
                         chosen for and the rate measured on test
    calibration.png      the same reliability, drawn
    baseline.parquet     validation and test images as the attributor sees them: see `manifpt.attributor.baseline`
    seen.parquet         `content_hash` of the training and validation images: to test on them would flatter
    metrics.json         what it reached on the test images
    README.md            model card
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save

from manifpt.attributor.calibration import probabilities
from manifpt.attributor.files import CONFIG, FORMAT, bundle_config, bundle_files
from manifpt.attributor.networks import AttributorNetwork, make_network
from manifpt.attributor.openset import OpenSet
from manifpt.attributor.outputs import Outputs, joined
from manifpt.attributor.spectrum import spectrum_size
from manifpt.attributor.training import from_arrays, outputs_of, rows_at_once
from manifpt.documents import Kinds, json_of, load_tensors, object_of
from manifpt.errors import ConfigError
from manifpt.storage import join, normalize, store_of

__all__ = ["SEEN", "Attribution", "Attributor", "Verdicts", "save_bundle"]

SEEN = "seen.parquet"
_CONFIG: Kinds = {"network": str, "shape": list, "space": dict, "estimate": dict, "reference_digest": str}
_TENSORS = ("model.safetensors", "openset.safetensors")


@dataclass(frozen=True, slots=True)
class Attribution:
    """What an attributor says of B artifacts.

    Attributes:
        source: B labels, the most probable ones.
        probability_bs: float32 [B, S], calibrated.
    """

    source: tuple[str, ...]
    probability_bs: np.ndarray


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What an attributor says of B artifacts, and whether their sources are any that it knows.

    Attributes:
        label: B labels, the most probable ones, of what is called unknown too.
        probability_bs: float32 [B, S], calibrated: shares among the known sources.
        unknown_score_b: float32 [B]; the larger, the less it is like the known sources.
        is_unknown_b: bool [B], whether the score is over the bundle's threshold.
        feature_ba: float32 [B, A + 1], the features along the principal axes of the training features, and the norm of
            what is left: the `feature` of the bundle's baseline.
        spectrum_bk: float32 [B, K], the artifacts' own: see `spectrum.spectrum_of`.
    """

    label: tuple[str, ...]
    probability_bs: np.ndarray
    unknown_score_b: np.ndarray
    is_unknown_b: np.ndarray
    feature_ba: np.ndarray
    spectrum_bk: np.ndarray


class Attributor:
    """A loaded bundle: `Attributor.load(path).verdicts(artifacts)`."""

    def __init__(
        self, network: AttributorNetwork, labels: Sequence[str], openset: OpenSet, config: Mapping[str, Any]
    ) -> None:
        self.network, self.labels, self.openset, self.config = network.eval(), tuple(labels), openset, config
        self.shape = tuple(int(n) for n in config["shape"])

    @classmethod
    def load(cls, path: str) -> Attributor:
        """Reads and verifies a bundle, from a path or `s3://`.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        uri = normalize(path)
        config, where = bundle_config(uri), f"The attributor {uri}"
        files = bundle_files(uri, config)
        for name in (*_TENSORS, "labels.json", "calibration.json"):
            if name not in files:
                raise ConfigError(f"{where} is damaged (its config names no {name}); train it again.")
        model, statistics = (files[name] for name in _TENSORS)
        labels, calibration = (json_of(files[name], where) for name in ("labels.json", "calibration.json"))
        object_of(config, where, _CONFIG)
        object_of(config["space"], where, {"name": str})
        if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels) or not labels:
            raise ConfigError(f"{where} is damaged (labels are texts); train it again.")
        if len(set(labels)) < len(labels):
            raise ConfigError(f"{where} is damaged (a label is there twice); train it again.")
        try:
            network = _network(config, model, len(labels), uri)
            temperature = float(calibration["temperature"])
            openset = OpenSet.from_bytes(statistics, temperature, calibration["unknown"])
            openset.check(len(labels), network.classifier.in_features, spectrum_size(config["shape"]))
            return cls(network, labels, openset, config)
        except (LookupError, TypeError, ValueError, RuntimeError, OverflowError, SafetensorError) as error:
            why = str(error).strip().splitlines() or [repr(error)]
            raise ConfigError(f"The attributor {uri} is damaged ({why[-1].strip()}); train it again.") from error

    @property
    def digest(self) -> str:
        """SHA-256 of all that verdicts depend on: two bundles of one digest say the same of any artifact."""
        config, openset = self.config, self.openset
        names = ("network", "shape", "space", "estimate", "reference_digest")
        decided = [config.get(name) for name in names] + [config["files"][name] for name in _TENSORS]
        facts = [decided, self.labels, openset.temperature, openset.chosen()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def verdicts(self, artifacts: np.ndarray, device: str = "cpu") -> Verdicts:
        """Names the sources of artifacts, float [B, *shape], and says which are of none that it knows.

        Raises:
            ConfigError: artifacts of another shape, or with numbers that are not finite.
        """
        return self._verdicts(self._outputs_if_finite(artifacts, device))

    def verdicts_where_finite(self, artifacts: np.ndarray, device: str = "cpu") -> tuple[Verdicts, np.ndarray]:
        """As `verdicts`, for a job that one odd image must not end.

        Returns:
            verdicts: of the artifacts of which the network makes finite numbers.
            is_finite_b: bool [B], which those are.

        Raises:
            ConfigError: as of `verdicts`.
        """
        said = self._outputs(artifacts, device)
        is_finite_b = said.is_finite_b
        return self._verdicts(said.take(np.flatnonzero(is_finite_b))), is_finite_b

    def predict(self, artifacts: np.ndarray, device: str = "cpu") -> Attribution:
        """Names the sources of artifacts, float [B, *shape], as if they were all known.

        Raises:
            ConfigError: as of `verdicts`.
        """
        found = self.verdicts(artifacts, device)
        return Attribution(found.label, found.probability_bs)

    def features(self, artifacts: np.ndarray, device: str = "cpu") -> np.ndarray:
        """What comes before the last layer, of artifacts float [B, *shape]: float32 [B, F].

        Raises:
            ConfigError: as of `verdicts`.
        """
        return self._outputs_if_finite(artifacts, device).features_bf

    def fits(self, space: Mapping[str, Any], estimate: Mapping[str, Any], reference_digest: str) -> bool:
        """Whether it was trained on such artifacts: of this space and estimate, onto this reference."""
        of_config = (self.config["space"], self.config["estimate"], self.config["reference_digest"])
        return of_config == (space, estimate, reference_digest)

    def _verdicts(self, said: Outputs) -> Verdicts:
        score_b = self.openset.scores(said)
        return Verdicts(
            label=tuple(self.labels[n] for n in said.predicted_b),
            probability_bs=probabilities(said.logits_bs, self.openset.temperature).astype(np.float32),
            unknown_score_b=score_b,
            is_unknown_b=score_b > self.openset.threshold,
            feature_ba=self.openset.coordinates(said.features_bf),
            spectrum_bk=said.spectrum_bk,
        )

    def _outputs_if_finite(self, artifacts: np.ndarray, device: str) -> Outputs:
        said = self._outputs(artifacts, device)
        if not said.is_finite_b.all():
            raise ConfigError("The attributor's numbers are not finite on these artifacts; train it again.")
        return said

    def _outputs(self, artifacts: np.ndarray, device: str) -> Outputs:
        artifacts = np.asarray(artifacts)
        if artifacts.shape[1:] != self.shape:
            raise ConfigError(
                f"This attributor takes artifacts of shape {list(self.shape)}, not {list(artifacts.shape[1:])}."
            )
        if not np.isfinite(artifacts).all():
            raise ConfigError("Artifacts hold numbers that are not finite: compute them again.")
        batches = from_arrays(artifacts, np.zeros(len(artifacts), np.int64), rows_at_once(self.shape))
        known, number_b = self.openset.statistics, np.empty(0, np.int64)
        none_bs, none_bf, none_bk = (
            np.empty((0, width), np.float32)
            for width in (len(self.labels), known.mean_sf.shape[1], known.spectrum_sk.shape[1])
        )
        none = Outputs(none_bs, none_bf, none_bk, number_b, number_b)
        return joined([none, *outputs_of(self.network.to(device), batches(0), device)])

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


def _network(config: Mapping[str, Any], data: bytes, labels: int, uri: str) -> AttributorNetwork:
    """Made without memory first: a config that names a huge shape must not get any."""
    shape = tuple(config["shape"])
    if not shape or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"no shape: {list(shape)}")
    with torch.device("meta"):
        network = make_network(config["network"], shape, labels)
    load_tensors(network, data, f"The attributor {uri}")
    return network.to(memory_format=torch.channels_last) if len(shape) == 3 else network


def save_bundle(
    output: str,
    state: Mapping[str, torch.Tensor],
    labels: Sequence[str],
    config: Mapping[str, Any],
    calibration: Mapping[str, Any],
    openset: OpenSet,
    metrics: Mapping[str, Any],
    card: str,
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a bundle; `config.json`, without which it is none, comes last.

    Args:
        output: a folder or prefix.
        state: the network's.
        labels: S names.
        config: what decided it.
        calibration: as `calibration.json` holds it, but for what `openset` says.
        openset: statistics, score and threshold.
        metrics: on the test images.
        card: Markdown.
        others: files by name, such as `baseline.parquet`.
    """
    store = store_of(output)
    chosen = {**calibration.get("unknown", {}), **openset.chosen()}
    calibration = {"temperature": openset.temperature, **calibration, "unknown": chosen}
    documents = {"labels.json": list(labels), "calibration.json": calibration, "metrics.json": metrics}
    weights = save({name: tensor.contiguous() for name, tensor in state.items()})
    files = dict(zip(_TENSORS, (weights, openset.to_bytes()), strict=True)) | dict(others or {})
    files |= {name: (json.dumps(document, indent=2) + "\n").encode() for name, document in documents.items()}
    for name, data in files.items():
        store.write(join(output, name), data)
    store.write(join(output, "README.md"), card.encode())
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    config = {"format": FORMAT, **config, "files": digests}
    store.write(join(output, CONFIG), (json.dumps(config, indent=2) + "\n").encode())
