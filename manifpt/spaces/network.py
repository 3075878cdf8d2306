"""Spaces made of a frozen network's pooled features: `supervised`, `selfsupervised` and a user's own.

Legend: B images, S side of the input in pixels, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from manifpt.errors import ConfigError
from manifpt.spaces.base import SpaceSpec
from manifpt.spaces.weights import load_state

__all__ = ["NetworkSpace", "build_network"]

_BATCH = 128  # images a forward pass: enough for any device; fixed, since rounding may differ between batch sizes


class NetworkSpace:
    """phi(x) = the pooled features of a frozen network, float32 [B, D] (paper section 3: ResNet50, 2,048-d).

    Inputs are the whole image, antialiased to S x S: small images are enlarged, never zero-padded (the released code's
    `CenterCrop(224)` would frame a 64-px image in black, and the frame would dominate the features).
    """

    def __init__(self, spec: SpaceSpec, threads: int = 1, device: str = "cpu") -> None:
        self.spec = spec
        self._threads = threads
        self._device = torch.device(device)
        self._network: nn.Module | None = None

    def encode(self, views_bchw: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, S, S] -> float32 [B, D]. float32 throughout, TF32 off."""
        if self._network is None:  # projection actors never call this, and never load the weights
            torch.set_num_threads(self._threads)
            torch.backends.cudnn.allow_tf32 = False  # on by default, for convolutions
            torch.backends.cudnn.deterministic = True  # a resumed run must give the same bytes
            self._network = build_network(self.spec).to(memory_format=torch.channels_last).to(self._device)
            self._mean = torch.tensor(self.spec.mean, device=self._device).view(1, 3, 1, 1) * 255
            self._std = torch.tensor(self.spec.std, device=self._device).view(1, 3, 1, 1) * 255
        parts = [self._forward(views_bchw[start : start + _BATCH]) for start in range(0, len(views_bchw), _BATCH)]
        return np.concatenate(parts)

    @torch.inference_mode()
    def _forward(self, views_bchw: np.ndarray) -> np.ndarray:
        assert self._network is not None
        images = torch.from_numpy(np.ascontiguousarray(views_bchw)).to(self._device)
        images = (images.float() - self._mean) / self._std
        features: torch.Tensor = self._network(images.contiguous(memory_format=torch.channels_last))
        return features.float().flatten(1).cpu().numpy()

    def embed(self, codes: np.ndarray) -> np.ndarray:
        """The code itself: float32 [B, D]."""
        return codes

    def compact(self, embeddings_bd: np.ndarray) -> np.ndarray:
        """The embedding itself."""
        return embeddings_bd


def build_network(spec: SpaceSpec) -> nn.Module:
    """The network without its classifier, with verified weights, in eval mode.

    Raises:
        ConfigError: an unknown architecture, or weights that don't fit it.
    """
    library, _, name = (spec.architecture or "").partition(":")
    if library == "torchvision":
        network = _torchvision(name)
    elif library == "timm":
        network = _timm(name)
    else:
        raise ConfigError(
            f"Space {spec.name!r}: architecture is torchvision:NAME or timm:NAME, not {spec.architecture!r}."
        )
    state = load_state(spec)
    expected = network.state_dict()
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or wrong:
        raise ConfigError(
            f"Space {spec.name!r}: the weights are not of {spec.architecture} ({len(missing)} tensors missing, such as "
            f"{(missing or wrong)[0]!r}); correct architecture or weights."
        )
    network.load_state_dict(state, strict=False)  # what is left over is the classifier
    return network.eval().requires_grad_(False)


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
    try:
        import timm
    except ImportError as error:
        raise ConfigError("A timm architecture needs the package: pip install 'manifpt[timm]'.") from error
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise ConfigError(f"timm has no model {name!r}.") from error
    return network
