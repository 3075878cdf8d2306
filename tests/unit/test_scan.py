from __future__ import annotations

import io
import json
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifpt import pipeline, storage
from manifpt.attributor import bundle
from manifpt.attributor.outputs import Outputs
from manifpt.config import ScanConfig, parse
from manifpt.errors import ConfigError
from manifpt.monitoring import lease
from manifpt.monitoring import scan as scan_module
from manifpt.monitoring.alerts import Alert
from manifpt.monitoring.inventory import write_inventory
from manifpt.monitoring.scan import scan
from manifpt.monitoring.settings import read_settings
from manifpt.monitoring.webhook import Webhook
from tests.helpers.images import encoded, picture, write_files
from tests.helpers.runs import without_ray
from tests.helpers.scans import HIDDEN, attributions, config_of, make_attributor, new_files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scan")
    make_attributor(folder)
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray, shards of 16 images, and a lease whose holder is dead in half a second."""
    without_ray(monkeypatch)
    monkeypatch.setattr("manifpt.monitoring.settings.auto_shard_rows", lambda view_bytes: 16)
    monkeypatch.setattr(lease.held.__wrapped__, "__defaults__", (0.1, 0.5))


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    write_files(new_files(10), tmp_path / "bucket")
    return tmp_path / "bucket"


def ids(table: pa.Table) -> list[str]:
    return table["image_id"].to_pylist()


def test_a_scan_says_something_of_every_new_image_once(made: Path, bucket: Path, tmp_path: Path) -> None:
    (bucket / "notes.txt").write_text("no image")
    (bucket / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    output = tmp_path / "scans"
    state = scan(config_of(made, output, bucket))
    table = attributions(output)
    assert ids(table) == sorted(str(path) for path in bucket.glob("*-*.png"))
    assert (state["images"], state["rejected"], state["skipped"]) == (41, 1, {"txt": 1})
    assert set(table["verdict"].to_pylist()) <= {"attributed", "unknown", "inconclusive"}
    is_attributed = np.array([verdict == "attributed" for verdict in table["verdict"].to_pylist()])
    assert (table["source"].is_valid().to_numpy() == is_attributed).all()
    is_inconclusive = np.array([verdict == "inconclusive" for verdict in table["verdict"].to_pylist()])
    assert (table["reason"].is_valid().to_numpy() == is_inconclusive).all()
    named = [Path(i).name.split("-")[0] for i in ids(table)]
    right = np.array([source == label for source, label in zip(named, table["label"].to_pylist(), strict=True)])
    assert right.mean() > 0.5, "the attributor has learned something"
    again = scan(config_of(made, output, bucket))
    assert (again["images"], again["windows_ended"], again["window"]) == (0, [], 1)
    assert attributions(output).equals(table)
    rejected = pq.read_table(output / "windows" / "00001" / "rejected.parquet").to_pylist()
    assert [(Path(row["image_id"]).name, row["reason"]) for row in rejected] == [("broken.png", "truncated")]
    assert b"broken" not in (output / "report.html").read_bytes(), "rejected images are counted, not listed"


def test_an_image_that_overflows_the_attributor_ends_no_scan(
    made: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every scan from then on would first end that window, and fail."""
    whole, bad = bundle.outputs_of, []

    def overflowing(*given: Any) -> Iterator[Outputs]:
        for outputs in whole(*given):
            logits_bs = outputs.logits_bs.copy()
            logits_bs[1::3, 0] = np.nan  # an alteration of each image
            logits_bs[0, -1] = np.inf  # and the first image of a shard
            bad.append(outputs)
            yield replace(outputs, logits_bs=logits_bs)

    monkeypatch.setattr(bundle, "outputs_of", overflowing)
    output = tmp_path / "scans"
    state = scan(config_of(made, output, bucket))
    assert (state["images"], state["rejected"]) == (40, len(bad))
    rejected = pq.read_table(output / "windows" / "00001" / "rejected.parquet")
    assert rejected["reason"].to_pylist() == ["not_finite"] * len(bad)
    told = attributions(output)
    assert len(told) == 40 - len(bad) and not set(ids(told)) & set(ids(rejected))
    assert set(told["flips"].to_pylist()) <= {1, 2}, "an alteration without a number is no vote"
    assert np.isfinite(told["probability"].to_numpy()).all()


