"""Artifact runs, controls and baselines -> one fair table: accuracy, FD ratio, codec audit."""

import sys

from manifpt.config import EvaluateConfig, parse, run_command
from manifpt.evaluation.evaluate import evaluate_attributor


def main() -> None:
    config = parse(EvaluateConfig, sys.argv[1:], "evaluate_attributor.py")
    print(evaluate_attributor(config)["text"])


if __name__ == "__main__":
    sys.exit(run_command(main))
