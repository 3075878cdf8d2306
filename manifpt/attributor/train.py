"""The command `train_attributor`: choose rows, train over workers; `manifpt.attributor.finish` makes a bundle of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from manifpt.attributor.altered import Altered, read_altered
from manifpt.attributor.choice import choice_of
from manifpt.attributor.examples import Examples, select_examples
from manifpt.attributor.files import bundle_config, bundle_object, is_finished
from manifpt.attributor.splits import SIDES, TEST, TRAIN, VALIDATION
from manifpt.attributor.trackers import Track, make_tracker
from manifpt.config import TrainConfig
from manifpt.errors import ConfigError
from manifpt.following import followed
from manifpt.log import event
from manifpt.plan import publish_facts
from manifpt.resources import share_training
from manifpt.storage import join, normalize

__all__ = ["train_attributor"]

_FEW_A_WORKER = 8  # images of a batch


def train_attributor(config: TrainConfig) -> dict[str, Any]:
    """Trains an attributor, or goes on where an earlier call stopped. Returns the bundle's metrics.

    Raises:
        ConfigError: what is missing or doesn't fit together; nothing was trained.
        WorkerError: workers died again and again.
    """
    begin = time.monotonic()
    run, output = normalize(config.artifacts), normalize(config.output)
    choice = replace(choice_of(config), seed=config.seed)
    examples = select_examples(run, config.space, choice)
    altered = read_altered([normalize(other) for other in config.altered_artifacts], examples)
    from manifpt.attributor import networks, training  # torch costs seconds

    network = config.network or ("resnet50" if len(examples.shape) == 3 else "head")
    training.check_network(network, examples.shape)
    recipe = training.RECIPES[network]
    if config.epochs is not None:
        if config.epochs < 1:
            raise ConfigError(f"--epochs must be at least 1, not {config.epochs}.")
        recipe = replace(recipe, epochs=config.epochs)
    if not 0 < config.false_alarms < 1:
        raise ConfigError(f"--false-alarms is a share of images, such as 0.05, not {config.false_alarms}.")
    weights = networks.imagenet_start(network)
    facts = _facts(config, examples, altered, network, recipe, weights.weights_sha256 if weights else None)
    publish_facts(join(output, "training.json"), facts, "training")
    if is_finished(output):
        metrics = bundle_object(output, bundle_config(output), "metrics.json")
        return metrics | {"labels": list(examples.labels), "trained": False}
    track = make_tracker(config.tracker, output)
    label_n = np.concatenate([examples.label_n[examples.side_n == TRAIN], *(of_run.label_n for of_run in altered)])
    count_s = np.bincount(label_n, minlength=len(examples.labels))
    event("training", run=run, space=config.space, estimate=examples.estimate.label, network=network,
          images=len(examples.label_n), train=int(count_s.sum()), labels=len(examples.labels),
          output=output)  # fmt: skip

    from manifpt import cluster, pipeline
    from manifpt.attributor import worker
    from manifpt.distributed import run_workers

    cluster.connect()
    shares = share_training(*cluster.cluster(), config.workers)
    if count_s.sum() < 2 * shares.workers:
        raise ConfigError(
            f"{shares.workers} workers can't share {count_s.sum()} training images, since each needs two: --workers "
            f"{count_s.sum() // 2} or fewer."
        )
    if (each := max(2, recipe.batch_size // shares.workers)) < _FEW_A_WORKER:
        event("few_images_a_worker", images=each, workers=shares.workers, hint="batch normalisation sees no more at "
              "once, and trains worse than with fewer --workers")  # fmt: skip
    job = worker.Job(
        output=output,
        run=run,
        space=config.space,
        shape=examples.shape,
        labels=examples.labels,
        train_rows=int(count_s.sum()),
        validation=examples.parts(VALIDATION),
        test=examples.parts(TEST),
        network=network,
        recipe=recipe,
        weight_s=training.class_weights(label_n, len(count_s), recipe.balanced),
        weights=weights,
        seed=config.seed,
    )
    parts = {run: examples.parts(TRAIN)} | {of_run.run: of_run.parts for of_run in altered}
    rows = pipeline.artifact_rows(parts, config.space, shares.task_cpus)
    with followed(join(output, "metrics.jsonl"), _tell(recipe.epochs, track)):
        run_workers(worker.train, job, output, shares, rows)
    from manifpt.attributor.finish import finish

    facts |= {"choice": choice.facts()}
    metrics = finish(output, examples, facts, shares.workers) | {"seconds": round(time.monotonic() - begin, 1)}
    return metrics | {"trained": True}


def _facts(
    config: TrainConfig,
    examples: Examples,
    altered: Sequence[Altered],
    network: str,
    recipe: Any,
    weights: str | None,
) -> dict[str, Any]:
    """What decides the attributor, as `config.json` says it."""
    return {
        "space": examples.spec.identity(),
        "estimate": examples.estimate.identity(),
        "reference_digest": examples.reference_digest,
        "shape": list(examples.shape),
        "examples_digest": examples.digest,
        "images": {side: int((examples.side_n == n).sum()) for n, side in enumerate(SIDES)},
        "left_out": examples.left_out,
        "group_column": config.group_column,
        "network": network,
        "start": f"ImageNet, SHA-256 {weights}" if weights else "random",
        "recipe": asdict(recipe) | {"milestones": list(recipe.milestones)},
        "seed": config.seed,
        "false_alarms": config.false_alarms,
        # Null as in a training that knows nothing of it; a name that isn't there is not compared.
        "altered": [of_run.facts() for of_run in altered] or None,
    }


def _tell(epochs: int, track: Track) -> Callable[[dict[str, Any], list[dict[str, Any]]], None]:
    """Tells an epoch, with the time that the rest will take at most."""

    def tell(epoch: dict[str, Any], found: list[dict[str, Any]]) -> None:
        event(
            "epoch", epoch=f"{epoch['epoch']}/{epochs}", loss=epoch["loss"], accuracy=epoch["accuracy"],
            validation_accuracy=epoch["validation_accuracy"], images_per_s=epoch["images_per_s"],
            eta_s=round((epochs - epoch["epoch"]) * float(np.median([e["seconds"] for e in found]))),
        )  # fmt: skip
        try:
            track(epoch)
        except Exception as error:  # a tracker's server is no reason to lose a training
            event("not_tracked", epoch=epoch["epoch"], error=error)

    return tell
