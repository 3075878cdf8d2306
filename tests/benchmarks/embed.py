"""Embedding: ours against torchvision's ResNet50 as it comes: eager, float32, NCHW.

Twice: in a process as it comes, and in one whose allocator keeps large blocks (`kept`). A batch of 32 allocates blocks
of 100 MB, which glibc takes fresh from the system each time: where page faults are dear, that is half of the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torchvision.models import resnet50

from manifpt.resources import KEPT_BLOCKS
from manifpt.spaces import SpaceSpec, make_space
from manifpt.spaces.weights import resolve_weights
from tests.benchmarks.measure import median, paired

__all__ = ["random_resnet50", "run"]

_IMAGES = {"cpu": 64, "cuda": 2_048}
_EAGER_BATCH = {"cpu": 32, "cuda": 256}
_MANY = 1_000_000  # a job of so many is compiled


def random_resnet50(path: Path) -> SpaceSpec:
    """A space of ResNet50 at 224 px; its speed does not depend on its weights."""
    torch.manual_seed(0)
    save_file({k: v.contiguous() for k, v in resnet50().state_dict().items()}, path)
    spec = SpaceSpec(name="resnet50", kind="network", architecture="torchvision:resnet50", weights=str(path))
    return resolve_weights(spec)


def run(rounds: int, threads: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Both processes; the second one's ratios end in `_kept`."""
    found = {}
    for name, tunables in (("", {}), ("_kept", KEPT_BLOCKS)):
        command = [sys.executable, "-m", "tests.benchmarks.embed", str(rounds), str(threads), str(folder)]
        done = subprocess.run(command, env={**os.environ, **tunables}, stdout=subprocess.PIPE, text=True, check=True)
        *lines, last = done.stdout.splitlines()
        for line in lines:
            say(f"{line}{' (allocator keeps blocks)' if name else ''}")
        found[name] = json.loads(last)
    return {
        "results": {f"embed{name}": part["results"] for name, part in found.items()},
        "ratios": {f"{ratio}{name}": value for name, part in found.items() for ratio, value in part["ratios"].items()},
    }


def here(rounds: int, threads: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """`embed` is our speed in float32 over theirs in a job large enough to compile for,
    `embed_not_compiled` that in a small one, `embed_bfloat16` that of the option."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = random_resnet50(folder / "resnet50.safetensors")
    views_bchw = np.random.default_rng(0).integers(0, 256, (_IMAGES[device], 3, 224, 224), dtype=np.uint8)
    plain = eager(folder / "resnet50.safetensors").to(device)
    small = make_space(spec, threads, device)
    ours = make_space(spec, threads, device, _MANY)
    half = make_space(replace(spec, precision="bfloat16"), threads, device, _MANY)
    contenders = {
        "eager": lambda: eager_features(plain, views_bchw, spec, device),
        "ours_not_compiled": lambda: small.encode(views_bchw),
        "ours": lambda: ours.encode(views_bchw),
        "ours_bfloat16": lambda: half.encode(views_bchw),
    }
    seconds = paired(contenders, rounds)
    theirs_bd = eager_features(plain, views_bchw, spec, device)
    scale = float(np.abs(theirs_bd).max())
    result = {
        "images": len(views_bchw),
        "device": device,
        "seconds": seconds,
        **{f"{name}_images_per_s": round(len(views_bchw) / median(values), 2) for name, values in seconds.items()},
        "error_of_range": float(np.abs(ours.encode(views_bchw) - theirs_bd).max()) / scale,
        "error_of_range_bfloat16": float(np.abs(half.encode(views_bchw) - theirs_bd).max()) / scale,
    }
    ratios = {
        "embed": round(median(seconds["eager"]) / median(seconds["ours"]), 3),
        "embed_not_compiled": round(median(seconds["eager"]) / median(seconds["ours_not_compiled"]), 3),
        "embed_bfloat16": round(median(seconds["eager"]) / median(seconds["ours_bfloat16"]), 3),
    }
    say(
        f"embed ResNet50 224 px on {device}: eager {result['eager_images_per_s']} images/s, "
        f"ours {result['ours_images_per_s']} (x{ratios['embed']:.2f}), largest error {result['error_of_range']:.1e} of "
        f"the range; not compiled x{ratios['embed_not_compiled']:.2f}"
    )
    say(
        f"embed ResNet50 224 px on {device}: bfloat16 {result['ours_bfloat16_images_per_s']} images/s "
        f"(x{ratios['embed_bfloat16']:.2f}), largest error {result['error_of_range_bfloat16']:.1e}"
    )
    return {"results": result, "ratios": ratios}


def eager(path: Path) -> torch.nn.Module:
    """As a tutorial has it."""
    from safetensors.torch import load_file

    network = resnet50()
    network.load_state_dict(load_file(path))
    network.fc = torch.nn.Identity()  # type: ignore[assignment]
    return network.eval()


def eager_features(network: torch.nn.Module, views_bchw: np.ndarray, spec: SpaceSpec, device: str) -> np.ndarray:
    """In batches that suit the device."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    with torch.inference_mode():
        batches = [
            network((torch.from_numpy(part).to(device).float() / 255 - mean) / std)
            for part in np.split(views_bchw, range(_EAGER_BATCH[device], len(views_bchw), _EAGER_BATCH[device]))
        ]
    return torch.cat(batches).cpu().numpy()


if __name__ == "__main__":
    print(json.dumps(here(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), print)))
