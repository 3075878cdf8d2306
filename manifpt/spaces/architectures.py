"""Networks without their classifiers, by name: torchvision's, timm's, and ours for small images."""

from __future__ import annotations

from torch import nn

from manifpt.errors import ConfigError

__all__ = ["make_architecture"]


def make_architecture(architecture: str | None) -> nn.Module:
    """The network that ends in its pooled features, with random weights.

    Args:
        architecture: `torchvision:NAME`, `timm:NAME` or `manifpt:NAME`.

    Raises:
        ConfigError: nobody knows it.
    """
    library, _, name = (architecture or "").partition(":")
    if library not in _LIBRARIES:
        raise ConfigError(
            f"architecture is {', '.join(f'{library}:NAME' for library in _LIBRARIES)}, not {architecture!r}."
        )
    return _LIBRARIES[library](name)


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    try:
        network: nn.Module = models.get_model(name, weights=None)
    except ValueError as error:
        raise ConfigError(f"torchvision has no model {name!r}.") from error
    for attribute in ("fc", "classifier", "head", "heads"):  # torchvision's names of a last layer
        if hasattr(network, attribute):
            setattr(network, attribute, nn.Identity())
            return network
    raise ConfigError(f"torchvision's {name!r} has no classifier that we know how to remove; use timm:{name}.")


def _timm(name: str) -> nn.Module:
    if not name.replace("_", "").replace(".", "").isalnum():  # `hf-hub:owner/name` asks a hub what to build
        raise ConfigError(f"timm has no model {name!r}.")
    try:
        import timm
    except ImportError as error:
        raise ConfigError("A timm architecture needs the package: pip install '.[timm]' in a checkout.") from error
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise ConfigError(f"timm has no model {name!r}.") from error
    return network


def _manifpt(name: str) -> nn.Module:
    """`resnet18_small`, `resnet50_small`: torchvision's, for images under 64 px, with the same names of tensors.

    The first convolution is 3 x 3 with stride 1: all frequencies of a small image reach it, and fingerprints are in the
    highest. The max-pool after it stays, unlike in the usual network for CIFAR: a quarter of the cost, so that a CPU
    can train it.
    """
    base, _, stem = name.rpartition("_")
    if stem != "small" or base not in ("resnet18", "resnet50"):
        raise ConfigError(f"There is no manifpt:{name}; known: manifpt:resnet18_small, manifpt:resnet50_small.")
    network = _torchvision(base)
    network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network


_LIBRARIES = {"torchvision": _torchvision, "timm": _timm, "manifpt": _manifpt}
