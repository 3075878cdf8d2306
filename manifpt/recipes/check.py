"""Which fields of a recipe fit each other: names, merges, and reals that are never projected onto themselves."""

from __future__ import annotations

import re
from collections import Counter

from manifpt.errors import ConfigError
from manifpt.manifest import REAL
from manifpt.recipes.schema import Part, Recipe, Source

__all__ = ["checked"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")  # one folder level, and no hidden one


def checked(recipe: Recipe) -> Recipe:
    """The recipe, if its fields fit each other.

    Raises:
        ConfigError: names that repeat or can't be a folder, merges that clash, a real image that would be in the
            reference and in the queries, a column that is used and not kept, a fact without its provenance.
    """
    where = f"Recipe {recipe.name}"
    if not recipe.used:
        raise ConfigError(f"{where} has no source that is used; add one.")
    if min(recipe.size_px, recipe.min_images, recipe.most_images or 1) < 1:
        raise ConfigError(f"{where}: size_px, min_images and most_images are 1 or more.")
    if recipe.most_images is not None and recipe.most_images < recipe.min_images:
        raise ConfigError(f"{where}: most_images is less than min_images, which leaves no label.")
    _check_sources(recipe, where)
    _check_merges(recipe, where)
    _check_real(recipe, where)
    labels = {source.class_label for source in recipe.used} | {REAL}
    for cross in recipe.cross:
        unknown = sorted(set(cross.labels) - labels)
        if unknown:
            raise ConfigError(f"{where}: cross to {cross.recipe} names {unknown[0]!r}, which is no label here.")
        if len(set(cross.labels.values())) < len(cross.labels):
            raise ConfigError(f"{where}: cross to {cross.recipe} maps two labels to one; merge them here instead.")
    return recipe


def _check_sources(recipe: Recipe, where: str) -> None:
    is_parquet = recipe.images.layout == "parquet"
    if is_parquet != (recipe.images.source_column is not None):
        raise ConfigError(f"{where}: source_column is for the layout parquet, which needs it.")
    if not is_parquet and (recipe.images.keep_columns or recipe.images.group_column):
        raise ConfigError(f"{where}: image files have no columns; keep_columns and group_column need Parquet.")
    if recipe.images.group_column not in {None, *recipe.images.keep_columns}:
        raise ConfigError(f"{where}: group_column {recipe.images.group_column!r} must be among keep_columns.")
    names = Counter(source.name for source in recipe.sources)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ConfigError(f"{where}: two sources are named {twice[0]!r}; rename one.")
    for source in recipe.sources:
        for text in (source.name, source.class_label, *([source.file] if source.file else [])):
            if not _NAME.match(text) or text == REAL:
                raise ConfigError(f"{where}: {text!r} can't name a source; use one word, and not {REAL!r}.")
        if is_parquet != (source.file is not None):
            raise ConfigError(f"{where}: {source.name}: file is for the layout parquet, which needs it.")
        if source.images is not None and source.images < 1:
            raise ConfigError(f"{where}: {source.name}: images is 1 or more, or left out.")
        facts = {"checkpoint": source.checkpoint, "sampling": source.sampling}
        for name, fact in facts.items():
            if (fact is None) != (getattr(source.provenance, name) is None):
                raise ConfigError(f"{where}: {source.name}: {name} and provenance.{name} come together or not at all.")


def _check_merges(recipe: Recipe, where: str) -> None:
    """Sources of one label are one generator: of one family."""
    first: dict[str, Source] = {}
    for source in recipe.sources:
        other = first.setdefault(source.class_label, source)
        if other.family != source.family:
            raise ConfigError(
                f"{where}: {other.name} and {source.name} share the label {source.class_label!r}, but not the family; "
                "give them labels of their own."
            )
    for source in recipe.sources:
        other = first.get(source.name, source)
        if source.class_label != source.name and other is not source and other.class_label == source.name:
            raise ConfigError(
                f"{where}: {source.name} is a source with the label {source.class_label!r}, and the label of "
                f"{other.name} too; choose another label."
            )


def _check_real(recipe: Recipe, where: str) -> None:
    for name, parts in (("reference", recipe.real.reference), ("queries", recipe.real.queries)):
        if not parts:
            raise ConfigError(f"{where}: real.{name} is empty; name a folder or file.")
        for part in parts:
            _check_part(part, recipe, f"{where}: real.{name}: {part.path}")
    for reference in recipe.real.reference:
        for query in recipe.real.queries:
            if reference.path == query.path and not _are_apart(reference, query):
                raise ConfigError(
                    f"{where}: real images of {reference.path} are in the reference and in the queries; select "
                    "queries with every: N and the reference with except_every: N."
                )


def _check_part(part: Part, recipe: Recipe, where: str) -> None:
    if not _NAME.match(part.path):
        raise ConfigError(f"{where} can't name a folder or file right under the root.")
    if recipe.images.layout == "folders" and part.path != REAL:
        raise ConfigError(f"{where}: the folder of real images is named {REAL!r}.")
    if (part.column is None) != (part.prefix is None):
        raise ConfigError(f"{where}: column and prefix come together.")
    if part.column is not None and part.column not in recipe.images.keep_columns:
        raise ConfigError(f"{where}: column {part.column!r} must be among keep_columns.")
    if part.every is not None and part.except_every is not None:
        raise ConfigError(f"{where}: every and except_every exclude each other.")
    if min(part.every or 2, part.except_every or 2) < 2:
        raise ConfigError(f"{where}: every and except_every are 2 or more.")
    if part.crops_px and recipe.images.layout != "parquet":
        raise ConfigError(f"{where}: crops_px need the layout parquet.")
    if min((*part.crops_px, recipe.size_px)) < recipe.size_px:
        raise ConfigError(f"{where}: a crop of less than {recipe.size_px} px would have to be enlarged.")


def _are_apart(one: Part, other: Part) -> bool:
    """Whether two parts of one file can have no image in common, which must be plain from the rules alone."""
    same_rows = (one.column, one.prefix) == (other.column, other.prefix)
    if same_rows:
        return {one.every, one.except_every} == {other.every, other.except_every} and one.every != other.every
    if one.prefix is None or other.prefix is None or one.column != other.column:
        return False
    return not (one.prefix.startswith(other.prefix) or other.prefix.startswith(one.prefix))
