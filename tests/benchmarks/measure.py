"""Paired rounds: every contender once a round, in turn, after a warm-up; medians of the rounds."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
import torch

__all__ = ["hardware", "median", "paired"]


def paired(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round. The order turns round by round, so that none is always the first."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin = time.perf_counter()
            contenders[name]()
            if number >= 0:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def median(seconds: list[float]) -> float:
    """Of the rounds."""
    return float(np.median(seconds))


def hardware(threads: int) -> dict[str, Any]:
    """What a number is worth nothing without."""
    model = platform.processor() or platform.machine()
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), model)
        flags = set(next((value.split() for key, _, value in lines if key.strip() == "flags"), []))
    return {
        "cpu": model,
        "cores": psutil.cpu_count(logical=False),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "features": sorted(
            flags & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}
        ),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy", "ray", "pyarrow", "pillow")}
        | {"faiss": faiss.__version__, "faiss_gpus": faiss.get_num_gpus()},
    }
