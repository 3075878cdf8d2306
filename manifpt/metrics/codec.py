"""The codec audit: which sources do files give away before a pixel is looked at?

Legend: B images, S sources, V values of a fact.

One source in JPEG among sources in PNG is told by traces of its codec, and its attribution is no proof of a fingerprint
(paper section 4; ours: the paper has no such audit). Facts such as EXIF leave no trace in pixels, but they show that a
source came by another way than the others.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from manifpt.errors import ConfigError

__all__ = ["LEAST_IMAGES", "SEPARABLE", "CodecAudit", "Fact", "audit", "container_facts"]

SEPARABLE = 0.75  # balanced accuracy from which on two sources count as told apart; chance is 0.5
LEAST_IMAGES = 4  # of a source: 2 to fill the tables and 2 to measure

Fact = str | int | bool | None

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_ORDER = (
    "format", "mode", "bit_depth", "compression", "quantisation", "subsampling", "progressive", "colour_type",
    "interlace", "icc", "exif", "width_px", "height_px",
)  # fmt: skip
_SIZE = ("width_px", "height_px")
_TOGETHER = "all facts together"
_NAMED = 3


@dataclass(frozen=True, slots=True)
class CodecAudit:
    """What facts alone tell of the sources, on images that the rule for it hasn't seen.

    Attributes:
        accuracy: mean recall over the sources.
        chance: 1 / S.
        separable: by source; see `audit`.
        why: by separable source, the fact that differs.
        pair_accuracy_ss: float64 [S, S], balanced accuracy for each two sources; 0.5 on the diagonal.
    """

    accuracy: float
    chance: float
    separable: dict[str, bool]
    why: dict[str, str]
    pair_accuracy_ss: np.ndarray


def container_facts(data: bytes) -> dict[str, Fact]:
    """What a file's header says, without decoding pixels.

    Args:
        data: a whole file, or anything else.

    Returns:
        `format`, `mode` (Pillow's), `width_px`, `height_px`, `exif`, `icc`; of a JPEG `quantisation` (a digest of its
        tables), `subsampling` (such as "2x2,1x1,1x1", horizontal by vertical factors of the components), `progressive`,
        `bit_depth`; of a PNG `bit_depth`, `colour_type`, `interlace`; of WebP and TIFF `compression`.
        {"format": "unreadable"} where there is no header to read. Never raises.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on metadata; and the bomb warning: nothing is decoded here
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            return _facts_of(image, data)
    except Exception:  # Pillow's parsers raise many kinds, and a bad image is a fact too
        return {"format": "unreadable"}


def _facts_of(image: Image.Image, data: bytes) -> dict[str, Fact]:
    facts: dict[str, Fact] = {
        "format": image.format,
        "mode": image.mode,
        "width_px": image.width,
        "height_px": image.height,
        "exif": "exif" in image.info,
        "icc": "icc_profile" in image.info,
    }
    if image.format in ("JPEG", "MPO"):
        tables = sorted((number, list(table)) for number, table in image.quantization.items())  # type: ignore[attr-defined]
        facts["quantisation"] = hashlib.blake2b(repr(tables).encode(), digest_size=8).hexdigest()
        facts["subsampling"] = ",".join(f"{layer[1]}x{layer[2]}" for layer in image.layer)  # type: ignore[attr-defined]
        facts["progressive"] = bool(image.info.get("progressive"))
        facts["bit_depth"] = image.bits  # type: ignore[attr-defined]
    elif image.format == "PNG":
        if data[12:16] == b"IHDR":
            facts["bit_depth"], facts["colour_type"], facts["interlace"] = data[24], data[25], bool(data[28])
    elif image.format == "WEBP":
        facts["compression"] = _webp_compression(data)
    elif image.format == "TIFF":
        facts["compression"] = str(image.info.get("compression"))
    return facts


def _webp_compression(data: bytes) -> str:
    """`lossy`, `lossless`, or `unknown`: the kind of the first chunk of pixels."""
    place = 12
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return "lossy" if kind == b"VP8 " else "lossless"
        # An animation's frame holds chunks of its own, after 16 bytes.
        place += 8 + (16 if kind == b"ANMF" else size + size % 2)
    return "unknown"


