"""Artifact runs, controls and baselines -> one fair table: accuracy, FD ratio, codec audit."""

import sys

from manifpt.config import EvaluateConfig, parse, run_command
from manifpt.evaluation.evaluate import evaluate_attributor
from manifpt.evaluation.ladder import measure_ladder
from manifpt.evaluation.leave_one_out import measure_leave_one_out


def main() -> None:
    config = parse(EvaluateConfig, sys.argv[1:], "evaluate_attributor.py")
    others = {measure_ladder: config.ladder, measure_leave_one_out: config.leave_one_out}
    command = next((command for command, is_asked in others.items() if is_asked), evaluate_attributor)
    print(command(config)["text"])


if __name__ == "__main__":
    sys.exit(run_command(main))
