"""Artifact shards -> what the fingerprints say of their generators: report.html, report.json and figures."""

import sys

from manifpt.analysis.analyze import analyze_fingerprints
from manifpt.config import AnalyzeConfig, parse, run_command
from manifpt.report.text import say_analysis


def main() -> None:
    config = parse(AnalyzeConfig, sys.argv[1:], "analyze_fingerprints.py")
    print(say_analysis(analyze_fingerprints(config), config.output))


if __name__ == "__main__":
    sys.exit(run_command(main))
