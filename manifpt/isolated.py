"""Decoding in a process of its own, for an image that may have ended the process that decoded it before.

A fault in a decoder's C code raises nothing: the process is gone, and with it whatever else it was doing. In a process
of its own the image is told from the others, and is rejected as they are. That costs a copy of every file and of its
pixels through a pipe, so it is for the second look, and for single images.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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
_ATTEMPTS = 3
_PAUSE_S = 1.0


class IsolatedDecoder:
    """Like `decode`; an image that ends its process is a bad image. Closes its process as a context does.

    The process starts with the first image, and again after one that ended it.
    """

    def __init__(self) -> None:
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None

    def __call__(self, data: bytes) -> np.ndarray:
        """Decodes one image.

        Args:
            data: a whole file.

        Returns:
            image_hwc: uint8 [H, W, 3], RGB.

        Raises:
            BadImage: with the reason, as of `decode`; `crashed` where the decoder's fault ended the process.
            WorkerError: the process was ended from outside again and again.
        """
        ended = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_S)
            found = self._asked(data)
            if isinstance(found, np.ndarray):
                return found
            if isinstance(found, BadImage):
                raise found
            ended = signal.Signals(-found).name if found < 0 else f"exit code {found}"
            if -found in _FAULTS:
                raise BadImage(RejectReason.CRASHED, f"the decoder ended by {ended}")
        raise WorkerError(
            f"A process that decodes ended {_ATTEMPTS} times at the same image ({ended}): no memory left? The same "
            f"command goes on from here."
        )

    def _asked(self, data: bytes) -> np.ndarray | BadImage | int:
        """Pixels, why there are none, or the return code of the process that ended."""
        process, connection = self._child = self._child or _started()
        try:
            connection.send_bytes(data)
            told = json.loads(connection.recv_bytes())
            if "shape" not in told:
                return BadImage(RejectReason(told["reason"]), told["detail"])
            image_hwc = np.empty(told["shape"], np.uint8)
            connection.recv_bytes_into(image_hwc.reshape(-1))
            return image_hwc
        except (EOFError, ConnectionError):
            self.close()
            return process.returncode

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._child:
            process, connection = self._child
            connection.close()  # which is what it ends by
            process.wait()
            self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _started() -> tuple[subprocess.Popen[bytes], Connection]:
    # A job's code may lie where only this process was told to look.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ours, other = Pipe()
    with other:
        command = [sys.executable, "-P", "-m", "manifpt.isolated", str(other.fileno())]
        return subprocess.Popen(command, pass_fds=[other.fileno()], env=environment), ours


def _serve(connection: Connection) -> None:
    """Answers each file with its shape and pixels, or with why there are none, until the connection is closed."""
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        try:
            image_hwc = decode(data)
        except BadImage as bad:
            connection.send_bytes(json.dumps({"reason": bad.reason.value, "detail": bad.detail}).encode())
        else:
            connection.send_bytes(json.dumps({"shape": image_hwc.shape}).encode())
            connection.send_bytes(image_hwc.tobytes())


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
