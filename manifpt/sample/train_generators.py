"""Make the embedded sample: 1,797 real handwritten digits and 500 images from each of four generators.

    python -m manifpt.sample.train_generators --output manifpt/sample/digits.parquet

1. The digits that scikit-learn ships (8x8, values 0..16) become 32x32 grey images by Pillow's bicubic filter.
2. A seeded split, stratified by digit, holds 300 of them out as ``query``. The other 1,497 are the ``reference``.
3. A GAN, a VAE, a normalising flow and a diffusion model train on the 1,497 reference digits and on nothing else.
4. Each model draws 500 images. Nothing is picked by hand or filtered: what is drawn first is what is stored.

Every image, real or generated, ends in the same ``quantise``: grey levels in steps of 3, which are 86 levels. The
8x8 originals have 17. It keeps the file small and gives all sources one set of grey levels (how often each level
occurs still differs between them). The PNGs hold their data uncompressed, because Parquet's zstd then works across
images and the file gets smaller.

The same seed on the same machine with the same library versions
gives the same pixels. Another processor sums floats in another order and gives slightly different ones.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["main"]

SIDE = 32
GREY_STEP = 3  # divides 255, so that both black and white stay exact
QUERY_REALS = 300
IMAGES_PER_GENERATOR = 500
BATCH = 64
THREADS = 2  # part of what makes a run repeatable: float sums depend on how work is divided


# --------------------------------------------------------------------------------------------------------- images
def quantise(grey: NDArray[np.floating] | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Round grey values of any shape (0..255) to the nearest multiple of ``GREY_STEP``."""
    steps = np.rint(np.clip(np.asarray(grey, dtype=np.float64), 0, 255) / GREY_STEP)
    return (steps * GREY_STEP).astype(np.uint8)


def real_digits() -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Return scikit-learn's digits as uint8 [1797, 32, 32] and their labels as int8 [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.rint(digits.images * 255 / 16).clip(0, 255).astype(np.uint8)  # [1797, 8, 8]
    large = [np.asarray(Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for grey in small]
    return quantise(np.stack(large)), digits.target.astype(np.int8)


def to_unit(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, 32, 32] -> float32 [N, 1, 32, 32] in [-1, 1]."""
    return torch.from_numpy(images).float().unsqueeze(1) / 127.5 - 1


def to_grey(images_bchw: Tensor) -> NDArray[np.uint8]:
    """float32 [N, 1, 32, 32], [-1, 1] after clipping -> uint8 [N, 32, 32]."""
    return quantise((images_bchw.squeeze(1).numpy() + 1) * 127.5)


# ------------------------------------------------------------------------------------------------------- training
def batches(images_bchw: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield ``steps`` batches [64, 1, 32, 32], reshuffling after each pass."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(images_bchw))
        yield images_bchw[order[:BATCH]]
        order = order[BATCH:]


def tail_mean(losses: list[float]) -> float:
    """Mean of the last twentieth: a single batch is too noisy to report."""
    return float(np.mean(losses[-max(1, len(losses) // 20) :]))


def fit(model: nn.Module, loss_of: Callable[[Tensor], Tensor], images_bchw: Tensor, steps: int, rate: float) -> float:
    """Train ``model`` by AdamW on ``loss_of(batch)``, leave it with its averaged weights, return the final loss."""
    model.to(memory_format=torch.channels_last)  # up to twice as fast on a CPU
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 2), pct_start=0.1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    losses = []
    for batch in batches(images_bchw, steps):
        loss = loss_of(batch)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.item())
    model.load_state_dict(average.module.state_dict())
    model.eval()
    return tail_mean(losses)


# ------------------------------------------------------------------------------------------------------------ GAN
def shift(images_bchw: Tensor, most: int = 2) -> Tensor:
    """Move each image by up to ``most`` pixels, real and fake alike, so that G learns no shift (DiffAugment)."""
    count = len(images_bchw)
    padded = F.pad(images_bchw, (most, most, most, most), value=-1.0)
    rows, columns = torch.randint(0, 2 * most + 1, (2, count, 1)) + torch.arange(SIDE)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


class Critic(nn.Module):
    """DCGAN discriminator with spectral normalisation. It also sees how varied its batch is, against collapse."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.utils.parametrizations.spectral_norm(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.head = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4 * width + 1, 1, 4))

    def forward(self, images_bchw: Tensor) -> Tensor:
        features = self.body(images_bchw)  # [B, 4w, 4, 4]
        variety = features.std(dim=0).mean().expand(len(features), 1, 4, 4)
        return self.head(torch.cat([features, variety], dim=1)).flatten()


def train_gan(images_bchw: Tensor, steps: int) -> tuple[Tensor, dict[str, float]]:
    """DCGAN: transposed convolutions, hinge loss. Returns float32 [500, 1, 32, 32] and the final losses."""

    def up(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    start = [nn.ConvTranspose2d(64, 192, 4, bias=False), nn.BatchNorm2d(192), nn.ReLU()]  # [B, 64, 1, 1] -> 4x4
    generator = nn.Sequential(*start, *up(192, 96), *up(96, 48), nn.ConvTranspose2d(48, 1, 4, 2, 1), nn.Tanh())
    critic = Critic()
    for network in (generator, critic):
        network.to(memory_format=torch.channels_last)
    generator_optimiser = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.0, 0.9))
    critic_optimiser = torch.optim.Adam(critic.parameters(), lr=4e-4, betas=(0.0, 0.9))
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
    generator_losses, critic_losses = [], []
    for real in batches(images_bchw, steps):
        fake = generator(torch.randn(BATCH, 64, 1, 1))
        loss = F.relu(1 - critic(shift(real))).mean() + F.relu(1 + critic(shift(fake.detach()))).mean()
        critic_optimiser.zero_grad()
        loss.backward()
        critic_optimiser.step()
        critic_losses.append(loss.item())

        loss = -critic(shift(fake)).mean()
        generator_optimiser.zero_grad()
        loss.backward()
        generator_optimiser.step()
        generator_losses.append(loss.item())
        average.update_parameters(generator)
    average.eval()
    with torch.no_grad():
        images = average(torch.randn(IMAGES_PER_GENERATOR, 64, 1, 1))
    return images, {"generator_hinge": tail_mean(generator_losses), "critic_hinge": tail_mean(critic_losses)}