def test_new_changed_and_deleted_objects_are_told_apart(made: Path, bucket: Path, tmp_path: Path) -> None:
    output = tmp_path / "scans"
    scan(config_of(made, output, bucket))
    before = attributions(output)
    files = sorted(bucket.iterdir())
    files[0].unlink()
    files[1].write_bytes(files[2].read_bytes())
    write_files(new_files(3, start=10), bucket)
    state = scan(config_of(made, output, bucket))
    result = json.loads((output / "windows" / "00002" / "window.json").read_text())
    assert result["objects"] == {"new": 12, "changed": 1, "gone": 1}
    assert state["images"] == 13
    table = attributions(output)
    assert table.slice(0, len(before)).equals(before), "what was said stays"
    assert str(files[1]) in ids(table.slice(len(before)))
    files[0].write_bytes(files[3].read_bytes())
    assert scan(config_of(made, output, bucket))["images"] == 1, "what comes back is new"


def test_a_share_that_is_not_mounted_is_no_bucket_that_was_emptied(made: Path, bucket: Path, tmp_path: Path) -> None:
    output = tmp_path / "scans"
    scan(config_of(made, output, bucket))
    bucket.rename(tmp_path / "elsewhere")
    for _ in ("gone", "the mount point that is left"):
        with pytest.raises(ConfigError, match="bucket is not there any more, or empty: mount it"):
            scan(config_of(made, output, bucket))
        bucket.mkdir(exist_ok=True)
    bucket.rmdir()
    (tmp_path / "elsewhere").rename(bucket)
    assert scan(config_of(made, output, bucket))["window"] == 1
    both = config_of(made, tmp_path / "two", bucket, tmp_path / "not-yet")
    assert [scan(both)["window"] for _ in range(2)] == [1, 1], "a folder that is still to come is no loss"


