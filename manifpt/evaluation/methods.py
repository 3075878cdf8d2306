"""What an evaluation compares: artifacts of runs, in groups of which validation chooses one; baselines; fusions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from manifpt.attributor.networks import imagenet_start
from manifpt.attributor.training import RECIPES, Recipe
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate
from manifpt.reader import read_plain_plan
from manifpt.spaces import SpaceSpec

__all__ = ["LOSS", "Candidate", "candidates_of", "key_digest"]

LOSS = "mean over images"  # what is fitted by another one is fitted again
_NETWORKS = {"rgb": ("small",), "frequency": ("head",)}
_CONTROLS = ("none", "random", "blur")
_NO_REALS = ("none", "blur")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to make artifacts and to learn from them.

    Attributes:
        run: its folder.
        test_run: where test images are; None: in the run.
        space, estimate: of its artifacts.
        reference_digest: of the reals; "" where the estimate has none.
        onto: the reference's folder, in a word or as many as it takes, where it isn't the first run's; "" else.
        are_reals_other: a control whose reals are no estimate of the manifold.
        network, recipe: of the attributor.
        start: the ImageNet weights that it starts from; None: random ones.
    """

    run: str
    test_run: str | None
    space: SpaceSpec
    estimate: Estimate
    reference_digest: str
    onto: str
    are_reals_other: bool
    network: str
    recipe: Recipe
    start: SpaceSpec | None = None

    @property
    def group(self) -> tuple[str, str, bool, bool, str]:
        """Candidates of one group differ in parameters and networks; validation picks the one that a table shows."""
        onto = self.reference_digest if self.onto else ""
        return self.space.name, self.estimate.name, self.estimate.residual_first, self.are_reals_other, onto

    @property
    def is_control(self) -> bool:
        """Whether the real manifold has no part in it."""
        return self.are_reals_other or self.estimate.name in _CONTROLS

    @property
    def title(self) -> str:
        """For a table: `ManiFPT, nearest real`."""
        title = _TITLES[self.estimate.name] + (", residual first" if self.estimate.residual_first else "")
        title = f"control: {title}" if self.are_reals_other else title
        return f"{title}, onto `{self.onto}`" if self.onto else title

    def key(self) -> dict[str, Any]:
        """What decides its result, but for rows and seed."""
        recipe = {name: getattr(self.recipe, name) for name in Recipe.__dataclass_fields__}
        return {
            "space": self.space.identity(),
            "estimate": self.estimate.identity(),
            "reference": self.reference_digest,
            "network": self.network,
            "recipe": recipe | {"milestones": list(self.recipe.milestones)},
            "loss": LOSS,
            **({"start": self.start.weights_sha256} if self.start else {}),
        }


def candidates_of(
    runs: Sequence[str],
    test_runs: Sequence[str],
    spaces: Sequence[str],
    networks: Sequence[str],
    epochs: int | None,
    control_runs: Sequence[str] = (),
) -> list[Candidate]:
    """All candidates of some runs.

    Args:
        runs: folders of finished runs.
        test_runs: none, or one for each of `runs` and `control_runs`.
        spaces: of these only; none: all.
        networks: to try on image-shaped artifacts; none: `small` on pixels, `head` on spectra, which have no places
            that a convolution could share weights over. Vectors always get `head`.
        epochs: of each training at most; None: the recipe's.
        control_runs: runs on reals that are no estimate of the manifold.

    Raises:
        ConfigError: a space that no run has, two runs that say the same, or unequal lists.
    """
    all_runs = [*runs, *control_runs]
    if test_runs and len(test_runs) != len(all_runs):
        raise ConfigError(f"--test-artifacts names {len(test_runs)} runs and there are {len(all_runs)}: one for each.")
    for network in networks:
        if network not in RECIPES:
            raise ConfigError(f"Unknown network {network!r} in --networks; known: {', '.join(RECIPES)}.")
    if not runs:
        raise ConfigError("Name one run or more with --artifacts.")
    if epochs is not None and epochs < 1:
        raise ConfigError(f"--epochs must be at least 1, not {epochs}.")
    plans = [read_plain_plan(run) for run in all_runs]
    known = {spec.name for plan in plans for spec in plan.spaces}
    for space in spaces:
        if space not in known:
            raise ConfigError(f"None of the runs has a space {space!r}; they have {', '.join(sorted(known))}.")
    start_of = {network: imagenet_start(network) for network in networks}
    names = _names({plan.reference_digest: plan.reference_uri for plan in plans})
    found: list[Candidate] = []
    test_of: Sequence[str | None] = test_runs or [None] * len(all_runs)
    for n, (run, test_run, plan) in enumerate(zip(all_runs, test_of, plans, strict=True)):
        has_reals = plan.estimate.name not in _NO_REALS
        is_first = not has_reals or plan.reference_digest == plans[0].reference_digest
        onto = "" if is_first else names[plan.reference_digest]
        for spec in (spec for spec in plan.spaces if not spaces or spec.name in spaces):
            for network in ["head"] if spec.kind == "network" else networks or _NETWORKS[spec.kind]:
                recipe = RECIPES[network]
                recipe = replace(recipe, epochs=min(epochs, recipe.epochs)) if epochs else recipe
                found.append(
                    Candidate(
                        run=run, test_run=test_run, space=spec, estimate=plan.estimate,
                        reference_digest=plan.reference_digest if has_reals else "", onto=onto,
                        are_reals_other=n >= len(runs) and has_reals, network=network, recipe=recipe,
                        start=start_of.get(network),
                    )
                )  # fmt: skip
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


def _names(uri_by_digest: Mapping[str, str]) -> dict[str, str]:
    """Of references, by digest: the last parts of where they lie, as many as tell them apart."""
    parts = {digest: uri.rstrip("/").split("/") for digest, uri in uri_by_digest.items()}

    def name(digest: str) -> str:
        own = parts[digest]
        for count in range(1, len(own) + 1):
            if sum(other[-count:] == own[-count:] for other in parts.values()) == 1:
                return "/".join(own[-count:])
        return f"{own[-1]} {digest[:8]}"  # one was built where the other was

    return {digest: name(digest) for digest in parts}


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
