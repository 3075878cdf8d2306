"""Two views of an image: what an encoder learns not to see.

Legend: B images, S side in pixels, s side of a crop.

What augmentation changes at random, the features lose. The standard policy, made for what a picture shows, resizes,
blurs and recolours: it washes out the high frequencies, in which fingerprints are. The `fingerprint` policy moves,
mirrors and adds a colour of its own to each view: a constant a channel, which changes frequency zero and no other.
Without it two views are told by their mean colours, and the network need not learn anything else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from manifpt.errors import ConfigError

__all__ = ["POLICIES", "Policy", "make_policy"]

# uint8 [B, 3, S, S] on any device, and a seed -> two views, float [B, 3, s, s], other for each image. Pixels are in
# [0, 1], but for a colour that was added.
Policy = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]

POLICIES = ("fingerprint", "standard")
_CROPPED = 1 / 8  # of a side
_COLOR = 0.3  # standard deviation of what is added to a channel, whose pixels are in [0, 1]
_BLURRED_FROM_PX = 64  # CIFAR's usual policy has no blur: a kernel of a tenth of 32 px is hardly one


def make_policy(name: str, size_px: int) -> Policy:
    """A policy for square images.

    Args:
        name: of `POLICIES`.
        size_px: S.

    Raises:
        ConfigError: the package of the standard policy isn't there.
    """
    return _fingerprint if name == "fingerprint" else _standard(size_px)


def _fingerprint(images_bchw: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops of 7/8 of the side, each at a place and with a colour of its own, and half of them mirrored."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for _ in range(2):
        moved_bchw = _moved(images_bchw, generator)
        color_bc11 = _COLOR * torch.randn(len(images_bchw), 3, 1, 1, generator=generator)
        views.append(moved_bchw + color_bc11.to(moved_bchw.device))
    return views[0], views[1]


def _moved(images_bchw: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    batch, _, height_px, width_px = images_bchw.shape
    crops = []
    for size_px in (height_px, width_px):
        kept_px = size_px - max(1, round(size_px * _CROPPED))
        start_b = torch.randint(size_px - kept_px + 1, (batch,), generator=generator)
        crops.append(start_b[:, None] + torch.arange(kept_px))
    row_bh, column_bw = crops
    is_mirrored_b = torch.rand(batch, generator=generator) < 0.5
    column_bw = torch.where(is_mirrored_b[:, None], column_bw.flip(1), column_bw)
    index = [places.to(images_bchw.device) for places in (torch.arange(batch), row_bh, column_bw)]
    cropped_bhwc = images_bchw.permute(0, 2, 3, 1)[index[0][:, None, None], index[1][:, :, None], index[2][:, None]]
    return cropped_bhwc.permute(0, 3, 1, 2).float() / 255


def _standard(size_px: int) -> Policy:
    """That of Barlow Twins (Zbontar et al. 2021, appendix A; facebookresearch/barlowtwins), other for the two views.

    Kornia draws from torch's global generator, which is left as it was.
    """
    try:
        import kornia.augmentation as kornia
    except ImportError as error:
        raise ConfigError(
            "The standard policy needs the package kornia: pip install '.[pretrain]' in a checkout."
        ) from error

    def steps(blurred: float, solarized: float) -> torch.nn.Sequential:
        kernel_px = 2 * (size_px // 20) + 1
        blur = kornia.RandomGaussianBlur((kernel_px, kernel_px), (0.1, 2.0), p=blurred)
        return torch.nn.Sequential(
            kornia.RandomResizedCrop((size_px, size_px), scale=(0.08, 1.0), resample="bicubic"),
            kornia.RandomHorizontalFlip(),
            torch.nn.Hardtanh(0, 1),  # bicubic weights overshoot
            kornia.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            kornia.RandomGrayscale(p=0.2),
            *([blur] if size_px >= _BLURRED_FROM_PX else []),
            kornia.RandomSolarize(thresholds=0.0, additions=0.0, p=solarized),
        )

    one, other = steps(blurred=1.0, solarized=0.0), steps(blurred=0.1, solarized=0.2)

    def policy(images_bchw: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixels_bchw = images_bchw.float() / 255
            return one(pixels_bchw).clamp(0, 1), other(pixels_bchw).clamp(0, 1)

    return policy
