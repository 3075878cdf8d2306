"""Encoders that `pretrain_encoder` made, as spaces."""

from __future__ import annotations

from typing import Any

from manifpt.storage import join, normalize
from manifpt.trained import WEIGHTS, trained_config

__all__ = ["encoder_config", "encoder_fields"]

_NEEDED = ("architecture", "size_px", "mean", "std")


def encoder_config(uri: str) -> dict[str, Any]:
    """What an encoder's folder says of it.

    Raises:
        ConfigError: there is no finished encoder, or a damaged one.
    """
    return trained_config(uri, "encoder", "pretrain_encoder", _NEEDED)


def encoder_fields(uri: str) -> dict[str, Any]:
    """The fields of a `SpaceSpec` that an encoder's folder states.

    Raises:
        ConfigError: as of `encoder_config`.
    """
    folder = normalize(uri)
    document = encoder_config(folder)
    return {name: document[name] for name in ("weights_sha256", *_NEEDED)} | {"weights": join(folder, WEIGHTS)}
