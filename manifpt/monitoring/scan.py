"""The command `scan`: end what was begun, find what is new, attribute it, say what has changed.

scan-plan.json                what is scanned, with which attributor and reference; another one is refused
attributions/part-*.parquet   a row an image and version: see `manifpt.monitoring.attributing`
commits/                      a shard is done when its commit is there, as in a run
windows/                      what each scan found: see `manifpt.monitoring.windows`
inventory/  lease/            what was seen; who works now
alerts.jsonl                  every alert, a line each
report.html  scan.json        the last windows to look at; the state, written last
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc

from manifpt import cluster
from manifpt.computing import Computing, check_actors
from manifpt.config import ScanConfig
from manifpt.documents import stored_object
from manifpt.errors import ConfigError
from manifpt.indexing import entries
from manifpt.log import event
from manifpt.monitoring.alerts import Alert
from manifpt.monitoring.inventory import known, merge_inventory
from manifpt.monitoring.lease import Lease, Taken, held
from manifpt.monitoring.result import alerts_in, window_result
from manifpt.monitoring.settings import Settings, read_settings
from manifpt.monitoring.windows import Window, open_window, plan_window, read_result, record_inventory, window_folder
from manifpt.plan import publish_facts
from manifpt.shards import committed_shards, read_commits
from manifpt.storage import is_local, join, store_of
from manifpt.telemetry import Telemetry

__all__ = ["scan"]

_SHOWN_WINDOWS = 50  # that a report shows, and quiet ones that drift compares with
_CLOCKS_DIFFER_S = 86_400.0  # at most, for a while; what lies farther ahead was a mistake
_MOST_LOOKED_AT = 500  # windows back from now, for those


def scan(config: ScanConfig) -> dict[str, Any]:
    """Scans once. Returns the content of `scan.json`, or of another scan's where one is at work.

    Raises:
        ConfigError: what is missing, or doesn't fit together.
        WorkerError: a worker died again and again.
    """
    check_actors(config.max_actors)
    settings = read_settings(config)
    plan_uri = join(settings.output, "scan-plan.json")
    if store_of(settings.output).stat(plan_uri) is None and not _is_anything(settings.inputs):
        raise ConfigError(f"There is nothing at {', '.join(settings.inputs)} yet; check the path, or scan again later.")
    publish_facts(plan_uri, settings.facts(), "scan")
    try:
        with held(settings.output) as lease:
            return _scan(settings, lease, config)
    except Taken as taken:
        event("scan_skipped", why=taken)
        return {"status": "skipped", "why": str(taken)}


def _scan(settings: Settings, lease: Lease, config: ScanConfig) -> dict[str, Any]:
    begin, began_s = time.monotonic(), time.time()
    output, template = settings.output, settings.template
    store_of(output).clean(output)
    state = _state(output)
    number, last = state.get("window", 0), None
    while (found := open_window(output, number + 1, template)) is not None:
        number, last = number + 1, found
    if last is None and number:
        last = open_window(output, number, template)
        if last is None:  # numbers of its shards would be given again
            raise ConfigError(
                f"{window_folder(output, number)} is gone, and scan.json names it: restore it, or scan into another "
                f"--output."
            )
    if last is None and (committed_shards(output) or not _is_empty(join(output, "inventory"))):
        raise ConfigError(
            f"{output} has shards or an inventory of windows that are gone, and no scan.json that says how far they "
            f"went: restore scan.json and the last of windows/, or scan into another --output."
        )
    ended = []
    if last is not None and last.result is None:
        event("window_resumed", window=last.number, images=last.plan.rows if last.plan else 0)
        ended.append(_end(last, settings, config))
    for uri in settings.inputs:
        _refuse_absent(uri, output)
    skipped: Counter[str] = Counter()
    template = replace(template, first_shard=last.next_shard if last is not None else 0)
    new = plan_window(settings.inputs, output, number + 1, template, began_s, skipped)
    event("listed", **(new.objects if new is not None else {"new": 0}), seconds=time.monotonic() - begin)
    if new is not None:
        ended.append(_end(new, settings, config))
    results = _results(output, new.number if new is not None else number)
    fresh = [result for result in results if result["window"] > state.get("window", 0)]  # also of a scan that died late
    state = {
        "status": "done",
        "window": results[-1]["window"] if results else 0,
        "windows_ended": [result["window"] for result in ended],
        "watermark_s": _later(began_s, state.get("watermark_s", 0.0)),
        "images": sum(result["images"] for result in ended),
        "unknown": sum(result["unknown"] for result in ended),
        "inconclusive": sum(result["inconclusive"] for result in ended),
        "rejected": sum(result["rejected"] for result in ended),
        "alerts": [alert for result in fresh for alert in result["alerts"]],
        "skipped": dict(skipped.most_common()),
        "seconds": round(time.monotonic() - begin, 2),
    }
    if not lease.is_newest():  # this process slept, and another one has gone on from here
        event("lease_lost", hint="another scan has taken over; its state stays")
        return state
    _publish(settings, results, fresh, state)
    return state


def _is_empty(uri: str) -> bool:
    try:
        return next(iter(store_of(uri).list(uri)), None) is None
    except FileNotFoundError:
        return True


def _later(began_s: float, last_s: float) -> float:
    """Clocks are set back; but one that was far ahead once must not silence the alarm for scans that are late."""
    return max(began_s, last_s if last_s < began_s + _CLOCKS_DIFFER_S else 0.0)


def _is_anything(inputs: Sequence[str]) -> bool:
    return any(True for uri in inputs for _ in entries(uri, Counter(), may_be_empty=True))


def _refuse_absent(uri: str, output: str) -> None:
    """Else all of it would be gone now, and new when it is there again.

    Raises:
        ConfigError: a local input that was seen is not there, or an object that was seen may not be read.
    """
    if is_local(uri):
        is_there = os.path.isfile(uri) or (os.path.isdir(uri) and next(store_of(uri).list(uri), None) is not None)
        if not is_there and _was_seen(output, uri):
            raise ConfigError(f"{uri} is not there any more, or empty: mount it, or leave a hidden file where it was.")
        return
    try:
        store_of(uri).stat(uri)
    except PermissionError as error:  # of a prefix it means nothing: it has no object of its name
        if next(store_of(uri).list(uri), None) is None and _was_seen(output, uri):
            raise ConfigError(f"No permission to read {uri} any more: {error}.") from error


def _was_seen(output: str, uri: str) -> bool:
    """Whether a scan found it, or anything in a folder."""
    is_folder = is_local(uri)
    return any(
        pc.any(pc.equal(table["uri"], uri)).as_py()
        or (is_folder and pc.any(pc.starts_with(table["uri"], uri.rstrip("/") + "/")).as_py())
        for table in known(output)
    )


def _state(output: str) -> dict[str, Any]:
    uri = join(output, "scan.json")
    found = stored_object(uri, {"window": int, "watermark_s": (int, float)}) or {}
    if found.get("window", 0) < 0:
        raise ConfigError(f"{uri} is damaged (window {found['window']}): restore it.")
    return found


def _end(window: Window, settings: Settings, config: ScanConfig) -> dict[str, Any]:
    """Brings a window to its result: once, whoever else tries."""
    if window.plan is not None:
        _attribute(window, config)
    quiet = _quiet(window.output, window.number - 1)
    result = window_result(window, settings, quiet, [] if quiet else _results(window.output, window.number - 1))
    record_inventory(window)
    uri = join(window.folder, "window.json")
    if not store_of(window.output).create(uri, (json.dumps(result, indent=2) + "\n").encode()):
        result = window.result or result
    event("window", window=window.number, images=result["images"], unknown=result["unknown"],
          inconclusive=result["inconclusive"], rejected=result["rejected"], alerts=len(result["alerts"]))  # fmt: skip
    return result


def _attribute(window: Window, config: ScanConfig) -> None:
    """Computes the shards of a window that have no commit."""
    assert window.plan is not None
    plan, output = window.plan, window.output
    done = committed_shards(output) & set(plan.numbers)
    pending = [number for number in plan.numbers if number not in done]
    if pending:
        rejected = sum(commit["rejected_images"] for commit in read_commits(output, sorted(done)))
        images = sum(len(plan.rows_of(number)) for number in done)
        for _ in Computing(plan, output, pending, images, rejected, config.max_actors, config.gpu).commits():
            pass


def _results(output: str, last: int) -> list[dict[str, Any]]:
    """Results of the last windows up to one, oldest first."""
    return [_result(output, number) for number in range(max(1, last - _SHOWN_WINDOWS + 1), last + 1)]


def _quiet(output: str, last: int) -> list[dict[str, Any]]:
    """Results of the last windows up to one that had images and gave no alert, oldest first: what is usual.

    They may lie far back, since what alerts goes on alerting until it is dealt with.
    """
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(_SHOWN_WINDOWS) as pool:
        for newest in range(last, max(0, last - _MOST_LOOKED_AT), -_SHOWN_WINDOWS):
            numbers = range(newest, max(0, newest - _SHOWN_WINDOWS), -1)
            # What no report shows any more may have been taken away.
            read = _result if newest == last else read_result
            for result in pool.map(functools.partial(read, output), numbers):
                if result is None or len(found) == _SHOWN_WINDOWS:
                    return found[::-1]
                if result["images"] and not result["alerts"]:
                    found.append(result)
    return found[::-1]


def _result(output: str, number: int) -> dict[str, Any]:
    result = read_result(output, number)
    if result is None:
        raise ConfigError(f"{window_folder(output, number)} has lost its window.json: restore it.")
    return result


def _publish(
    settings: Settings, results: Sequence[Mapping[str, Any]], fresh: Sequence[Mapping[str, Any]], state: dict[str, Any]
) -> None:
    """Alerts, report and, last, the state: until it is there, the next scan publishes the same again."""
    output, telemetry = settings.output, Telemetry()
    if cluster.is_there():  # also where nothing was new: a watermark that stands still is an alarm
        cluster.connect()
    for result in fresh:
        telemetry.drift({finding["name"]: finding["adjusted"] for finding in result["findings"]})
        for alert in result["alerts"]:
            telemetry.alert(alert["rule"], alert["severity"])
    telemetry.watermark(state["watermark_s"], output)
    _add_alerts(output, [alert for result in fresh for alert in alerts_in(result)])
    if fresh:
        from manifpt.report.scan import write_scan_report  # matplotlib, only where there is something new to draw

        write_scan_report(settings, results)
        merge_inventory(output)
    waiting = {
        number: read_result(output, number) for number in _state(output).get("undelivered", [])[-_SHOWN_WINDOWS:]
    }
    if settings.webhook is not None:
        waiting |= {result["window"]: result for result in fresh if result["alerts"]}
    _write_state(output, state | {"undelivered": sorted(waiting)})
    if settings.webhook is None or not waiting:
        return
    for number in sorted(waiting, reverse=True):  # an endpoint that refuses something old still hears of now
        alerting = waiting[number]
        if alerting is not None and not settings.webhook.deliver(alerts_in(alerting)):
            break  # nor is the next one likely to be taken
        del waiting[number]
    _write_state(output, state | {"undelivered": sorted(waiting)})


def _write_state(output: str, state: Mapping[str, Any]) -> None:
    store_of(output).write(join(output, "scan.json"), (json.dumps(state, indent=2) + "\n").encode())


def _add_alerts(output: str, alerts: Sequence[Alert]) -> None:
    """Adds the lines that `alerts.jsonl` lacks: a scan that was killed after the last ones finds them there."""
    uri = join(output, "alerts.jsonl")
    try:
        there = store_of(output).read(uri).decode()
    except FileNotFoundError:
        there = ""
    known = set(there.splitlines(keepends=True))
    lines = [line for line in (alert.line() for alert in alerts) if line not in known]
    if lines or not there:
        store_of(output).write(uri, (there + "".join(lines)).encode())
