"""A run folder: `plan.json`, the commits and the parts, read as every job reads them."""

from __future__ import annotations

import functools
import random

from manifpt.attributor.choice import Choice
from manifpt.attributor.examples import select_examples
from manifpt.errors import ConfigError
from manifpt.plan import check_plan
from manifpt.reader import ArtifactReader, read_plan
from manifpt.shards import committed_shards, part_path, read_commits, write_rejected
from tests.fuzz.places import Documents, new_folder
from tests.helpers.runs import make_run, rows_of

__all__ = ["check", "mutated", "seeds"]


@functools.cache
def _documents() -> Documents:
    folder = new_folder()
    make_run(folder, rows_of({"gan": 8, "real": 8}), shard_rows=8)
    return Documents(folder, ["plan.json", "commits/00000.json", part_path("artifacts", "rgb", 0)])


def seeds() -> list[bytes]:
    """One of each."""
    return _documents().seeds()


def mutated(data: bytes, dice: random.Random) -> bytes:
    """As its kind can be damaged."""
    return _documents().mutated(data, dice)


def check(data: bytes) -> int:
    """Reads the whole run, as far as it can be read."""
    documents = _documents()
    output = str(documents.folder)
    name = documents.placed(data)
    try:
        plan = read_plan(output)
        check_plan(plan, output)
        assert plan.digest
        if name.startswith("commits"):
            write_rejected(output, read_commits(output, sorted(committed_shards(output))))
        else:
            reader = ArtifactReader(output, "rgb")
            for shard in (0, 1):
                assert reader.read(shard)["artifact"].type.shape
            select_examples(output, "rgb", Choice(labels={}))
    except ConfigError:
        pass
    finally:
        documents.restored(name)
    return 0
