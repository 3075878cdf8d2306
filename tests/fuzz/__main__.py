"""Fuzzes, reports, and keeps what failed.

    python -m tests.fuzz [decode manifest commit bundle] [--minutes 20] [--failures fuzz-failures]

The minutes are all targets' together. A target goes on after a failure until its time is over or it has ten. What it
learned of coverage stays in memory only: every call starts from the seeds. Exit code 1: something failed. Its input and
its error lie in the folder; `python -m tests.fuzz --again FILE` runs it alone, under a debugger say.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.limits import Limits

TARGETS = ("decode", "manifest", "commit", "bundle")
_MOST_FAILURES = 10
_STUCK_S = 60  # in which no input ends: by the clock, so not too near to what a busy machine does


def main() -> int:
    """Every target in its turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], default=[])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--again", type=Path, help="one input that failed")
    options = parser.parse_args()
    if options.again:
        target = importlib.import_module(f"tests.fuzz.{options.again.name.partition('-')[0]}")
        for seed in target.seeds():
            target.check(seed)
        Limits(target.check)(options.again.read_bytes())
        return 0
    options.failures.mkdir(parents=True, exist_ok=True)
    targets = options.targets or TARGETS
    found = [fuzzed(name, 60 * options.minutes / len(targets), options.failures.resolve()) for name in targets]
    return int(any(found))


def fuzzed(name: str, seconds: float, failures: Path) -> int:
    """Fuzzes one target; the number of failures."""
    begin, inputs, coverage, failed = time.monotonic(), 0, 0, 0
    target = importlib.import_module(f"tests.fuzz.{name}")
    memory = Path("/dev/shm")  # every input is written to some file
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as place:
        corpus = Path(place, "corpus")
        corpus.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": place}
        for number, seed in enumerate(target.seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
        while failed < _MOST_FAILURES and (left_s := int(begin + seconds - time.monotonic())) > 0:
            flags = [f"-max_total_time={left_s}", f"-timeout={_STUCK_S}", "-rss_limit_mb=0", "-max_len=262144",
                     f"-artifact_prefix={failures}/{name}-", "-print_final_stats=1", str(corpus)]  # fmt: skip
            command = [sys.executable, "-m", "tests.fuzz.child", name, str(failures), *flags]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            printed = done.stdout.decode(errors="replace")
            inputs += int((re.findall(r"number_of_executed_units: (\d+)", printed) or [0])[-1])
            coverage = max([coverage, *map(int, re.findall(r"cov: (\d+)", printed))])
            if done.returncode:
                failed += 1
                print(f"{name}: {last_error(printed)}", flush=True)
                if "INITED" not in printed:  # not even the seeds pass
                    print(printed[-3000:])
                    break
    took_s = time.monotonic() - begin
    print(f"{name}: {inputs} inputs in {took_s:.0f} s ({inputs / took_s:.0f} a second), {coverage} branches covered, "
          f"{failed} failures", flush=True)  # fmt: skip
    return failed


def last_error(printed: str) -> str:
    """The exception's line, or the fuzzer's own."""
    lines = [line for line in printed.splitlines() if re.match(r"(\w+\.)*\w*(Error|Exception|Limit|Image)\b", line)]
    return next(iter(lines[-1:]), printed[-300:])


if __name__ == "__main__":
    sys.exit(main())
