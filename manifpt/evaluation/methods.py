"""What an evaluation compares: artifacts of runs, in groups of which validation chooses one; baselines; fusions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from manifpt.attributor.training import RECIPES, Recipe
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate
from manifpt.reader import read_plan
from manifpt.spaces import SpaceSpec

__all__ = ["Candidate", "candidates_of", "group_title", "key_digest"]

_NETWORKS = {"rgb": ("small",), "frequency": ("head",)}
_CONTROLS = ("none", "random", "blur")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to make artifacts and to learn from them.

    Attributes:
        run: its folder.
        test_run: where test images are; None: in the run.
        space, estimate: of its artifacts.
        network, recipe: of the attributor.
    """

    run: str
    test_run: str | None
    space: SpaceSpec
    estimate: Estimate
    network: str
    recipe: Recipe

    @property
    def group(self) -> tuple[str, str, bool]:
        """Candidates of one group differ in parameters and networks; validation picks the one that a table shows."""
        return self.space.name, self.estimate.name, self.estimate.residual_first

    @property
    def is_control(self) -> bool:
        """Whether the real manifold has no part in it."""
        return self.estimate.name in _CONTROLS

    def key(self) -> dict[str, Any]:
        """What decides its result, but for rows and seed."""
        recipe = {name: getattr(self.recipe, name) for name in Recipe.__dataclass_fields__}
        return {
            "space": self.space.identity(),
            "estimate": self.estimate.identity(),
            "network": self.network,
            "recipe": recipe | {"milestones": list(self.recipe.milestones)},
        }


def candidates_of(
    runs: Sequence[str],
    test_runs: Sequence[str],
    spaces: Sequence[str],
    networks: Sequence[str],
    epochs: int | None,
) -> list[Candidate]:
    """All candidates of some runs.

    Args:
        runs: folders of finished runs.
        test_runs: none, or one for each run.
        spaces: of these only; none: all.
        networks: to try on image-shaped artifacts; none: `small` on pixels, `head` on spectra, which have no places
            that a convolution could share weights over. Vectors always get `head`.
        epochs: of each training at most; None: the recipe's.

    Raises:
        ConfigError: a space that no run has, two runs that say the same, or unequal lists.
    """
    if test_runs and len(test_runs) != len(runs):
        raise ConfigError(f"--test-artifacts names {len(test_runs)} runs and --artifacts {len(runs)}: one for each.")
    for network in networks:
        if network not in RECIPES:
            raise ConfigError(f"Unknown network {network!r} in --networks; known: {', '.join(RECIPES)}.")
    if not runs:
        raise ConfigError("Name one run or more with --artifacts.")
    if epochs is not None and epochs < 1:
        raise ConfigError(f"--epochs must be at least 1, not {epochs}.")
    plans = [read_plan(run) for run in runs]
    known = {spec.name for plan in plans for spec in plan.spaces}
    for space in spaces:
        if space not in known:
            raise ConfigError(f"None of the runs has a space {space!r}; they have {', '.join(sorted(known))}.")
    found: list[Candidate] = []
    test_of: Sequence[str | None] = test_runs or [None] * len(runs)
    for run, test_run, plan in zip(runs, test_of, plans, strict=True):
        for spec in (spec for spec in plan.spaces if not spaces or spec.name in spaces):
            for network in ["head"] if spec.kind == "network" else networks or _NETWORKS[spec.kind]:
                recipe = RECIPES[network]
                recipe = replace(recipe, epochs=min(epochs, recipe.epochs)) if epochs else recipe
                found.append(Candidate(run=run, test_run=test_run, space=spec, estimate=plan.estimate,
                                       network=network, recipe=recipe))  # fmt: skip
    seen: dict[str, str] = {}
    for candidate in found:
        digest = key_digest(candidate.key())
        if digest in seen:
            raise ConfigError(
                f"{seen[digest]} and {candidate.run} hold the same artifacts ({candidate.space.name}, "
                f"{candidate.estimate.label}): name one of them."
            )
        seen[digest] = candidate.run
    return found


def group_title(group: tuple[str, str, bool]) -> str:
    """For a table: `ManiFPT, nearest real`."""
    _, estimate, residual_first = group
    return _TITLES[estimate] + (", residual first" if residual_first else "")


_TITLES = {
    "nearest": "ManiFPT, nearest real",
    "mean": "mean of k nearest reals",
    "hull": "affine hull of k nearest reals",
    "soft": "soft projection",
    "denoiser": "denoiser residual",
    "none": "control: raw embedding",
    "random": "control: random real",
    "blur": "control: high-pass",
}


def key_digest(key: Mapping[str, Any]) -> str:
    """A short name of a key, for folders."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
