"""Manifest and reference -> committed artifact shards. Without arguments: on the shipped sample, into runs/sample."""

import sys

from manifpt.config import ArtifactsConfig, parse, run_command
from manifpt.planning import describe_plan, plan_artifacts
from manifpt.report.text import SAMPLE_PLAN, say_artifacts, say_plan
from manifpt.runs import compute_artifacts, sample_config


def main() -> None:
    config = parse(ArtifactsConfig, sys.argv[1:], "compute_artifacts.py")
    if not config.manifest and not config.reference:
        if config.dry_run:
            print(SAMPLE_PLAN)
            return
        config = sample_config(config)
    if config.dry_run:
        print(say_plan(describe_plan(*plan_artifacts(config))))
        return
    print(say_artifacts(compute_artifacts(config), str(config.output)))


if __name__ == "__main__":
    sys.exit(run_command(main))
