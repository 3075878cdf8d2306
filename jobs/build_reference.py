"""Manifest of real images -> reference bundle."""

import sys

from manifpt.config import ReferenceConfig, parse, run_command
from manifpt.report.text import say_reference
from manifpt.runs import build_reference


def main() -> None:
    config = parse(ReferenceConfig, sys.argv[1:], "build_reference.py")
    print(say_reference(build_reference(config), config.output))


if __name__ == "__main__":
    sys.exit(run_command(main))
