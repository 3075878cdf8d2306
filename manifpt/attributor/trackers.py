"""Metrics to where people watch them: TensorBoard's files, or MLflow. `metrics.jsonl` is always written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from manifpt.errors import ConfigError
from manifpt.storage import is_local, join

__all__ = ["Track", "make_tracker"]

Track = Callable[[Mapping[str, Any]], None]


def make_tracker(name: str | None, output: str) -> Track:
    """A function that takes an epoch's metrics.

    Args:
        name: None, `tensorboard` (files under the output) or `mlflow` (to `MLFLOW_TRACKING_URI`).
        output: the training's folder.

    Raises:
        ConfigError: the package isn't there, or the output is no folder of this machine.
    """
    if name is None:
        return lambda metrics: None
    if name == "tensorboard":
        return _tensorboard(output)
    return _mlflow(output)


def _tensorboard(output: str) -> Track:
    from tensorboardX import SummaryWriter  # comes with ray[train]

    if not is_local(output):
        raise ConfigError("--tracker tensorboard writes files of this machine: choose a local --output, or mlflow.")
    writer = SummaryWriter(join(output, "tensorboard"))

    def track(metrics: Mapping[str, Any]) -> None:
        for key, value in metrics.items():
            if key != "epoch":
                writer.add_scalar(key, value, metrics["epoch"])
        writer.flush()

    return track


def _mlflow(output: str) -> Track:
    try:
        import mlflow
    except ImportError as error:
        raise ConfigError("--tracker mlflow needs the package: pip install mlflow-skinny.") from error
    # By its id: a thread has an active run of its own, and metrics come from another one than this.
    run_id = mlflow.start_run(run_name=output.rpartition("/")[2]).info.run_id

    def track(metrics: Mapping[str, Any]) -> None:
        values = {key: float(value) for key, value in metrics.items() if key != "epoch"}
        mlflow.log_metrics(values, step=metrics["epoch"], run_id=run_id)

    return track
