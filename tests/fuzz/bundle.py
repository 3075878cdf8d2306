"""What was trained or built, and may come from others: references, attributors, encoders and denoisers.

Sums are made anew after the damage, so that it is met by what reads the content and not by what compares digests.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifpt.attributor.bundle import Attributor, save_bundle
from manifpt.attributor.networks import make_network
from manifpt.errors import ConfigError
from manifpt.estimates.denoiser import Denoiser, DenoiserProjector, denoiser_digest, save_denoiser
from manifpt.reference import Codes, Reference, open_bundle
from manifpt.spaces import SpaceSpec
from manifpt.spaces.encoders import own_fields
from manifpt.spaces.weights import load_state, resolve_weights
from tests.fuzz.places import Documents, new_folder
from tests.helpers.runs import SHAPE, openset_of, sample_reference, without_ray

__all__ = ["check", "mutated", "seeds"]

_PIXELS = SpaceSpec(name="rgb", kind="rgb", height_px=8, width_px=8)
_FILES = ("reference/bundle.json", "reference/PART", "attributor/config.json", "attributor/labels.json",
          "attributor/calibration.json", "attributor/model.safetensors", "attributor/openset.safetensors",
          "denoiser/config.json", "denoiser/model.safetensors", "encoder/config.json",
          "encoder/model.safetensors")  # fmt: skip


@functools.cache
def _documents() -> Documents:
    folder = new_folder()
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        sample_reference(folder, 12, {"real": 1})
    network, openset = make_network("head", SHAPE, 2), openset_of(2, temperature=2.0)
    config = {"space": {"name": "rgb"}, "estimate": {"name": "nearest"}, "reference_digest": "r" * 64, "seed": 0}
    config |= {"shape": list(SHAPE), "network": "head"}
    labels = ("gan", "real")
    save_bundle(str(folder / "attributor"), network.state_dict(), labels, config, {}, openset, {}, "card")
    save_denoiser(Denoiser(width=4, depth=2), str(folder / "denoiser"), {"color": "rgb", "reference_digest": "r"})
    encoder = {"architecture": "manifpt:resnet18_small", "size_px": 32, "mean": [0.5] * 3, "std": [0.2] * 3}
    save_denoiser(Denoiser(width=4, depth=2), str(folder / "encoder"), encoder)
    part = next((folder / "reference").rglob("part-*.parquet")).relative_to(folder)
    return Documents(folder, [name.replace("reference/PART", str(part)) for name in _FILES])


def seeds() -> list[bytes]:
    """One of each."""
    return _documents().seeds()


def mutated(data: bytes, dice: random.Random) -> bytes:
    """As its kind can be damaged."""
    return _documents().mutated(data, dice)


def check(data: bytes) -> int:
    """Opens the bundle that the document is of, and uses it once."""
    documents = _documents()
    name = documents.placed(data)
    kind = name.partition("/")[0]
    try:
        with _right_sums(documents.folder, name):
            _USES[kind](str(documents.folder / kind))
    except ConfigError:
        pass
    finally:
        documents.restored(name)
    return 0


class _right_sums:  # noqa: N801  # a context
    """What names the sum of a damaged file is told the new one, meanwhile."""

    def __init__(self, folder: Path, name: str) -> None:
        self._digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        kind, _, self._name = name.partition("/")
        config = "reference/bundle.json" if name.endswith(".parquet") else f"{kind}/config.json"
        is_named = kind == "attributor" or name.endswith((".parquet", ".safetensors"))
        self._path = folder / config if is_named and name != config else None

    def __enter__(self) -> None:
        if self._path is None:
            return
        self._before = self._path.read_bytes()
        document: dict[str, Any] = json.loads(self._before)
        if "parts" in document:
            next(iter(document["parts"].values()))[0]["sha256"] = self._digest
        elif "files" in document:
            document["files"][self._name] = self._digest
        else:
            document["weights_sha256"] = self._digest
        self._path.write_bytes(json.dumps(document).encode())

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._path.write_bytes(self._before)


def _use_reference(uri: str) -> None:
    bundle = open_bundle(uri)
    for spec in bundle.spaces.values():
        if spec.kind == "network":  # its weights are another document
            continue
        codes = Codes(bundle, spec.code_key)
        reference = Reference(codes, spec)
        found = reference.projector.project(reference.embeddings_of(range(min(2, len(codes.array)))))
        assert np.isfinite(found.distance_b).all()


def _use_attributor(uri: str) -> None:
    attributor = Attributor.load(uri)
    assert attributor.fits({}, {}, "") in (True, False)
    if int(np.prod(attributor.shape)) < 1 << 16:
        found = attributor.predict(np.ones((2, *attributor.shape), np.float32))
        assert np.isfinite(found.probability_bs).all()
        assert all(isinstance(label, str) for label in found.source)


def _use_denoiser(uri: str) -> None:
    projector = DenoiserProjector(uri, denoiser_digest(uri), _PIXELS)
    projector.project(np.ones((2, 3 * 8 * 8), np.float32))


def _use_encoder(uri: str) -> None:
    spec = SpaceSpec.from_json({"name": "x", "kind": "network", **own_fields({"encoder": uri})})
    assert spec.view.height_px
    load_state(resolve_weights(spec))


_USES = {
    "reference": _use_reference,
    "attributor": _use_attributor,
    "denoiser": _use_denoiser,
    "encoder": _use_encoder,
}
