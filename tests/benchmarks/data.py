"""Real images for the benchmark: `../shared/data` where it is, else the shipped sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from manifpt.decode import decode
from manifpt.sample import SAMPLE_PATH
from manifpt.spaces.base import View
from tests.helpers.cluster import ROOT
from tests.helpers.images import cifar_files, sample_files

__all__ = ["SHARED", "faces", "files", "sample_views", "views"]

SHARED = ROOT.parent / "shared" / "data"


def views(path: Path, size_px: int, count: int | None = None) -> np.ndarray:
    """uint8 [N, 3, size_px, size_px] of a Parquet file's images, at equal steps where not all are asked for."""
    cells = pq.read_table(path, columns=["image"])["image"].to_pylist()
    cells = cells[:: max(1, len(cells) // count)][:count] if count else cells
    view = View(size_px, size_px, resized=True, min_px=1)
    return np.stack([view.of(decode(cell["bytes"] if isinstance(cell, dict) else cell)) for cell in cells])


def sample_views(split: str) -> np.ndarray:
    """uint8 [N, 3, 28, 28] of the shipped sample."""
    rows = pq.read_table(SAMPLE_PATH).to_pylist()
    view = View(28, 28, resized=False, min_px=1)
    return np.stack([view.of(decode(row["image"]["bytes"])) for row in rows if row["split"] == split])


def generated(folder: Path, size_px: int, count: int) -> np.ndarray:
    """Images of every generator of a set alike, in a fixed random order."""
    paths = [path for path in sorted(folder.glob("*.parquet")) if not path.stem.startswith("real")]
    found = np.concatenate([views(path, size_px, -(-2 * count // len(paths))) for path in paths])
    return found[np.random.default_rng(0).permutation(len(found))[:count]]


def faces(count: int) -> np.ndarray:
    """uint8 [N, 3, 64, 64]: CelebA as it is, then random crops and flips of it, since the set has 6,000."""
    cells = pq.read_table(SHARED / "gm_celeba64_many" / "real_celeba_89x109.parquet", columns=["image"])["image"]
    images = [decode(cell["bytes"] if isinstance(cell, dict) else cell) for cell in cells.to_pylist()]
    view, rng = View(64, 64, resized=True, min_px=1), np.random.default_rng(0)
    out = [view.of(image) for image in images[:count]]
    while len(out) < count:
        image_hwc = images[len(out) % len(images)]
        side = int(min(image_hwc.shape[:2]) * rng.uniform(0.8, 1.0))
        top, left = (rng.integers(0, size - side + 1) for size in image_hwc.shape[:2])
        crop_hwc = image_hwc[top : top + side, left : left + side]
        out.append(view.of(crop_hwc[:, ::-1] if rng.random() < 0.5 else crop_hwc))
    return np.stack(out)


def files(count: int) -> Iterator[tuple[str, bytes]]:
    """`(source/name, bytes)` of so many generated images; they repeat under other names where there are fewer."""
    folder = SHARED / "gm_cifar10"
    images = list(sample_files("query"))
    if folder.exists():
        names = [path.stem for path in sorted(folder.glob("*.parquet")) if not path.stem.startswith("real")]
        images = list(cifar_files(folder, dict.fromkeys(names, 1 << 30)))
    for number in range(count):
        name, data = images[number % len(images)]
        source, _, rest = name.rpartition("/")
        yield f"{source}/{number // len(images):03d}-{rest}", data
