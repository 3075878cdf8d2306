"""Design choices of generators: a table that a recipe has, or a user's file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from manifpt.errors import ConfigError
from manifpt.recipes import recipe, shipped
from manifpt.recipes.load import read_yaml

__all__ = ["Choices", "read_choices"]

_LONGEST = 100


@dataclass(frozen=True, slots=True)
class Choices:
    """Values by generator and choice.

    Attributes:
        names: of the choices, in the table's order.
        values: generator -> choice -> value; what isn't known is left out.
        unverified: generators whose values are general knowledge that nobody has checked against the model's code.
    """

    names: tuple[str, ...]
    values: Mapping[str, Mapping[str, str]]
    unverified: frozenset[str] = frozenset()

    def of(self, generators: Sequence[str], name: str) -> list[str | None]:
        """A choice of each of some generators; None where it isn't known."""
        return [self.values.get(generator, {}).get(name) for generator in generators]


def read_choices(name_or_path: str) -> Choices:
    """The design table of a shipped recipe, or of a YAML file: `generators: {name: {choice: value, ...}, ...}`.

    Raises:
        ConfigError: no such recipe or file, or one that is no such table.
    """
    if Path(name_or_path).suffix not in (".yaml", ".yml"):
        return _of_recipe(name_or_path)
    document = read_yaml(name_or_path)
    generators = document.get("generators") if isinstance(document, Mapping) else None
    if not isinstance(generators, Mapping) or not generators:
        raise ConfigError(f"--designs {name_or_path} needs `generators:`, a table of choices by generator.")
    values: dict[str, dict[str, str]] = {}
    for generator, of_generator in generators.items():
        if not isinstance(generator, str) or not isinstance(of_generator, Mapping | None):
            raise ConfigError(f"--designs {name_or_path}: {str(generator)[:_LONGEST]!r} must hold choices and values.")
        for choice, value in (of_generator or {}).items():
            if not _is_word(choice) or not (value is None or _is_word(value)):
                raise ConfigError(
                    f"--designs {name_or_path}: {generator[:_LONGEST]!r} has {str(choice)[:_LONGEST]!r}: "
                    f"{str(value)[:_LONGEST]!r}; a choice and its value are text, the value in quotes if it looks like "
                    f"a number."
                )
        values[generator] = {choice: value for choice, value in (of_generator or {}).items() if value is not None}
    names = dict.fromkeys(choice for of_generator in values.values() for choice in of_generator)
    if not names:
        raise ConfigError(f"--designs {name_or_path} states no choice of any generator.")
    return Choices(tuple(names), values)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST


def _of_recipe(name: str) -> Choices:
    if name not in shipped():
        raise ConfigError(f"There is no design table {name!r}: name a recipe ({', '.join(shipped())}) or a .yaml file.")
    used = recipe(name).used
    values: dict[str, dict[str, str]] = {}
    for source in used:
        stated = dataclasses.asdict(source.design) if source.design is not None else {}
        known = {choice: value for choice, value in stated.items() if value is not None}
        values[source.class_label] = {**known, "family": str(source.family)}
    unverified = {s.class_label for s in used if s.provenance.design == "recollection"}
    names = dict.fromkeys(choice for of_generator in values.values() for choice in of_generator if choice != "family")
    return Choices((*names, "family"), values, frozenset(unverified))
