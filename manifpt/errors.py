"""Every way in which this project says no, with a type and a sentence that says what to do next."""

from __future__ import annotations

from enum import Enum

__all__ = [
    "BadImage",
    "ConfigError",
    "NodesLost",
    "ObjectUnreadable",
    "PlanMismatch",
    "RejectReason",
    "StorageError",
    "TooManyRejected",
    "WorkerError",
    "told_as",
]


class ConfigError(Exception):
    """The command can't do what was asked, whatever the data: exit code 2."""


class PlanMismatch(ConfigError):
    """The output folder holds a run with another plan."""


class StorageRefused(ConfigError):
    """Storage can't be asked by whoever we are, or where we ask: no property of an object."""


class TooManyRejected(Exception):
    """More images were rejected than `max_rejected` allows: exit code 3."""


class StorageError(Exception):
    """Storage failed for longer than the retries last: exit code 1. The same command resumes."""


class WorkerError(Exception):
    """A worker process died again and again at the same work, or Ray's own did not start: exit code 1."""


class NodesLost(WorkerError):
    """Nodes vanished with work and with what others waited for: what isn't committed can be computed anew."""


def told_as(error: Exception) -> ConfigError | StorageError | WorkerError | None:
    """An error as one with a sentence for the user; None: it is a fault of ours, and keeps its trace.

    What a file system or a store says of itself has a number; Arrow's errors of damaged data are OSErrors without one.
    """
    if isinstance(error, ConfigError | StorageError | WorkerError):
        return error
    if isinstance(error, PermissionError):
        return ConfigError(f"No permission: {error}. Grant it and say the same command again.")
    if isinstance(error, OSError) and error.errno is not None:
        return StorageError(f"{type(error).__name__}: {error}")
    return None


class RejectReason(str, Enum):
    """Why an image is in `rejected.parquet`. The values are part of the format and never change."""

    MISSING = "missing"  # 404: listed in the manifest, gone from storage
    FORBIDDEN = "forbidden"  # 403, or no permission on a file system
    CHANGED = "changed"  # another object than the one that was indexed
    EMPTY = "empty"  # zero bytes
    NOT_AN_IMAGE = "not_an_image"  # no known image signature
    TRUNCATED = "truncated"  # the data end before the image does
    CORRUPT = "corrupt"  # the data contradict the format
    CRASHED = "crashed"  # a fault in its decoder ends the process
    ANIMATED = "animated"  # more than one frame: which one is the image?
    TOO_LARGE = "too_large"  # more bytes or pixels than allowed; decompression bombs
    TOO_SMALL = "too_small"  # under the space's minimum
    SIZE_MISMATCH = "size_mismatch"  # a native-resolution space, and not the size of its reference
    UNSUPPORTED = "unsupported"  # a pixel format without a written rule
    NOT_FINITE = "not_finite"  # its embedding overflows
    IN_REFERENCE = "in_reference"  # a real image that the projection was trained on and can't leave out


class ObjectUnreadable(ConfigError):
    """A stored object that can't be opened now, and may be tomorrow.

    Attributes:
        reason: `missing`, `forbidden` or `changed`.
    """

    def __init__(self, text: str, reason: RejectReason) -> None:
        super().__init__(text)
        self.reason = reason


class BadImage(Exception):
    """One image can't be used. Becomes a row of `rejected.parquet`; never ends a job.

    Attributes:
        reason: the typed reason.
        detail: one line for a person.
    """

    def __init__(self, reason: RejectReason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = " ".join(detail.split())[:300]
