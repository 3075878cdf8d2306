"""What a space is: the seam at which a user's own embedding enters.

Legend: B images, C channels, H W pixels, S side of a square view in pixels.

A space sees an image in three steps, so that what crosses processes and lies in a bundle stays small:

1. *view*: decoded pixels, at the size the space asks for, uint8 (`SpaceSpec.view`, CPU);
2. *code*: `Space.encode`, the expensive part, on the accelerator: a network's features; in a pixel space the view;
3. *embedding*: `Space.embed`, cheap, float32, where the projection happens: phi(x) of the paper.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from manifpt.alterations import reencoded
from manifpt.errors import BadImage, ConfigError, RejectReason

__all__ = ["Space", "SpaceSpec", "View", "crop_box"]

_WHOLE = 2  # times a view's bytes: what may travel to where it is resized


@dataclass(frozen=True, slots=True)
class View:
    """The pixels that a space sees.

    Resizing is antialiased (Pillow's bicubic, whose support grows with the factor), so that no frequency of the image
    folds into another; padding never happens, since a black frame would be the strongest feature of a small image.

    Attributes:
        height_px, width_px: of every view. None: native, still unknown.
        resized: whether images of another size are brought to this size (shorter side, then centre crop), or rejected.
        min_px: the shorter side an image must have.
        codec: `jpeg` where every image is re-encoded first.
    """

    height_px: int | None
    width_px: int | None
    resized: bool
    min_px: int
    codec: str = ""

    @property
    def key(self) -> str:
        kind = "resized" if self.resized else "native"
        codec = f"-{self.codec}" if self.codec else ""
        return f"{kind}-{self.height_px}x{self.width_px}-min{self.min_px}{codec}"

    def of(self, image_hwc: np.ndarray) -> np.ndarray:
        """The view of one image.

        Args:
            image_hwc: uint8 [H, W, 3].

        Returns:
            view_chw: uint8 [3, height_px, width_px].

        Raises:
            BadImage: too small, not of the native size, or too long for its codec.
        """
        is_other = self._is_other(image_hwc)
        if self.codec:
            image_hwc = reencoded(image_hwc, "JPEG", _QUALITY)  # the last codec of every image is then the same
        if is_other:
            image_hwc = _resized(image_hwc, self.height_px or 0, self.width_px or 0)
        return np.ascontiguousarray(image_hwc.transpose(2, 0, 1))

    def whole(self, image_hwc: np.ndarray) -> np.ndarray:
        """As `of`, but an image that isn't much larger than the view stays as it is, to be resized later."""
        if self.codec:
            return self.of(image_hwc)
        if self._is_other(image_hwc) and image_hwc.size > _WHOLE * 3 * (self.height_px or 0) * (self.width_px or 0):
            return self.of(image_hwc)
        return np.ascontiguousarray(image_hwc.transpose(2, 0, 1))

    def _is_other(self, image_hwc: np.ndarray) -> bool:
        """Whether an image that this view takes must be resized."""
        height_px, width_px = image_hwc.shape[:2]
        if min(height_px, width_px) < self.min_px:
            raise BadImage(RejectReason.TOO_SMALL, f"{width_px} x {height_px} px; the least side is {self.min_px} px")
        assert self.height_px is not None and self.width_px is not None, "a native view is resolved first"
        if (height_px, width_px) == (self.height_px, self.width_px):
            return False
        if not self.resized:
            detail = f"{width_px} x {height_px} px; the reference has {self.width_px} x {self.height_px} px"
            raise BadImage(RejectReason.SIZE_MISMATCH, detail)
        return True


_QUALITY = 75  # libjpeg's default, and its 4:2:0


def _resized(image_hwc: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Scales so that the target is just covered, keeps the aspect ratio, crops the centre. One resampling, no rounding
    between scale and crop: the crop is given to Pillow as a box in source pixels."""
    box = crop_box(image_hwc.shape[0], image_hwc.shape[1], height_px, width_px)
    image = Image.fromarray(image_hwc).resize((width_px, height_px), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)


def crop_box(source_height: int, source_width: int, height_px: int, width_px: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the centre of a source that has the target's shape, in source pixels."""
    scale = min(source_height / height_px, source_width / width_px)
    box_height, box_width = height_px * scale, width_px * scale
    # Rounding may lead a hair outside, which Pillow refuses.
    top, left = max(0.0, (source_height - box_height) / 2), max(0.0, (source_width - box_width) / 2)
    return left, top, min(source_width, left + box_width), min(source_height, top + box_height)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceSpec:
    """A space, as it stands in configs, plans and bundles. Two specs with equal `identity` make equal embeddings.

    Attributes:
        name: the folder of its shards.
        kind: `rgb`, `frequency` or `network`.
        size_px: side of the square view; None: native.
        height_px, width_px: of the view, once known.
        min_px: least side of an image; 0: what the kind needs.
        architecture: `torchvision:NAME`, `timm:NAME` or `manifpt:NAME`.
        weights: a name of the registry, a path, `s3://` or `https://` URI; None: those published for a timm name.
        weights_sha256: of the weight file. Required for files that are no safetensors.
        mean, std: of the input in [0, 1], a channel.
        precision: of a network, `float32` or `bfloat16`, which is faster and gives other neighbours.
        color: of a pixel space, `rgb` or `ycbcr`.
        codec: `jpeg`: every image is re-encoded alike first, so that no source differs by its codec; "": as it is.
    """

    name: str
    kind: str
    size_px: int | None = None
    height_px: int | None = None
    width_px: int | None = None
    min_px: int = 0
    architecture: str | None = None
    weights: str | None = None
    weights_sha256: str | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    precision: str = "float32"
    color: str = "rgb"
    codec: str = ""

    @property
    def view(self) -> View:
        """The pixels it sees."""
        if self.kind == "network":  # small images are enlarged, never padded
            size_px = self.size_px or 224
            return View(size_px, size_px, resized=True, min_px=self.min_px or 16, codec=self.codec)
        if self.size_px is None:
            return View(self.height_px, self.width_px, resized=False, min_px=self.min_px or 8, codec=self.codec)
        # Enlarging would invent pixels, and with them a spectrum.
        least_px = self.min_px or self.size_px
        return View(self.size_px, self.size_px, resized=True, min_px=least_px, codec=self.codec)

    @property
    def code_key(self) -> str:
        """Spaces with equal keys have equal codes, which are computed, moved and stored once."""
        return self.name if self.kind == "network" else self.view.key

    def identity(self) -> dict[str, Any]:
        """What makes the numbers: all but where the weight file lies."""
        found = asdict(self)
        del found["weights"]
        found["mean"], found["std"] = list(self.mean), list(self.std)
        if self.precision == "float32":  # as of bundles made before there was a choice
            del found["precision"]
        for name, default in (("color", "rgb"), ("codec", "")):
            if found[name] == default:
                del found[name]
        return found

    @staticmethod
    def from_json(fields: dict[str, Any]) -> SpaceSpec:
        """Raises:
        ConfigError: an unknown field, or none of the required ones.
        """
        if not isinstance(fields, dict):
            raise ConfigError("A space is names and values.")
        known = SpaceSpec.__dataclass_fields__
        for name in fields:
            if name not in known:
                raise ConfigError(f"Space {fields.get('name')!r}: unknown field {name!r}; known: {', '.join(known)}.")
        if "name" not in fields or "kind" not in fields:
            raise ConfigError("A space needs a name and a kind (rgb, frequency or network).")
        _check_name(fields["name"])
        for name in ("kind", "architecture", "weights", "weights_sha256"):
            if not isinstance(fields.get(name), str | None) or (name == "kind" and fields[name] is None):
                raise ConfigError(f"Space {fields['name']!r}: {name} is a text, not {fields[name]!r}.")
        for name in ("size_px", "min_px", "height_px", "width_px"):
            value = fields.get(name)
            if value is not None and (type(value) is not int or value < 0 or (name == "size_px" and value < 1)):
                raise ConfigError(f"Space {fields['name']!r}: {name} is a number of pixels, not {value!r}.")
        for name in ("mean", "std"):
            value = fields.get(name, (0.0, 0.0, 0.0))
            if not (
                isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(v, float | int) for v in value)
            ):
                raise ConfigError(f"Space {fields['name']!r}: {name} is three numbers, not {value!r}.")
        if fields.get("precision", "float32") not in ("float32", "bfloat16"):
            raise ConfigError(
                f"Space {fields['name']!r}: precision is float32 or bfloat16, not {fields['precision']!r}."
            )
        if fields.get("color", "rgb") not in ("rgb", "ycbcr"):
            raise ConfigError(f"Space {fields['name']!r}: color is rgb or ycbcr, not {fields['color']!r}.")
        if fields["kind"] == "network" and fields.get("color", "rgb") != "rgb":
            raise ConfigError(f"Space {fields['name']!r}: color is for pixel spaces; a network sees rgb.")
        if fields.get("codec", "") not in ("", "jpeg"):
            raise ConfigError(f"Space {fields['name']!r}: codec is jpeg or empty, not {fields['codec']!r}.")
        named: dict[str, Any] = {k: tuple(v) if k in {"mean", "std"} else v for k, v in fields.items()}
        if named.get("weights_sha256"):
            named["weights_sha256"] = named["weights_sha256"].lower()
        return SpaceSpec(**named)


def _check_name(name: Any) -> None:
    """A bundle from elsewhere must not choose the folder that a run writes to."""
    is_text = isinstance(name, str) and 0 < len(name) <= 100 and not name.startswith(".")
    if not is_text or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ConfigError(f"A space's name is a folder's name: letters, digits, '-', '_' and '.', not {name!r:.120}.")


class Space(Protocol):
    """An embedding phi. Implementations are made from their spec alone, on any machine."""

    spec: SpaceSpec

    def load(self) -> None:
        """Does once what `encode` needs, such as reading weights; `encode` does it where nobody asked before."""
        ...

    def encode(self, views_bchw: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] -> codes [B, ...], uint8 or float32. May use the accelerator.

        A network takes images of another size than its view's too, all of one, and resizes them there.
        """
        ...

    def embed(self, codes: np.ndarray) -> np.ndarray:
        """codes [B, ...] -> embeddings, float32 [B, ...]: [B, 3, H, W] or [B, D]. Pure and cheap."""
        ...

    def compact(self, embeddings_bd: Any) -> Any:
        """float32 [B, D] -> float32 [B, W], W <= D: a linear map that lengthens no difference, for a faster search.

        Of NumPy or torch, wherever it lies.
        At most two numbers are added for each that comes out, and scaled once: the search allows for that rounding.
        """
        ...
