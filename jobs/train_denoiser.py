"""Reference bundle -> a denoiser of its reals, for compute_artifacts --estimate denoiser."""

import sys

from manifpt.config import DenoiserConfig, parse, run_command
from manifpt.estimates.denoising import train_denoiser


def main() -> None:
    config = parse(DenoiserConfig, sys.argv[1:], "train_denoiser.py")
    found = train_denoiser(config)
    left = ", ".join(f"{share:.2f} at {sigma}" for sigma, share in found["variance_left"].items())
    done = f"Trained in {found['seconds']:.0f} s" if found["trained"] else "Was trained before"
    print(f"{done}: {config.output}\n  of the noise's variance on unseen reals there is left: {left}")


if __name__ == "__main__":
    sys.exit(run_command(main))
