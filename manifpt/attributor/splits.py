"""Training, validation and test images of every label, with no two images of one group, or of the same pixels, on two.

Legend: B images, C components (images that must stay together), L labels, S = 3 sides.

What the paper's splits keep together isn't known; the released code re-splits by label alone (cocoaaa/gm-fpts).
A latent that was rendered at many training steps, or one image under two names, would then be learnt on one side and
asked for on the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import optimize, sparse

from manifpt.errors import ConfigError

__all__ = ["FRACTIONS", "SIDES", "TEST", "TRAIN", "VALIDATION", "assign_splits", "components"]

TRAIN, VALIDATION, TEST = 0, 1, 2
SIDES = ("train", "validation", "test")  # names, by number
FRACTIONS = (0.6, 0.15, 0.25)

_SEARCH_NODES = 1_000  # of branch and bound; a limit of time would make the answer depend on the machine


def assign_splits(
    label_b: np.ndarray,
    keys: Sequence[Sequence[str | None]],
    ids: Sequence[str],
    seed: int,
    fractions: tuple[float, float, float] = FRACTIONS,
    sources: Sequence[str] | None = None,
) -> np.ndarray:
    """Puts whole components on sides, so that each label is spread as near to the fractions as they allow.

    Components of several images come first, the largest of them first, each to the side where it lessens most the sum
    over labels and sides of (share on the side - fraction)^2: for one label that is the side that lacks most. Single
    images then fill each label's sides. A label that lacks a side gets the smallest component that no label needs where
    it is. Our own rule: any of this kind would do.

    Args:
        label_b: int64 [B].
        keys: columns of B strings, such as a latent's group within its source, and a content hash. Images with the same
            value in a column are one component, and so are those that a chain of such images ties. None and "" tie
            nothing.
        ids: B names, no two alike. The split doesn't depend on the order of the rows.
        seed: which of equally good splits.
        fractions: of `TRAIN`, `VALIDATION` and `TEST`; above 0, of sum 1.
        sources: names of the labels, for messages.

    Returns:
        side_b: int8 [B], `TRAIN`, `VALIDATION` or `TEST`; every label has an image on each.

    Raises:
        ConfigError: fewer than two labels, a label of fewer than three components, or labels so tied to each other that
            no split with all of them on each side was found. Also fractions or ids that are none, and columns of
            unequal lengths.
    """
    if len(fractions) != len(SIDES) or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(f"The fractions {tuple(fractions)} are not three numbers above 0 with a sum of 1.")
    if len({len(ids), len(label_b), *(len(key) for key in keys)}) > 1:
        raise ConfigError(
            f"There are {len(label_b)} labels, {len(ids)} ids or another number of keys; give one of each."
        )
    id_b = _strings(ids)
    order_b = pc.sort_indices(id_b)
    _refuse_duplicates(id_b.take(order_b))
    order_b = order_b.to_numpy()
    value_l, label_b = np.unique(np.asarray(label_b)[order_b], return_inverse=True)
    name_l = [repr(sources[value]) if sources is not None else str(value) for value in value_l]
    if len(value_l) < 2:
        raise ConfigError(f"There are images of {len(value_l)} source(s); an attributor needs two or more.")
    component_b = components([_strings(key).take(pa.array(order_b)) for key in keys], len(id_b))
    ones_b = np.ones(len(id_b), np.int64)
    count_cl = sparse.csr_array((ones_b, (component_b, label_b)))
    count_cl.sum_duplicates()
    _refuse_few(count_cl, name_l)

    rng = np.random.default_rng(seed)
    target_ls = count_cl.sum(axis=0)[:, None] * np.asarray(fractions)
    side_c = _spread(count_cl, target_ls, rng)
    missing_l = _repair(count_cl, side_c)
    if len(missing_l):
        side_c = _searched(count_cl, side_c, [name_l[label] for label in missing_l])
    side_b = np.empty(len(id_b), np.int8)
    side_b[order_b] = side_c[component_b]
    return side_b


def components(keys: Sequence[pa.StringArray], count: int) -> np.ndarray:
    """Which rows belong together: connected components of the graph of rows and the values they hold.

    Args:
        keys: columns of B strings; null and "" tie nothing.
        count: B.

    Returns:
        component_b: int64 [B], from 0 on.
    """
    row_parts, node_parts, nodes = [], [], count
    for key in keys:
        value_b = pc.if_else(pc.equal(key, ""), None, key).dictionary_encode()
        code_b = pc.fill_null(value_b.indices, -1).to_numpy(zero_copy_only=False)
        row_p = np.flatnonzero(code_b >= 0)
        row_parts.append(row_p)
        node_parts.append(nodes + code_b[row_p].astype(np.int64))
        nodes += len(value_b.dictionary)
    if not row_parts:
        return np.arange(count)
    row_p, node_p = np.concatenate(row_parts), np.concatenate(node_parts)
    graph = sparse.coo_array((np.ones(len(row_p), np.int8), (row_p, node_p)), shape=(nodes, nodes))
    _, component_n = sparse.csgraph.connected_components(graph, directed=False)
    return np.unique(component_n[:count], return_inverse=True)[1]


def _strings(column: Sequence[str | None]) -> pa.StringArray:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column if isinstance(column, pa.Array) else pa.array(column, pa.string())


def _refuse_duplicates(sorted_b: pa.StringArray) -> None:
    twice = pc.index(pc.equal(sorted_b[1:], sorted_b[:-1]), True).as_py() if len(sorted_b) > 1 else -1
    if sorted_b.null_count or twice >= 0:
        name = repr(sorted_b[twice].as_py()) if twice >= 0 else "null"
        raise ConfigError(f"The image id {name} is no name of one image; give every image an id of its own.")


def _refuse_few(count_cl: sparse.csr_array, name_l: list[str]) -> None:
    images_l, components_l = count_cl.sum(axis=0), np.bincount(count_cl.indices, minlength=len(name_l))
    label = int(components_l.argmin())
    if components_l[label] < len(SIDES):
        raise ConfigError(
            f"The source {name_l[label]} has {images_l[label]} image(s) in {components_l[label]} group(s), too few for"
            f" {len(SIDES)} sides, since a group stays whole; merge it with another source or drop it."
        )


def _spread(count_cl: sparse.csr_array, target_ls: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sides of the components, int64 [C], near to the targets; whether a label lacks a side isn't looked at."""
    size_c = count_cl.sum(axis=1)
    shuffled_c = rng.permutation(len(size_c))
    side_c = np.empty(len(size_c), np.int64)
    large_c = shuffled_c[size_c[shuffled_c] > 1]
    large_c = large_c[np.argsort(-size_c[large_c], kind="stable")]
    lack_ls = target_ls.tolist()  # lists are several times as fast as arrays of three numbers
    weight_l = (1 / target_ls.sum(axis=1) ** 2).tolist()
    start_c, label_p, count_p = count_cl.indptr.tolist(), count_cl.indices.tolist(), count_cl.data.tolist()
    for component in large_c.tolist():
        part = range(start_c[component], start_c[component + 1])
        gain_s = [0.0, 0.0, 0.0]
        for p in part:
            weight, lack_s = count_p[p] * weight_l[label_p[p]], lack_ls[label_p[p]]
            for side in (TRAIN, VALIDATION, TEST):
                gain_s[side] += weight * lack_s[side]
        best = gain_s.index(max(gain_s))
        side_c[component] = best
        for p in part:
            lack_ls[label_p[p]][best] -= count_p[p]
    single_c = shuffled_c[size_c[shuffled_c] == 1]
    label_c = count_cl.indices[count_cl.indptr[single_c]]
    single_c = single_c[np.argsort(label_c, kind="stable")]
    filled_ls = _filled(np.array(lack_ls), np.bincount(label_c, minlength=len(target_ls)), rng)
    side_c[single_c] = np.repeat(np.tile(np.arange(len(SIDES)), len(target_ls)), filled_ls.reshape(-1))
    return side_c


