"""An input that names one document of a folder, and what it holds: its first byte is the document's number.

A reader of several documents is fuzzed with all of them good but one.
"""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.fuzz.mutation import damaged_bytes, damaged_json, damaged_parquet, damaged_safetensors

__all__ = ["Documents", "new_folder"]

_DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": damaged_json,
    ".parquet": damaged_parquet,
    ".safetensors": damaged_safetensors,
}


def new_folder() -> Path:
    """Gone when the process ends well; where it doesn't, `tests.fuzz` removes what it gave as a place for it."""
    folder = Path(tempfile.mkdtemp(prefix="manifpt-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Documents:
    """The documents of some folders, by their path."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self._names = folder, names
        self._good: Mapping[str, bytes] = {name: (folder / name).read_bytes() for name in names}

    def seeds(self) -> list[bytes]:
        """Every document, as it is."""
        return [bytes([number]) + self._good[name] for number, name in enumerate(self._names)]

    def mutated(self, data: bytes, dice: random.Random) -> bytes:
        """The document, damaged as its kind can be."""
        if not data or dice.random() < 0.01:
            return bytes([dice.randrange(len(self._names))]) + data[1:]
        damage = _DAMAGE.get(Path(self.name_in(data)).suffix, damaged_bytes)
        return data[:1] + damage(data[1:], dice)

    def name_in(self, data: bytes) -> str:
        """The document's path below the folder."""
        return self._names[(data[0] if data else 0) % len(self._names)]

    def placed(self, data: bytes) -> str:
        """Puts the input's document in its place; returns its name."""
        name = self.name_in(data)
        (self.folder / name).write_bytes(data[1:])
        return name

    def restored(self, name: str) -> None:
        """Puts the good one back."""
        (self.folder / name).write_bytes(self._good[name])
