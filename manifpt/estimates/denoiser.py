"""The denoiser residual x - D(x), D a small network trained on the reference's reals alone.

Legend: B images, C channels, H W pixels.

A denoiser that minimises the mean squared error returns the posterior mean of the real image (Tweedie), so D(x) is a
soft projection onto the reals, and x - D(x) is proportional to the score of the noisy reals' distribution. Not in the
paper.

Without biases the network scales with its input, D(t x) = t D(x), and works for noise levels that it was not trained at
(Mohan et al., ICLR 2020, bias-free networks; the architecture is ours).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from manifpt.documents import load_tensors, object_of
from manifpt.errors import ConfigError
from manifpt.projection import Projection, projection_without_sample
from manifpt.spaces import SpaceSpec
from manifpt.storage import join, store_of
from manifpt.trained import WEIGHTS, publish_trained, trained_config

__all__ = [
    "Denoiser",
    "DenoiserProjector",
    "check_pixels",
    "check_reference",
    "denoiser_config",
    "denoiser_digest",
    "save_denoiser",
]

_BATCH_PX = 1 << 20
_WIDEST, _DEEPEST = 1024, 64  # a config from elsewhere must not fill the memory


class Denoiser(nn.Module):
    """D(x) = x - f(x), f a stack of 3 x 3 convolutions without biases: what f returns is the noise."""

    def __init__(self, width: int = 32, depth: int = 5) -> None:
        super().__init__()
        channels = [3, *[width] * (depth - 1), 3]
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1, padding_mode="reflect", bias=False) for i, o in itertools.pairwise(channels)
        )
        self.config = {"width": width, "depth": depth}

    def noise(self, x_bchw: torch.Tensor) -> torch.Tensor:
        """x - D(x): float32 [B, 3, H, W], pixels or a residual of them, in the colours it was trained in."""
        for layer in self.layers[:-1]:
            x_bchw = torch.relu(layer(x_bchw))
        found: torch.Tensor = self.layers[-1](x_bchw)
        return found

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        """D(x)."""
        return x_bchw - self.noise(x_bchw)


def save_denoiser(model: Denoiser, output: str, facts: dict[str, Any]) -> None:
    """Writes the folder, with its facts (color, noise levels, reference digest)."""
    data = save({name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()})
    store_of(output).write(join(output, WEIGHTS), data)
    publish_trained(output, {"architecture": model.config, **facts})


def denoiser_digest(uri: str) -> str:
    """SHA-256 of a denoiser's weights, as its config states it.

    Raises:
        ConfigError: there is no denoiser.
    """
    return str(denoiser_config(uri)["weights_sha256"])


def check_reference(uri: str, reference_digest: str) -> None:
    """Raises:
    ConfigError: a denoiser has learned other reals than those of a reference, whose queries it could then have seen.
    """
    if denoiser_config(uri).get("reference_digest") != reference_digest:
        raise ConfigError(f"The denoiser {uri} was trained on another reference than this run's: train one on it.")


def denoiser_config(uri: str) -> dict[str, Any]:
    """What a denoiser's folder says of it.

    Raises:
        ConfigError: there is no denoiser, or a damaged one.
    """
    return trained_config(uri, "denoiser", "train_denoiser", ("color", "architecture"))


def check_pixels(uri: str, spec: SpaceSpec) -> None:
    """Raises:
    ConfigError: a denoiser was trained in other colours, or through another codec, than a space has.
    """
    document = denoiser_config(uri)
    if document["color"] != spec.color:
        raise ConfigError(f"The denoiser {uri} was trained on {document['color']} pixels, not on {spec.color}.")
    codec = document.get("codec", "")
    if codec != spec.codec:
        raise ConfigError(f"The denoiser {uri} was trained with codec {codec!r}, and the space has {spec.codec!r}.")


class DenoiserProjector:
    """x* = D(x)."""

    def __init__(self, uri: str, weights_sha256: str, spec: SpaceSpec, device: str = "cpu") -> None:
        """Args:
            uri: the denoiser's folder.
            weights_sha256: that the plan holds.
            spec: of the pixels that are projected.

        Raises:
            ConfigError: it was trained in other colours, or changed since the plan was made.
        """
        check_pixels(uri, spec)
        document = denoiser_config(uri)
        try:
            data = store_of(uri).read(join(uri, WEIGHTS))
        except FileNotFoundError as error:
            raise ConfigError(f"The denoiser {uri} has lost its weights; make it again.") from error
        if hashlib.sha256(data).hexdigest() != weights_sha256:
            raise ConfigError(f"The denoiser {uri} was changed since this run was planned: choose another --output.")
        size = object_of(document["architecture"], f"The denoiser {uri}", {"width": int, "depth": int})
        if not (1 <= size["width"] <= _WIDEST and 2 <= size["depth"] <= _DEEPEST):
            raise ConfigError(
                f"The denoiser {uri} has a network of size {size}, which none of ours has: make it again."
            )
        self._model = Denoiser(size["width"], size["depth"])
        load_tensors(self._model, data, f"The denoiser {uri}")
        self._model.eval().to(device).to(memory_format=torch.channels_last)
        self._shape = (3, spec.view.height_px or 0, spec.view.width_px or 0)
        self._device = device

    def project(self, embeddings_bd: np.ndarray, excluded: Sequence[np.ndarray] | None = None) -> Projection:
        """Projects float32 [B, 3 H W]. Reals of the reference must not come here: it can't forget them."""
        assert not any(len(rows) for rows in excluded or ()), "rejected before"
        step = max(1, _BATCH_PX // (self._shape[1] * self._shape[2]))
        artifact_bd = np.empty_like(embeddings_bd, np.float32)
        # On a GPU as on a CPU: the same bits each time, and no rounding to ten bits.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            for start in range(0, len(embeddings_bd), step):
                x_bchw = torch.from_numpy(embeddings_bd[start : start + step].reshape(-1, *self._shape))
                noise_bchw = self._model.noise(x_bchw.to(self._device, memory_format=torch.channels_last))
                artifact_bd[start : start + step] = noise_bchw.cpu().numpy().reshape(len(x_bchw), -1)
        return projection_without_sample(artifact_bd)