# ------------------------------------------------------------------------------------------------------------ VAE
class Vae(nn.Module):
    """Convolutional VAE. The decoder enlarges by nearest neighbour + convolution, never by transposed convolution."""

    def __init__(self, latent: int = 16, width: int = 32) -> None:
        super().__init__()
        self.latent = latent
        encoder: list[nn.Module] = []
        for inputs, outputs in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            encoder += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(4 * width * 16, 2 * latent))
        decoder: list[nn.Module] = [nn.Linear(latent, 4 * width * 16), nn.Unflatten(1, (4 * width, 4, 4)), nn.SiLU()]
        for inputs, outputs in ((4 * width, 2 * width), (2 * width, width), (width, width)):
            decoder += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(inputs, outputs, 3, padding=1)]
            decoder += [nn.GroupNorm(8, outputs), nn.SiLU()]
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(width, 1, 3, padding=1), nn.Tanh())

    def loss(self, images_bchw: Tensor, sigma: float = 0.5) -> Tensor:
        """Negative ELBO per image (without its constant) under a Gaussian likelihood of fixed ``sigma``."""
        mean, log_variance = self.encoder(images_bchw).chunk(2, dim=1)
        decoded = self.decoder(mean + torch.randn_like(mean) * (log_variance / 2).exp())
        error = (decoded - images_bchw).square().sum() / (2 * sigma**2)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
        return (error + divergence) / len(images_bchw)


def train_vae(images_bchw: Tensor, steps: int) -> tuple[Tensor, dict[str, float]]:
    """Train the VAE and decode draws from the prior. Returns float32 [500, 1, 32, 32] and the final loss."""
    model = Vae()
    loss = fit(model, model.loss, images_bchw, steps, rate=2e-3)
    with torch.no_grad():
        return model.decoder(torch.randn(IMAGES_PER_GENERATOR, model.latent)), {"negative_elbo_nats": loss}


# ----------------------------------------------------------------------------------------------------------- flow
def haar(images_bchw: Tensor, inverse: bool = False) -> Tensor:
    """Orthonormal Haar transform [B, 1, 2H, 2W] -> [B, 4, H, W] (mean, then 3 details), or back. Its log-det is 0."""
    basis = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2  # its own inverse
    if inverse:
        return F.pixel_shuffle(torch.einsum("ij,bjhw->bihw", basis, images_bchw), 2)
    return torch.einsum("ij,bjhw->bihw", basis, F.pixel_unshuffle(images_bchw, 2))


