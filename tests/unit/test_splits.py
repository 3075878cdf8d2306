"""Splits: no group on two sides, every label on each, near to the fractions, whatever the order of the rows."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt.attributor import splits
from manifpt.attributor.splits import FRACTIONS, SIDES, TEST, TRAIN, VALIDATION, _filled, assign_splits
from manifpt.errors import ConfigError


def names(count: int) -> list[str]:
    return [f"image/{row:06d}" for row in range(count)]


def tied(keys: list[list[str | None]], count: int) -> list[set[int]]:
    """Components by flooding: the definition, slowly."""
    left, parts = set(range(count)), []
    while left:
        part, edge = set(), {left.pop()}
        while edge:
            row = edge.pop()
            part.add(row)
            near = {other for other in left if any(key[row] and key[row] == key[other] for key in keys)}
            left -= near
            edge |= near
        parts.append(part)
    return parts


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, list[list[str | None]]]:
    """Labels, of which some images share groups, and some groups labels; at least three free images a label."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels, count = draw(st.integers(2, 5)), draw(st.integers(0, 60))
    values = draw(st.sampled_from([2, 8, 40]))
    label_b = np.concatenate([np.repeat(np.arange(labels) * 7 - 3, 3), rng.integers(0, labels, count) * 7 - 3])
    free: list[str | None] = [None] * (3 * labels)
    first = [*free, *(rng.choice([None, "", *map(str, range(values))]) for _ in range(count))]
    second = [*free, *(f"{rng.integers(0, 3 * values)}" if rng.random() < 0.5 else None for _ in range(count))]
    return label_b, [first, second]


@settings(max_examples=80, deadline=None)
@given(table=tables(), seed=st.integers(0, 99))
def test_groups_stay_whole_and_every_label_is_on_each_side(
    table: tuple[np.ndarray, list[list[str | None]]], seed: int
) -> None:
    label_b, keys = table
    side_b = assign_splits(label_b, keys, names(len(label_b)), seed)
    assert side_b.dtype == np.int8
    assert set(side_b.tolist()) <= {TRAIN, VALIDATION, TEST}
    for part in tied(keys, len(label_b)):
        assert len({int(side_b[row]) for row in part}) == 1
    for label in np.unique(label_b):
        assert set(side_b[label_b == label].tolist()) == {TRAIN, VALIDATION, TEST}


@settings(max_examples=40, deadline=None)
@given(table=tables(), seed=st.integers(0, 99))
def test_the_order_of_rows_does_not_matter(table: tuple[np.ndarray, list[list[str | None]]], seed: int) -> None:
    label_b, keys = table
    ids = names(len(label_b))
    order_b = np.random.default_rng(seed).permutation(len(label_b))
    moved = [[key[row] for row in order_b] for key in keys]
    side_b = assign_splits(label_b, keys, ids, seed)
    np.testing.assert_array_equal(
        assign_splits(label_b[order_b], moved, [ids[row] for row in order_b], seed), side_b[order_b]
    )


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(3, 400), min_size=2, max_size=6),
    seed=st.integers(0, 99),
    fractions=st.sampled_from([FRACTIONS, (0.8, 0.1, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.02, 0.49, 0.49)]),
)
def test_single_images_are_spread_to_within_one(
    counts: list[int], seed: int, fractions: tuple[float, float, float]
) -> None:
    label_b = np.repeat(np.arange(len(counts)), counts)
    side_b = assign_splits(label_b, [], names(len(label_b)), seed, fractions)
    for label, count in enumerate(counts):
        held_s = np.bincount(side_b[label_b == label], minlength=3)
        assert held_s.min() >= 1
        # A side that would be empty takes one more from another.
        assert (np.abs(held_s - count * np.array(fractions)) < (1 if held_s.min() > 1 else 2.01)).all()


def test_groups_are_spread_as_near_as_they_allow() -> None:
    """40 latents of 40 steps, as in gm_cifar10, beside single images: whole latents come out right."""
    label_b = np.repeat([0, 1, 2], [1600, 1600, 500])
    latents = [f"duke/{row % 40}" if row < 1600 else None for row in range(3700)]
    side_b = assign_splits(label_b, [latents], names(3700), seed=1)
    for label, count in enumerate((1600, 1600, 500)):
        assert np.bincount(side_b[label_b == label]).tolist() == [count * 0.6, count * 0.15, count * 0.25]


def test_single_images_make_up_for_large_groups() -> None:
    label_b = np.repeat([0, 1], 100)
    groups = ["a"] * 50 + ["b"] * 24 + [None] * 126
    side_b = assign_splits(label_b, [groups], names(200), seed=0)
    for label in (0, 1):
        assert np.bincount(side_b[label_b == label]).tolist() == [60, 15, 25]


