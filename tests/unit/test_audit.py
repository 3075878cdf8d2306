"""The audit: what it finds must fail it, and what it could not look at must show."""

from __future__ import annotations

import re
from pathlib import Path

from tests.audit import ACCEPTED, advisories, secrets
from tests.helpers.cluster import ROOT


def test_an_advisory_is_a_finding() -> None:
    hole = {"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}
    packages = [{"name": "a", "version": "1.0", "vulns": [hole]}, {"name": "b", "version": "1.0", "vulns": []}]
    assert advisories({"dependencies": packages}) == (["a 1.0: PYSEC-1, fixed in 2.0"], "")


def test_packages_without_an_answer_are_counted_and_no_pass() -> None:
    packages = [{"name": "a", "skip_reason": "not found"}, {"name": "b", "version": "1.0", "vulns": []}]
    assert advisories({"dependencies": packages}) == ([], "1 of 2 packages, such as a")


def test_no_answer_at_all_is_no_pass_either() -> None:
    assert advisories({})[1].startswith("all packages")


def test_a_secret_is_a_finding() -> None:
    found = {"results": {"a.py": [{"type": "AWS Access Key", "line_number": 3}]}}
    assert secrets(found) == ["a.py:3: looks like a secret (AWS Access Key)"]
    assert secrets({"results": {}}) == []


MARKS = re.compile(r"# noqa: S\d+|# pragma: allowlist nextline secret")


def unexplained(text: str) -> list[str]:
    """Lines with an exception that has no word of why behind it."""
    return [
        line.strip()
        for line in text.splitlines()
        for mark in MARKS.finditer(line)
        if not re.match(r"\s+# \w", line[mark.end() :])
    ]


def test_every_exception_says_why() -> None:
    sources: list[Path] = [path for folder in ("manifpt", "jobs", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert [line for path in sources for line in unexplained(path.read_text()) if path != Path(__file__)] == []
    assert unexplained("x = y  # noqa: " + "S310") == ["x = y  # noqa: " + "S310"]
    assert all(ACCEPTED.values())
