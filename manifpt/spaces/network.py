"""Spaces made of a frozen network's pooled features: `supervised`, `selfsupervised` and a user's own.

Legend: B images, S side of the input in pixels, D features.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn

from manifpt.errors import ConfigError
from manifpt.log import event
from manifpt.spaces.architectures import make_architecture
from manifpt.spaces.base import SpaceSpec
from manifpt.spaces.resize import resized
from manifpt.spaces.weights import load_state

__all__ = ["NetworkSpace", "build_network"]

# Pixels a forward pass. On CPUs 16 images (ResNet50 at 224 px) run a tenth faster than 4 where the allocator keeps
# their activations (`resources.KEPT_BLOCKS`), and no slower elsewhere; 32 cost page faults there. GPUs want many.
# Fixed for a device, and filled up with zeros where images are fewer: rounding differs between batch sizes, and an
# image's features must not depend on what it came with.
_BATCH_PIXELS = {"cpu": 16 * 224 * 224, "cuda": 256 * 224 * 224}
_MOST_IMAGES = {"cpu": 128, "cuda": 1_024}

# Compiling takes 5 to 20 s and a C++ compiler, and makes ResNet50 1.1 times, EfficientNet-Lite0 2.2 times as fast.
_COMPILED_FROM = 10_000  # images of a plan: it must not hang on how many of them are left after a restart


class NetworkSpace:
    """phi(x) = the pooled features of a frozen network, float32 [B, D] (paper section 3: ResNet50, 2,048-d).

    Inputs are the whole image, antialiased to S x S: small images are enlarged, never zero-padded (the released code's
    `CenterCrop(224)` would frame a 64-px image in black, and the frame would dominate the features).

    Precision is float32 throughout, TF32 off, unless the spec says `bfloat16`: then neighbours differ from those of
    float32 features (EfficientNet-Lite0 on CIFAR-10: one in five), so it is never the default.
    """

    def __init__(self, spec: SpaceSpec, threads: int = 1, device: str = "cpu", images: int = 0) -> None:
        """Args:
        spec: resolved.
        threads: CPU threads.
        device: `cpu` or `cuda`.
        images: about so many will be encoded.
        """
        self.spec = spec
        self._threads, self._images = threads, images
        self._device = torch.device(device)
        view = spec.view
        assert view.height_px is not None and view.width_px is not None, "a network's view has a size"
        self._size_px = view.height_px, view.width_px
        pixels = _BATCH_PIXELS[self._device.type] // (view.height_px * view.width_px)
        self._batch = max(1, min(_MOST_IMAGES[self._device.type], pixels))
        self._network: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._compiled_for: int | None = None  # threads a batch

    def encode(self, views_bchw: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, S, S] -> float32 [B, D]."""
        if self._network is None:  # projection actors never call this, and never load the weights
            self.load()
        starts = range(0, len(views_bchw), self._batch)
        parts = [views_bchw[start : start + self._batch] for start in starts]
        # On CPUs a batch a thread: threads that share a batch wait for each other after each layer, and all of them for
        # the one whose core another process has for a moment. Their number changes no bit (tests/unit/test_network.py).
        streams = max(1, min(self._threads, len(parts))) if self._device.type == "cpu" else 1
        threads = self._compiled_for or self._threads // streams

        def features(part_bchw: np.ndarray) -> torch.Tensor:
            torch.set_num_threads(threads)  # of this thread
            with torch.no_grad():
                return self._forward(part_bchw)

        if streams == 1:
            # Nothing waits for the device before all is queued: it copies and computes while the host prepares.
            found = [features(part_bchw) for part_bchw in parts]
        else:
            with ThreadPoolExecutor(streams) as pool:
                found = list(pool.map(features, parts))
        torch.set_num_threads(self._threads)  # for what this thread, and those that begin now, do next
        return torch.cat(found).cpu().numpy()

    def load(self) -> None:
        """Reads, verifies and folds the network."""
        torch.backends.cudnn.allow_tf32 = False  # on by default, for convolutions
        torch.backends.cudnn.deterministic = True  # a resumed run must give the same bytes
        network = _folded(build_network(self.spec), self.spec)
        network = network.to(memory_format=torch.channels_last).to(self._device)
        self._mean = torch.tensor(self.spec.mean, device=self._device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(self.spec.std, device=self._device).view(1, 3, 1, 1) * 255
        self._network = network
        if self._images >= _COMPILED_FROM:
            self._compile(network)

    def _compile(self, network: nn.Module) -> None:
        # Kernels are compiled for the number of threads that is set, and again where it changes: see `encode`.
        threads = 1 if self._device.type == "cpu" else self._threads
        torch.set_num_threads(threads)
        options: dict[str, Any] = {"freezing": True, "compile_threads": 1}  # 1: in this process, none of its own
        begin = time.monotonic()
        try:
            self._network = torch.compile(network, dynamic=False, options=options)
            with torch.no_grad():
                self._forward(np.zeros((1, 3, *self._size_px), np.uint8))
        except Exception as error:  # no compiler, or one that can't: in as many ways as there are machines
            self._network = network
            event("not_compiled", space=self.spec.name, error=type(error).__name__, hint="slower, else the same")
            return
        self._compiled_for = threads
        event("compiled", space=self.spec.name, seconds=time.monotonic() - begin)

    def _forward(self, views_bchw: np.ndarray) -> torch.Tensor:
        assert self._network is not None
        images_bchw = torch.zeros(
            (self._batch, *views_bchw.shape[1:]), dtype=torch.uint8, pin_memory=self._device.type == "cuda"
        )
        images_bchw[: len(views_bchw)] = torch.from_numpy(np.ascontiguousarray(views_bchw))
        moved = images_bchw.to(self._device, non_blocking=True)
        if moved.shape[2:] != self._size_px:
            moved = self._resized(moved)
        moved = moved.contiguous(memory_format=torch.channels_last)
        normalized = (moved.float() - self._mean) / self._std
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.spec.precision == "bfloat16"):
            features = self._network(normalized)
        return features[: len(views_bchw)].float().flatten(1)

    def _resized(self, images_bchw: torch.Tensor) -> torch.Tensor:
        found = resized(images_bchw, *self._size_px)
        if found is None:  # a Pillow of another kind; then Pillow itself
            images_bhwc = images_bchw.cpu().numpy().transpose(0, 2, 3, 1)
            found = torch.from_numpy(np.stack([self.spec.view.of(image_hwc) for image_hwc in images_bhwc]))
        return found.to(self._device)

    def embed(self, codes: np.ndarray) -> np.ndarray:
        """The code itself: float32 [B, D]."""
        return codes

    def compact(self, embeddings_bd: Any) -> Any:
        """The embedding itself."""
        return embeddings_bd


def build_network(spec: SpaceSpec) -> nn.Module:
    """The network without its classifier, with verified weights, in eval mode.

    Raises:
        ConfigError: an unknown architecture, or weights that don't fit it.
    """
    try:
        network = make_architecture(spec.architecture)
    except ConfigError as error:
        raise ConfigError(f"Space {spec.name!r}: {error}") from error
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


def _folded(network: nn.Module, spec: SpaceSpec) -> nn.Module:
    """With batch normalisations folded into their convolutions, where the network can be traced: 1.2 times as fast.

    The same numbers but for rounding, which is checked on one image; a network that traces to another one stays whole.
    """
    from torch.fx.experimental.optimization import fuse

    size_px = spec.view.height_px or 224, spec.view.width_px or 224
    noise_bchw = torch.randn(1, 3, *size_px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), contextlib.suppress(Exception):  # tracing fails in as many ways as there are networks
        folded: nn.Module = fuse(network)
        whole, parts = network(noise_bchw), folded(noise_bchw)
        if torch.allclose(whole, parts, rtol=1e-3, atol=1e-4 * float(whole.abs().max())):
            return folded.requires_grad_(False)
    return network
