"""Weight files: where they come from, and the proof that they are the right ones.

Order of search: the folder or S3 prefix in `MANIFPT_WEIGHTS`, the cache (`~/.cache/manifpt/weights`), then the source.
A file whose SHA-256 isn't the stated one is refused, and a pickle (`.pth`) without a stated one is never opened.

Tensors by name, or below `state_dict` or `model`, as checkpoints have them. Barlow Twins (facebookresearch/barlowtwins)
publishes both: `resnet50.pth` has torchvision's names without `fc`; in `checkpoint.pth` they are
`module.backbone.NAME`, beside a `module.projector` and a `module.bn` that only training used.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from manifpt.documents import tensors_of
from manifpt.errors import ConfigError
from manifpt.spaces.base import SpaceSpec
from manifpt.storage import LocalStore, join, normalize, store_of

if TYPE_CHECKING:
    import torch

__all__ = ["REGISTRY", "Published", "cache_folder", "load_state", "resolve_weights", "timm_preprocessing"]


_SECURE = "https://"
_MOST_BYTES = 8 << 30  # of a weight file from the web


@dataclass(frozen=True, slots=True)
class Published:
    """A published weight file.

    Attributes:
        file: its name in a cache folder.
        source: where its authors publish it.
        sha256: of the file, in full; "" where nobody states it, and the user has to.
        sha256_prefix: what is known of an unstated sum.
    """

    file: str
    source: str
    sha256: str
    sha256_prefix: str = ""


REGISTRY = {
    "resnet50-imagenet1k-v1": Published(
        "resnet50-0676ba61.pth",
        "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        # pragma: allowlist nextline secret  # the published sum of a public file
        "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
    ),
    "resnet50-imagenet1k-v2": Published(
        "resnet50-11ad3fa6.pth",
        "https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
        # pragma: allowlist nextline secret  # the published sum of a public file
        "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
    ),
    # The authors state no sum; the prefix is the one by which other projects pin the file.
    "resnet50-barlow-twins": Published(
        "resnet50-barlow-twins.pth",
        "https://dl.fbaipublicfiles.com/barlowtwins/ep1000_bs2048_lrw0.2_lrb0.0048_lambd0.0051/resnet50.pth",
        "",
        "cf015f40cc",
    ),
}


def resolve_weights(spec: SpaceSpec) -> SpaceSpec:
    """Finds the weight file of a network space and puts its SHA-256 into the spec; its source stays as stated.

    Raises:
        ConfigError: no such file, or the wrong one; the sentence says where to put it.
    """
    if spec.kind != "network":
        return spec
    spec = replace(spec, weights=spec.weights or _timm_source(spec))
    stated, published = spec.weights_sha256 or "", REGISTRY.get(spec.weights or "")
    if published:
        stated = stated or published.sha256
        if not stated:
            raise ConfigError(
                f"{published.source} has no published checksum. Download it, check that `sha256sum` begins with "
                f"{published.sha256_prefix}, and state it: weights_sha256 of space {spec.name!r} in --config."
            )
        if not stated.startswith(published.sha256_prefix):
            raise ConfigError(f"Space {spec.name!r}: weights_sha256 does not begin with {published.sha256_prefix}.")
    uri, data = _read(spec, stated)
    found = hashlib.sha256(data).hexdigest()
    if not stated and not uri.endswith(".safetensors"):
        raise ConfigError(
            f"{uri} is a pickle, which runs code when it is loaded: state its weights_sha256 ({found}, if you trust "
            f"this very file), or convert it to safetensors."
        )
    return replace(spec, weights_sha256=found)


def _read(spec: SpaceSpec, sha256: str) -> tuple[str, bytes]:
    """Where a weight file is on this machine, and its bytes, verified where a sum is known."""
    assert spec.weights is not None
    published = REGISTRY.get(spec.weights)
    file, source = (published.file, published.source) if published else (_cached_name(spec.weights), spec.weights)
    uri = _find(file, source, sha256)
    data = store_of(uri).read(uri)
    found = hashlib.sha256(data).hexdigest()
    if sha256 and found != sha256.lower():
        raise ConfigError(f"{uri} has SHA-256 {found}, not the stated {sha256}: refused. Delete it and get it again.")
    return uri, data


def load_state(spec: SpaceSpec) -> dict[str, torch.Tensor]:
    """The tensors of a resolved spec's weight file, found and verified on the machine that needs them."""
    import torch  # the driver resolves weights, and never loads them

    assert spec.weights_sha256 is not None, "resolve_weights comes first"
    uri, data = _read(spec, spec.weights_sha256)
    if uri.endswith(".safetensors"):
        return tensors_of(data, uri)
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    whole: dict[str, Any] = state if isinstance(state, dict) else {}
    tensors = next((whole[name] for name in ("state_dict", "model") if isinstance(whole.get(name), dict)), whole)
    named = {str(k).removeprefix("module."): value for k, value in tensors.items() if isinstance(value, torch.Tensor)}
    backbone = {k.removeprefix("backbone."): value for k, value in named.items() if k.startswith("backbone.")}
    return backbone or named


