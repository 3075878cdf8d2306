"""A window: the images that one scan found new, from the moment they are fixed until its result is there.

    windows/00017/plan.json            what it holds; created once, so that whoever comes second does the same work
    windows/00017/manifest-*.parquet   its images, named by the plan
    windows/00017/objects-*.parquet    what storage had: `uri`, `etag`, `change` (new, changed, gone), and of what
                                       can't be read `problem` and `reason`
    windows/00017/rejected.parquet     images without a verdict, and objects that can't be opened
    windows/00017/window.json          its result, last: counts, tests, newcomers, alerts

Nothing is planned while an earlier window has no result: a scan first ends what one that was killed has begun.
"""

from __future__ import annotations

import json
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifpt.documents import Kinds, object_of, stored_object
from manifpt.errors import ConfigError, ObjectUnreadable, RejectReason, StorageRefused
from manifpt.indexing import BATCH_ROWS, IndexOptions, batch_of, images_in
from manifpt.manifest import Manifest, write_manifest
from manifpt.monitoring.inventory import changes, known, listing, write_inventory
from manifpt.plan import Plan
from manifpt.shards import Rejected, read_commits, write_rejected
from manifpt.storage import Entry, join, store_of

__all__ = ["Window", "open_window", "plan_window", "read_result", "record_inventory", "window_folder",
           "write_window_rejected"]  # fmt: skip

