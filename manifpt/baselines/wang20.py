"""Wang et al. 2020, "CNN-generated images are surprisingly easy to spot... for now": ResNet50 with blur and JPEG.

Legend: B images, H W pixels.

Known from the original's code (PeterWang512/CNNDetection): ResNet50 with ImageNet weights, last layer new, drawn from
N(0, 0.02); Adam, rate 1e-4, betas 0.9 and 0.999, batch 64; images brought to 256 px, cropped at random to 224 (in the
middle for validation), mirrored at random, ImageNet's mean and deviation. Augmentation "Blur+JPEG (0.5)": with
probability 0.5 Gaussian blur with sigma from U[0, 3], then with probability 0.5 JPEG of a quality from 30 to 100.
Patience is 5 epochs without a gain of 0.001 in validation accuracy; then the rate is divided by 10 and the gain is
0.002; it ends below a rate of 1e-6, after the second drop.

Our reading: one class a source and cross-entropy instead of real or fake. No image is resized: enlarging a 32-px image
to 256 would smear the very traces, and the crop is 7/8 of each side, which is 224 at 256 px. JPEG is Pillow's; the
original takes OpenCV's half of the time.

Weights: those in MANIFPT_WEIGHTS or the cache (`manifpt.spaces.weights`; the file's SHA-256 is checked). Where there
are none the network starts from scratch, and `notes` says so: a deviation that costs accuracy, and isn't the
original's method. `pretrained=True` insists on them, and downloads.
"""

from __future__ import annotations

import io
import os

import numpy as np
import torch
from torch import nn

from manifpt.baselines.network import Classifier, LearnedBaseline, Training
from manifpt.spaces.base import SpaceSpec
from manifpt.spaces.weights import REGISTRY, cache_folder, load_state, resolve_weights
from manifpt.storage import join, normalize, store_of

__all__ = ["Wang20", "blur_jpeg"]

WEIGHTS = "resnet50-imagenet1k-v1"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Wang20(LearnedBaseline):
    """Features are ResNet50's 2,048 pooled ones."""

    name = "wang20"

    def __init__(
        self,
        sources: int,
        size_px: tuple[int, int],
        seed: int = 0,
        threads: int = 1,
        budget_images: int = 60_000,
        learning_rate: float = 1e-4,
        batch: int = 64,
        patience: int = 5,
        blur_probability: float = 0.5,
        jpeg_probability: float = 0.5,
        pretrained: bool | None = None,
    ) -> None:
        """Args:
        sources, size_px, seed, threads: see `make_baseline`.
        budget_images, learning_rate, batch, patience: see `Training`.
        blur_probability, jpeg_probability: of the augmentation.
        pretrained: ImageNet weights: True: or an error; False: none; None: where they lie at hand.
        """
        training = Training(
            learning_rate=learning_rate, batch=batch, budget_images=budget_images, patience=patience, drops=2
        )
        super().__init__(sources, size_px, seed, threads, training)
        self._blur, self._jpeg = blur_probability, jpeg_probability
        self.pretrained = _is_at_hand() if pretrained is None else pretrained
        self._crop_px = size_px[0] * 7 // 8, size_px[1] * 7 // 8

    @property
    def notes(self) -> tuple[str, ...]:
        """How it was trained, and from where."""
        return (*super().notes, "ImageNet weights" if self.pretrained else "from scratch: no ImageNet weights at hand")

    def _build(self) -> Classifier:
        from torchvision.models import resnet50

        body = resnet50(weights=None)
        body.fc = nn.Identity()
        if self.pretrained:
            spec = SpaceSpec(name="wang20", kind="network", architecture="torchvision:resnet50", weights=WEIGHTS)
            state = load_state(resolve_weights(spec))
            body.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
        head = nn.Linear(2048, self._shape.sources)
        nn.init.normal_(head.weight, 0.0, 0.02)
        return Classifier(body, head)

    def _inputs(self, images_bchw: np.ndarray) -> torch.Tensor:
        top, left = (images_bchw.shape[2] - self._crop_px[0]) // 2, (images_bchw.shape[3] - self._crop_px[1]) // 2
        return _normalised(images_bchw[:, :, top : top + self._crop_px[0], left : left + self._crop_px[1]])

    def _augmented(self, images_bchw: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        height, width = self._crop_px
        cropped = np.empty((len(images_bchw), 3, height, width), np.uint8)
        for b, image_chw in enumerate(images_bchw):
            changed_chw = blur_jpeg(image_chw, self._blur, self._jpeg, rng)
            top = rng.integers(image_chw.shape[1] - height + 1)
            left = rng.integers(image_chw.shape[2] - width + 1)
            part_chw = changed_chw[:, top : top + height, left : left + width]
            cropped[b] = part_chw[..., ::-1] if rng.random() < 0.5 else part_chw
        return _normalised(cropped)


def blur_jpeg(
    image_chw: np.ndarray, blur_probability: float, jpeg_probability: float, rng: np.random.Generator
) -> np.ndarray:
    """Perhaps blurred, then perhaps compressed: uint8 [3, H, W] -> the same."""
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    if rng.random() < blur_probability:
        sigma_px = rng.uniform(0, 3)
        image_chw = gaussian_filter(image_chw, (0, sigma_px, sigma_px))
    if rng.random() < jpeg_probability:
        compressed = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(image_chw.transpose(1, 2, 0)))
        image.save(compressed, "JPEG", quality=int(rng.integers(30, 101)))
        image_chw = np.asarray(Image.open(compressed)).transpose(2, 0, 1)
    return image_chw


def _normalised(images_bchw: np.ndarray) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (_MEAN, _STD))
    return (torch.from_numpy(np.ascontiguousarray(images_bchw)).float() - mean) / std


def _is_at_hand() -> bool:
    """Whether the weight file lies where `resolve_weights` looks first. Never downloads."""
    mirror, file = os.environ.get("MANIFPT_WEIGHTS"), REGISTRY[WEIGHTS].file
    uris = [join(folder, file) for folder in ([normalize(mirror)] if mirror else []) + [cache_folder()]]
    return any(store_of(uri).stat(uri) is not None for uri in uris)
