"""A recipe and its images -> the paper's table on them, from index to evaluation."""

import sys

from manifpt.config import ReproduceConfig, parse, run_command
from manifpt.recipes.reproduce import reproduce_tables


def main() -> None:
    config = parse(ReproduceConfig, sys.argv[1:], "reproduce_tables.py")
    print(reproduce_tables(config)["text"])


if __name__ == "__main__":
    sys.exit(run_command(main))
