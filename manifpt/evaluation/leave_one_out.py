"""The command `evaluate_attributor --leave-one-out`: how well sources that were not in training are found.

Every label but `real` is left out in turn, for every run, space, network and seed. A training without a source has a
result of its own, so the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from manifpt import cluster
from manifpt.attributor.examples import Examples
from manifpt.attributor.openset import SCORES
from manifpt.config import EvaluateConfig
from manifpt.errors import ConfigError
from manifpt.evaluation.evaluate import check_codec
from manifpt.evaluation.images import examples_by_seed
from manifpt.evaluation.methods import Candidate, candidates_of, key_digest
from manifpt.evaluation.results import merged_notes
from manifpt.evaluation.running import run_works
from manifpt.evaluation.tasks import Work
from manifpt.evaluation.unseen import FALSE_ALARMS, hold_out, measure_unseen
from manifpt.evaluation.unseen_table import CHOSEN, leave_one_out_markdown, means
from manifpt.log import event
from manifpt.manifest import REAL
from manifpt.storage import join, normalize, store_of

__all__ = ["measure_leave_one_out"]


def measure_leave_one_out(config: EvaluateConfig) -> dict[str, Any]:
    """Writes `leave_one_out.json` and `.md`. Returns both, and where they are.

    Raises:
        ConfigError: what is missing or doesn't fit together.
    """
    output = normalize(config.output)
    runs, control_runs = ([normalize(run) for run in of] for of in (config.artifacts, config.control_artifacts))
    if config.attributor or config.baselines or config.test_artifacts:
        raise ConfigError("--leave-one-out trains its own attributors: no --attributor, --baselines, --test-artifacts.")
    if config.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, not {config.seeds}.")
    candidates = candidates_of(runs, [], config.spaces, config.networks, config.epochs, control_runs)
    check_codec([*runs, *control_runs], config.equalize_codec)
    examples = examples_by_seed(candidates, config)
    first = examples[0][candidates[0].run, candidates[0].space.name]
    if len(first.labels) < 3:
        raise ConfigError(f"Without one of {', '.join(first.labels)} nothing is left to tell apart: give three labels.")
    left_out = [label for label in first.labels if label != REAL]
    dataset = config.dataset or runs[0].rstrip("/").rpartition("/")[2]
    event("leave_one_out", dataset=dataset, images=len(first.label_n), labels=len(first.labels), seeds=config.seeds,
          candidates=len(candidates), output=output)  # fmt: skip
    works = {
        (candidate, label): [
            _work(candidate, of_seed[candidate.run, candidate.space.name], label, output, seed)
            for seed, of_seed in enumerate(examples)
        ]
        for candidate in candidates
        for label in left_out
    }
    cluster.connect()
    waiting = [work for of_seeds in works.values() for work in of_seeds if work.done("unseen") is None]
    run_works(measure_unseen, waiting, "unseen", _told)
    document = {
        "dataset": dataset,
        "labels": list(first.labels),
        "images": len(first.label_n),
        "seeds": config.seeds,
        "false_alarms": FALSE_ALARMS,
        "rows": [
            _row(candidate, label, [work.done("unseen") or {} for work in of_seeds])
            for (candidate, label), of_seeds in works.items()
        ],
    }
    text = leave_one_out_markdown(document)
    store_of(output).write(join(output, "leave_one_out.json"), (json.dumps(document, indent=2) + "\n").encode())
    store_of(output).write(join(output, "leave_one_out.md"), text.encode())
    return {"document": document, "text": text, "output": output}


def _work(candidate: Candidate, examples: Examples, label: str, output: str, seed: int) -> Work:
    known, held = hold_out(examples, label)
    key = candidate.key() | {"examples": known.digest, "left_out": label, "test": held.digest, "seed": seed,
                             "scores": list(SCORES)}  # fmt: skip
    folder = join(output, "leave_one_out", f"{candidate.space.name}-{candidate.estimate.name}-{key_digest(key)}")
    return Work(folder=folder, key=key, name=candidate.network, examples=known, test_examples=held,
                recipe=candidate.recipe, start=candidate.start, seed=seed)  # fmt: skip


def _told(found: dict[str, Any]) -> dict[str, Any]:
    key = found["key"]
    return {
        "method": f"{key['space']['name']}/{key['estimate']['name']}/{key['network']}",
        "left_out": key["left_out"],
        "seed": key["seed"],
        "score": found["chosen"],
        "auroc": found["scores"][found["chosen"]]["auroc"],
    }


def _row(candidate: Candidate, label: str, of_seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One source left out of one method: means over seeds, of the chosen score and of each alone."""
    by_score = {
        CHOSEN: [found["scores"][found["chosen"]] for found in of_seeds],
        **{name: [found["scores"][name] for found in of_seeds] for name in of_seeds[0]["scores"]},
    }
    return {
        "method": candidate.title,
        "space": candidate.space.name,
        "network": f"{candidate.network}; {candidate.estimate.label}",
        "left_out": label,
        "images": of_seeds[0]["unseen_images"],
        "chosen": [found["chosen"] for found in of_seeds],
        "closed_accuracy": statistics.fmean(found["closed_accuracy"] for found in of_seeds),
        "scores": {name: means(found) for name, found in by_score.items()},
        "notes": merged_notes({seed: found.get("notes", ()) for seed, found in enumerate(of_seeds)}),
    }