def _filled(lack_ls: np.ndarray, singles_l: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many single images go to each side, int64 [L, S]: the whole numbers that leave the least sum of squares."""
    # What lacks adds up to the singles; where a side has too much, the others share what is over.
    share_ls = np.zeros_like(lack_ls)
    is_open_ls = np.ones(lack_ls.shape, bool)
    for _ in SIDES:
        over_l = ((lack_ls * is_open_ls).sum(axis=1) - singles_l) / is_open_ls.sum(axis=1)
        share_ls = (lack_ls - over_l[:, None]) * is_open_ls
        is_open_ls &= share_ls > -1e-6  # not 0: rounding must not shut the last one
    share_ls = np.maximum(share_ls, 0)
    filled_ls = np.floor(share_ls + 1e-9).astype(np.int64)
    rank_ls = np.lexsort((rng.random(share_ls.shape), filled_ls - share_ls), axis=1).argsort(axis=1)
    return filled_ls + (rank_ls < (singles_l - filled_ls.sum(axis=1))[:, None])


def _repair(count_cl: sparse.csr_array, side_c: np.ndarray) -> np.ndarray:
    """Moves components, in place, to sides that a label lacks; returns the labels for which none could be moved."""
    held_ls = _held(count_cl, side_c)
    size_c, member_cl = count_cl.sum(axis=1), count_cl.tocsc()
    for label, side in np.argwhere(held_ls == 0):
        if held_ls[label, side]:  # a move for another label has filled it
            continue
        own_c = member_cl.indices[member_cl.indptr[label] : member_cl.indptr[label + 1]]
        for component in own_c[np.argsort(size_c[own_c], kind="stable")]:
            tied_l = count_cl.indices[count_cl.indptr[component] : count_cl.indptr[component + 1]]
            if (held_ls[tied_l, side_c[component]] > 1).all():
                held_ls[tied_l, side_c[component]] -= 1
                held_ls[tied_l, side] += 1
                side_c[component] = side
                break
    return np.flatnonzero((held_ls == 0).any(axis=1))


def _held(count_cl: sparse.csr_array, side_c: np.ndarray) -> np.ndarray:
    """Components of each label on each side, int64 [L, S]."""
    side_p = np.repeat(side_c, np.diff(count_cl.indptr))
    cells = count_cl.shape[1] * len(SIDES)
    return np.bincount(count_cl.indices * len(SIDES) + side_p, minlength=cells).reshape(-1, len(SIDES))


def _searched(count_cl: sparse.csr_array, side_c: np.ndarray, missing: list[str]) -> np.ndarray:
    """The sides, int64 [C], with the fewest images moved so that every label has each: an integer program.

    Only labels that share components need it, and of the components of one label alone no more than three a side.
    """
    size_c, tied_c = count_cl.sum(axis=1), np.diff(count_cl.indptr)
    own_c = np.flatnonzero(tied_c == 1)
    own_c = own_c[np.lexsort((size_c[own_c], side_c[own_c], count_cl.indices[count_cl.indptr[own_c]]))]
    kind_c = count_cl.indices[count_cl.indptr[own_c]] * len(SIDES) + side_c[own_c]
    nth_c = np.arange(len(own_c)) - np.searchsorted(kind_c, kind_c)
    chosen_c = np.concatenate([np.flatnonzero(tied_c > 1), own_c[nth_c < len(SIDES)]])
    member_lc = (count_cl[chosen_c] > 0).T.astype(np.float64)
    stays_cs = side_c[chosen_c, None] == np.arange(len(SIDES))
    each_side = sparse.eye_array(len(SIDES))
    found = optimize.milp(
        np.where(stays_cs, 0, size_c[chosen_c, None]).reshape(-1),
        integrality=1,
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(sparse.kron(sparse.eye_array(len(chosen_c)), np.ones((1, len(SIDES)))), 1, 1),
            optimize.LinearConstraint(sparse.kron(member_lc, each_side), 1, np.inf),
        ],
        options={"node_limit": _SEARCH_NODES},
    )
    if found.x is None:
        raise ConfigError(
            f"No split was found that puts {', '.join(missing)} on every side, since their images share keys with"
            " those of other sources; drop the images that sources share, or merge those sources."
        )
    side_c = side_c.copy()
    side_c[chosen_c] = found.x.reshape(-1, len(SIDES)).argmax(axis=1)
    return side_c
