"""Design choices of generators: one YAML table a data set, beside this module, or a user's own.

Whether clusters of fingerprints follow a choice (the paper's Section 7 and Table 5) can only be asked where equal
choices are equal words. So values are short and lower-case, the shipped tables share their words, and what is not known
is null. `unverified` names the choices whose value nobody found in the generator's code: general knowledge, or a guess
among several versions of that code.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from manifpt.errors import ConfigError
from manifpt.recipes.load import parsed
from manifpt.storage import normalize, store_of

__all__ = ["Designs", "read_designs", "shipped"]

_UNVERIFIED = "unverified"
_ALL = "all"
_MOST_CHARACTERS = 100
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Designs:
    """A table of design choices.

    Attributes:
        choices: the columns.
        value: generator -> choice -> value; None where it is not known. Every generator has every choice.
        unverified: generator -> the choices whose value nobody checked in the model's code.
    """

    choices: tuple[str, ...]
    value: Mapping[str, Mapping[str, str | None]]
    unverified: Mapping[str, frozenset[str]]

    def of(self, generators: Sequence[str], choice: str) -> list[str | None]:
        """One choice of each generator, in their order; None for a generator or a value that is not known.

        Raises:
            ConfigError: the table has no such choice.
        """
        if choice not in self.choices:
            raise ConfigError(f"There is no design choice {choice!r}; choose {', '.join(self.choices)}.")
        return [self.value[generator][choice] if generator in self.value else None for generator in generators]


def shipped() -> tuple[str, ...]:
    """Names of the tables that come with the package."""
    names = (Path(entry.name) for entry in resources.files(__package__).iterdir())
    return tuple(sorted(name.stem for name in names if name.suffix == ".yaml"))


def read_designs(path: str) -> Designs:
    """The table of this name, or in this file.

    Args:
        path: one of `shipped()`, or a path or URI that ends in `.yaml` or `.yml`.

    Raises:
        ConfigError: no such table or file, no YAML, or anything in it that is not a table.
        StorageError: storage still fails after its retries.
    """
    if Path(path).suffix in (".yaml", ".yml"):
        return _table(parsed(_read(path), path), path)
    if path not in shipped():
        raise ConfigError(f"There are no designs {path!r}; choose {', '.join(shipped())}, or a .yaml file.")
    return _table(parsed((resources.files(__package__) / f"{path}.yaml").read_bytes(), path), path)


def _read(path: str) -> bytes:
    uri = normalize(path)
    try:
        data = store_of(uri).read(uri, 0, _MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"Can't read the designs {path}: {error.strerror or error}.") from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{path} has more than {_MOST_BYTES} bytes, and so is no table of designs.")
    return data


def _table(given: Any, where: str) -> Designs:
    if not isinstance(given, Mapping) or set(given) != {"choices", "generators"}:
        raise ConfigError(f"{where} must hold choices and generators, and nothing else.")
    choices = tuple(_word(choice, f"{where}: a choice") for choice in _listed(given["choices"], f"{where}: choices"))
    if not choices or len(set(choices)) < len(choices) or _UNVERIFIED in choices:
        raise ConfigError(f"{where}: choices must be one or more, each once, and none {_UNVERIFIED!r}.")
    generators = given["generators"]
    if not isinstance(generators, Mapping) or not generators:
        raise ConfigError(f"{where}: generators must name one or more, with their choices.")
    value: dict[str, dict[str, str | None]] = {}
    unverified: dict[str, frozenset[str]] = {}
    for generator, entry in generators.items():
        name = _text(generator, f"{where}: a generator's name")
        value[name] = _values(entry, choices, f"{where}: {name}")
        unverified[name] = _marked(entry, choices, f"{where}: {name}")
    return Designs(choices, value, unverified)


def _values(entry: Any, choices: tuple[str, ...], where: str) -> dict[str, str | None]:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} must hold choices and values, not {reprlib.repr(entry)}.")
    unknown = [name for name in entry if name not in (*choices, _UNVERIFIED)]
    if unknown:
        raise ConfigError(f"{where}: unknown choice {reprlib.repr(unknown[0])}; known: {', '.join(choices)}.")
    missing = [choice for choice in choices if choice not in entry]
    if missing:
        raise ConfigError(f"{where}: the choice {missing[0]!r} is missing; write null where it is not known.")
    return {
        choice: _word(entry[choice], f"{where}: {choice}") if entry[choice] is not None else None for choice in choices
    }


def _marked(entry: Mapping[str, Any], choices: tuple[str, ...], where: str) -> frozenset[str]:
    given = entry.get(_UNVERIFIED, [])
    marked = choices if given == _ALL else _listed(given, f"{where}: {_UNVERIFIED}")
    unknown = [choice for choice in marked if choice not in choices]
    if unknown:
        raise ConfigError(f"{where}: {_UNVERIFIED} names {reprlib.repr(unknown[0])}; known: {', '.join(choices)}.")
    return frozenset(marked)


def _listed(given: Any, where: str) -> Sequence[Any]:
    if not isinstance(given, list):
        raise ConfigError(f"{where} must be a list, not {reprlib.repr(given)}.")
    return given


def _text(given: Any, where: str) -> str:
    if not isinstance(given, str) or not given or given != " ".join(given.split()):
        raise ConfigError(f"{where} can't be {reprlib.repr(given)}; write words with single spaces.")
    if len(given) > _MOST_CHARACTERS:
        raise ConfigError(f"{where} has {len(given)} characters; write {_MOST_CHARACTERS} or fewer.")
    return given


def _word(given: Any, where: str) -> str:
    text = _text(given, where)
    if text != text.lower():
        raise ConfigError(f"{where} is {reprlib.repr(text)}; write lower case, so that equal choices are equal words.")
    return text
