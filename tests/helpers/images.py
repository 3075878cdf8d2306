"""Real images for tests, unpacked from Parquet to files or objects; and files that are no good."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from manifpt.manifest import write_manifest
from manifpt.sample import SAMPLE_PATH


def cifar_files(folder: Path, sources: dict[str, int]) -> Iterator[tuple[str, bytes]]:
    """`(source/number.ending, bytes)` of the first images of some of the set's files."""
    for source, count in sources.items():
        table = pq.read_table(folder / f"{source}.parquet", columns=["image", "format"]).slice(0, count)
        for number, row in enumerate(table.to_pylist()):
            yield f"{source}/{number:05d}.{row['format'].lower()}", row["image"]


def put_objects(files: Iterator[tuple[str, bytes]], bucket: str, prefix: str, env: dict[str, str]) -> int:
    """Uploads files; returns how many."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region_name=env["AWS_DEFAULT_REGION"],
        config=Config(max_pool_connections=16, retries={"mode": "standard", "total_max_attempts": 8}),
    )
    with ThreadPoolExecutor(16) as pool:
        done = pool.map(lambda item: client.put_object(Bucket=bucket, Key=f"{prefix}/{item[0]}", Body=item[1]), files)
        return sum(1 for _ in done)


def write_files(files: Iterator[tuple[str, bytes]], folder: Path) -> int:
    """Writes files below a folder; returns how many."""
    count = 0
    for name, data in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        count += 1
    return count


def sample_files(split: str, sources: dict[str, int] | None = None) -> Iterator[tuple[str, bytes]]:
    """`(source/number.png, bytes)` of the shipped sample; of all sources, or so many of some."""
    table = pq.read_table(SAMPLE_PATH)
    seen: dict[str, int] = {}
    for row in table.to_pylist():
        if row["split"] != split or (
            sources is not None and seen.get(row["source"], 0) >= sources.get(row["source"], 0)
        ):
            continue
        seen[row["source"]] = seen.get(row["source"], 0) + 1
        yield row["image"]["path"], row["image"]["bytes"]


def repeated(manifest: Path, images: int, output: Path) -> None:
    """A manifest of so many rows over the same files."""
    table = pq.read_table(manifest)
    copies = -(-images // len(table))
    tables = [
        table.set_column(0, table.schema.field(0), pa.array([f"{n:03d}/{i}" for i in table["image_id"].to_pylist()]))
        for n in range(copies)
    ]
    whole = pa.concat_tables(tables).slice(0, images)
    assert write_manifest(whole.to_batches(), str(output)) == images


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def picture(size_px: int = 32, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A picture that compresses like one, not noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size_px, size_px), Image.Resampling.BICUBIC).convert(mode)


def png_bomb(width_px: int = 100_000, height_px: int = 100_000) -> bytes:
    """A valid header, and pixels that would fill 30 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bad_files() -> dict[str, tuple[bytes, str]]:
    """By name: bytes, and the reason for which they must be rejected."""
    frames = [picture(seed=seed) for seed in range(3)]
    return {
        "zero.png": (b"", "empty"),
        "truncated.jpg": (encoded(picture(64), "JPEG", quality=95)[:-400], "truncated"),
        "truncated.png": (encoded(picture(64), "PNG")[:-300], "truncated"),
        "text.png": (b"This is not a picture.\n" * 20, "not_an_image"),
        "bomb.png": (png_bomb(), "too_large"),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "animated"),
        "animated.png": (encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), "animated"),
        "tiny.png": (encoded(picture(4), "PNG"), "too_small"),
        "other_size.png": (encoded(picture(48), "PNG"), "size_mismatch"),
    }


def odd_but_good_files() -> dict[str, bytes]:
    """By name: 32-px files that the written rule decodes. The names are odd too."""
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray((np.arange(32 * 32, dtype=np.uint16) * 63).reshape(32, 32))
    return {
        "cmyk.jpg": encoded(picture(seed=1, mode="CMYK"), "JPEG", quality=95),
        "palette.png": encoded(picture(seed=2).quantize(16), "PNG"),
        "grey16.png": encoded(grey16, "PNG"),
        "grey.png": encoded(picture(seed=3, mode="L"), "PNG"),
        "alpha.png": encoded(picture(seed=4, mode="RGBA"), "PNG"),
        "rotated.jpg": encoded(picture(seed=5), "JPEG", quality=95, exif=exif),
        "really_a_jpeg.png": encoded(picture(seed=6), "JPEG", quality=95),
        "no_ending": encoded(picture(seed=7), "PNG"),
        "qu'ote\"d.png": encoded(picture(seed=8), "PNG"),
        "a..b.png": encoded(picture(seed=9), "PNG"),
        "line\nfeed.png": encoded(picture(seed=10), "PNG"),
        "漢字 ü.png": encoded(picture(seed=11), "PNG"),
        "per%41cent#1.png": encoded(picture(seed=12), "PNG"),
    }


def tree_bytes(folder: Path, below: str = "artifacts") -> dict[str, bytes]:
    """Every file below a run's folder of parts, by relative name."""
    root = folder / below
    return {os.path.relpath(path, root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
