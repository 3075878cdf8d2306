"""Runs the benchmark, writes `bench.json` and prints a table.

    python -m tests.benchmarks [--sections search embed train whole growth driver] [--rounds 5] [--output bench.json]

Real images come from `../shared/data` where it is there, else from the shipped sample. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import driver, embed, growth, search, train, whole
from tests.benchmarks.data import SHARED
from tests.benchmarks.measure import hardware

SECTIONS = ("search", "embed", "train", "driver", "growth", "whole")


def main() -> None:
    """All sections, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=20_000, help="of the whole job")
    parser.add_argument("--paired-images", type=int, default=1_000, help="of each supervised round against the script")
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    parser.add_argument("--quiet", action="store_true", help="no table")
    options = parser.parse_args()
    if len(options.sections) > 1:  # each in a process of its own: one's memory would flatter another's allocations
        for section in options.sections:
            command = [sys.executable, "-m", "tests.benchmarks", "--sections", section, "--rounds", str(options.rounds)]
            command += ["--images", str(options.images), "--paired-images", str(options.paired_images)]
            subprocess.run([*command, "--output", str(options.output), "--quiet"], check=True)
        print(table(json.loads(options.output.read_text())))
        return
    document = one(options.sections[0], options)
    if not options.quiet:
        print(table(document))


def one(section: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a section and puts it into the document; what earlier runs wrote of the others stays."""
    threads = os.cpu_count() or 1
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        if section == "search":
            found = search.run(options.rounds, threads, folder, say)
        elif section == "embed":
            found = embed.run(options.rounds, threads, folder, say)
        elif section == "train":
            found = train.run(options.rounds, threads, folder, say)
        elif section == "whole":
            found = whole.run(options.rounds, threads, folder, options.images, options.paired_images, say)
        elif section == "growth":
            found = growth.run(folder, say)
        else:
            found = driver.run(folder, say)
    document: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    document |= {"hardware": hardware(threads), "data": "shared" if SHARED.exists() else "sample"}
    document.setdefault("sections", {})[section] = found["results"]
    document.setdefault("ratios", {}).update(found["ratios"])
    document.setdefault("took_s", {})[section] = round(time.perf_counter() - begin, 1)
    options.output.write_text(json.dumps(document, indent=2) + "\n")
    return document


def say(line: str) -> None:
    """One line as soon as it is known."""
    print(line, flush=True)


def table(document: dict[str, Any]) -> str:
    """Every ratio."""
    machine = document["hardware"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['gpu'] or 'no GPU'}; data: {document['data']}",
        "",
    ]
    lines += [f"| {name:32} | {value:10.3f} |" for name, value in document["ratios"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