def test_an_object_that_may_not_be_read_for_a_while_is_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 lists nothing below the name of a single object, and tells those who may not read it no more."""
    keys = ["s3://b/in.v1/a.png", "s3://b/in/0a1b2c", "s3://b/in/a.parquet"]
    listed: list[str] = []

    def stat(uri: str) -> None:
        raise PermissionError("access denied")

    store = SimpleNamespace(stat=stat, list=lambda uri: iter([key for key in listed if key.startswith(f"{uri}/")]))
    monkeypatch.setattr(scan_module, "store_of", lambda uri: store)
    columns = {"uri": keys, "etag": ["e"] * 3, "present": [True] * 3}
    write_inventory(str(tmp_path), 1, [pa.table(columns)])
    for uri in keys[1:]:
        with pytest.raises(ConfigError, match=rf"No permission to read {uri} any more: access denied"):
            scan_module._refuse_absent(uri, str(tmp_path))
    for prefix in ("s3://b/in", "s3://b/in.v1", "s3://b/in/b.parquet"):  # emptied, or never there
        scan_module._refuse_absent(prefix, str(tmp_path))
    listed += keys
    scan_module._refuse_absent("s3://b/in.v1", str(tmp_path))


def test_only_deleted_objects_make_a_window_without_images(made: Path, bucket: Path, tmp_path: Path) -> None:
    output = tmp_path / "scans"
    scan(config_of(made, output, bucket))
    next(bucket.iterdir()).unlink()
    state = scan(config_of(made, output, bucket))
    assert (state["window"], state["images"]) == (2, 0)
    write_files(new_files(1, start=20), bucket)
    assert scan(config_of(made, output, bucket))["images"] == 4
    assert len(attributions(output)) == 44


class _Killed(BaseException):
    """As SIGKILL: nothing that catches errors sees it, and no code of ours runs after it."""


def killed_at(effect: int, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """From now on, the process dies before its n-th effect on storage, and every later one fails too."""
    done = 0

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, uri: str, *rest: Any, **more: Any) -> Any:
            nonlocal done
            if "/lease/" not in uri:
                done += 1
            if done > effect:
                raise _Killed
            return method(self, uri, *rest, **more)

        return call

    for name in ("create", "write", "remove"):
        patch.setattr(storage.LocalStore, name, counted(getattr(storage.LocalStore, name)))
    upload = storage.LocalStore.upload
    patch.setattr(storage.LocalStore, "upload", lambda self, path, uri: counted(upload_to(upload, path))(self, uri))
    return lambda: done


def upload_to(upload: Callable[..., Any], path: Path) -> Callable[..., Any]:
    return lambda self, uri: upload(self, path, uri)


def test_killed_before_any_of_its_effects_and_run_again_nothing_is_lost_and_nothing_twice(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, undisturbed = tmp_path / "bucket", tmp_path / "undisturbed"

    def waves(output: Path, kill: Callable[[int], None]) -> None:
        shutil.rmtree(bucket, ignore_errors=True)
        for wave in range(2):
            write_files(new_files(6, start=6 * wave), bucket)
            kill(wave)
            scan(config_of(made, output, bucket))

    waves(undisturbed, lambda wave: None)
    with pytest.MonkeyPatch.context() as patch:
        count = killed_at(10**6, patch)
        shutil.rmtree(bucket)
        write_files(new_files(6), bucket)
        scan(config_of(made, tmp_path / "counted", bucket))
        effects = count()
    assert effects > 8

    for number, effect in enumerate(range(0, effects, max(1, effects // 10))):
        output = tmp_path / f"killed-{number}"

        def kill(wave: int, effect: int = effect, output: Path = output) -> None:
            with pytest.MonkeyPatch.context() as patch:
                killed_at(effect, patch)
                with pytest.raises(_Killed):
                    scan(config_of(made, output, bucket))

        waves(output, kill)
        assert told(output) == told(undisturbed), f"killed before effect {effect}"
        assert json.loads((output / "scan.json").read_text())["window"] == 2
        assert (output / "report.html").exists()


def told(output: Path) -> list[dict[str, Any]]:
    """All rows but for etags, which hold times."""
    return attributions(output).drop_columns(["etag", "feature"]).to_pylist()


def test_an_object_that_is_replaced_during_the_scan_is_scanned_as_what_it_is_now(
    made: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, other = sorted(bucket.glob("flow-*.png"))[0], sorted(bucket.glob("gan-*.png"))[0]
    run = pipeline.run

    def replaced(*rest: Any) -> Iterator[dict[str, Any]]:
        victim.write_bytes(other.read_bytes())
        yield from run(*rest)

    output = tmp_path / "scans"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run", replaced)
        first = scan(config_of(made, output, bucket))
    assert first["rejected"] == 1
    rejected = pq.read_table(output / "windows" / "00001" / "rejected.parquet").to_pylist()
    assert [(row["image_id"], row["reason"]) for row in rejected] == [(str(victim), "changed")]
    assert str(victim) not in ids(attributions(output)), "nothing is said of bytes that were not looked at"
    assert scan(config_of(made, output, bucket))["images"] == 1
    rows = {row["image_id"]: row for row in attributions(output).to_pylist()}
    assert rows[str(victim)]["content_hash"] == rows[str(other)]["content_hash"]


def test_a_clock_that_is_set_back_an_hour_loses_nothing(
    made: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, now_s = tmp_path / "scans", time.time()
    first = scan(config_of(made, output, bucket))
    monkeypatch.setattr(time, "time", lambda: now_s - 3600)
    write_files(new_files(2, start=10), bucket)
    second = scan(config_of(made, output, bucket))
    assert (second["images"], len(attributions(output))) == (8, 48)
    assert second["watermark_s"] == first["watermark_s"], "what was looked at was looked at"


def test_a_scan_beside_another_one_does_nothing_and_says_so(made: Path, bucket: Path, tmp_path: Path) -> None:
    output = tmp_path / "scans"
    scan(config_of(made, output, bucket))
    write_files(new_files(1, start=10), bucket)
    with lease.held(str(output), 0.1, 0.5):
        state = scan(config_of(made, output, bucket))
    assert state["status"] == "skipped" and "Another scan works" in state["why"]
    assert scan(config_of(made, output, bucket))["images"] == 4


def test_damaged_containers_and_odd_files_never_end_a_scan(made: Path, bucket: Path, tmp_path: Path) -> None:
    (bucket / "damaged.tar").write_bytes(b"no tar at all" * 100)
    (bucket / "damaged.parquet").write_bytes(b"PAR1 and no more")
    (bucket / "empty.png").write_bytes(b"")
    (bucket / "larger.png").write_bytes(encoded(picture(48), "PNG"))
    (bucket / "line\nfeed.png").write_bytes(encoded(picture(32), "PNG"))
    images = [{"bytes": encoded(picture(32, seed), "PNG"), "path": None} for seed in range(3)]
    pq.write_table(pa.table({"image": images}), bucket / "three.parquet")
    output = tmp_path / "scans"
    state = scan(config_of(made, output, bucket))
    rejected = pq.read_table(output / "windows" / "00001" / "rejected.parquet").to_pylist()
    assert sorted((Path(row["image_id"]).name, row["reason"]) for row in rejected) == [
        ("damaged.parquet", "corrupt"), ("damaged.tar", "corrupt"), ("empty.png", "empty"),
        ("larger.png", "size_mismatch"),
    ]  # fmt: skip
    assert state["rejected"] == 4
    assert {f"{bucket / 'three.parquet'}#{row}" for row in range(3)} <= set(ids(attributions(output)))
    assert scan(config_of(made, output, bucket))["images"] == 0, "what is damaged is not tried again until it changes"


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def rejected_in(output: Path, window: int) -> list[tuple[str, str]]:
    rows = pq.read_table(output / "windows" / f"{window:05d}" / "rejected.parquet").to_pylist()
    return sorted((Path(row["image_id"]).name, row["reason"]) for row in rows)


def test_two_images_of_one_id_never_end_a_scan(made: Path, bucket: Path, tmp_path: Path) -> None:
    """`tar -r` writes a changed file a second time; and a file may have the name of a tar's member."""
    tar_of(
        bucket / "a.tar",
        [(name, encoded(picture(32, seed), "PNG")) for seed, name in enumerate(("x.png", "y.png", "x.png"))],
    )
    (bucket / "a.tar#y.png").write_bytes(encoded(picture(32, 9), "PNG"))
    tar_of(bucket / "a.tar#b.tar", [("x.png", encoded(picture(32, 8), "PNG"))])
    output = tmp_path / "scans"
    state = scan(config_of(made, output, bucket))
    assert rejected_in(output, 1) == [
        ("a.tar", "unsupported"), ("a.tar#b.tar", "unsupported"), ("a.tar#y.png", "unsupported"),
    ]  # fmt: skip
    told = [name for name in ids(attributions(output)) if ".tar" in name]
    assert told == [f"{bucket / 'a.tar'}#x.png", f"{bucket / 'a.tar'}#y.png"]
    assert state["rejected"] == 3 and scan(config_of(made, output, bucket))["window"] == 1


