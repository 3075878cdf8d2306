"""The commands' settings: frozen dataclasses, filled from a YAML file and flags; flags win."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml

from manifpt.errors import ConfigError, StorageError, TooManyRejected, WorkerError, told_as
from manifpt.log import event, printable
from manifpt.termination import EXIT_CODE, Terminated, terminable

__all__ = [
    "AnalyzeConfig",
    "ArtifactsConfig",
    "DenoiserConfig",
    "EncoderConfig",
    "EvaluateConfig",
    "ExplainConfig",
    "IndexConfig",
    "ReferenceConfig",
    "ReproduceConfig",
    "RowsConfig",
    "ScanConfig",
    "TrainConfig",
    "parse",
    "rejection_budget",
    "run_command",
]

AlertSection = Annotated[dict[str, Any], tyro.conf.Suppress]
OwnSpaces = Annotated[dict[str, dict[str, Any]], tyro.conf.Suppress]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Lists images and writes a manifest."""

    input: tuple[str, ...]
    """Folders, S3 prefixes, tar files or Parquet files with an image column."""
    output: str
    """The manifest: a .parquet path or URI."""
    source: str | None = None
    """One source (generator, or "real") for all images. Default: the first folder level of each image."""
    source_column: str | None = None
    """The column (Parquet) or JSON field (tar) that names an image's source."""
    split: str | None = None
    """One split for all images."""
    split_column: str | None = None
    """The column or field that names an image's split."""
    keep_columns: tuple[str, ...] = ()
    """Columns or fields that travel on to the shards, such as a group for splits."""
    where: str | None = None
    """COLUMN=VALUE: only images with this value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Embeds real images and writes a reference bundle."""

    manifest: str
    """Manifest of the real images."""
    output: str
    """The bundle: a folder or prefix."""
    spaces: tuple[str, ...] = ("rgb", "frequency")
    """rgb, frequency, ycbcr, frequency_ycbcr, supervised, selfsupervised, or names under own_spaces in --config."""
    size_px: int | None = None
    """Resolution of pixels and spectra. Default: native; all images must then have the first one's size."""
    encoder: str | None = None
    """Of selfsupervised: the folder that jobs/pretrain_encoder.py made. Default: the published Barlow Twins weights."""
    equalize_codec: bool = False
    """Re-encode every image alike (JPEG, quality 75, 4:2:0), here and in all runs on this reference."""
    shard_rows: int | None = None
    """Images a shard. Default: so that a decoded shard stays under 128 MiB."""
    max_rejected: str = ""
    """As many images, or as many percent (5%), may be rejected. Default: 1%, but at least 10 images."""
    max_actors: int | None = None
    """Actors a stage may scale up to. Default: what the cluster has room for, also when it grows."""
    gpu: bool = False
    """Use GPUs though the cluster has none yet: its autoscaler brings them. Where it has some, they are used anyway."""
    own_spaces: OwnSpaces = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactsConfig:
    """Projects images onto a reference and writes artifact shards. Without arguments: the shipped sample."""

    manifest: str | None = None
    """Manifest of the images to project."""
    reference: str | None = None
    """The reference bundle."""
    output: str | None = None
    """The run folder or prefix. Default without arguments: runs/sample."""
    spaces: tuple[str, ...] = ()
    """Spaces of the bundle. Default: all of them."""
    store: Literal["inline", "lazy", "auto"] = "auto"
    """inline: artifacts in the shards. lazy: neighbour and distance only. auto: lazy over 128 KiB a row."""
    projection: Literal["exact", "flat", "approximate"] = "exact"
    """exact: by the fastest proved search. flat: the same, looking at every reference image. approximate: FAISS IVF,
    whose recall is measured and reported."""
    estimate: Literal["nearest", "mean", "hull", "soft", "denoiser", "none", "random", "blur"] = "nearest"
    """What the projection x* is. nearest: the nearest real (the paper's). mean, hull: of the --neighbors nearest
    reals, their mean or the nearest point of their affine hull. soft: by a Gaussian model of the reals, with --sigma.
    denoiser: by a network trained on the reals, --denoiser. Controls: none (x* = 0), blur (--sigma, px), random (any
    real)."""
    neighbors: int = 16
    """Of mean and hull: k, 1 to 64."""
    ridge: float = 0.1
    """Of hull: its regularisation, times the mean squared distance of the neighbours."""
    sigma: float | None = None
    """Of soft, in the space's units (default 0.01); of blur, in px (default 1)."""
    denoiser: str | None = None
    """Of denoiser: the folder that jobs/train_denoiser.py made."""
    residual_first: bool = False
    """In frequency spaces: project among pixels, then transform the residual: phi(x - x*)."""
    alter: str = "none"
    """Alter every image first: by a step of the robustness ladder (jpeg-75, webp-50, resize-0.5, crop-0.9, blur-1.0,
    noise-2, ...), or drawn: by what is drawn for each image, for --altered-artifacts of train_attributor."""
    reference_shards: int = 1
    """Parts in which the reference is held, each by actors of its own, where one actor's memory is too small."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of stored artifacts."""
    shard_rows: int | None = None
    """Images a shard. Default: so that a decoded shard stays under 128 MiB."""
    max_rejected: str = ""
    """As many images, or as many percent (5%), may be rejected. Default: 1%, but at least 10 images."""
    max_actors: int | None = None
    """Actors a stage may scale up to. Default: what the cluster has room for, also when it grows."""
    gpu: bool = False
    """Use GPUs though the cluster has none yet: its autoscaler brings them. Where it has some, they are used anyway."""
    dry_run: bool = False
    """Print the plan, and do nothing."""
    own_spaces: OwnSpaces = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Trains an encoder on real images alone (Barlow Twins), for the space selfsupervised."""

    manifest: str
    """Manifest of the real images."""
    output: str
    """The encoder: a folder or prefix."""
    backbone: Literal["resnet18", "resnet50"] = "resnet18"
    """torchvision's; images under 64 px get a first layer that keeps their high frequencies."""
    policy: Literal["fingerprint", "standard"] = "fingerprint"
    """What two views of an image differ in. fingerprint: place, mirroring and mean colour, so features may keep all
    frequencies but zero. standard: as Barlow Twins, contrast and sizes too, and from 64 px on blur."""
    size_px: int | None = None
    """Side of the square that it sees. Default: that of the first image; smaller ones are rejected."""
    epochs: int = 100
    """Passes over the images."""
    batch_size: int = 128
    """Images a step, over all workers."""
    label_column: str | None = None
    """Kept column with a class, for a nearest-neighbour probe after each epoch. Training never sees it."""
    max_rejected: str = ""
    """As many images, or as many percent (5%), may be rejected. Default: 1%, but at least 10 images."""
    seed: int = 0
    """Of weights, order and views."""
    workers: int | None = None
    """Default: one a GPU, or one a node."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Trains a denoiser on the real images of a reference."""

    reference: str
    """The bundle; it must have a space of pixels."""
    output: str
    """The denoiser: a folder or prefix."""
    space: str = "ycbcr"
    """Of the reference: rgb or ycbcr."""
    images: int = 200_000
    """Images seen in training."""
    seed: int = 0
    """Of weights, order and noise."""
    workers: int | None = None
    """Default: one a GPU, or one a node."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """Which images of a run take part, and under which labels."""

    labels: str | None = None
    """YAML that maps sources to labels (sources that are one generator) or to null (left out)."""
    min_images: int = 1
    """Labels with fewer images are left out."""
    most_images: int | None = None
    """Images of a label at most."""
    group_column: str | None = None
    """Kept column: images that share its value stay on one side of the split. Default: latent_group, if it was kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RowsConfig):
    """Trains an attributor on the artifacts of a run."""

    artifacts: str
    """A finished run of compute_artifacts."""
    space: str
    """One of the run's spaces."""
    output: str
    """The attributor bundle: a folder or prefix."""
    altered_artifacts: tuple[str, ...] = ()
    """Runs that differ from it by --alter alone: copies of training images are trained on too, and nothing else of
    them."""
    network: Literal["resnet50", "small", "released", "head"] | None = None
    """resnet50: torchvision's, from ImageNet weights where they can be had. small: the released code's network.
    released: the same by its SGD schedule. head: one hidden layer. Default: resnet50 for images, head for vectors."""
    seed: int = 0
    """Of splits, weights and order."""
    epochs: int | None = None
    """At most. Default: the network's recipe."""
    false_alarms: float = 0.05
    """Share of images of known sources that may be called unknown; the threshold is set on validation images."""
    workers: int | None = None
    """Default: one a GPU, or one a node."""
    tracker: Literal["tensorboard", "mlflow"] | None = None
    """Also send metrics there; metrics.jsonl is always written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RowsConfig):
    """Compares artifacts, controls and baselines on the same images and splits."""

    artifacts: tuple[str, ...]
    """Finished runs of compute_artifacts: one for each estimate of the projection, and controls."""
    control_artifacts: tuple[str, ...] = ()
    """Runs of the same images onto reals that say nothing of their manifold: of random phases, of another domain."""
    output: str
    """Results: table.md, table.json, details.json. The same command again goes on."""
    spaces: tuple[str, ...] = ()
    """Of the runs. Default: all."""
    networks: tuple[str, ...] = ()
    """Tried on image-shaped artifacts; validation picks. Default: small on pixels, head on spectra."""
    epochs: int | None = None
    """Of each training at most. Default: the network's recipe."""
    baselines: tuple[str, ...] = ()
    """all, or names such as durall20 yu19."""
    attributor: tuple[str, ...] = ()
    """Bundles to measure on the run that they fit: on their own test images where it is that of their training, else on
    all of its images. With --ladder, on their own test images."""
    ladder: bool = False
    """Only this: the --attributor bundles on test images after JPEG, WebP, resizing, crop, blur and noise; ladder.md,
    ladder.json and ladder.png."""
    leave_one_out: bool = False
    """Only this: each generator in turn is left out of training, and how well its images are found to be of an unknown
    source is measured; leave_one_out.md and leave_one_out.json."""
    seeds: int = 3
    """Each has its own weights and order, and its own split unless the manifest has one."""
    test_artifacts: tuple[str, ...] = ()
    """Cross-dataset: test on all images of these runs, one for each of --artifacts and --control-artifacts."""
    test_labels: str | None = None
    """YAML that maps the sources of --test-artifacts to the labels of training."""
    equalize_codec: bool = False
    """All images re-encoded alike. The runs' reference must have been built with it."""
    dataset: str | None = None
    """Its name in the tables. Default: that of the first run's folder."""
    test_dataset: str | None = None
    """The same of --test-artifacts."""
    paper_column: str | None = None
    """Show the paper's Table 2 beside: cifar10, celeba, chq or ffhq; or its Table 4: cifar10->celeba, chq->ffhq ..."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeConfig(RowsConfig):
    """What the fingerprints of a run say of their generators: report.html, report.json and figures."""

    artifacts: str
    """A finished run of compute_artifacts."""
    output: str
    """The report: a folder or prefix."""
    spaces: tuple[str, ...] = ()
    """Of the run. Default: all."""
    designs: str | None = None
    """Design choices by label: a shipped table (gm_cifar10, paper, ...), or a YAML file like those in
    manifpt/analysis/designs."""
    attributor: tuple[str, ...] = ()
    """Bundles trained on this run, one for a space: their features of test images are then clustered and mapped."""
    seed: int = 0
    """Of all that is drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Measures one image and writes an evidence panel: evidence.png and evidence.json."""

    image: str
    """One image file."""
    attributor: str
    """The attributor bundle."""
    artifacts: str
    """The finished run that it was trained on."""
    output: str
    """A folder or prefix."""
    reference: str | None = None
    """The reference bundle, where it was moved. Default: that of the run."""
    denoiser: str | None = None
    """Of a run by --estimate denoiser: the folder that jobs/train_denoiser.py made."""
    labels: str | None = None
    """YAML that maps the run's sources to the attributor's labels. Default: as they were mapped for its training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Attributes what is new in a bucket since the last scan, and says what has changed. For a schedule."""

    input: tuple[str, ...]
    """Folders or S3 prefixes; tar and Parquet files in them too."""
    attributor: str
    """The attributor bundle."""
    reference: str
    """The reference bundle of the run that it was trained on."""
    output: str
    """The scans' folder or prefix, the same each time."""
    denoiser: str | None = None
    """Of an attributor of runs by --estimate denoiser: the folder that jobs/train_denoiser.py made."""
    drift_level: float = 0.01
    """The chance that a scan in which nothing has changed finds any drift."""
    max_actors: int | None = None
    """Actors a stage may scale up to. Default: what the cluster has room for, also when it grows."""
    gpu: bool = False
    """Use GPUs though the cluster has none yet: its autoscaler brings them. Where it has some, they are used anyway."""
    alerts: AlertSection = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Makes the table of a data set, from its images to Markdown. The same command again goes on."""

    recipe: str
    """A shipped one (gm_cifar10, paper_gm_chq, ...) or a YAML file."""
    images: str
    """The root that the recipe's folders or files lie in."""
    output: str
    """A local folder."""
    runs: tuple[str, ...] = ()
    """Estimates and controls to compare: nearest none random blur-0.7 soft-0.01 denoiser ... Default: all."""
    baselines: tuple[str, ...] = ("all",)
    """all, or names."""
    networks: tuple[str, ...] = ()
    """Tried on image-shaped artifacts; validation picks. Default: small on pixels, head on spectra."""
    epochs: int | None = None
    """Of each training at most. Default: the network's recipe."""
    seeds: int = 3
    """Each has its own weights and order, and its own split unless the manifest has one."""
    most_images: int | None = None
    """Images of a label at most. Default: the recipe's."""
    denoiser_images: int = 200_000
    """Images that the denoiser sees in training."""
    equalize_codec: bool = False
    """Re-encode all images alike (JPEG, quality 75, 4:2:0)."""
    across: tuple[str, ...] = ()
    """Outputs of this command for recipes that this one's `cross` names: train here, test there, as in the paper's
    Table 4."""
    size_px: int | None = None
    """Side of pixels and spectra. Default: the recipe's. For --across, two sets of different sizes need one."""
    own_spaces: OwnSpaces = dataclasses.field(default_factory=dict)