@settings(max_examples=200, deadline=None)
@given(lack=st.tuples(*[st.floats(-20, 20)] * 3), singles=st.integers(0, 25))
def test_filling_leaves_the_least_sum_of_squares(lack: tuple[float, float, float], singles: int) -> None:
    lack_s = np.array(lack) + (singles - sum(lack)) / 3  # what lacks adds up to the singles
    filled_s = _filled(lack_s[None], np.array([singles]), np.random.default_rng(0))[0]
    assert filled_s.sum() == singles and filled_s.min() >= 0
    every = [(a, b, singles - a - b) for a in range(singles + 1) for b in range(singles + 1 - a)]
    least = ((np.array(every) - lack_s) ** 2).sum(axis=1).min()
    assert ((filled_s - lack_s) ** 2).sum() == pytest.approx(least, abs=1e-6)


def test_the_largest_group_comes_first_and_the_rest_is_mended() -> None:
    """By size alone the group of 100 and then both single images would leave one side empty."""
    label_b = np.repeat([0, 1], [102, 10])
    side_b = assign_splits(label_b, [["a"] * 100 + [None] * 12], names(112), seed=0)
    assert side_b[0] == TRAIN
    assert sorted(side_b[100:102].tolist()) == [VALIDATION, TEST]


def test_labels_that_share_groups_are_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three groups hold all images of three labels each: a Latin square, that moving one group can't reach."""
    # Label l has the groups of row l; each must be on three sides.
    rows = [("a", "b", "c"), ("c", "d", "e"), ("e", "f", "a"), ("b", "d", "f")]
    label_b = np.repeat(np.arange(4), 3)
    groups = [group for row in rows for group in row]
    searched = []
    search = splits._searched
    monkeypatch.setattr(splits, "_searched", lambda *given: searched.append(given) or search(*given))
    for seed in range(20):
        side_b = assign_splits(label_b, [groups], names(12), seed)
        assert all(set(side_b[label_b == label].tolist()) == {0, 1, 2} for label in range(4))
    assert searched, "the case is no longer hard: nothing is shown"


def test_labels_that_no_split_can_part_are_named() -> None:
    """Four groups, and every three of them a label: two of them must be on one side, and some label holds both."""
    rows = [("a", "b", "c"), ("a", "b", "d"), ("a", "c", "d"), ("b", "c", "d")]
    with pytest.raises(ConfigError, match=r"'s\d'.*share keys.*drop the images"):
        assign_splits(
            np.repeat(np.arange(4), 3),
            [[group for row in rows for group in row]],
            names(12),
            seed=0,
            sources=["s0", "s1", "s2", "s3"],
        )


def test_a_seed_gives_one_split_and_another_seed_another() -> None:
    label_b = np.repeat([0, 1], 50)
    one_b, again_b, other_b = (assign_splits(label_b, [], names(100), seed) for seed in (3, 3, 4))
    assert (one_b == again_b).all()
    assert (one_b != other_b).any()


@pytest.mark.parametrize(
    ("label", "groups", "message"),
    [
        ([5] * 9, [None] * 9, "1 source"),
        ([], [], "0 source"),
        ([0] * 6 + [1] * 2, [None] * 8, r"'few' has 2 image\(s\) in 2 group\(s\).*merge it.*or drop it"),
        ([0] * 6 + [1] * 9, [None] * 6 + ["a"] * 5 + ["b"] * 4, r"'few' has 9 image\(s\) in 2 group"),
    ],
)
def test_what_can_not_be_split_is_refused(label: list[int], groups: list[str | None], message: str) -> None:
    sources = ["many", "few", "", "", "", "other"]
    with pytest.raises(ConfigError, match=message):
        assign_splits(np.array(label, np.int64), [groups], names(len(label)), seed=0, sources=sources)


def test_bad_fractions_and_ids_are_refused() -> None:
    label_b = np.repeat([0, 1], 3)
    with pytest.raises(ConfigError, match="sum of 1"):
        assign_splits(label_b, [], names(6), 0, (0.8, 0.0, 0.2))
    with pytest.raises(ConfigError, match="'x'"):
        assign_splits(label_b, [], ["x", "a", "b", "c", "x", "d"], 0)
    with pytest.raises(ConfigError, match="one of each"):
        assign_splits(label_b, [[None] * 5], names(6), 0)


def test_a_million_images_take_seconds() -> None:
    count = 1_000_000
    label_b = np.arange(count) % 25
    started = time.perf_counter()
    side_b = assign_splits(label_b, [[None] * count], names(count), seed=0)
    assert time.perf_counter() - started < 10
    assert np.bincount(side_b).tolist() == [600_000, 150_000, 250_000]
    assert len(SIDES) == 3
