"""Decoding in a process of its own, for an image that may have ended the process that decoded it before.

A fault in a decoder's C code raises nothing: the process is gone, and with it whatever else it was doing. In a process
of its own the image is told from the others, and is rejected as they are. That costs a copy of every file and of its
pixels through a pipe, so it is for the second look, and for single images.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import numpy as np

from manifpt.decode import decode
from manifpt.errors import BadImage, RejectReason, WorkerError

__all__ = ["IsolatedDecoder"]

# What a fault of its own ends a process by. Others come from outside: a machine that runs out of memory kills.
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS, signal.SIGTRAP}
_ATTEMPTS = 5
_PAUSE_S = 1.0  # doubled each time: others may give memory back


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    connection: Connection
    images: int = 0  # that it was asked for, once it was ready


class IsolatedDecoder:
    """Like `decode`; an image that ends its process is a bad image. Closes its process as a context does.

    The process starts with the first image, and again after one that ended it.
    """

    def __init__(self) -> None:
        self._child: _Child | None = None

    def __call__(self, data: bytes) -> np.ndarray:
        """Decodes one image.

        Args:
            data: a whole file.

        Returns:
            image_hwc: uint8 [H, W, 3], RGB.

        Raises:
            BadImage: with the reason, as of `decode`; `crashed` where the decoder's fault ended the process.
            WorkerError: the process didn't start, or was ended from outside again and again.
        """
        pause_s = _PAUSE_S
        for attempt in range(_ATTEMPTS):
            child = self._child = self._child or _started()
            found = self._asked(child, data)
            if isinstance(found, np.ndarray):
                return found
            if isinstance(found, BadImage):
                raise found
            is_fault = -found in _FAULTS and child.images > 0
            ended = signal.Signals(-found).name if found < 0 else f"exit code {found}"
            # An earlier image may have spoilt the memory of a process that goes on: to blame is what ends a new one.
            if is_fault and child.images == 1:
                raise BadImage(RejectReason.CRASHED, f"the decoder ended by {ended}")
            if not is_fault and attempt < _ATTEMPTS - 1:
                time.sleep(pause_s)
                pause_s *= 2
        raise WorkerError(
            f"A process that decodes ended {_ATTEMPTS} times at the same image ({ended}; by SIGKILL where no memory is "
            f"left). Its own messages are in Ray's logs, or above; the same command goes on from here."
        )

    def _asked(self, child: _Child, data: bytes) -> np.ndarray | BadImage | int:
        """Pixels, why there are none, or the return code of the process that ended."""
        try:
            if not child.images:
                child.connection.recv_bytes()  # it is ready; no image is what ends it before
            child.images += 1
            child.connection.send_bytes(data)
            told = json.loads(child.connection.recv_bytes())
            if "shape" not in told:
                return BadImage(RejectReason(told["reason"]), told["detail"])
            image_hwc = np.empty(told["shape"], np.uint8)
            child.connection.recv_bytes_into(image_hwc.reshape(-1))
            return image_hwc
        except (EOFError, OSError):  # between messages, within one
            self.close()
            return child.process.returncode
        except BaseException:  # its answer is still to come, and must not be taken for the next image's
            child.process.kill()
            self.close()
            raise

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._child:
            self._child.connection.close()  # which is what it ends by
            self._child.process.wait()
            self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _started() -> _Child:
    # A job's code may lie where only this process was told to look; an empty place is the folder that it is in.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path)}
    ours, other = Pipe()
    with other:
        command = [sys.executable, "-P", "-m", "manifpt.isolated", str(other.fileno())]
        try:
            process = subprocess.Popen(command, pass_fds=[other.fileno()], env=environment)
        except OSError as error:
            ours.close()
            raise WorkerError(
                f"No process that decodes could be started ({error}): say the same command again."
            ) from error
    return _Child(process, ours)


def _serve(connection: Connection) -> None:
    """Answers each file with its shape and pixels, or with why there are none, until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to this process too
    with contextlib.suppress(EOFError, OSError):
        connection.send_bytes(b"ready")
        while True:
            data = connection.recv_bytes()
            try:
                image_hwc = decode(data)
            except BadImage as bad:
                connection.send_bytes(json.dumps({"reason": bad.reason.value, "detail": bad.detail}).encode())
            else:
                connection.send_bytes(json.dumps({"shape": image_hwc.shape}).encode())
                connection.send_bytes(image_hwc.data.cast("B"))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
