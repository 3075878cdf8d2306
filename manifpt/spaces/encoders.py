"""Encoders that `pretrain_encoder` made, as spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manifpt.storage import join, normalize
from manifpt.trained import WEIGHTS, trained_config

__all__ = ["encoder_config", "own_fields"]

_NEEDED = ("architecture", "size_px", "mean", "std")


def encoder_config(uri: str) -> dict[str, Any]:
    """What an encoder's folder says of it.

    Raises:
        ConfigError: there is no finished encoder, or a damaged one.
    """
    return trained_config(uri, "encoder", "pretrain_encoder", _NEEDED)


def own_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `SpaceSpec` that a user gives: as they are, or with those of the `encoder` that they name.

    Raises:
        ConfigError: as of `encoder_config`.
    """
    fields = dict(given)
    if "encoder" not in fields:
        return fields
    folder = normalize(str(fields.pop("encoder")))
    document = encoder_config(folder)
    stated = {name: document[name] for name in ("weights_sha256", *_NEEDED)}
    return stated | {"weights": join(folder, WEIGHTS)} | fields
