"""The straightforward script: what a good engineer writes in an afternoon, without Ray and without this project.

One process with DataLoader workers, eager float32 ResNet50, FAISS flat, Parquet. No resume, no rejected images.

    python -m tests.benchmarks.script --images FOLDER --reference reference.npy --space rgb --output out.parquet
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Images(Dataset[tuple[torch.Tensor, str]]):
    """Files of a folder as float32 [3, H, W]."""

    def __init__(self, folder: Path, size_px: int | None, limit: int) -> None:
        self.paths = sorted(str(path) for path in folder.rglob("*") if path.is_file())[:limit]
        self.size_px = size_px

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, str]:
        image = Image.open(self.paths[number]).convert("RGB")
        if self.size_px:
            image = image.resize((self.size_px, self.size_px), Image.Resampling.BICUBIC)
        image_chw = torch.from_numpy(np.asarray(image).transpose(2, 0, 1) / np.float32(255))
        if self.size_px:
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            image_chw = (image_chw - mean[:, None, None]) / std[:, None, None]
        return image_chw, self.paths[number]


def main() -> None:
    """Prints what it took as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--space", choices=["rgb", "supervised"], required=True)
    parser.add_argument("--limit", type=int, default=1 << 60)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.perf_counter()
    reference_nd = np.load(options.reference)
    index = faiss.IndexFlatL2(reference_nd.shape[1])
    if faiss.get_num_gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(reference_nd)
    network: torch.nn.Module = torch.nn.Flatten()
    if options.space == "supervised":
        from safetensors.torch import load_file
        from torchvision.models import resnet50

        network = resnet50()
        network.load_state_dict(load_file(options.weights))
        network.fc = torch.nn.Identity()  # type: ignore[assignment]
        network.eval().to(device)
    ready_s = time.perf_counter() - begin

    begin = time.perf_counter()
    dataset = Images(options.images, 224 if options.space == "supervised" else None, options.limit)
    size = 64 if options.space == "supervised" else 1024
    loader = DataLoader(dataset, batch_size=size, num_workers=threads, pin_memory=device == "cuda")
    writer = None
    with torch.inference_mode():
        for images_bchw, paths in loader:
            embeddings_bd = network(images_bchw.to(device, non_blocking=True)).cpu().numpy()
            squared_b1, neighbor_b1 = index.search(embeddings_bd, 1)
            artifact_bd = (embeddings_bd - reference_nd[neighbor_b1[:, 0]]).astype(np.float16)
            column = pa.FixedSizeListArray.from_arrays(pa.array(artifact_bd.reshape(-1)), artifact_bd.shape[1])
            columns = {"path": list(paths), "neighbor": neighbor_b1[:, 0], "distance": np.sqrt(squared_b1[:, 0])}
            table = pa.table({**columns, "artifact": column})
            writer = writer or pq.ParquetWriter(
                options.output, table.schema, compression="zstd", use_dictionary=["path"]
            )
            writer.write_table(table)
    if writer:
        writer.close()
    print(json.dumps({"images": len(dataset), "seconds": time.perf_counter() - begin, "ready_s": ready_s}))


if __name__ == "__main__":
    main()
