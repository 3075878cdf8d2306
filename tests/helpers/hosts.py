"""Hosts with addresses of their own on this machine: network namespaces, joined by a bridge in one more.

Each also has a folder of its own where Ray keeps its session, as machines have, at a path that is the same on all.
Nothing of it is seen from the machine's own network. It needs root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

__all__ = ["Hosts", "hosts", "needs_namespaces"]

_NETWORK = "10.77.0"  # nobody else sees it

needs_namespaces = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
)


class Hosts:
    """Named hosts.

    Attributes:
        folder: each host sees one of its own here.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.folder = folder / "own"
        self._folders = {name: folder / name for name in names}
        self._bridge = f"mf-{secrets.token_hex(3)}"
        self._spaces = {name: f"{self._bridge}-{number}" for number, name in enumerate(names)}

    def address(self, name: str) -> str:
        """Of a host."""
        return f"{_NETWORK}.{1 + list(self._spaces).index(name)}"

    def on(self, name: str, *command: str) -> list[str]:
        """A command as it runs on a host."""
        enter = 'mount --bind "$0" "$1" && shift && exec "$@"'
        own = [str(self._folders[name]), str(self.folder)]
        return ["ip", "netns", "exec", self._spaces[name], "sh", "-c", enter, *own, *command]

    def cut(self, name: str) -> None:
        """Pulls the plug: nothing comes, nothing goes, and nobody is told."""
        _ip("-n", self._bridge, "link", "set", self._port(name), "down")

    def join(self, name: str) -> None:
        """Plugs it in again."""
        _ip("-n", self._bridge, "link", "set", self._port(name), "up")

    def _port(self, name: str) -> str:
        return f"port{list(self._spaces).index(name)}"

    def start(self) -> None:
        """Makes the network."""
        self.folder.mkdir()
        _ip("netns", "add", self._bridge)
        _ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "bridge", "up")
        for name, space in self._spaces.items():
            self._folders[name].mkdir()
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", self._port(name), "netns", self._bridge)
            _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", self._bridge, "link", "set", self._port(name), "master", "bridge", "up")

    def stop(self) -> None:
        """Takes it away again; what runs on a host must have ended."""
        for space in (*self._spaces.values(), self._bridge):
            with contextlib.suppress(subprocess.CalledProcessError):  # it was not made
                _ip("netns", "delete", space)


@contextlib.contextmanager
def hosts(*names: str) -> Iterator[Hosts]:
    """Hosts that can reach each other, and nobody else."""
    folder = Path(tempfile.mkdtemp(prefix="mf-"))  # short: the paths of sockets have a limit
    made = Hosts(names, folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
