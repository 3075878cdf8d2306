"""Bucket, folder, tar or Parquet of images -> manifest.parquet."""

import json
import sys

from manifpt.config import IndexConfig, parse, run_command
from manifpt.runs import index_images


def main() -> None:
    found = index_images(parse(IndexConfig, sys.argv[1:], "index_images.py"))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    sys.exit(run_command(main))
