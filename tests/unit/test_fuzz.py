"""A short look of the fuzzer, the same inputs each time; `python -m tests.fuzz` looks longer, and follows coverage."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest

from tests.fuzz.limits import Limits

INPUTS = {"decode": 1500, "manifest": 250, "commit": 150, "bundle": 150}


@pytest.mark.parametrize("name", INPUTS)
def test_any_input_is_read_or_refused_within_its_limits(name: str, tmp_path: Path) -> None:
    target, dice = importlib.import_module(f"tests.fuzz.{name}"), random.Random(name)
    seeds = target.seeds()
    for seed in seeds:
        target.check(seed)
    limits = Limits(target.check)
    for _ in range(INPUTS[name]):
        data = dice.choice(seeds)
        for _ in range(dice.choice((1, 1, 2))):
            data = target.mutated(data, dice)
        (tmp_path / f"{name}-input").write_bytes(data)
        limits(data)
