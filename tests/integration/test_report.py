"""The report of a run, as a reader opens it: in a browser, with labels that a stranger chose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from manifpt.config import ArtifactsConfig
from manifpt.runs import compute_artifacts
from tests.helpers.cluster import job, must
from tests.helpers.runs import sample_reference, without_ray

pytestmark = pytest.mark.timeout(600)
EVIL = "<img src=x onerror=alert(1)>"
SOURCES = {"gan": 40, "vae": 40, "flow": 40, "diffusion": 40, "real": 40}
BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        reference = sample_reference(folder, 200, SOURCES)
        compute_artifacts(
            ArtifactsConfig(manifest=str(folder / "queries.parquet"), reference=reference, output=str(folder / "run"))
        )
    return folder


@pytest.fixture(scope="module")
def report(run: Path, cluster: dict[str, str]) -> Path:
    (run / "labels.yaml").write_text(yaml.safe_dump({"gan": EVIL}))
    values = {EVIL: "nearest", "vae": "nearest", "flow": "unsqueeze", "diffusion": "unsqueeze"}
    generators = {label: {"upsampling": value} for label, value in values.items()}
    (run / "designs.yaml").write_text(yaml.safe_dump({"choices": ["upsampling"], "generators": generators}))
    attributor, rows = run / "attributor", ("--artifacts", run / "run", "--labels", run / "labels.yaml")
    must(
        job(
            "train_attributor",
            *rows,
            "--space",
            "rgb",
            "--network",
            "head",
            "--epochs",
            2,
            "--output",
            attributor,
            env=cluster,
        )
    )
    said = must(
        job("analyze_fingerprints", *rows, "--designs", run / "designs.yaml", "--attributor", attributor,
            "--output", run / "report", env=cluster)
    )  # fmt: skip
    assert "report.html" in said
    return run / "report"


def test_the_report_holds_every_number_and_a_picture_of_each_figure(report: Path) -> None:
    document = json.loads((report / "report.json").read_text())
    assert set(document["spaces"]) == {"rgb", "frequency"}
    for found in document["spaces"].values():
        assert set(found["overlap"]) == {EVIL, "vae", "flow", "diffusion", "real"}
        assert found["overlap"]["real"]["precision"] > found["overlap"][EVIL]["precision"]
        assert found["alignment"]["upsampling"]["generators"] == 4
        assert len(found["distances"]["energy_distance"]) == 5
    of_network = document["spaces"]["rgb"]["maps"][-1]
    assert of_network["of"] == "attributor's features"
    assert len(of_network["x"]) == sum(document["attributors"]["rgb"]["test_images"]), "of its test images alone"
    page = (report / "report.html").read_text()
    figures = sorted((report / "figures").iterdir())
    assert len(figures) == page.count("<figure>") == 15
    assert EVIL not in page


def test_the_same_command_again_finds_it_and_another_is_refused(run: Path, report: Path) -> None:
    """Without Ray."""
    rows = ("--artifacts", run / "run", "--labels", run / "labels.yaml", "--output", report)
    same = (*rows, "--designs", run / "designs.yaml", "--attributor", run / "attributor")
    before = (report / "report.html").stat().st_mtime_ns
    assert "Was analysed before" in must(job("analyze_fingerprints", *same))
    assert (report / "report.html").stat().st_mtime_ns == before
    other = job("analyze_fingerprints", *same, "--seed", 1)
    assert (other.returncode, "holds another analysis: seed differs" in other.stderr) == (2, True)


def test_an_attributor_of_other_rows_is_refused(run: Path, report: Path, cluster: dict[str, str]) -> None:
    done = job("analyze_fingerprints", "--artifacts", run / "run", "--attributor", run / "attributor", "--output",
               run / "other", env=cluster)  # fmt: skip
    assert done.returncode == 2
    assert "was trained on other rows than these" in done.stderr
    assert not (run / "other").exists(), "the next try may go there"
    unused = job("analyze_fingerprints", "--artifacts", run / "run", "--attributor", run / "attributor", "--spaces",
                 "frequency", "--output", run / "other")  # fmt: skip
    assert (unused.returncode, "isn't analysed" in unused.stderr) == (2, True)


@pytest.fixture(scope="module")
def opened(report: Path) -> Iterator[tuple[object, list[str]]]:
    if not BROWSER:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})  # a phone
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        local = ("data:", "blob:", "file:")
        page.on("request", lambda request: None if request.url.startswith(local) else complaints.append(request.url))
        page.goto((report / "report.html").as_uri())
        yield page, complaints
        browser.close()


def test_a_browser_shows_it_without_an_error_or_a_request(opened: tuple[object, list[str]]) -> None:
    page, complaints = opened
    pictures = page.locator("figure img")  # type: ignore[attr-defined]
    assert pictures.count() == 15
    assert all(
        pictures.evaluate_all("all => all.map(img => img.complete && img.naturalWidth > 0 && img.alt.length > 5)")
    )
    assert page.locator("th[scope=row]", has_text=EVIL).count() > 2  # type: ignore[attr-defined]
    assert page.locator("img[src=x]").count() == 0  # type: ignore[attr-defined]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "tables scroll, the page doesn't"  # type: ignore[attr-defined]
    maps = page.locator("details.interactive")  # type: ignore[attr-defined]
    for number in range(maps.count()):
        maps.nth(number).locator("summary").click()
        maps.nth(number).locator(".map > *").first.wait_for()
    page.wait_for_timeout(500)  # type: ignore[attr-defined]
    assert complaints == []


def test_its_tables_sort_by_numbers_and_by_text(opened: tuple[object, list[str]]) -> None:
    page, complaints = opened
    table = page.locator("table", has_text="rgb: generated against real")  # type: ignore[attr-defined]
    column = 7  # mean |a|

    def values(place: int) -> list[str]:
        cells = table.locator("tbody tr").evaluate_all(f"all => all.map(row => row.cells[{place}].dataset.value)")
        return list(cells)

    head = table.locator("thead th").nth(column)
    for order, reverse in (("ascending", False), ("descending", True)):
        head.locator("button").press("Enter")
        assert head.get_attribute("aria-sort") == order
        numbers = [float(value) for value in values(column)]
        assert numbers == sorted(numbers, reverse=reverse)
    table.locator("thead th").first.locator("button").click()
    assert values(0) == sorted(values(0), key=str.casefold)
    assert head.get_attribute("aria-sort") is None
    assert complaints == []


def test_an_accessibility_checker_finds_nothing_serious(opened: tuple[object, list[str]]) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page, _ = opened
    found = Axe().run(page).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")] == []
