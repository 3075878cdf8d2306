"""A decoder that ends its process at some images, as a fault in its C code would, or a machine without memory."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CRASH", "KILL", "crashing_decoder"]

# What such a file starts with.
CRASH, KILL = b"CRASH", b"KILL!"

_CODE = f"""
import os, signal
import PIL.Image
opened = PIL.Image.open
def crashing(source, *arguments, **options):
    print("a library prints")
    start = source.getvalue()[:5]
    if start in ({CRASH!r}, {KILL!r}):
        os.kill(os.getpid(), signal.SIGSEGV if start == {CRASH!r} else signal.SIGKILL)
    return opened(source, *arguments, **options)
PIL.Image.open = crashing
"""


def crashing_decoder(folder: Path) -> Path:
    """Writes what Python reads at its start where the folder is in `PYTHONPATH`, and returns the folder."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_CODE)
    return folder