_FORMAT = 1
_PLAN: Kinds = {"rows": int, "first_shard": int, "objects_uri": str, "began_s": (int, float), "objects": dict}
_PLAN_OF_IMAGES: Kinds = {
    "manifest_uri": str, "manifest_digest": str, "rows": int, "shard_rows": int, "first_shard": int,
}  # fmt: skip
_RESULT: Kinds = {
    "window": int, "began": str, "objects": dict, "images": int, "attributed": dict, "unknown": int,
    "inconclusive": int, "rejected": int, "inconclusive_reasons": dict, "rejected_reasons": dict, "findings": list,
    "newcomers": list, "alerts": list,
}  # fmt: skip
_NUMBER = (int, float)
_IN_LISTS: dict[str, Kinds] = {
    "findings": {
        "name": str, "statistic": _NUMBER, "p_value": _NUMBER, "adjusted": _NUMBER, "fired": bool, "detail": str,
    },
    "newcomers": {
        "images": int, "of_unknown": int, "examples": list, "compactness": _NUMBER, "nearest_source": str,
        "separation": _NUMBER,
    },
    "alerts": {"time": str, "window": str, "rule": str, "severity": str, "measured": dict, "sentence": str},
}  # fmt: skip
_OBJECTS = pa.schema([(name, pa.string()) for name in ("uri", "etag", "change", "problem", "reason")])
# Reasons that may be gone tomorrow: such an object counts as not seen.
_PASSING = {RejectReason.MISSING.value, RejectReason.FORBIDDEN.value, RejectReason.CHANGED.value}
_PROBES = 16  # objects at once of which is asked whether they can be read by now
_IN_CONTAINER = re.compile(r"\.(tar|parquet)#", re.IGNORECASE)  # of an image id


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a scan.

    Attributes:
        output: the scan's folder.
        number: from 1.
        plan: of its images; None: it has none, since objects are only gone, or hold no images.
        objects_uri: what storage had.
        began_s: Unix time before the listing: up to then the input has been looked at.
        objects: by change: `new`, `changed`, `gone`, and `unreadable` among them.
        next_shard: the first number that is free after it.
    """

    output: str
    number: int
    plan: Plan | None
    objects_uri: str
    began_s: float
    objects: dict[str, int]
    next_shard: int

    @property
    def folder(self) -> str:
        """Where its files are."""
        return window_folder(self.output, self.number)

    @property
    def result(self) -> dict[str, Any] | None:
        """`window.json`, if it is there."""
        return read_result(self.output, self.number)


def window_folder(output: str, number: int) -> str:
    """Where the files of a window are."""
    return join(output, "windows", f"{number:05d}")


def read_result(output: str, number: int) -> dict[str, Any] | None:
    """The result of a window; None: it has none.

    Raises:
        ConfigError: it is damaged.
    """
    uri = join(window_folder(output, number), "window.json")
    found = stored_object(uri, _RESULT)
    if found is None:
        return None
    if found["window"] != number:
        raise ConfigError(f"{uri} is damaged (of window {found['window']}): restore it.")
    for name in ("objects", "attributed", "inconclusive_reasons", "rejected_reasons"):
        object_of(found[name], f"{name} of {uri}", dict.fromkeys(found[name], int))
    for name, kinds in _IN_LISTS.items():
        for element in found[name]:
            object_of(element, f"{name} of {uri}", kinds)
    return found


def open_window(output: str, number: int, template: Plan) -> Window | None:
    """A window that was planned; None: there is none of this number.

    Args:
        output: the scan's folder.
        number: its.
        template: the plan of any window of this scan, without images.

    Raises:
        ConfigError: its plan is damaged, or its manifest gone.
    """
    uri = join(window_folder(output, number), "plan.json")
    found = stored_object(uri, _PLAN)
    if found is None:
        return None
    plan, next_shard = None, found["first_shard"]
    if found["rows"]:
        object_of(found, uri, _PLAN_OF_IMAGES)
        if min(found["rows"], found["shard_rows"]) < 1:
            raise ConfigError(f"{uri} is damaged (no images, or none a shard): restore it.")
        plan = replace(template, **{name: found[name] for name in _PLAN_OF_IMAGES})
        entry = store_of(plan.manifest_uri).stat(plan.manifest_uri)
        if entry is None:
            raise ConfigError(f"{plan.manifest_uri} is gone: restore it, or scan into another --output.")
        plan, next_shard = replace(plan, manifest_etag=entry.etag), plan.numbers.stop
    return Window(output, number, plan, found["objects_uri"], found["began_s"], found["objects"], next_shard)


def plan_window(
    inputs: Sequence[str], output: str, number: int, template: Plan, began_s: float, skipped: Counter[str]
) -> Window | None:
    """Compares storage with what was seen, and fixes a window; None: nothing has changed.

    Args:
        inputs: folders and prefixes.
        output, number, template: as of `open_window`; `first_shard` of the template is this window's.
        began_s: Unix time now.
        skipped: counts, by ending, what was listed and is no image.

    Raises:
        ConfigError: an input that can't be listed.
    """
    token = uuid.uuid4().hex[:12]  # two scans that plan the same window must not write the same files
    folder = window_folder(output, number)
    manifest_uri, objects_uri = (join(folder, f"{name}-{token}.parquet") for name in ("manifest", "objects"))
    counts: Counter[str] = Counter()
    rows = 0
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="manifpt-window-"))) / "objects.parquet"
        writer = stack.enter_context(pq.ParquetWriter(path, _OBJECTS, compression="zstd"))
        batches = _image_batches(inputs, output, writer, counts, skipped)
        first = next(batches, None)
        if first is not None:
            rows = write_manifest(chain([first], batches), manifest_uri)
        writer.close()
        if not counts:
            return None
        store_of(output).upload(path, objects_uri)
    document: dict[str, Any] = {
        "format": _FORMAT,
        "window": number,
        "began_s": began_s,
        "objects": dict(counts),
        "objects_uri": objects_uri,
        "rows": rows,
        "first_shard": template.first_shard,
    }
    if rows:
        manifest = Manifest(manifest_uri)
        document |= {
            "manifest_uri": manifest_uri,
            "manifest_digest": manifest.digest(),
            "shard_rows": template.shard_rows,
        }
        manifest.close()
    store_of(output).create(join(folder, "plan.json"), json.dumps(document, indent=2).encode())
    return open_window(output, number, template)


def _image_batches(
    inputs: Sequence[str], output: str, writer: pq.ParquetWriter, counts: Counter[str], skipped: Counter[str]
) -> Iterator[pa.RecordBatch]:
    """Manifest rows of all that is new or changed; what storage had is written on the way."""
    options = IndexOptions(source="")
    held: list[dict[str, Any]] = []
    for step in changes(listing(inputs, skipped), known(output)):
        problems: dict[str, tuple[str, RejectReason]] = {}
        new = pa.concat_tables([step.new, _readable(step.waiting)])
        for row in pa.concat_tables([new, step.changed]).to_pylist():
            # The whole URI is its id: two prefixes may have the same keys.
            entry = Entry(row["uri"], row["uri"], row["size_bytes"], row["etag"])
            try:
                for found in _distinct(images_in(entry, options, skipped), entry.uri, problems):
                    if isinstance(found, pa.RecordBatch):
                        yield found
                        continue
                    held.append(found)
                    if len(held) == BATCH_ROWS:
                        yield batch_of(held, options)
                        held.clear()
            except ObjectUnreadable as error:
                problems[entry.uri] = str(error), error.reason
            except StorageRefused:
                raise
            except ConfigError as error:  # a damaged tar or Parquet file must not end every scan from now on
                problems[entry.uri] = str(error), RejectReason.CORRUPT
        parts = {"new": new, "changed": step.changed, "gone": step.gone}
        tables = [_objects(table, change, problems) for change, table in parts.items() if len(table)]
        if tables:
            writer.write_table(pa.concat_tables(tables).sort_by("uri"))
        for change, table in parts.items():
            counts[change] += len(table)
        counts["unreadable"] += len(problems)
    for name in [name for name, count in counts.items() if not count]:
        del counts[name]
    if held:
        yield batch_of(held, options)


def _readable(waiting: pa.Table) -> pa.Table:
    """Those of some objects that can be read by now. The others were reported, and make no window of their own."""

    def is_readable(uri: str) -> bool:
        try:
            store_of(uri).read(uri, 0, 1)
        except (FileNotFoundError, PermissionError):
            return False
        return True

    if not len(waiting):
        return waiting
    with ThreadPoolExecutor(_PROBES) as pool:
        return waiting.filter(pa.array(list(pool.map(is_readable, waiting["uri"].to_pylist()))))


def _distinct(
    images: Iterator[dict[str, Any] | pa.RecordBatch], uri: str, problems: dict[str, tuple[str, RejectReason]]
) -> Iterator[dict[str, Any] | pa.RecordBatch]:
    """Without images whose id another one has: a manifest with two of them is none, and would end every scan."""
    seen: set[str] = set()
    repeated = 0
    for found in images:
        if _IN_CONTAINER.search(uri):
            problems[uri] = "its name is that of a part of a tar or Parquet file: rename it", RejectReason.UNSUPPORTED
            return
        if isinstance(found, pa.RecordBatch):  # ids are numbers of rows
            yield found
        elif found["image_id"] in seen:  # as `tar -r` writes a file that has changed
            repeated += 1
        else:
            if found.get("container") is not None:
                seen.add(found["image_id"])
            yield found
    if repeated:
        why = f"{repeated} of its members have the name of an earlier one, and were not looked at: write it again"
        problems[uri] = why, RejectReason.UNSUPPORTED


def _objects(table: pa.Table, change: str, problems: dict[str, tuple[str, RejectReason]]) -> pa.Table:
    uris = table["uri"].to_pylist()
    told = [problems.get(uri) for uri in uris]
    texts, reasons = [why and why[0] for why in told], [why and why[1].value for why in told]
    return pa.table([uris, table["etag"].to_pylist(), [change] * len(uris), texts, reasons], schema=_OBJECTS)


def _objects_of(window: Window) -> Iterator[pa.Table]:
    with store_of(window.objects_uri).open(window.objects_uri) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(BATCH_ROWS, use_threads=False):
            table = pa.table(batch)
            if "reason" not in table.column_names:  # of a window from before there was one
                reasons = pc.if_else(
                    pc.is_valid(table["problem"]), RejectReason.CORRUPT.value, pa.scalar(None, pa.string())
                )
                table = table.append_column("reason", reasons)
            yield table


def write_window_rejected(window: Window) -> Counter[str]:
    """Writes `rejected.parquet` of a window whose shards are all committed. Returns images (and objects) by reason."""
    reasons: Counter[str] = Counter()

    def told() -> Iterator[dict[str, Any]]:
        for commit in read_commits(window.output, list(window.plan.numbers) if window.plan else []):
            reasons.update({row[0]: row[4] for row in commit["rejected"]}.values())
            yield commit
        for table in _objects_of(window):
            bad = table.filter(pc.is_valid(table["problem"]))
            reasons.update(bad["reason"].to_pylist())
            columns = (bad[name].to_pylist() for name in ("uri", "reason", "problem"))
            yield {
                "rejected": [
                    list(astuple(Rejected(row[0], row[0], "", None, *row[1:]))) for row in zip(*columns, strict=True)
                ]
            }

    write_rejected(window.folder, told())
    return +reasons


def record_inventory(window: Window) -> None:
    """What this window has seen is known from now on; objects that could not be read, and may be tomorrow, as such."""
    passing: set[str] = set()
    for table in _objects_of(window):
        is_passing = pc.is_in(table["reason"], value_set=pa.array(sorted(_PASSING)))
        passing.update(table["uri"].filter(is_passing).to_pylist())
    for commit in read_commits(window.output, list(window.plan.numbers) if window.plan else []):
        passing.update(row[1] for row in commit["rejected"] if row[4] in _PASSING)
    again = pa.array(sorted(passing), pa.string())

    def seen() -> Iterator[pa.Table]:
        for table in _objects_of(window):
            is_gone = np.array([change == "gone" for change in table["change"].to_pylist()], bool)
            is_again = pc.is_in(table["uri"].combine_chunks(), value_set=again)
            table = table.select(["uri", "etag"]).append_column("present", pa.array(~is_gone))
            yield table.append_column("again", is_again)

    write_inventory(window.output, window.number, seen())
