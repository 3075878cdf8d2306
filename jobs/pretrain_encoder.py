"""Manifest of reals -> an encoder of them, for build_reference --spaces selfsupervised --encoder."""

import sys

from manifpt.config import EncoderConfig, parse, run_command
from manifpt.encoder.pretrain import pretrain_encoder


def main() -> None:
    config = parse(EncoderConfig, sys.argv[1:], "pretrain_encoder.py")
    found = pretrain_encoder(config)
    done = f"Trained in {found['seconds']:.0f} s" if found["trained"] else "Was trained before"
    print(f"{done}: {config.output}")
    print(f"  loss {found['loss'][0]:.1f} in the first epoch, {found['loss'][-1]:.1f} in the last")
    if found["knn_accuracy"]:
        first, last = found["knn_accuracy"][0], found["knn_accuracy"][-1]
        print(f"  nearest neighbours tell {100 * last:.1f}% of {config.label_column} (untrained: {100 * first:.1f}%)")


if __name__ == "__main__":
    sys.exit(run_command(main))
