"""One image -> an evidence panel: what it was measured to be, and whether that names a source. Needs no Ray."""

import sys

from manifpt.analysis.explain import explain_image
from manifpt.config import ExplainConfig, parse, run_command
from manifpt.report.text import say_evidence


def main() -> None:
    config = parse(ExplainConfig, sys.argv[1:], "explain_image.py")
    print(say_evidence(explain_image(config), config.output))


if __name__ == "__main__":
    sys.exit(run_command(main))
