"""The model card of an attributor: what it was trained on, what it reached, and what it must not be used for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manifpt.report.text import cell

__all__ = ["model_card"]


def model_card(
    labels: Sequence[str], config: Mapping[str, Any], metrics: Mapping[str, Any], unknown: Mapping[str, Any]
) -> str:
    """Markdown.

    Args:
        labels: S names.
        config, metrics: of the bundle.
        unknown: of its `calibration.json`.
    """
    estimate = config["estimate"]
    rows = [
        f"| {cell(label)} | {count} | {_percent(precision)} | {_percent(recall)} |"
        for label, count, precision, recall in zip(
            labels, metrics["test_images"], metrics["precision"], metrics["recall"], strict=True
        )
    ]
    altered = config.get("altered")
    return "\n".join(
        [
            "# Attributor of generated images",
            "",
            f"Names the source of an image among {len(labels)}, by its artifact (ManiFPT, CVPR 2024): space "
            f"`{config['space']['name']}`, projection `{estimate['name']}`, network `{config['network']}`, seed "
            f"{config['seed']}.",
            "",
            f"Accuracy on {sum(metrics['test_images'])} test images that it never saw: {_percent(metrics['accuracy'])} "
            f"(mean over sources {_percent(metrics['balanced_accuracy'])}; chance {_percent(1 / len(labels))}). "
            f"Calibration error {metrics['calibration_error']:.3f} (probabilities that are right would show "
            f"{metrics['calibration_error_by_chance']:.3f} on so many images). {_ratio(metrics['fd_ratio'])}",
            "",
            *([_augmentation(altered), ""] if altered else []),
            "| source | test images | precision | recall |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "## Use",
            "",
            "```python",
            "from manifpt.attributor.bundle import Attributor",
            "",
            "verdicts = Attributor.load(PATH).verdicts(artifacts)  # of the same space, projection and reference",
            "```",
            "",
            f"Artifacts must come from the reference with digest `{config['reference_digest'][:16]}`.",
            "",
            "## Limits",
            "",
            *_unknown(unknown),
            "- Re-encoding, resizing and filtering change artifacts; accuracy on such images was not measured here.",
            "- Where sources went through different codecs, it may name the codec. `evaluate_attributor` audits that.",
            "- A probability is evidence about an image, not a proof of who made it.",
            "",
        ]
    )


def _unknown(unknown: Mapping[str, Any]) -> list[str]:
    if unknown["threshold"] is None:
        return [
            f"- No image is called unknown: there were too few validation images for a false-alarm rate of "
            f"{_percent(unknown['rate'])}. One of a source that is not in the table gets one of its names all the same."
        ]
    threshold = f"{unknown['threshold']:.4g}"
    return [
        f"- An image is called unknown where its score (`{unknown['score']}`) is over {threshold}, as at most "
        f"{_percent(unknown['rate'])} of the images of known sources should be; of the test images, "
        f"{_percent(unknown['measured_rate'])} were (mean over sources).",
        "- No image of an unknown source was there to choose score and threshold by. How many are found depends on the "
        "source; `evaluate_attributor --leave-one-out` measures it. One that isn't found gets one of the names.",
    ]


def _augmentation(altered: Sequence[Mapping[str, Any]]) -> str:
    runs = ", ".join(f"{of_run['images']} by `--alter {of_run['alter']}`" for of_run in altered)
    return f"Altered copies of its training images were trained on too: {runs}."


def _ratio(value: float | None) -> str:
    return "" if value is None else f"FD ratio {value:.2f}."


def _percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{100 * value:.1f} %"
