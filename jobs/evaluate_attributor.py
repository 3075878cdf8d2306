"""Artifact runs, controls and baselines -> one fair table: accuracy, FD ratio, codec audit."""

import sys

from manifpt.config import EvaluateConfig, parse, run_command
from manifpt.evaluation.evaluate import evaluate_attributor
from manifpt.evaluation.ladder import measure_ladder


def main() -> None:
    config = parse(EvaluateConfig, sys.argv[1:], "evaluate_attributor.py")
    print((measure_ladder if config.ladder else evaluate_attributor)(config)["text"])


if __name__ == "__main__":
    sys.exit(run_command(main))
