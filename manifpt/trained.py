"""A trained network in a folder: weights without pickle, and a config that is written last.

model.safetensors  weights
README.md          card, where there is one
config.json        what it is, with the weights' SHA-256; without it, nothing in the folder is finished
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from manifpt.documents import json_of, object_of
from manifpt.errors import ConfigError
from manifpt.storage import join, store_of

__all__ = ["WEIGHTS", "publish_trained", "trained_config"]

WEIGHTS = "model.safetensors"
_FORMAT = 1


def publish_trained(output: str, facts: Mapping[str, Any], card: str | None = None) -> dict[str, Any]:
    """Writes what makes a folder of weights whole. Returns its config.

    Args:
        output: its URI; its weights are there.
        facts: what the config says, besides its format and the weights' sum.
        card: Markdown.
    """
    store = store_of(output)
    digest = hashlib.sha256(store.read(join(output, WEIGHTS))).hexdigest()
    if card is not None:
        store.write(join(output, "README.md"), card.encode())
    document = {"format": _FORMAT, "weights_sha256": digest, **facts}
    store.write(join(output, "config.json"), (json.dumps(document, indent=2) + "\n").encode())
    return document


def trained_config(uri: str, what: str, job: str, needed: Collection[str]) -> dict[str, Any]:
    """What a folder says of its network.

    Args:
        uri: the folder.
        what: it holds: `denoiser`.
        job: that makes one: `train_denoiser`.
        needed: names that its config must have.

    Raises:
        ConfigError: there is none, a damaged one, or one of another format.
    """
    try:
        data = store_of(uri).read(join(uri, "config.json"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no finished {what} at {uri}; make one with jobs/{job}.py.") from error
    document = object_of(json_of(data, f"The {what} {uri}"), f"The {what} {uri}", {})
    if not {"format", "weights_sha256", *needed} <= set(document):
        raise ConfigError(f"{uri} holds no {what}; make one with jobs/{job}.py.")
    if document["format"] != _FORMAT:
        raise ConfigError(f"The {what} {uri} has format {document['format']!r}; this version reads {_FORMAT}.")
    return document
