"""What a run will do, fixed before it starts: which rows make which shard, in which spaces, from which reference.

A shard is a row range of the manifest. Its identity never comes from how Ray happens to cut blocks, so a run that was
killed continues exactly where it was, on any cluster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from manifpt.alterations import NONE
from manifpt.documents import json_of, object_of
from manifpt.errors import ConfigError, PlanMismatch
from manifpt.estimates.spec import Estimate
from manifpt.spaces import SpaceSpec
from manifpt.storage import join, store_of

__all__ = ["Plan", "auto_shard_rows", "check_plan", "publish_facts", "publish_plan"]

_SHARD_BYTES = 128 << 20  # decoded; a few shards in flight must fit into a small worker's memory
_MOST_SHARD_ROWS = 1024

# In words, for the sentence that says how two plans differ.
_FIELDS = {
    "task": "the task",
    "manifest_digest": "the manifest's content",
    "rows": "the number of images",
    "shard_rows": "the shard size (--shard-rows)",
    "spaces": "the spaces or their preprocessing and weights",
    "reference_digest": "the reference",
    "dtype": "the stored number format (--dtype)",
    "inline": "what is stored inline (--store)",
    "decoder": "the decoder",
    "projection": "exact or approximate projection (--projection)",
    "estimate": "the estimate of the projection (--estimate and its parameters)",
    "alter": "how images are altered first (--alter)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that decides the bytes of the parts; batch sizes, actors and machines don't.

    Attributes:
        task: `artifacts`, `reference` or `attributions`.
        manifest_uri: where the rows are.
        manifest_digest: SHA-256 of the manifest.
        rows: images.
        shard_rows: images a shard; the last one has the rest.
        spaces: resolved specs.
        reference_uri: the bundle; "" for a reference.
        reference_digest: of the bundle.
        dtype: of stored artifacts.
        inline: spaces whose artifacts are stored, not only their neighbours.
        decoder: rule of `manifpt.decode`.
        manifest_etag: of the manifest now, so that a worker sees when it was replaced.
        reference_shards: parts that the reference is held in, each by actors of its own.
        projection: `exact`, `flat` (as exact, by looking at everything) or `approximate`.
        estimate: what x* is.
        attributor_uri: the bundle that names sources; "" for other tasks.
        attributor_digest: of that bundle.
        first_shard: number of the first shard, where a folder holds those of earlier plans.
        variants: alterations of each image that go the same way, as rows of their own.
        alter: what happens to images after decoding, before everything else: of `manifpt.alterations`.
    """

    task: str
    manifest_uri: str
    manifest_digest: str
    rows: int
    shard_rows: int
    spaces: tuple[SpaceSpec, ...]
    reference_uri: str = ""
    reference_digest: str = ""
    dtype: str = "float16"
    inline: tuple[str, ...] = ()
    decoder: str = ""
    manifest_etag: str = ""
    projection: str = "exact"
    reference_shards: int = 1
    estimate: Estimate = field(default_factory=Estimate)
    attributor_uri: str = ""
    attributor_digest: str = ""
    first_shard: int = 0
    variants: tuple[str, ...] = ()
    alter: str = NONE

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def numbers(self) -> range:
        """Of the shards."""
        return range(self.first_shard, self.first_shard + self.shards)

    def rows_of(self, shard: int) -> range:
        """Manifest rows of a shard."""
        start = (shard - self.first_shard) * self.shard_rows
        return range(start, min(start + self.shard_rows, self.rows))

    def semantic(self) -> dict[str, Any]:
        """The content of `plan.json` that two runs must share to write into one folder."""
        return {
            "task": self.task,
            "manifest_digest": self.manifest_digest,
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "spaces": [spec.identity() for spec in self.spaces],
            "reference_digest": self.reference_digest,
            "dtype": self.dtype,
            "inline": list(self.inline),
            "decoder": self.decoder,
            **({"projection": "approximate"} if self.projection == "approximate" else {}),
            **(self._attribution() if self.task == "attributions" else {}),
            **({"estimate": self.estimate.identity()} if self.estimate.identity() != Estimate().identity() else {}),
            **({"alter": self.alter} if self.alter != NONE else {}),
        }

    def _attribution(self) -> dict[str, Any]:
        names = ("attributor_digest", "first_shard", "variants")
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in names}

    @property
    def digest(self) -> str:
        """SHA-256 of `semantic`."""
        return hashlib.sha256(json.dumps(self.semantic(), sort_keys=True).encode()).hexdigest()


def auto_shard_rows(view_bytes: int) -> int:
    """Rows a shard: a power of two whose decoded views stay near 128 MiB, and at most 1,024."""
    rows = max(1, min(_MOST_SHARD_ROWS, _SHARD_BYTES // max(1, view_bytes)))
    return 1 << (rows.bit_length() - 1)


def publish_plan(plan: Plan, output: str) -> None:
    """Writes `plan.json`, or finds the same plan there.

    Raises:
        PlanMismatch: the folder holds another plan; the message says what differs.
        ConfigError: the output can't be written.
    """
    document = plan.semantic() | {
        "format": 1,
        "shards": plan.shards,
        "manifest_uri": plan.manifest_uri,
        "reference_uri": plan.reference_uri,
        "digest": plan.digest,
    }
    if not _published(join(output, "plan.json"), document):
        check_plan(plan, output)


def publish_facts(uri: str, facts: Mapping[str, Any], what: str) -> None:
    """Writes what decides a result, as JSON, or finds the same there.

    Args:
        uri: of the document.
        facts: its content.
        what: that the folder holds, for the message.

    Raises:
        PlanMismatch: it is of another one; the message says what differs.
        ConfigError: it can't be written.
    """
    if _published(uri, facts):
        return
    there = object_of(json_of(store_of(uri).read(uri), uri), uri, {})
    differing = [name for name in facts if there.get(name) != json.loads(json.dumps(facts[name]))]
    if differing:
        folder = uri.rpartition("/")[0]
        raise PlanMismatch(
            f"{folder} holds another {what}: {', '.join(differing)} differs. Choose another --output, or delete it."
        )


def _published(uri: str, document: Mapping[str, Any]) -> bool:
    """Writes what a folder is for, as JSON; False where something is there already.

    Raises:
        ConfigError: it can't be written.
    """
    try:
        return store_of(uri).create(uri, json.dumps(document, indent=2).encode())
    except OSError as error:
        raise ConfigError(f"Can't write {uri} ({error}); choose another --output or correct its rights.") from error


def check_plan(plan: Plan, output: str) -> None:
    """Compares a plan with the one in a folder, if there is one; writes nothing.

    Raises:
        PlanMismatch: it is another one.
        ConfigError: it is none.
    """
    uri = join(output, "plan.json")
    try:
        there = object_of(json_of(store_of(uri).read(uri), uri), uri, {})
    except FileNotFoundError:
        return
    differing = [words for field, words in _FIELDS.items() if there.get(field) != plan.semantic().get(field)]
    if differing:
        raise PlanMismatch(
            f"{output} holds a run with another plan: {', '.join(differing)} differs. Choose another --output, or "
            f"delete the folder if you don't need it."
        )
