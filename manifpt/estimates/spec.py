"""Which estimate of the projection x* a run uses, as it stands in plans and in the shards' metadata."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from manifpt.documents import Kinds, object_of
from manifpt.errors import ConfigError

__all__ = ["ESTIMATES", "Estimate"]

# Fields of each beyond its name; all other fields are left out of plans and metadata.
ESTIMATES: dict[str, tuple[str, ...]] = {
    "nearest": (),
    "mean": ("neighbors",),
    "hull": ("neighbors", "ridge"),
    "soft": ("sigma",),
    "denoiser": ("weights_sha256",),
    # Controls: what is left when the real manifold is taken out of the method.
    "none": (),
    "random": ("seed",),
    "blur": ("sigma",),
}

_MOST_NEIGHBORS = 64
_LEAST_RIDGE = 1e-9  # below, float64 can't tell neighbours apart that are nearly one


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An estimate of the projection. The paper's is `nearest`.

    Attributes:
        name: a key of `ESTIMATES`.
        neighbors: k, of `mean` and `hull`, 1 to 64.
        ridge: of `hull`, times the mean squared distance of the k neighbours, 1e-9 to 1e9.
        sigma: `soft`: the noise's standard deviation, in the embedding's units. `blur`: the Gaussian's, in px.
        weights: a denoiser's folder; `weights_sha256` is its digest.
        seed: of `random`.
        residual_first: in `frequency`: phi(x - x*), projected among pixels, instead of phi(x) - phi(x*).
    """

    name: str = "nearest"
    neighbors: int = 16
    ridge: float = 0.1
    sigma: float = 0.0
    weights: str = ""
    weights_sha256: str = ""
    seed: int = 0
    residual_first: bool = False

    def __post_init__(self) -> None:
        """Raises:
        ConfigError: an unknown name, or a parameter out of range.
        """
        if self.name not in ESTIMATES:
            raise ConfigError(f"Unknown estimate {self.name!r}; known: {', '.join(ESTIMATES)}.")
        if "neighbors" in ESTIMATES[self.name] and not 1 <= self.neighbors <= _MOST_NEIGHBORS:
            raise ConfigError(f"--neighbors is 1 to {_MOST_NEIGHBORS}, not {self.neighbors}.")
        if "sigma" in ESTIMATES[self.name] and not 0 < self.sigma < math.inf:
            raise ConfigError(f"--estimate {self.name} needs a --sigma above 0, such as {_EXAMPLES[self.name]}.")
        if "ridge" in ESTIMATES[self.name] and not _LEAST_RIDGE <= self.ridge <= 1 / _LEAST_RIDGE:
            raise ConfigError(f"--ridge is {_LEAST_RIDGE:g} to {1 / _LEAST_RIDGE:g}, not {self.ridge}.")

    @property
    def is_sample(self) -> bool:
        """Whether x* is one image of the reference."""
        return self.name in ("nearest", "random")

    @property
    def seeks_neighbors(self) -> bool:
        """Whether it looks for the nearest reals of an image, and so sees which are near copies of it."""
        return self.name in ("nearest", "mean", "hull")

    @property
    def uses_reals(self) -> bool:
        """Whether it hangs on the reference, of which an image may be."""
        return self.name not in ("none", "blur")

    @property
    def uses_gpu(self) -> bool:
        """Whether its work is more than a GPU's while: the controls search nothing."""
        return self.name not in ("none", "random", "blur")

    def identity(self) -> dict[str, Any]:
        """What makes the numbers."""
        found: dict[str, Any] = {"name": self.name} | {field: getattr(self, field) for field in ESTIMATES[self.name]}
        return found | ({"residual_first": True} if self.residual_first else {})

    @property
    def label(self) -> str:
        """For tables: `soft sigma=0.01, residual first`."""
        fields = [f"{field}={getattr(self, field)}" for field in ESTIMATES[self.name] if field != "weights_sha256"]
        return ", ".join([" ".join([self.name, *fields]), *(["residual first"] if self.residual_first else [])])

    @staticmethod
    def from_json(document: dict[str, Any] | None) -> Estimate:
        """The inverse of `identity`; None is the paper's, as in runs made before there was a choice.

        Raises:
            ConfigError: an unknown field, or a value of another kind.
        """
        if document is None:
            return Estimate()
        found = object_of(document, "An estimate", {})
        unknown = sorted(set(found) - set(_KINDS))
        if unknown:
            raise ConfigError(f"An estimate has no {unknown[0]!r}; this version may be too old for what made it.")
        object_of(found, "An estimate", {name: kind for name, kind in _KINDS.items() if name in found})
        return Estimate(**found)


_KINDS: Kinds = {
    "name": str, "neighbors": int, "ridge": (int, float), "sigma": (int, float), "weights": str, "weights_sha256": str,
    "seed": int, "residual_first": bool,
}  # fmt: skip
_EXAMPLES = {"soft": "0.01 of a pixel's range", "blur": "1.0 px"}
