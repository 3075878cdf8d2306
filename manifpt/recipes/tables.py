"""The paper's numbers, to print beside ours: Tables 2 (attribution), 4 (other data sets) and 5 (clusters)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from manifpt.errors import ConfigError
from manifpt.recipes.load import built, read_yaml

__all__ = ["OURS", "Score", "paper_accuracies", "paper_table2", "paper_table4", "paper_table5"]

OURS = ("ManiFPT_RGB", "ManiFPT_FREQ", "ManiFPT_SL", "ManiFPT_SSL")  # rows of the paper's own method


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One cell pair of Table 2.

    Attributes:
        accuracy, std: percent; over how many runs is not known.
        fd_ratio: between-class over within-class Fréchet distance of the classifier's features.
    """

    accuracy: float
    std: float
    fd_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    source: str
    table2: dict[str, dict[str, Score]]
    table4: dict[str, dict[str, float]]
    table5: dict[str, dict[str, float]]


def _tables() -> _Tables:
    return built(_Tables, read_yaml("paper_tables", is_shipped=True), "paper_tables")


def paper_table2() -> Mapping[str, Mapping[str, Score]]:
    """Method -> data set (`cifar10`, `celeba`, `chq`, `ffhq`) -> score, in the paper's order."""
    return _tables().table2


def paper_table4() -> Mapping[str, Mapping[str, float]]:
    """Method -> `train->test` (as `cifar10->celeba`) -> accuracy in percent, in the paper's order."""
    return _tables().table4


def paper_table5() -> Mapping[str, Mapping[str, float]]:
    """Method -> design choice (as `manifpt.analysis.designs` names it) -> NMI with clusters, in the paper's order."""
    return _tables().table5


def paper_accuracies(column: str) -> Mapping[str, str]:
    """Method -> accuracy in percent, as printed, in a column of Table 2 (`cifar10`) or of Table 4 (`cifar10->celeba`).

    Raises:
        ConfigError: no such column.
    """
    tables = _tables()
    found = {
        name: f"{of[column].accuracy:.1f} ± {of[column].std:.1f}" for name, of in tables.table2.items() if column in of
    }
    found |= {name: f"{of[column]:.1f}" for name, of in tables.table4.items() if column in of}
    if not found:
        known = [*next(iter(tables.table2.values())), *next(iter(tables.table4.values()))]
        raise ConfigError(f"The paper has no column {column!r}; its Tables 2 and 4 have {', '.join(known)}.")
    return found
