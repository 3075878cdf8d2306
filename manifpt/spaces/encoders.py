"""Encoders that `pretrain_encoder` made, as spaces."""

from __future__ import annotations

import json
from typing import Any

from manifpt.errors import ConfigError
from manifpt.storage import join, normalize, store_of

__all__ = ["encoder_fields"]

_FORMAT = 1


def encoder_fields(uri: str) -> dict[str, Any]:
    """The fields of a `SpaceSpec` that an encoder's folder states.

    Raises:
        ConfigError: there is no finished encoder, or one of another format.
    """
    folder = normalize(uri)
    try:
        document = json.loads(store_of(folder).read(join(folder, "config.json")))
        if document["format"] != _FORMAT:
            raise ConfigError(f"The encoder {folder} has format {document['format']}; this version reads {_FORMAT}.")
        names = ("architecture", "weights_sha256", "size_px", "mean", "std")
        return {name: document[name] for name in names} | {"weights": join(folder, "model.safetensors")}
    except FileNotFoundError as error:
        raise ConfigError(f"There is no finished encoder at {folder}; jobs/pretrain_encoder.py makes one.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{join(folder, 'config.json')} is not of an encoder: train it again.") from error
