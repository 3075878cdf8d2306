"""The card of an encoder: what it has seen, and what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["encoder_card"]


def encoder_card(document: Mapping[str, Any]) -> str:
    """Markdown.

    Args:
        document: what `config.json` holds.
    """
    lines = [
        "# Encoder of real images",
        "",
        f"`{document['architecture']}` at {document['size_px']} px, trained by Barlow Twins (Zbontar et al. 2021) on "
        f"the real images of the manifest {document['manifest_digest'][:16]} alone: {document['images_an_epoch']} an "
        f"epoch, {document['epochs']} epochs, batches of {document['batch_size']}, policy `{document['policy']}`, seed "
        f"{document['seed']}. The loss fell from {document['loss'][0]:.1f} in the first epoch to "
        f"{document['loss'][-1]:.1f}.",
    ]
    if document["knn_accuracy"]:
        first, last = document["knn_accuracy"][0], document["knn_accuracy"][-1]
        lines += [
            "",
            f"Nearest neighbours (k = 200, cosine) tell {100 * last:.1f}% of `{document['label_column']}`; with random "
            f"weights {100 * first:.1f}%. The labels were not used in training; the images of the probe were.",
        ]
    lines += [
        "",
        "## Use",
        "",
        "```bash",
        "python jobs/build_reference.py --manifest real.parquet --spaces selfsupervised --encoder THIS --output ref/",
        "```",
        "",
        "It knows images like those it has seen. For evidence on others, train another.",
        "",
    ]
    return "\n".join(lines)
