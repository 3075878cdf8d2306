"""The files of an attributor bundle, none of which is read that isn't the one that its config names. Knows no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from manifpt.documents import json_of, object_of
from manifpt.errors import ConfigError
from manifpt.log import event
from manifpt.storage import join, store_of

__all__ = ["CONFIG", "FORMAT", "bundle_config", "bundle_file", "bundle_files", "bundle_object", "is_finished"]

CONFIG = "config.json"
FORMAT = 4
_AGAIN = "train it again, by the same command"


def bundle_config(uri: str) -> dict[str, Any]:
    """`config.json` of a bundle of this version, with `files`, the SHA-256 of the others by name.

    Raises:
        ConfigError: there is none, it is damaged, or of another version.
    """
    try:
        data = store_of(uri).read(join(uri, CONFIG))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no finished attributor at {uri}; train one: jobs/train_attributor.py.") from error
    where = f"The attributor {uri}"
    config = object_of(json_of(data, where), where, {})
    if config.get("format") != FORMAT:
        raise ConfigError(f"{where} has format {config.get('format')!r}; this version reads {FORMAT}: {_AGAIN}.")
    files = object_of(config, where, {"files": dict})["files"]
    if any("/" in name for name in files):  # a bundle from elsewhere must not lead out of its folder
        raise ConfigError(f"{where} is damaged ({CONFIG} names files of other folders); {_AGAIN}.")
    return config


def bundle_file(uri: str, config: Mapping[str, Any], name: str) -> bytes:
    """Another file of a bundle.

    Args:
        uri: of the bundle.
        config: of `bundle_config`.
        name: of the file.

    Raises:
        ConfigError: it isn't there, or is another one than was written with the config: a copy that was cut off, or
            made over an older bundle.
    """
    try:
        data = store_of(uri).read(join(uri, name))
    except FileNotFoundError as error:
        raise ConfigError(
            f"The attributor {uri} is damaged ({name} is missing); copy it whole, or {_AGAIN}."
        ) from error
    if hashlib.sha256(data).hexdigest() != config["files"].get(name):
        raise ConfigError(
            f"The attributor {uri} is damaged ({name} is not the one that its config names); copy it whole, or "
            f"{_AGAIN}."
        )
    return data


def bundle_files(uri: str, config: Mapping[str, Any]) -> dict[str, bytes]:
    """All of them, by name: a bundle is whole, or none, since what lacks would be missed only when it is needed.

    Raises:
        ConfigError: as of `bundle_file`.
    """
    return {name: bundle_file(uri, config, name) for name in config["files"]}


def bundle_object(uri: str, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A file of a bundle that holds a JSON object.

    Raises:
        ConfigError: as of `bundle_file`.
    """
    where = f"{name} of the attributor {uri}"
    return object_of(json_of(bundle_file(uri, config, name), where), where, {})


def is_finished(uri: str) -> bool:
    """Whether a training left a bundle there that is whole and of this version. Another one is made anew."""
    if store_of(uri).stat(join(uri, CONFIG)) is None:
        return False
    try:
        bundle_files(uri, bundle_config(uri))
    except ConfigError as error:
        event("bundle_made_anew", output=uri, why=error)
        return False
    return True