def test_what_can_not_be_read_is_told_once_and_attributed_when_it_can_be(
    made: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image and a tar. Each scan would make a window of them, all rejected, or never look at the tar again."""
    tar_of(bucket / "shut.tar", [("x", encoded(picture(32, 1), "PNG"))])
    pq.write_table(pa.table({"image": [encoded(picture(32, 4), "PNG")]}), bucket / "shut.parquet")
    (bucket / "shut.png").write_bytes(encoded(picture(32, 2), "PNG"))
    shut, store = {"shut.tar", "shut.parquet", "shut.png"}, storage.LocalStore

    class Refusing(io.BytesIO):
        """As s3fs reads what is archived: opened without a word."""

        def read(self, size: int | None = -1, /) -> bytes:
            raise PermissionError("not for you")

    read, opened = store.read, store.open

    def guarded(self: Any, uri: str, *arguments: Any) -> bytes:
        if Path(uri).name in shut:
            raise PermissionError(f"no permission to read {uri}")
        return read(self, uri, *arguments)

    monkeypatch.setattr(store, "read", guarded)
    monkeypatch.setattr(
        store, "open", lambda self, uri, etag=None: Refusing(bytes(99)) if Path(uri).name in shut else opened(self, uri)
    )
    output = tmp_path / "scans"
    assert scan(config_of(made, output, bucket))["rejected"] == 3
    assert rejected_in(output, 1) == [(f"shut.{ending}", "forbidden") for ending in ("parquet", "png", "tar")]
    for _ in range(2):
        state = scan(config_of(made, output, bucket))
        assert (state["window"], state["images"], state["windows_ended"]) == (1, 0, [])
    write_files(new_files(1, start=20), bucket)
    state = scan(config_of(made, output, bucket))
    assert (state["window"], state["rejected"]) == (2, 0), "what is still shut is no news"
    shut.clear()
    state = scan(config_of(made, output, bucket))
    assert (state["window"], state["images"]) == (3, 3)
    assert ids(attributions(output))[-3:] == [
        f"{bucket / 'shut.parquet'}#0", str(bucket / "shut.png"), f"{bucket / 'shut.tar'}#x",
    ]  # fmt: skip
    assert scan(config_of(made, output, bucket))["images"] == 0
    shut.add("gone.png")
    (bucket / "gone.png").write_bytes(encoded(picture(32, 3), "PNG"))
    scan(config_of(made, output, bucket))
    (bucket / "gone.png").unlink()
    assert scan(config_of(made, output, bucket))["window"] == 4, "what was never read does not vanish"


def test_drift_is_measured_against_quiet_windows_however_far_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What alerts goes on alerting: after 50 such windows there was nothing left to compare with."""
    results = {n: {"window": n, "images": n % 7, "alerts": [1] if n > 90 else []} for n in range(1, 201)}
    monkeypatch.setattr(scan_module, "read_result", lambda output, number: results[number])
    found = [result["window"] for result in scan_module._quiet("scans", 200)]
    assert found == [n for n in range(1, 91) if n % 7][-50:]
    assert scan_module._quiet("scans", 0) == []
    monkeypatch.setattr(scan_module, "read_result", lambda output, number: results[number] if number > 120 else None)
    assert scan_module._quiet("scans", 200) == [], "what lies further back than a report shows may be taken away"
    with pytest.raises(ConfigError, match="has lost its window.json"):
        scan_module._quiet("scans", 130)


def test_what_was_usual_is_known_however_many_windows_alert(
    made: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 500 of them the change itself became usual, and the alert went off."""
    output = tmp_path / "scans"
    for start in (100, 200, 300):
        write_files(new_files(2, start=start), bucket)
        if start == 300:  # as if no quiet window could be seen any more
            monkeypatch.setattr(scan_module, "_MOST_LOOKED_AT", 0)
        scan(config_of(made, output, bucket))
    first, second, third = (json.loads((output / f"windows/{n:05d}/window.json").read_text()) for n in (1, 2, 3))
    assert second["compared_with_windows"] == 1 and third["compared_with_windows"] == 0
    assert second["usual"] == {name: first[name] for name in ("attributed", "unknown", "inconclusive", "rejected")}
    assert third["usual"] == second["usual"]


def test_until_a_window_was_quiet_each_of_which_a_fifth_can_not_be_looked_at_alerts(
    made: Path, bucket: Path, tmp_path: Path
) -> None:
    """A file that is no image made the window before the first, and total rejection was the norm from then on."""
    output, alerted = tmp_path / "scans", []
    for names in (("README.txt",), ("a.png", "b.png"), ("c.png",)):
        for name in names:
            (bucket / name).write_bytes(b"no image")
        if names == ("README.txt",):
            for path in bucket.iterdir():
                if path.name != "README.txt":
                    path.unlink()
        scan(config_of(made, output, bucket))
        last = sorted((output / "windows").iterdir())[-1]
        alerted.append([alert["rule"] for alert in json.loads((last / "window.json").read_text())["alerts"]])
    assert alerted[-2:] == [["many-rejected"]] * 2


def test_new_windows_never_take_the_numbers_of_lost_ones(made: Path, bucket: Path, tmp_path: Path) -> None:
    """Their shards were found done, and nobody attributed the new images."""
    output = tmp_path / "scans"
    scan(config_of(made, output, bucket))
    (output / "scan.json").unlink()
    shutil.rmtree(output / "windows")
    write_files(new_files(2, start=100), bucket)
    with pytest.raises(ConfigError, match=r"no scan\.json that says how far they went: restore"):
        scan(config_of(made, output, bucket))


@pytest.mark.parametrize("level", [0.0, 1.0, float("nan")])
def test_a_drift_level_that_is_none_is_refused_before_anything_is_done(
    made: Path, bucket: Path, tmp_path: Path, level: float
) -> None:
    with pytest.raises(ConfigError, match="drift level of .* is none"):
        scan(config_of(made, tmp_path / "scans", bucket, drift_level=level))
    assert not (tmp_path / "scans").exists()


@pytest.mark.parametrize(("ahead_s", "expected"), [(3600, 13_600.0), (10**9, 10_000.0)])
def test_a_clock_that_was_far_ahead_once_does_not_silence_the_alarm(ahead_s: float, expected: float) -> None:
    assert scan_module._later(10_000.0, 10_000.0 + ahead_s) == expected


def test_alerts_that_a_webhook_did_not_take_are_sent_again(
    made: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list[str]] = []
    is_there = [False]

    def deliver(self: Webhook, alerts: Sequence[Alert]) -> bool:
        sent.append([alert.window for alert in alerts])
        return is_there[0]

    monkeypatch.setattr(Webhook, "deliver", deliver)
    monkeypatch.setenv("ALERTS", "https://example.com/hook")
    output = tmp_path / "scans"
    always = {"name": "any", "when": "rejected_share >= 0.0", "severity": "info"}
    alerts = {"rules": [always], "webhook": {"url_env": "ALERTS"}}
    config = replace(config_of(made, output, bucket), alerts=alerts)
    scan(config)
    assert json.loads((output / "scan.json").read_text())["undelivered"] == [1]
    is_there[0] = True
    scan(config)
    assert sent == [["00001"], ["00001"]] and json.loads((output / "scan.json").read_text())["undelivered"] == []
    scan(config)
    assert len(sent) == 2
    is_there[0] = False
    for start in (100, 200):
        write_files(new_files(1, start=start), bucket)
        scan(config)
    assert sent[2:] == [["00002"], ["00003"]], "one is tried, the newest: the others would wait as long"
    write_files(new_files(1, start=300), bucket)
    scan(replace(config, alerts={"rules": [always]}))
    assert json.loads((output / "scan.json").read_text())["undelivered"] == [2, 3], "also without a webhook for once"
    is_there[0] = True
    scan(config)
    assert sent[4:] == [["00003"], ["00002"]]


def test_a_reference_image_in_the_bucket_is_not_projected_onto_itself(made: Path, bucket: Path, tmp_path: Path) -> None:
    real = sorted((made / "reals").rglob("*.png"))[0]
    shutil.copy(real, bucket / "a-copy.png")
    output = tmp_path / "scans"
    scan(config_of(made, output, bucket))
    row = next(row for row in attributions(output).to_pylist() if row["image_id"].endswith("a-copy.png"))
    assert (row["verdict"], row["reason"]) == ("inconclusive", "in_reference")
    assert row["distance"] > 0


def test_images_that_need_another_attributor_reference_or_place_are_refused(
    made: Path, bucket: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scans"
    with pytest.raises(ConfigError, match="lie in each other"):
        scan(config_of(made, bucket / "scans", bucket))
    with pytest.raises(ConfigError, match="nothing at"):
        scan(config_of(made, output, tmp_path / "not-there"))
    with pytest.raises(ConfigError, match="needs --denoiser|knows no --denoiser"):
        scan(config_of(made, output, bucket, denoiser=str(tmp_path)))
    with pytest.raises(ConfigError, match="alerts: unknown name 'rule'"):
        scan(config_of(made, output, bucket, alerts={"rule": []}))
    scan(config_of(made, output, bucket))
    with pytest.raises(ConfigError, match="another scan: inputs differs"):
        scan(config_of(made, output, tmp_path / "other"))


@pytest.mark.parametrize("name", ["baseline.parquet", "calibration.png"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_damaged_attributor_ends_a_scan_before_it_begins(
    made: Path, bucket: Path, tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    """What only report and drift need would else be missed when everything is attributed, by each scan again."""
    shutil.copytree(made / "attributor", tmp_path / "attributor")
    damage(tmp_path / "attributor" / name)
    with pytest.raises(ConfigError, match=rf"is damaged \({name} is .*copy it whole"):
        scan(config_of(made, tmp_path / "scans", bucket, attributor=str(tmp_path / "attributor")))
    assert not (tmp_path / "scans").exists()


def test_a_new_generator_raises_an_alert_in_its_wave_and_not_before(made: Path, tmp_path: Path) -> None:
    bucket, output = tmp_path / "bucket", tmp_path / "scans"
    write_files(new_files(30), bucket)
    assert scan(config_of(made, output, bucket, drift_level=0.05))["alerts"] == []
    write_files(new_files(30, start=30), bucket)
    write_files(new_files(100, sources=(HIDDEN,)), bucket)
    state = scan(config_of(made, output, bucket, drift_level=0.05))
    assert state["alerts"], "100 of 220 images are of a source that training never saw"
    lines = (output / "alerts.jsonl").read_text().splitlines()
    assert [json.loads(line)["window"] for line in lines] == ["00002"] * len(state["alerts"])
    page = (output / "report.html").read_text()
    assert state["alerts"][0]["rule"] in page


def test_rules_come_from_the_config_file(made: Path, bucket: Path, tmp_path: Path) -> None:
    path = tmp_path / "scan.yaml"
    path.write_text(
        f"input: [{bucket}]\nattributor: {made / 'attributor'}\nreference: {made / 'reference'}\n"
        "alerts:\n  rules:\n    - {name: any, when: inconclusive_share >= 0.0, severity: info}\n"
    )
    config = parse(ScanConfig, ["--config", str(path), "--output", str(tmp_path / "scans")], "scan.py")
    assert [alert["rule"] for alert in scan(config)["alerts"]] == ["any"]
    path.write_text("alerts: [1]\n")
    with pytest.raises(ConfigError, match="alerts can't be"):
        parse(ScanConfig, ["--config", str(path)], "scan.py")


def test_settings_name_what_decides_a_verdict(made: Path, bucket: Path, tmp_path: Path) -> None:
    facts = read_settings(config_of(made, tmp_path / "scans", bucket)).facts()
    assert facts["variants"] == ["jpeg-95", "webp-95"]
    assert len(facts["attributor_digest"]) == len(facts["reference_digest"]) == 64


@pytest.mark.parametrize("name", ["scan.json", "windows/00001/window.json", "windows/00001/plan.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"window": "x"}', '{"window": -1, "watermark_s": 0}'])
def test_a_damaged_state_is_one_sentence(made: Path, bucket: Path, tmp_path: Path, name: str, content: str) -> None:
    output = tmp_path / "scans"
    scan(config_of(made, output, bucket))
    (output / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"{name} is damaged \(.*: restore it"):
        scan(config_of(made, output, bucket))


@pytest.mark.parametrize("name", ["findings", "newcomers", "alerts", "attributed"])
def test_a_damaged_result_is_one_sentence(made: Path, bucket: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "scans"
    scan(config_of(made, output, bucket))
    path = output / "windows" / "00001" / "window.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {name: {"a": "many"} if name == "attributed" else [{"images": "many"}]}))
    with pytest.raises(ConfigError, match=rf"{name} of .*window.json is damaged \(.*: restore it"):
        scan(config_of(made, output, bucket))


def test_a_lost_window_is_one_sentence(made: Path, bucket: Path, tmp_path: Path) -> None:
    """Else its numbers of shards would be given again, and old verdicts be those of new images."""
    output = tmp_path / "scans"
    scan(config_of(made, output, bucket))
    shutil.rmtree(output / "windows" / "00001")
    write_files(new_files(2, start=10), bucket)
    with pytest.raises(ConfigError, match=r"windows/00001 is gone, and scan.json names it: restore it"):
        scan(config_of(made, output, bucket))