def cache_folder() -> str:
    """Where downloaded weights lie on this machine."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "manifpt", "weights")


def _cached_name(source: str) -> str:
    """Hubs call every file model.safetensors: a cached one also carries a digest of its address."""
    name = source.rpartition("/")[2]
    if not source.startswith(("https://", "http://")):
        return name
    return f"{hashlib.sha256(source.encode()).hexdigest()[:8]}-{name}"


def _find(file: str, source: str, sha256: str) -> str:
    is_web = source.startswith(("https://", "http://"))
    if not is_web:
        uri = normalize(source)
        if store_of(uri).stat(uri) is not None:
            return uri
    mirror = os.environ.get("MANIFPT_WEIGHTS")
    for folder in ([normalize(mirror)] if mirror else []) + [cache_folder()]:
        uri = join(folder, file)
        try:
            if store_of(uri).stat(uri) is not None:
                return uri
        except PermissionError:  # as S3 says of what isn't there to whom may not list
            continue
    if not is_web:
        raise ConfigError(f"There is no weight file {source}; correct `weights`, or use one of {', '.join(REGISTRY)}.")
    return _download(source, join(cache_folder(), file), sha256)


class _Guarded(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https alone: a reference may come from a stranger, and name what only a node can reach."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith(_SECURE):
            raise urllib.error.URLError(f"a redirect to {newurl:.200}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(source: str, uri: str, sha256: str) -> str:
    if not source.startswith(_SECURE) and all(source != published.source for published in REGISTRY.values()):
        raise ConfigError(f"Weights are fetched by https alone, not from {source}: get the file, and name its path.")
    try:
        opener = urllib.request.build_opener(_Guarded)
        with opener.open(source, timeout=60) as answer:
            data = answer.read(_MOST_BYTES + 1)
            told = answer.headers.get("Content-Length") or ""
            length = int(told) if told.isdecimal() else len(data)
            if len(data) < min(length, _MOST_BYTES + 1):  # asked for a number of bytes, http.client takes fewer as well
                raise http.client.IncompleteRead(data, length - len(data))
    except (http.client.HTTPException, OSError) as error:
        raise ConfigError(
            f"Can't download {source} ({error}). Put the file into {cache_folder()}, or set MANIFPT_WEIGHTS to a "
            f"folder or s3:// prefix that has it."
        ) from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{source} has more than {_MOST_BYTES >> 30} GiB: get the file, and name its path.")
    if sha256 and hashlib.sha256(data).hexdigest() != sha256.lower():
        raise ConfigError(f"{source} does not have the stated SHA-256 {sha256}: refused.")
    LocalStore().write(uri, data)
    return uri


def timm_preprocessing(architecture: str) -> dict[str, Any]:
    """Input size, mean and std that timm names for a model's published weights; {} where it names none."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError("A timm architecture needs the package: pip install '.[timm]' in a checkout.") from error
    pretrained = timm.get_pretrained_cfg(architecture.partition(":")[2])
    if pretrained is None:
        return {}
    return {"size_px": pretrained.input_size[-1], "mean": list(pretrained.mean), "std": list(pretrained.std)}


def _timm_source(spec: SpaceSpec) -> str:
    """The safetensors file that timm names for a model."""
    library, _, name = (spec.architecture or "").partition(":")
    if library == "timm":
        import timm

        pretrained = timm.get_pretrained_cfg(name)
        if pretrained is not None and pretrained.hf_hub_id:
            return f"https://huggingface.co/{pretrained.hf_hub_id}/resolve/main/model.safetensors"
    raise ConfigError(f"Space {spec.name!r} has no weights; name a file, a URI or one of {', '.join(REGISTRY)}.")
