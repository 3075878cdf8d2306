"""The command `train_denoiser`: a denoiser of the reference's reals, trained over workers.

Legend: B images, N reference images.

No generated image takes part. Noise is Gaussian, its standard deviation drawn anew for each image, log-uniform between
two bounds: small ones, since what generators leave is small. The loss is the squared error over the noise's variance,
so that every level counts the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manifpt.cluster import cluster, connect
from manifpt.config import DenoiserConfig
from manifpt.distributed import Worker, run_workers
from manifpt.errors import ConfigError
from manifpt.estimates.denoiser import Denoiser, denoiser_config, save_denoiser
from manifpt.following import followed, json_lines, write_json_lines
from manifpt.learning import State, cosine, load_state, save_state
from manifpt.log import event
from manifpt.plan import publish_facts
from manifpt.reference import Codes, Reference, open_bundle
from manifpt.resources import share_training
from manifpt.spaces import SpaceSpec
from manifpt.storage import join, normalize, store_of

__all__ = ["train_denoiser"]

_SIGMAS = (0.002, 0.05)  # of pixels in [0, 1]
_BATCH = 32
_LEAST_REALS = 10  # of which one is held out
_LEARNING_RATE = 2e-3
_REPORT_EVERY = 250  # steps
_WARM_UP = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    reference: str
    space: str
    output: str
    facts: dict[str, Any]


def train_denoiser(config: DenoiserConfig) -> dict[str, Any]:
    """Trains a denoiser, or goes on where an earlier call stopped. Returns what its config says.

    Raises:
        ConfigError: no such reference, or none of pixels.
        WorkerError: workers died again and again.
    """
    output = normalize(config.output)
    bundle = open_bundle(normalize(config.reference))
    spec = bundle.spaces.get(config.space)
    if spec is None or spec.kind != "rgb":
        known = ", ".join(name for name, known in bundle.spaces.items() if known.kind == "rgb") or "none"
        raise ConfigError(
            f"A denoiser needs a space of pixels of the reference, not {config.space!r}; it has: {known}."
        )
    if config.images < _BATCH:
        raise ConfigError(f"--images must be at least {_BATCH}, not {config.images}.")
    reals = sum(part["rows"] for part in bundle.parts[spec.code_key])  # of this space, which may have rejected some
    if reals < _LEAST_REALS:
        raise ConfigError(f"A denoiser needs {_LEAST_REALS} real images or more, and {bundle.uri} has {reals}.")
    facts = {
        "color": spec.color,
        "codec": spec.codec,
        "reference_digest": bundle.digest,
        "sigmas": list(_SIGMAS),
        "images_seen": config.images,
        "seed": config.seed,
    }
    publish_facts(join(output, "training.json"), facts, "denoiser")
    if store_of(output).stat(join(output, "config.json")) is not None:
        return denoiser_config(output) | {"trained": False}
    event("denoiser", reference=bundle.uri, space=spec.name, images=bundle.images, images_seen=config.images)
    connect()
    shares = share_training(*cluster(), config.workers)
    if shares.workers > _BATCH:  # each needs an image of every batch
        shares = share_training(*cluster(), _BATCH)
    job = _Job(reference=bundle.uri, space=spec.name, output=output, facts=facts)
    with followed(join(output, "metrics.jsonl"), _tell):
        run_workers(_train, job, output, shares)
    return denoiser_config(output) | {"trained": True}


def _tell(line: dict[str, Any], _: list[dict[str, Any]]) -> None:
    event("denoiser_step", **line)


def _train(worker: Worker, job: _Job) -> None:
    bundle = open_bundle(job.reference)
    if bundle.digest != job.facts["reference_digest"]:
        raise ConfigError(f"The reference {job.reference} was built again meanwhile; start anew.")
    spec, seed, metrics_uri = bundle.spaces[job.space], job.facts["seed"], join(job.output, "metrics.jsonl")
    reference = Reference(Codes(bundle, spec.code_key), spec)
    count = len(reference.codes.array)
    held_out = np.random.default_rng(seed).permutation(count)[: min(512, count // 10)]
    rows_n = np.setdiff1d(np.arange(count), held_out)
    rows_n = rows_n[worker.rank :: worker.count] if len(rows_n) >= worker.count else rows_n
    torch.manual_seed(seed)
    model = Denoiser().to(worker.device).to(memory_format=torch.channels_last)
    parallel, optimizer = worker.parallel(model), torch.optim.AdamW(model.parameters(), _LEARNING_RATE)
    steps, first = max(1, job.facts["images_seen"] // _BATCH), 0
    with worker.newest_checkpoint() as folder:
        if folder is not None:
            state = load_state(folder)
            model.load_state_dict(state.network)
            optimizer.load_state_dict(state.optimizer)
            first = int(next(iter(state.optimizer["state"].values()))["step"])
    lines = [line for line in json_lines(metrics_uri) if line["step"] <= first]

    def save(folder: Path) -> None:
        weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        save_state(State(weights, optimizer.state_dict(), weights), folder)

    begin, share = time.monotonic(), _share(worker.rank, worker.count)
    for step in range(first, steps):
        rng = np.random.default_rng([seed, worker.rank, step])
        clean = _pixels(reference, rng.choice(rows_n, share, replace=len(rows_n) < share), spec, worker.device)
        loss = _loss(parallel, clean, torch.Generator().manual_seed(int(rng.integers(2**62))))
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * cosine(step / steps, _WARM_UP, 1 / steps)
        optimizer.zero_grad(set_to_none=True)
        (loss * (share * worker.count / _BATCH)).backward()  # gradients are averaged over workers
        optimizer.step()
        if (step + 1) % _REPORT_EVERY == 0 or step + 1 == steps:
            spent_s = time.monotonic() - begin
            rate = (step + 1 - first) * _BATCH / spent_s
            eta_s = round((steps - step - 1) * spent_s / (step + 1 - first))
            lines.append({"step": step + 1, "steps": steps, "loss": float(loss.detach()), "images_per_s": rate,
                          "eta_s": eta_s})  # fmt: skip
            if worker.rank == 0:
                write_json_lines(metrics_uri, lines)
            worker.report(lines[-1], save)
    if worker.rank == 0:
        parts = (held_out[start : start + _BATCH] for start in range(0, len(held_out), _BATCH))
        measured = _measured(model, (_pixels(reference, rows, spec, worker.device) for rows in parts))
        save_denoiser(model, job.output, {**job.facts, **measured, "seconds": round(time.monotonic() - begin, 1)})


def _share(rank: int, workers: int) -> int:
    """Images of a step that a worker takes, so that all together take as many as one would."""
    return _BATCH // workers + (rank < _BATCH % workers)


def _pixels(reference: Reference, rows: np.ndarray, spec: SpaceSpec, device: str) -> torch.Tensor:
    """float32 [B, 3, H, W]."""
    shape = (-1, 3, spec.view.height_px or 0, spec.view.width_px or 0)
    pixels = torch.from_numpy(reference.embeddings_of(rows).reshape(shape))
    return pixels.to(device).contiguous(memory_format=torch.channels_last)


def _loss(model: torch.nn.Module, clean_bchw: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    low, high = (math.log(sigma) for sigma in _SIGMAS)
    sigma_b = torch.exp(torch.rand(len(clean_bchw), 1, 1, 1, generator=generator) * (high - low) + low)
    noise = torch.randn(clean_bchw.shape, generator=generator) * sigma_b
    denoised = model(clean_bchw + noise.to(clean_bchw.device))
    return (((denoised - clean_bchw) / sigma_b.to(clean_bchw.device)) ** 2).mean()


def _measured(model: Denoiser, parts: Iterable[torch.Tensor]) -> dict[str, Any]:
    """On reals that it was not trained on, as many at once as training takes: what is left of the noise's variance, at
    a few levels; 1 is no denoising."""
    left, numbers = dict.fromkeys((0.005, 0.01, 0.02, 0.05), 0.0), 0
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for clean_bchw in parts:
            numbers += clean_bchw.numel()
            for sigma in left:
                noise = torch.randn(clean_bchw.shape, generator=generator) * sigma
                denoised = model(clean_bchw + noise.to(clean_bchw.device))
                left[sigma] += float(((denoised - clean_bchw) ** 2).sum(dtype=torch.float64))
    return {"variance_left": {str(sigma): round(total / numbers / sigma**2, 4) for sigma, total in left.items()}}
