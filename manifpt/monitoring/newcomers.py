"""Clusters among unknown images that look like one new generator: HDBSCAN on an attributor's features.

Legend: B images of the window, U unknown ones among them, N images of the baseline, A coordinates of a feature, C
components.

A cluster has no p-value. Whether there are more unknown images than there should be is a test of
`manifpt.monitoring.drift`; this says what they are, and `manifpt.monitoring.alerts` asks for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from manifpt.metrics.tiles import finite
from manifpt.monitoring.drift import Sample

__all__ = ["Newcomer", "newcomers"]

_MOST_UNKNOWN = 5000  # that are clustered: time grows with its square
_LEAST_MEMBERS = 8
_SMALLEST_SHARE = 0.1  # of the unknown images
_NEIGHBORS = 10  # that make a place dense
_COMPONENTS = 8  # distances of more lose their contrast
_EXAMPLES = 12
_WIDEST = 1.5  # times the widest known source
_DENSER = 3.0  # than the baseline where the cluster lies: below, it is the edge of what is known


@dataclass(frozen=True, slots=True)
class Newcomer:
    """One cluster.

    Attributes:
        images: how many; of a window with over 5,000 unknown images, of the 5,000 that were drawn.
        of_unknown: how many images were clustered.
        examples: ids of the images nearest to the centre, the nearest first.
        compactness: its median distance to the centre, over that of the median known source.
        nearest_source: the known source whose centre is nearest.
        separation: distance of the two centres, over that source's median distance to its own.
    """

    images: int
    of_unknown: int
    examples: tuple[str, ...]
    compactness: float
    nearest_source: str
    separation: float


def newcomers(window: Sample, image_id_b: np.ndarray, baseline: Sample, seed: int) -> list[Newcomer]:
    """Clusters of the window's unknown images, the largest first.

    Features are divided by their standard deviation within the baseline's sources, and reduced to eight principal
    components of unknown images and baseline together. HDBSCAN (Campello et al. 2013) finds cores; a cluster is the
    unknown images that are nearest to a core's centre. It counts if it is no wider than a known source can be, and if
    the window is three times as dense there as the baseline: the edge of a known source gives unknown images too. At
    least 8 images, and a core of a tenth of the unknown ones.

    Args:
        window: a window's images, or a sample of them that is random in every respect.
        image_id_b: str (object) [B], their ids.
        baseline: of held-out images.
        seed: of the draw among more than 5,000 unknown images; otherwise nothing is drawn.

    Raises:
        ConfigError: a feature that is no finite number.
    """
    from sklearn.cluster import HDBSCAN

    unknown_u = np.flatnonzero(window.is_unknown_b)
    if len(unknown_u) > _MOST_UNKNOWN:
        unknown_u = np.sort(np.random.default_rng(seed).choice(unknown_u, _MOST_UNKNOWN, replace=False))
    if len(unknown_u) < _LEAST_MEMBERS or len(baseline) < 2:
        return []
    window_bc, baseline_nc = _components(window.feature_ba, unknown_u, baseline)
    known = _Known.of(baseline_nc, baseline.label_b)
    least = max(_LEAST_MEMBERS, round(_SMALLEST_SHARE * len(unknown_u)))
    dense = HDBSCAN(
        min_cluster_size=least, min_samples=min(_NEIGHBORS, len(unknown_u)), allow_single_cluster=True, copy=True
    )
    core_u = dense.fit_predict(window_bc[unknown_u])
    out = []
    for member_m in _grown(window_bc[unknown_u], core_u, known):
        newcomer = _newcomer(window_bc, unknown_u[member_m], image_id_b, known, baseline_nc, len(unknown_u))
        out += [newcomer] if newcomer else []
    return sorted(out, key=lambda newcomer: (-newcomer.images, newcomer.examples))


@dataclass(frozen=True, slots=True)
class _Known:
    """Known sources: names, centres float64 [S, C], median distances to them float64 [S], none of them 0, and how far
    images reach."""

    names: tuple[str, ...]
    centre_sc: np.ndarray
    radius_s: np.ndarray
    reach: float

    @classmethod
    def of(cls, component_nc: np.ndarray, label_n: np.ndarray) -> _Known:
        names = tuple(sorted(set(label_n)))
        centre_sc = np.stack([component_nc[label_n == name].mean(axis=0) for name in names])
        own_n = np.linalg.norm(component_nc - centre_sc[np.searchsorted(names, label_n.astype(str))], axis=1)
        radius_s = np.array([np.median(own_n[label_n == name]) for name in names])
        # A source of one image has none, and that of any other is a better guess than a division by nothing.
        usual = np.median(radius_s[radius_s > 0]) if (radius_s > 0).any() else 1.0
        radius_s = np.where(radius_s > 0, radius_s, usual)
        return cls(names, centre_sc, radius_s, float(np.quantile(own_n, 0.95)))


def _components(feature_ba: np.ndarray, unknown_u: np.ndarray, baseline: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The window's and the baseline's images in principal components of all unknown and known ones, float64 [., C]."""
    from sklearn.decomposition import PCA

    known_na = finite(baseline.feature_ba)
    residual_na = known_na.copy()
    for name in set(baseline.label_b):
        residual_na[baseline.label_b == name] -= residual_na[baseline.label_b == name].mean(axis=0)
    scale_a = residual_na.std(axis=0)
    scale_a = np.maximum(scale_a, np.median(scale_a) / 10)  # a unit that is dead among the known would outweigh all
    scale_a[scale_a == 0] = 1
    window_ba = finite(feature_ba) / scale_a
    known_na = known_na / scale_a
    both_na = np.concatenate([window_ba[unknown_u], known_na])
    rotation = PCA(min(_COMPONENTS, *both_na.shape), svd_solver="full").fit(both_na)
    return rotation.transform(window_ba), rotation.transform(known_na)


