from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.cluster import commits, job, must
from tests.helpers.images import repeated, sample_files, tree_bytes, write_files

IMAGES, SHARD_ROWS = 3_000, 24


@dataclass(frozen=True)
class Workplace:
    """Images, a reference, and what a run on one node made of them.

    Attributes:
        folder: of all, on storage that every node sees.
        undisturbed: parts by name.
        shards: of a run.
        shard_rows: images of each.
    """

    folder: Path
    undisturbed: dict[str, bytes]
    shards: int
    shard_rows: int = SHARD_ROWS

    def arguments(self, output: str) -> tuple[object, ...]:
        """Of compute_artifacts.py."""
        common = ("--manifest", self.folder / "many.parquet", "--reference", self.folder / "reference")
        return (*common, "--shard-rows", SHARD_ROWS, "--output", self.folder / output)

    def check_same(self, output: str) -> None:
        """Nothing lost, nothing twice, every byte the same."""
        run = self.folder / output
        assert (run / "_SUCCESS").exists()
        assert tree_bytes(run) == self.undisturbed
        assert (run / "rejected.parquet").read_bytes() == (self.folder / "one" / "rejected.parquet").read_bytes()
        assert not list(run.rglob("*.tmp")), "a temporary file was left behind"


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, cluster: dict[str, str]) -> Workplace:
    folder = tmp_path_factory.mktemp("nodes")
    write_files(sample_files("reference", {"real": 400}), folder / "reals")
    write_files(sample_files("query"), folder / "queries")
    (folder / "queries" / "gan" / "broken.png").write_bytes(b"no image")
    for name in ("reals", "queries"):
        must(job("index_images", "--input", folder / name, "--output", folder / f"{name}.parquet"))
    repeated(folder / "queries.parquet", IMAGES, folder / "many.parquet")
    must(job("build_reference", "--manifest", folder / "reals.parquet", "--output", folder / "reference", env=cluster))
    workplace = Workplace(folder, {}, -(-IMAGES // SHARD_ROWS))
    must(job("compute_artifacts", *workplace.arguments("one"), env=cluster))
    assert len(commits(folder / "one")) == workplace.shards
    return Workplace(folder, tree_bytes(folder / "one"), workplace.shards)
