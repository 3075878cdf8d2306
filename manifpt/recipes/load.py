"""YAML to recipes, strictly: a name that isn't known, or isn't there, is an error that says which."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from manifpt.errors import ConfigError
from manifpt.manifest import REAL
from manifpt.recipes.check import checked
from manifpt.recipes.schema import Recipe

__all__ = ["built", "families", "labels", "parsed", "read_yaml", "recipe", "shipped"]

_TABLES = "paper_tables"  # lies among the recipes, and is none

Kind = TypeVar("Kind")


def shipped() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    names = (Path(entry.name) for entry in resources.files(__package__).iterdir())
    return tuple(sorted(name.stem for name in names if name.suffix == ".yaml" and name.stem != _TABLES))


def recipe(name_or_path: str) -> Recipe:
    """The recipe of this name, or in this file.

    Args:
        name_or_path: one of `shipped()`, or a path that ends in `.yaml` or `.yml`.

    Raises:
        ConfigError: no such recipe or file, no YAML, an unknown or missing field, or fields that contradict each other.
    """
    if Path(name_or_path).suffix in (".yaml", ".yml"):
        return checked(built(Recipe, read_yaml(name_or_path), name_or_path))
    if name_or_path not in shipped():
        raise ConfigError(f"There is no recipe {name_or_path!r}; choose {', '.join(shipped())}, or a .yaml file.")
    return checked(built(Recipe, read_yaml(name_or_path, is_shipped=True), name_or_path))


def labels(recipe: Recipe) -> dict[str, str]:
    """Manifest source -> label, of the sources that are used and of the reals."""
    return {source.name: source.class_label for source in recipe.used} | {REAL: REAL}


def families(recipe: Recipe) -> dict[str, str]:
    """Label -> family; the reals are a family of their own."""
    return {source.class_label: str(source.family) for source in recipe.used} | {REAL: REAL}


def read_yaml(name_or_path: str, is_shipped: bool = False) -> Any:
    """The parsed text of a file, or of package data without its ending.

    Raises:
        ConfigError: it isn't there, or is no YAML.
    """
    file = resources.files(__package__) / f"{name_or_path}.yaml" if is_shipped else Path(name_or_path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"Can't read the recipe {name_or_path}: {error.strerror}.") from error
    return parsed(data, name_or_path)


def parsed(data: bytes, where: str) -> Any:
    """What YAML says, strictly: a key that stands twice is an error, and so are several merges into one mapping.

    Raises:
        ConfigError: it is no YAML in UTF-8, says impossible things (a 13th month), or nests too deep to read.
    """
    try:
        return yaml.load(data.decode("utf-8"), _Strict)  # noqa: S506  # a subclass of the safe loader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no YAML: {' '.join(str(error).split())}") from error


class _Strict(yaml.SafeLoader):
    """YAML's safe loader, and a key that stands twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [key for key in keys if keys.count(key) > 1] if node not in self._merged else []
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        merges = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        if len(merges) > 1 or any(isinstance(value, yaml.SequenceNode) for value in merges):
            # Ten lines that each merge the line before ten times would be ten thousand million keys.
            raise yaml.constructor.ConstructorError(None, None, "merge one mapping, not several", node.start_mark)
        if merges:
            self._merged.add(node)  # what is merged in may be overridden, and stands in the node twice from here on
        super().flatten_mapping(node)

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._merged: set[yaml.MappingNode] = set()


def built(kind: type[Kind], given: Any, where: str) -> Kind:
    """A dataclass from a mapping, its fields' types checked, nested ones too.

    Raises:
        ConfigError: an unknown field, a missing one, or a value of another type.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must hold names and values, not {given!r}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [name for name in given if name not in fields]
    if unknown:
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(fields)}.")
    for name, field in fields.items():
        if name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: the field {name!r} is missing.")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in given.items()})


def _value(hint: Any, given: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if given is None and types.NoneType in arguments:
            return None
        [hint] = [argument for argument in arguments if argument is not types.NoneType]
        return _value(hint, given, where)
    if origin is Literal:
        if given in arguments:
            return given
        raise ConfigError(f"{where} is {given!r}; choose {', '.join(map(str, arguments))}.")
    if origin is tuple and isinstance(given, list):
        return tuple(
            _value(arguments[0], item, f"{where}: {_title(item, number)}") for number, item in enumerate(given)
        )
    if origin is dict and isinstance(given, Mapping):
        return {_value(arguments[0], key, where): _value(arguments[1], item, where) for key, item in given.items()}
    if dataclasses.is_dataclass(hint):
        return built(hint, given, where)  # type: ignore[arg-type]
    if hint is float and type(given) is int:
        return float(given)
    if origin is None and type(given) is hint:
        return given.strip() if hint is str else given
    raise ConfigError(f"{where} can't be {given!r}; it is {getattr(hint, '__name__', hint)}.")


def _title(item: Any, number: int) -> str:
    """How an error names an item of a list."""
    return str(item.get("name", number)) if isinstance(item, Mapping) else str(number)
