"""One target under atheris, in a process of its own: `python -m tests.fuzz.child TARGET FAILURES -libfuzzer_flags`.

Inputs come from the target's own damage and, a third of the time, from the fuzzer's. At the first that fails, the
process ends: the fuzzer writes the input to the folder, and this module why it failed.
"""

from __future__ import annotations

import hashlib
import importlib
import random
import sys
import traceback
from pathlib import Path

import atheris

from tests.fuzz.limits import Limits


def main() -> None:
    """Does not return: the fuzzer ends the process."""
    name, failures, *flags = sys.argv[1:]
    with atheris.instrument_imports(include=["manifpt", "PIL", "tarfile", "json"]):
        target = importlib.import_module(f"tests.fuzz.{name}")
        for seed in target.seeds():  # loads what is loaded at first use
            target.check(seed)
    limits = Limits(target.check)

    def check(data: bytes) -> None:
        try:
            limits(data)
        except BaseException as error:
            path = Path(failures) / f"{name}-crash-{hashlib.sha1(data).hexdigest()}.txt"  # as the fuzzer names it
            path.write_text("".join(traceback.format_exception(error)))
            raise

    def mutated(data: bytes, most_bytes: int, seed: int) -> bytes:
        dice = random.Random(seed)
        if dice.random() < 1 / 3:
            return bytes(atheris.Mutate(data, most_bytes))
        return target.mutated(data, dice)[:most_bytes]

    atheris.Setup([sys.argv[0], *flags], check, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
