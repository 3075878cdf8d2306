"""Training-time augmentation: altered copies of training images, from runs of the same images by `--alter`.

Legend: N rows of a training, n of them altered.

Only what lies on the training side of the plain run has copies here, so that what chooses and what tests is the plain
run alone, and no image is tested on whose copy was trained on. Labels are those of the plain run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifpt.alterations import NONE
from manifpt.attributor.examples import Examples, Part, read_rows
from manifpt.attributor.splits import TRAIN
from manifpt.errors import ConfigError
from manifpt.plan import Plan
from manifpt.reader import read_plan

__all__ = ["Altered", "read_altered"]


@dataclass(frozen=True, slots=True)
class Altered:
    """The altered copies that a run has of a training's images.

    Attributes:
        run: its folder.
        alter: what it did to them.
        plan_digest: of its plan, which decides its artifacts.
        parts: where they are; rows are numbered after those of the plain run and of the runs before.
        label_n: int64 [n].
    """

    run: str
    alter: str
    plan_digest: str
    parts: tuple[Part, ...]
    label_n: np.ndarray

    def facts(self) -> dict[str, Any]:
        """What of it decides the attributor, as `config.json` says it."""
        return {"alter": self.alter, "plan_digest": self.plan_digest, "images": len(self.label_n)}


def read_altered(runs: Sequence[str], examples: Examples) -> tuple[Altered, ...]:
    """The altered copies of training images; an image that a run rejected has none there.

    Args:
        runs: folders of runs by `--alter`, of the same manifest, space, estimate and reference as the examples' run.
        examples: of the plain run.

    Raises:
        ConfigError: a run that differs in more than that, isn't altered, is like another one, or isn't finished.
    """
    plan = read_plan(examples.run)
    found: list[Altered] = []
    for number, run in enumerate(runs, start=1):
        altered = read_plan(run)
        if altered.alter == NONE:
            raise ConfigError(f"{run} is of images as they are: compute it with --alter drawn, or leave it out.")
        if any(altered.alter == other.alter for other in found):
            raise ConfigError(f"Two of --altered-artifacts are by --alter {altered.alter}: name one of them.")
        _refuse_other(altered, plan, run, examples)
        found.append(_altered(run, altered, examples, number * len(examples.label_n)))
    return tuple(found)


def _refuse_other(altered: Plan, plan: Plan, run: str, examples: Examples) -> None:
    spec = next((spec.identity() for spec in altered.spaces if spec.name == examples.spec.name), None)
    pairs = {
        "manifest": (altered.manifest_digest, plan.manifest_digest),
        "space": (spec, examples.spec.identity()),
        "estimate": (altered.estimate.identity(), examples.estimate.identity()),
        "reference": (altered.reference_digest, examples.reference_digest),
        "number format (--dtype)": (altered.dtype, plan.dtype),
        "projection (--projection)": (altered.projection == "approximate", plan.projection == "approximate"),
        "decoder": (altered.decoder, plan.decoder),
    }
    differing = [what for what, (one, other) in pairs.items() if one != other]
    if differing:
        raise ConfigError(
            f"{run} differs from {examples.run} in its {', '.join(differing)}, not only by --alter: compute it "
            f"anew, with all other settings of {examples.run}."
        )


def _altered(run: str, plan: Plan, examples: Examples, offset: int) -> Altered:
    table = read_rows(run, examples.spec.name, altered=True).table
    train_n = np.flatnonzero(examples.side_n == TRAIN)
    ids = examples.table["image_id"].take(pa.array(train_n)).combine_chunks()
    place_n = pc.index_in(ids, value_set=table["image_id"].combine_chunks())
    train_n = train_n[place_n.is_valid().to_numpy(zero_copy_only=False)]
    label_n = examples.label_n[train_n]
    # The run's own shards and places, of these rows alone, in the plain run's order.
    copies = replace(examples, run=run, table=table.take(place_n.drop_null()), label_n=label_n,
                     side_n=np.full(len(label_n), TRAIN, np.int8))  # fmt: skip
    parts = tuple(replace(part, row_n=part.row_n + offset) for part in copies.parts(TRAIN))
    return Altered(run, plan.alter, plan.digest, parts, label_n)
