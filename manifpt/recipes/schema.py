"""What a recipe is: frozen dataclasses, and the checks that need more than one field.

A *source* is what made a folder or file of images; a *label* is the class that an attributor learns. Several sources
may share a label: two training runs of one generator, say, that nobody could tell apart.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from manifpt.errors import ConfigError
from manifpt.manifest import REAL

__all__ = ["Cross", "Design", "Images", "Part", "Provenance", "Real", "Recipe", "Source", "checked"]

Family = Literal["gan", "vae", "flow", "score", "autoregressive"]
Tag = Literal["paper-fig", "author-log", "author-code", "repo", "set-readme", "recollection"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")  # one folder level, and no hidden one


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """Design choices of a generator: the columns of the paper's Table 5. None: not known."""

    up: str | None
    down: str | None
    norm: str | None
    nonlinearity: str | None
    skip: str | None
    loss: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """How each kind of fact about a source is known.

    `paper-fig`: a figure or table of the paper; `author-log`, `author-code`: the author's released logs and code, older
    than the paper; `repo`: the generator's own public code; `set-readme`: the text beside an image set; `recollection`:
    general knowledge that nobody has checked against the code.
    """

    listed: Tag
    design: Tag | None = None
    checkpoint: Tag | None = None
    sampling: Tag | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One generator's images.

    Attributes:
        name: the value of the manifest's `source`: the folder's name, or what the source column says.
        family: of the generator.
        file: the Parquet file under the images' root; None in the layout `folders`.
        label: the class; None: the name.
        images: how many there are, where that is known.
        design, checkpoint, sampling: None where not known.
        provenance: how the facts are known.
        note: one remark.
        exclude: why the source is left out; None: it is used.
    """

    name: str
    family: Family
    provenance: Provenance
    file: str | None = None
    label: str | None = None
    images: int | None = None
    design: Design | None = None
    checkpoint: str | None = None
    sampling: str | None = None
    note: str | None = None
    exclude: str | None = None

    @property
    def class_label(self) -> str:
        """The label, which is the name unless sources are merged."""
        return self.label or self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some of the real images of one folder or file, chosen by rules that need no list and no seed.

    Attributes:
        path: the folder (layout `folders`) or Parquet file.
        column, prefix: only images whose kept column begins so.
        every: only positions 0, n, 2n, ... among the rows that the prefix leaves.
        except_every: all but those. Parts with equal n never overlap.
        crops_px: sides of centre squares that stand for an image, each resampled to the recipe's size; empty: whole.
        images: how many images that is, crops counted apart, where known.
    """

    path: str
    column: str | None = None
    prefix: str | None = None
    every: int | None = None
    except_every: int | None = None
    crops_px: tuple[int, ...] = ()
    images: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """The real images: reference, and the class `real` among the queries, with no image in both."""

    reference: tuple[Part, ...]
    queries: tuple[Part, ...]
    licence: str
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """How the images lie under the root that a user names.

    Attributes:
        layout: `folders`, one a source and one for the reals; or `parquet`, one file a source.
        source_column: of the Parquet files.
        keep_columns: what must travel with the images.
        group_column: images of one group may not be divided between train and test. An empty value is a group of its
            own. Values must be unique over sources.
    """

    layout: Literal["folders", "parquet"]
    source_column: str | None = None
    keep_columns: tuple[str, ...] = ()
    group_column: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cross:
    """Another recipe with which this one shares labels: train here, test there.

    Attributes:
        recipe: its name.
        table4: the column of the paper's Table 4.
        labels: of this recipe, to those of the other.
    """

    recipe: str
    table4: str
    labels: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A data set of real images and images of generators, ready to be indexed.

    Attributes:
        name, title: for people and file names.
        size_px: side of the square view of `rgb` and `frequency`, and so of every artifact there.
        resolution: where that size comes from.
        images, real, sources: what lies where.
        spaces: to compute.
        min_images: labels with fewer are left out.
        most_images: a label's cap; None: all.
        paper_column: of the paper's Table 2; None where the paper has no such set.
        cross: recipes to generalize to.
        note: what a reader of results must know.
    """

    name: str
    title: str
    size_px: int
    resolution: str
    images: Images
    real: Real
    sources: tuple[Source, ...]
    spaces: tuple[str, ...]
    min_images: int
    most_images: int | None = None
    paper_column: str | None = None
    cross: tuple[Cross, ...] = ()
    note: str | None = None

    @property
    def used(self) -> tuple[Source, ...]:
        """The sources that are not excluded."""
        return tuple(source for source in self.sources if source.exclude is None)


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
        facts = {"design": source.design, "checkpoint": source.checkpoint, "sampling": source.sampling}
        for name, fact in facts.items():
            if (fact is None) != (getattr(source.provenance, name) is None):
                raise ConfigError(f"{where}: {source.name}: {name} and provenance.{name} come together or not at all.")


def _check_merges(recipe: Recipe, where: str) -> None:
    """Sources of one label are one generator: of one family and one design."""
    first: dict[str, Source] = {}
    for source in recipe.sources:
        other = first.setdefault(source.class_label, source)
        if (other.family, other.design) != (source.family, source.design):
            raise ConfigError(
                f"{where}: {other.name} and {source.name} share the label {source.class_label!r}, but not the family "
                "and the design; give them labels of their own."
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
