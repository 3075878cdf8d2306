"""Committed artifact shards -> attributor bundle, trained with Ray Train."""

import sys

from manifpt.attributor.train import train_attributor
from manifpt.config import TrainConfig, parse, run_command
from manifpt.report.text import say_attributor


def main() -> None:
    config = parse(TrainConfig, sys.argv[1:], "train_attributor.py")
    print(say_attributor(train_attributor(config), config.output))


if __name__ == "__main__":
    sys.exit(run_command(main))
