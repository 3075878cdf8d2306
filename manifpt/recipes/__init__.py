"""Data-set recipes: which images are of which generator, which reals are the reference, and what the paper reports.

A recipe is a YAML file beside this module, or a user's own; README.md here says how it looks. Pure: reading a recipe
touches no image, and `select` works on manifest rows, never on pixels.
"""

from __future__ import annotations

from manifpt.recipes.framing import framed, framed_name, framed_table
from manifpt.recipes.load import families, labels, recipe, shipped
from manifpt.recipes.schema import Cross, Images, Part, Provenance, Real, Recipe, Source
from manifpt.recipes.select import Selected, inputs, select
from manifpt.recipes.tables import Score, paper_table2, paper_table4, paper_table5

__all__ = [
    "Cross", "Images", "Part", "Provenance", "Real", "Recipe", "Score", "Selected", "Source",
    "families", "framed", "framed_name", "framed_table", "inputs", "labels", "paper_table2",
    "paper_table4", "paper_table5", "recipe", "select", "shipped",
]  # fmt: skip