Config = TypeVar("Config")


def parse(kind: type[Config], arguments: Sequence[str], program: str) -> Config:
    """Settings from `--config FILE.yaml` and flags.

    Raises:
        ConfigError: a file that isn't there, an unknown name, or a value of the wrong kind.
        SystemExit: with 2 and a usage message where the flags don't fit, with 0 after `--help`.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    known, rest = before.parse_known_args(arguments)
    default: Any = tyro.MISSING_NONPROP
    if known.config:
        default = _from_yaml(kind, known.config)
    epilog = " --config FILE.yaml sets the same names (with _ for -); flags win."
    return tyro.cli(kind, prog=program, args=rest, default=default, description=(kind.__doc__ or "") + epilog)


def _from_yaml(kind: type[Config], path: str) -> Config:
    try:
        with open(path, encoding="utf-8") as file:
            loaded = yaml.safe_load(file) or {}
    except OSError as error:
        raise ConfigError(f"Can't read --config {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"--config {path} must hold names and values.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name, value in loaded.items():
        if name not in fields:
            raise ConfigError(f"--config {path}: unknown name {name!r}; known: {', '.join(fields)}.")
        if not _fits(value, str(fields[name].type)):
            hint = "put it in quotes" if isinstance(value, int | float) else "see --help"  # a source named 2024, say
            told = "what it is" if name == "alerts" else repr(value)  # which may be a webhook's URL, a secret
            raise ConfigError(f"--config {path}: {name} can't be {told}; {hint}.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in loaded.items()}
    values |= {name: float(value) for name, value in loaded.items() if _is_whole(value, str(fields[name].type))}
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            values.setdefault(name, tyro.MISSING)
    return kind(**values)


def _fits(value: Any, annotation: str) -> bool:
    if annotation.startswith("OwnSpaces"):
        return isinstance(value, dict) and all(isinstance(fields, dict) for fields in value.values())
    if annotation == "AlertSection":
        return isinstance(value, dict)  # read by manifpt.monitoring.alerts
    if annotation.startswith("tuple"):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if annotation.startswith("Literal"):
        return isinstance(value, str) and f'"{value}"' in annotation
    kinds: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
    allowed = [kinds[name.strip()] for name in annotation.split("|") if name.strip() in kinds]
    return type(value) in allowed or (value is None and "None" in annotation) or _is_whole(value, annotation)


def _is_whole(value: Any, annotation: str) -> bool:
    """Whether a float was written without a point."""
    return type(value) is int and "float" in annotation.split(" | ")


def rejection_budget(text: str, images: int) -> int:
    """How many images may be rejected.

    Raises:
        ConfigError: neither a number nor a percentage.
    """
    try:
        if not text:
            return max(10, images // 100)
        budget = int(images * float(text[:-1]) / 100) if text.endswith("%") else int(text)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"--max-rejected is a number of images or a percentage, not {text!r}.") from error
    if budget < 0:
        raise ConfigError(f"--max-rejected can't be less than 0: {text!r}.")
    return budget


def run_command(command: Callable[[], None]) -> int:
    """Runs a job's main function and turns its outcome into an exit code: 0 done, 2 configuration, 3 too many rejected
    images, 143 ended by SIGTERM, 1 anything else."""
    try:
        with terminable():
            command()
    except Terminated:
        event("terminated", hint="the same command goes on from here")
        return EXIT_CODE
    except ConfigError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    except TooManyRejected as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 3
    except (StorageError, OSError) as error:
        told = told_as(error)
        if told is None:
            raise
        if isinstance(told, ConfigError):
            print(printable(f"error: {told}"), file=sys.stderr)
            return 2
        event("storage_failed", error=told)
        print("error: storage failed; the same command goes on where this one stopped.", file=sys.stderr)
        return 1
    except WorkerError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    return 0