def _grown(component_uc: np.ndarray, core_u: np.ndarray, known: _Known) -> list[np.ndarray]:
    """HDBSCAN finds the dense core of a cluster, or several: from each centre, all images that are nearest to it.

    Args:
        component_uc: float64 [U, C].
        core_u: int64 [U], HDBSCAN's clusters; -1: none.
        known: sources, whose images stay theirs.

    Returns:
        for each cluster int64 [M], numbers of its members.
    """
    centres: list[np.ndarray] = []
    for core in np.argsort(-np.bincount(core_u[core_u >= 0]), kind="stable"):
        centre_c = component_uc[core_u == core].mean(axis=0)
        if all(np.linalg.norm(centre_c - other_c) > np.median(known.radius_s) for other_c in centres):
            centres.append(centre_c)
    if not centres:
        return []
    gap_uc = cdist(component_uc, np.concatenate([known.centre_sc, np.stack(centres)]))
    nearest_u = np.where(gap_uc.min(axis=1) <= known.reach, gap_uc.argmin(axis=1) - len(known.names), -1)
    members = [np.flatnonzero(nearest_u == place) for place in range(len(centres))]
    return [member_m for member_m in members if len(member_m) >= _LEAST_MEMBERS]


def _newcomer(
    window_bc: np.ndarray, member_m: np.ndarray, image_id_b: np.ndarray, known: _Known, baseline_nc: np.ndarray,
    of_unknown: int,
) -> Newcomer | None:  # fmt: skip
    centre_c = window_bc[member_m].mean(axis=0)
    distance_m = np.linalg.norm(window_bc[member_m] - centre_c, axis=1)
    radius = float(np.median(distance_m))
    if radius > _WIDEST * known.radius_s.max():
        return None
    ball = np.quantile(distance_m, 0.9)
    share, share_before = (
        (np.linalg.norm(component_c - centre_c, axis=1) <= ball).mean() for component_c in (window_bc, baseline_nc)
    )
    if share < _DENSER * share_before:
        return None
    gap_s = np.linalg.norm(known.centre_sc - centre_c, axis=1)
    nearest = int(np.argmin(gap_s))
    order_m = np.argsort(distance_m, kind="stable")[:_EXAMPLES]
    return Newcomer(
        images=len(member_m),
        of_unknown=of_unknown,
        examples=tuple(str(name) for name in image_id_b[member_m[order_m]]),
        compactness=radius / float(np.median(known.radius_s)),
        nearest_source=known.names[nearest],
        separation=float(gap_s[nearest] / known.radius_s[nearest]),
    )
