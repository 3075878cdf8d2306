"""The registry of spaces. A new kind is one file and one line here; a new network is a few lines of a user's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from manifpt.errors import ConfigError
from manifpt.spaces.base import Space, SpaceSpec, View
from manifpt.spaces.encoders import own_fields
from manifpt.spaces.pixels import FrequencySpace, RgbSpace
from manifpt.spaces.weights import timm_preprocessing

__all__ = ["BUILT_IN", "Space", "SpaceSpec", "View", "make_space", "spec_of"]

BUILT_IN = {
    "rgb": SpaceSpec(name="rgb", kind="rgb"),
    "frequency": SpaceSpec(name="frequency", kind="frequency"),
    "ycbcr": SpaceSpec(name="ycbcr", kind="rgb", color="ycbcr"),
    "frequency_ycbcr": SpaceSpec(name="frequency_ycbcr", kind="frequency", color="ycbcr"),
    "supervised": SpaceSpec(
        name="supervised", kind="network", architecture="torchvision:resnet50", weights="resnet50-imagenet1k-v1",
        size_px=224,
    ),
    "selfsupervised": SpaceSpec(
        name="selfsupervised", kind="network", architecture="torchvision:resnet50", weights="resnet50-barlow-twins",
        size_px=224,
    ),
}  # fmt: skip


def _network(spec: SpaceSpec, threads: int, device: str, images: int) -> Space:
    from manifpt.spaces.network import NetworkSpace  # torch costs seconds; pixel spaces do without

    return NetworkSpace(spec, threads, device, images)


_KINDS: dict[str, Callable[[SpaceSpec, int, str, int], Space]] = {
    "rgb": lambda spec, threads, device, images: RgbSpace(spec),
    "frequency": lambda spec, threads, device, images: FrequencySpace(spec),
    "network": _network,
}


def make_space(spec: SpaceSpec, threads: int = 1, device: str = "cpu", images: int = 0) -> Space:
    """The space of a spec.

    Args:
        spec: with a known size, and resolved weights if it will encode.
        threads: CPU threads for its arithmetic.
        device: `cpu` or `cuda`.
        images: about so many will be encoded; for many, a network is compiled.
    """
    return _KINDS[spec.kind](spec, threads, device, images)


def spec_of(name: str, own: Mapping[str, Mapping[str, Any]], size_px: int | None = None) -> SpaceSpec:
    """The spec of a name: a built-in, a built-in with the user's changes, or the user's own.

    Args:
        name: as on the command line.
        own: by name, fields of `SpaceSpec`, from the config's `own_spaces`; and `encoder`, a folder that
            `pretrain_encoder` made, in place of them.
        size_px: resolution for the pixel spaces that state none.

    Raises:
        ConfigError: an unknown name or field.
    """
    built_in = BUILT_IN.get(name)
    fields = own_fields(own.get(name, {}))
    if fields.get("name", name) != name:
        raise ConfigError(f"Space {name!r}: its name is the key under own_spaces; leave out `name`.")
    if str(fields.get("architecture", "")).startswith("timm:"):
        fields = timm_preprocessing(fields["architecture"]) | fields
    if built_in is None and not fields:
        known = ", ".join(dict.fromkeys([*BUILT_IN, *own]))
        raise ConfigError(f"Unknown space {name!r}; known: {known}. Describe your own under own_spaces in --config.")
    if built_in is not None:
        base = {field: getattr(built_in, field) for field in SpaceSpec.__dataclass_fields__}
    else:
        base = {"name": name, "kind": "network" if "architecture" in fields else ""}
    spec = SpaceSpec.from_json({**base, **fields})
    if spec.kind not in _KINDS:
        raise ConfigError(f"Space {name!r}: kind is one of {', '.join(_KINDS)}, not {spec.kind!r}.")
    if spec.kind == "network" and spec.size_px is None:
        spec = replace(spec, size_px=224)
    if spec.kind != "network" and spec.size_px is None and size_px is not None:
        spec = SpaceSpec.from_json({**spec.identity(), "size_px": size_px})
    return spec
