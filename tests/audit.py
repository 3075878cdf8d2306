"""Known holes in the packages of an image, and secrets in the repository: `make audit`.

    python -m tests.audit

Exit code 1: there is a finding. What is no secret is marked where it stands (`pragma: allowlist nextline secret`), with
its reason; an advisory that does not concern us goes into `ACCEPTED`, with its own. Advisories come from the registry's
answers for each release. Where it gives none, nothing was audited, and the last line says so: a machine without a route
to them must still be able to run the tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tests.helpers.cluster import ROOT

__all__ = ["advisories", "main", "secrets"]

LOCKS = ("cluster/requirements-cpu.txt", "cluster/requirements-cuda.txt")
ACCEPTED: dict[str, str] = {}  # an advisory's id, and why it does not concern us


def main() -> int:
    """Both at a time, since one waits for the registry."""
    locks = [option for lock in LOCKS for option in ("--requirement", lock)]
    accepted = [option for advisory in ACCEPTED for option in ("--ignore-vuln", advisory)]
    audited = _started("pip_audit", "--format", "json", "--disable-pip", "--require-hashes", *locks, *accepted)
    scanned = _started("detect_secrets", "scan")
    holes, left_out = advisories(_document(audited, may_fail=True))
    findings = [*holes, *secrets(_document(scanned, may_fail=False))]
    print("\n".join(findings or ["No findings."]))
    if left_out:
        print(f"NOT AUDITED: {left_out}. Run `make audit` where the registry's advisories can be reached.")
    return int(bool(findings))


def advisories(document: Mapping[str, Any]) -> tuple[list[str], str]:
    """Of pip-audit's answer: findings, and what was left out ("": nothing)."""
    packages = document.get("dependencies", [])
    holes = [
        f"{package['name']} {package['version']}: {hole['id']}, fixed in {', '.join(hole['fix_versions']) or 'none'}"
        for package in packages
        for hole in package.get("vulns", [])
    ]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if not packages:
        return holes, "all packages; pip-audit found no advisories' service"
    return holes, f"{len(skipped)} of {len(packages)} packages, such as {skipped[0]}" if skipped else ""


def secrets(document: Mapping[str, Any]) -> list[str]:
    """Of detect-secrets' answer: findings."""
    return [
        f"{file}:{found['line_number']}: looks like a secret ({found['type']})"
        for file, all_found in document["results"].items()
        for found in all_found
    ]


def _started(module: str, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _document(process: subprocess.Popen[bytes], *, may_fail: bool) -> dict[str, Any]:
    """What it prints as JSON; {} of one that may fail and does, after a word of why."""
    printed, errors = process.communicate(timeout=300)
    try:
        document: dict[str, Any] = json.loads(printed)
        return document
    except ValueError:
        print(errors.decode(errors="replace")[-500:], file=sys.stderr)
        if not may_fail:
            raise
        return {}


if __name__ == "__main__":
    sys.exit(main())
