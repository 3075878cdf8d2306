"""What a target is."""

from __future__ import annotations

import random
from typing import Protocol

__all__ = ["Target"]


class Target(Protocol):
    """A module of this package."""

    def seeds(self) -> list[bytes]:
        """Inputs that are good, or nearly so."""
        ...

    def mutated(self, data: bytes, dice: random.Random) -> bytes:
        """Another input, damaged where it matters."""
        ...

    def check(self, data: bytes) -> int:
        """Reads it; how many pixels it asked for. Whatever is raised is a finding."""
        ...