def audit(
    facts: Sequence[Mapping[str, Fact]],
    label_b: np.ndarray,
    extra: Mapping[str, Sequence[object]],
    sources: Sequence[str],
    seed: int,
    native_size: bool = False,
) -> CodecAudit:
    """Which sources are told by facts of their files alone.

    A rule is a lookup table: of a fact's value, the source among whose images it is most frequent; equal ones, and
    values never seen, are a guess among them. A half of each source's images, drawn at random, fills the tables of each
    fact and of all facts together, and chooses among them by leaving one image out. The other half measures the one
    chosen: for all sources at once, and for each two.

    Two sources are told apart from a balanced accuracy of `SEPARABLE` on. That is mutual: one JPEG source is told from
    every PNG source, and they from it. So a source is separable if it is told from most of the others, more than half:
    then the odd ones out are marked, and not those that are alike. Where two halves of the sources differ, all are.
    `pair_accuracy_ss` has every pair.

    Args:
        facts: of B images, from `container_facts`.
        label_b: int64 [B], places in `sources`.
        extra: more facts by name, of B values each, such as `went_through_jpeg`.
        sources: S names; all need 4 images or more, 2 to fill the tables and 2 to measure.
        seed: of the halves; they also depend on the order of the rows.
        native_size: whether width and height are facts. Only where images are fed at native size: what is resized to
            one size doesn't show the attributor how large it was.

    Raises:
        ConfigError: fewer than two sources, too few images of one, or not B of everything.
    """
    label_b = np.asarray(label_b, np.int64)
    _refuse(len(facts), label_b, extra, sources)
    columns = _columns(facts, extra, native_size)
    is_fit_b = _halves(label_b, seed)
    fit, held, whole = {}, {}, {}
    for name, column in columns.items():
        shape = (len(column.dictionary), len(sources))
        code_b = column.indices.to_numpy()
        fit[name] = _table(code_b[is_fit_b], label_b[is_fit_b], shape)
        held[name] = _table(code_b[~is_fit_b], label_b[~is_fit_b], shape)
        whole[name] = fit[name] + held[name]

    _, accuracy = _measured(fit, held, list(range(len(sources))))
    pair_ss, told_by = np.full((len(sources), len(sources)), 0.5), {}
    for one, other in itertools.combinations(range(len(sources)), 2):
        name, pair_ss[one, other] = _measured(fit, held, [one, other])
        pair_ss[other, one] = pair_ss[one, other]
        told_by[one, other] = told_by[other, one] = name
    separable, why = {}, {}
    for source, text in enumerate(sources):
        told = [other for other in np.flatnonzero(pair_ss[source] >= SEPARABLE).tolist() if other != source]
        separable[text] = len(told) > (len(sources) - 1) / 2
        if separable[text]:
            name = Counter(told_by[source, other] for other in told).most_common(1)[0][0]
            peers = [other for other in told if told_by[source, other] == name]
            why[text] = _why(name, columns[name].dictionary.to_pylist(), whole[name], source, peers, sources)
    return CodecAudit(accuracy, 1 / len(sources), separable, why, pair_ss)


def _refuse(count: int, label_b: np.ndarray, extra: Mapping[str, Sequence[object]], sources: Sequence[str]) -> None:
    lengths = {"labels": len(label_b)} | {name: len(column) for name, column in extra.items()}
    for name, length in lengths.items():
        if length != count:
            raise ConfigError(f"There are facts of {count} images and {length} values of {name}; give one of each.")
    if len(sources) < 2:
        raise ConfigError(f"The codec audit compares sources, and there is {len(sources)}; add another one.")
    if count and not (label_b.min() >= 0 and label_b.max() < len(sources)):
        raise ConfigError(f"A label is none of {len(sources)} sources; leave out images of sources unknown here.")
    count_s = np.bincount(label_b, minlength=len(sources))
    if count_s.min() < LEAST_IMAGES:
        name = sources[int(count_s.argmin())]
        raise ConfigError(
            f"The source {name!r} has {count_s.min()} image(s), and the codec audit needs {LEAST_IMAGES}; leave it out."
        )


