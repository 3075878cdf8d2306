"""What a recipe is, as frozen dataclasses; `manifpt.recipes.check` says which fields fit each other.

A *source* is what made a folder or file of images; a *label* is the class that an attributor learns. Several sources
may share a label: two training runs of one generator, say, that nobody could tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Cross", "Images", "Part", "Provenance", "Real", "Recipe", "Source"]

Family = Literal["gan", "vae", "flow", "score", "autoregressive"]
Tag = Literal["paper-fig", "author-log", "author-code", "repo", "set-readme", "recollection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """How each kind of fact about a source is known.

    `paper-fig`: a figure or table of the paper; `author-log`, `author-code`: the author's released logs and code, older
    than the paper; `repo`: the generator's own public code; `set-readme`: the text beside an image set; `recollection`:
    general knowledge that nobody has checked against the code.
    """

    listed: Tag
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
        checkpoint, sampling: None where not known.
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