class Coupling(nn.Module):
    """One Glow step: per-channel affine, learned 1x1 mixing, affine coupling, all given a context [B, K, H, W]."""

    def __init__(self, channels: int, context: int, hidden: int) -> None:
        super().__init__()
        self.kept = channels // 2
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.offset = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.mixing = nn.Parameter(nn.init.orthogonal_(torch.empty(channels, channels)))
        last = nn.Conv2d(hidden, 2 * (channels - self.kept), 3, padding=1)
        nn.init.zeros_(last.weight)  # starts as the identity, the usual cure for flows that diverge at once
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        first, middle = nn.Conv2d(self.kept + context, hidden, 3, padding=1), nn.Conv2d(hidden, hidden, 3, padding=1)
        self.net = nn.Sequential(first, nn.SiLU(), middle, nn.SiLU(), last)

    def forward(self, x: Tensor, context: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Data to noise, or back by ``inverse``: the result and the log-determinant [B] of data to noise."""
        mixing = self.mixing
        if not inverse:
            x = torch.einsum("ij,bjhw->bihw", mixing, x * self.log_scale.exp() + self.offset)
        kept, moved = x[:, : self.kept], x[:, self.kept :]
        log_scale, offset = self.net(torch.cat([kept, context], dim=1)).chunk(2, dim=1)
        log_scale = 2 * torch.tanh(log_scale / 2)  # one step may stretch by e^2 at most
        moved = (moved - offset) * (-log_scale).exp() if inverse else moved * log_scale.exp() + offset
        x = torch.cat([kept, moved], dim=1)
        if inverse:
            x = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(mixing), x)
            x = (x - self.offset) * (-self.log_scale).exp()
        pixels = x.shape[2] * x.shape[3]
        fixed = (self.log_scale.sum() + torch.linalg.slogdet(mixing)[1]) * pixels
        return x, log_scale.sum(dim=(1, 2, 3)) + fixed


class Couplings(nn.ModuleList):
    """A density of x [B, C, H, W] given a context [B, K, H, W]: couplings that lead to a standard normal."""

    def nats(self, x: Tensor, context: Tensor) -> Tensor:
        """Negative log-likelihood [B]."""
        log_determinant = torch.zeros(len(x))
        for coupling in self:
            x, change = coupling(x, context)
            log_determinant = log_determinant + change
        return (x.square() + math.log(2 * math.pi)).sum(dim=(1, 2, 3)) / 2 - log_determinant

    def draw(self, shape: tuple[int, int, int], context: Tensor, temperature: float) -> Tensor:
        """One [C, H, W] for each row of the context."""
        x = torch.randn(len(context), *shape) * temperature
        for coupling in reversed(list(self)):
            x, _ = coupling(x, context, inverse=True)
        return x


class Flow(nn.Module):
    """Wavelet flow: p(8x8 means) p(details to 16x16 | means) p(details to 32x32 | means), an exact likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Couplings(Coupling(4, 0, 128) for _ in range(16))  # 8x8 pixels as [4, 4, 4]
        self.coarse = Couplings(Coupling(3, 1, 48) for _ in range(4))  # [3, 8, 8] given [1, 8, 8]
        self.fine = Couplings(Coupling(3, 1, 48) for _ in range(4))  # [3, 16, 16] given [1, 16, 16]

    def loss(self, images_bchw: Tensor) -> Tensor:
        """Bits per pixel of the grey levels, by uniform dequantisation."""
        grey_step = GREY_STEP / 127.5
        fine = haar(images_bchw + (torch.rand_like(images_bchw) - 0.5) * grey_step)  # [B, 4, 16, 16]
        coarse = haar(fine[:, :1])  # [B, 4, 8, 8]
        base = F.pixel_unshuffle(coarse[:, :1], 2)  # [B, 4, 4, 4]
        nats = self.fine.nats(fine[:, 1:], fine[:, :1]) + self.coarse.nats(coarse[:, 1:], coarse[:, :1])
        nats = nats + self.base.nats(base, base[:, :0])
        return (nats.mean() / SIDE**2 - math.log(grey_step)) / math.log(2)

    @torch.no_grad()
    def sample(self, count: int, temperature: float) -> Tensor:
        x = F.pixel_shuffle(self.base.draw((4, 4, 4), torch.empty(count, 0, 4, 4), temperature), 2)
        x = haar(torch.cat([x, self.coarse.draw((3, 8, 8), x, temperature)], dim=1), inverse=True)
        return haar(torch.cat([x, self.fine.draw((3, 16, 16), x, temperature)], dim=1), inverse=True)


def train_flow(images_bchw: Tensor, steps: int) -> tuple[Tensor, dict[str, float]]:
    """Train the flow and draw at temperature 0.8. Returns float32 [500, 1, 32, 32] and the final loss."""
    model = Flow()
    loss = fit(model, model.loss, images_bchw, steps, rate=1e-3)
    return model.sample(IMAGES_PER_GENERATOR, temperature=0.8), {"bits_per_pixel": loss}


# ------------------------------------------------------------------------------------------------------ diffusion
class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-Conv twice, told the noise level by a per-channel scale and offset."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.norm = nn.GroupNorm(8, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.level = nn.Linear(embedding, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, offset = self.level(embedding)[:, :, None, None].chunk(2, dim=1)
        return self.skip(x) + self.second(F.silu(self.norm(self.first(x)) * (1 + scale) + offset))


class Denoiser(nn.Module):
    """Small U-Net that predicts v. Works on 2x2 pixel blocks (16x16, 8x8, 4x4): what a CPU can train in minutes."""

    def __init__(self, width: int = 64, embedding: int = 128) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000), 32)))
        self.embed = nn.Sequential(nn.Linear(64, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        self.enter = nn.Conv2d(4, width, 3, padding=1)
        self.down = nn.ModuleList(
            ResidualBlock(inputs, outputs, embedding)
            for inputs, outputs in ((width, width), (width, 2 * width), (2 * width, 2 * width))
        )
        self.middle = ResidualBlock(2 * width, 2 * width, embedding)
        self.up = nn.ModuleList(
            ResidualBlock(inputs, outputs, embedding)
            for inputs, outputs in ((4 * width, 2 * width), (4 * width, width), (2 * width, width))
        )
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, noisy_bchw: Tensor, time_b: Tensor) -> Tensor:
        angles = time_b[:, None] * self.frequencies  # type: ignore[operator]
        embedding = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        x = self.enter(F.pixel_unshuffle(noisy_bchw, 2))
        skips = []
        for depth, block in enumerate(self.down):
            x = block(x if depth == 0 else F.avg_pool2d(x, 2), embedding)
            skips.append(x)
        x = self.middle(x, embedding)
        for depth, block in enumerate(self.up):
            x = block(torch.cat([x if depth == 0 else F.interpolate(x, scale_factor=2.0), skips.pop()], 1), embedding)
        return F.pixel_shuffle(self.leave(x), 2)

    def loss(self, images_bchw: Tensor) -> Tensor:
        """Mean squared error of v = cos(a) noise - sin(a) image, with a = time * pi / 2 (the cosine schedule)."""
        time_b = (torch.arange(len(images_bchw)) + torch.rand(1)) / len(images_bchw)  # even cover, a steadier loss
        angle = (time_b * math.pi / 2)[:, None, None, None]
        noise = torch.randn_like(images_bchw)
        target = angle.cos() * noise - angle.sin() * images_bchw
        return F.mse_loss(self(angle.cos() * images_bchw + angle.sin() * noise, time_b), target)

    @torch.no_grad()
    def sample(self, count: int, steps: int = 60) -> Tensor:
        """Deterministic DDIM from pure noise."""
        x = torch.randn(count, 1, SIDE, SIDE)
        times = torch.linspace(1, 0, steps + 1)
        for now, after in zip(times[:-1] * math.pi / 2, times[1:] * math.pi / 2, strict=True):
            v = self(x, (now / (math.pi / 2)).expand(count))
            image = (now.cos() * x - now.sin() * v).clamp(-1, 1)
            noise = (x - now.cos() * image) / now.sin()
            x = after.cos() * image + after.sin() * noise
        return x


def train_diffusion(images_bchw: Tensor, steps: int) -> tuple[Tensor, dict[str, float]]:
    """Train the diffusion model and draw by DDIM. Returns float32 [500, 1, 32, 32] and the final loss."""
    model = Denoiser()
    loss = fit(model, model.loss, images_bchw, steps, rate=1e-3)
    return model.sample(IMAGES_PER_GENERATOR), {"v_mean_squared_error": loss}


# ----------------------------------------------------------------------------------------------------- everything
Trainer = Callable[[Tensor, int], tuple[Tensor, dict[str, float]]]
GENERATORS: dict[str, tuple[Trainer, int]] = {  # the trainer and its full number of steps
    "gan": (train_gan, 2500),
    "vae": (train_vae, 2000),
    "flow": (train_flow, 1500),
    "diffusion": (train_diffusion, 1800),
}


def novelty(images: NDArray[np.uint8], reference: NDArray[np.uint8]) -> dict[str, float]:
    """Are ``images`` [N, 32, 32] copies? Distances are L2 over pixels in 0..1, to the nearest of ``reference``."""
    queries, targets = (torch.from_numpy(grey.reshape(len(grey), -1) / 255.0) for grey in (images, reference))
    nearest = torch.cdist(queries, targets, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values
    return {
        "mean_distance_to_reference": round(nearest.mean().item(), 4),
        "least_distance_to_reference": round(nearest.min().item(), 4),
        "copies_of_reference": int((nearest == 0).sum()),
        "duplicates_among_themselves": len(images) - len(np.unique(images.reshape(len(images), -1), axis=0)),
    }


def row(grey: NDArray[np.uint8], source: str, number: int, split: str, digit: int | None) -> dict[str, object]:
    """One row of the file. The PNG's data is stored and not compressed (the module's docstring says why)."""
    png = io.BytesIO()
    Image.fromarray(grey).save(png, "PNG", compress_level=0)
    image = {"bytes": png.getvalue(), "path": f"{source}/{number:04d}.png"}
    return {"image": image, "source": source, "split": split, "digit": digit}


def write(rows: list[dict[str, object]], facts: dict[str, object], output: Path) -> None:
    """Write the Parquet file, with ``facts`` as JSON under the key ``manifpt.sample``."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [("image", image), ("source", pa.string()), ("split", pa.string()), ("digit", pa.int8())]
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields, metadata={"manifpt.sample": json.dumps(facts)}))
    # One page of one row group holds every image, because zstd finds only what repeats within a page.
    layout = {"row_group_size": len(rows), "data_page_size": 1 << 26, "write_batch_size": len(rows)}
    pq.write_table(
        table, output, compression="zstd", compression_level=22, use_dictionary=["source", "split"], **layout
    )
    print(f"wrote {output}: {len(rows)} rows, {output.stat().st_size:,} bytes")


def main() -> None:
    """Train all four generators, print one line for each and write the file."""
    import sklearn
    from sklearn.model_selection import train_test_split

    parser = argparse.ArgumentParser(description="Train four small generators on digits and write the sample.")
    parser.add_argument("--output", type=Path, required=True, help="the Parquet file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="0.01 for a quick trial of the whole script")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    # Deterministic mode also fills new memory, a debugging aid that would double the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_flush_denormal(True)

    real, digit = real_digits()
    reference, query = train_test_split(
        np.arange(len(real)), test_size=QUERY_REALS, stratify=digit, random_state=arguments.seed
    )
    training_images = to_unit(real[reference])
    is_query = np.isin(np.arange(len(real)), query)
    rows = [row(grey, "real", i, "query" if is_query[i] else "reference", int(digit[i])) for i, grey in enumerate(real)]
    facts: dict[str, object] = {"real": novelty(real[query], real[reference])}
    print(f"real: {len(reference)} reference, {len(query)} query, {facts['real']}", flush=True)

    for number, (name, (trainer, full_steps)) in enumerate(GENERATORS.items()):
        torch.manual_seed(arguments.seed * 1000 + number)  # each model is repeatable without the ones before it
        steps = max(2, round(full_steps * arguments.steps_scale))
        start = time.perf_counter()
        drawn, losses = trainer(training_images, steps)
        images = to_grey(drawn)
        seconds = time.perf_counter() - start
        facts[name] = {"steps": steps, "batch": BATCH, "losses": losses, **novelty(images, real[reference])}
        print(f"{name}: {seconds:.0f} s, {facts[name]}", flush=True)
        rows += [row(grey, name, i, "query", None) for i, grey in enumerate(images)]

    facts |= {"seed": arguments.seed, "threads": THREADS}
    facts |= {"torch": torch.__version__, "scikit-learn": sklearn.__version__}
    write(rows, facts, arguments.output)


if __name__ == "__main__":
    main()