def _columns(
    facts: Sequence[Mapping[str, Fact]], extra: Mapping[str, Sequence[object]], native_size: bool
) -> dict[str, pa.DictionaryArray]:
    """Values as text, by fact, and of all facts; the first of equally good ones is named, so plain ones come first."""
    known = set().union(*facts) - (set() if native_size else set(_SIZE))
    names = [name for name in _ORDER if name in known] + sorted(known - set(_ORDER))
    texts = {name: [_text(fact.get(name)) for fact in facts] for name in names}
    texts |= {name: [_text(value) for value in column] for name, column in extra.items()}
    columns = {name: pa.array(column, pa.string()).dictionary_encode() for name, column in texts.items()}
    joint_b = np.zeros(len(facts), np.int64)
    for column in columns.values():
        joint_b = np.unique(joint_b * len(column.dictionary) + column.indices.to_numpy(), return_inverse=True)[1]
    columns[_TOGETHER] = pa.array(joint_b.astype(str).tolist()).dictionary_encode()
    return columns


def _text(value: object) -> str:
    return "none" if value is None else str(value)


def _halves(label_b: np.ndarray, seed: int) -> np.ndarray:
    """bool [B]: half of each source's images, rounded down."""
    shuffled_b = np.random.default_rng(seed).permutation(len(label_b))
    shuffled_b = shuffled_b[np.argsort(label_b[shuffled_b], kind="stable")]
    sorted_b = label_b[shuffled_b]
    is_fit_b = np.empty(len(label_b), bool)
    is_fit_b[shuffled_b] = (
        np.arange(len(label_b)) - np.searchsorted(sorted_b, sorted_b) < np.bincount(label_b)[sorted_b] // 2
    )
    return is_fit_b


def _table(code_b: np.ndarray, label_b: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Counts of images, int64 [V, S]."""
    return np.bincount(code_b * shape[1] + label_b, minlength=shape[0] * shape[1]).reshape(shape)


def _measured(fit: dict[str, np.ndarray], held: dict[str, np.ndarray], among: list[int]) -> tuple[str, float]:
    """The rule that is best on one half, the first of equal ones, and its mean recall on the other."""
    best, best_recall = _TOGETHER, -1.0
    for name, fit_vs in fit.items():
        recall = _left_out_recall(fit_vs[:, among])
        if recall > best_recall + 1e-9:
            best, best_recall = name, recall
    return best, _recall(fit[best][:, among], held[best][:, among])


def _recall(fit_vs: np.ndarray, held_vs: np.ndarray) -> float:
    """Mean recall of a lookup table; a tie counts as the chance to guess it."""
    guess_vs = _guesses(fit_vs / fit_vs.sum(axis=0))
    return float(((held_vs * guess_vs).sum(axis=0) / held_vs.sum(axis=0)).mean())


def _left_out_recall(fit_vs: np.ndarray) -> float:
    """Mean recall on the images that fill the table, each without itself: a value seen once tells nothing."""
    count_s = fit_vs.sum(axis=0)
    recalls = []
    for source in range(fit_vs.shape[1]):
        rate_vs = fit_vs / count_s
        rate_vs[:, source] = np.maximum(fit_vs[:, source] - 1, 0) / (count_s[source] - 1)
        recalls.append(float((fit_vs[:, source] * _guesses(rate_vs)[:, source]).sum() / count_s[source]))
    return float(np.mean(recalls))


def _guesses(rate_vs: np.ndarray) -> np.ndarray:
    """How likely each source is guessed at each value. Equal counts over equal counts are equal floats."""
    is_best_vs = rate_vs == rate_vs.max(axis=1, keepdims=True)
    return is_best_vs / is_best_vs.sum(axis=1, keepdims=True)


def _why(
    name: str, value_v: list[str], count_vs: np.ndarray, source: int, peers: list[int], sources: Sequence[str]
) -> str:
    """One line, such as "format: JPEG, others PNG"."""
    others = "others" if len(peers) == len(sources) - 1 else ", ".join(sources[peer] for peer in peers[:_NAMED])
    if others != "others" and len(peers) > _NAMED:
        others += f" and {len(peers) - _NAMED} more"
    if name == _TOGETHER:
        return f"{name}, against {others}"
    own_v, peer_v = count_vs[:, source], count_vs[:, peers].sum(axis=1)
    own, peer = int(own_v.argmax()), int(peer_v.argmax())
    if own != peer:
        return f"{name}: {value_v[own]}, {others} {value_v[peer]}"
    share, peer_share = own_v[own] / own_v.sum(), peer_v[own] / peer_v.sum()
    return f"{name}: {value_v[own]} in {share:.0%}, in {peer_share:.0%} of {others}"
