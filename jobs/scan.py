"""New images of a bucket -> attributions, what has drifted, alerts, a report. The same command, on a schedule."""

import sys

from manifpt.config import ScanConfig, parse, run_command
from manifpt.monitoring.scan import scan
from manifpt.report.text import say_scan


def main() -> None:
    config = parse(ScanConfig, sys.argv[1:], "scan.py")
    print(say_scan(scan(config), config.output))


if __name__ == "__main__":
    sys.exit(run_command(main))
