"""A decoder that ends its process at some images, as a fault in its C code would, or a machine without memory."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CRASH", "KILL", "SPOIL", "crashing_decoder"]

# What such a file starts with; the last one spoils memory, and the image after it ends the process.
CRASH, KILL, SPOIL = b"CRASH", b"KILL!", b"SPOIL"

_CODE = f"""
import os, signal
import PIL.Image
opened, spoilt = PIL.Image.open, False
def crashing(source, *arguments, **options):
    global spoilt
    print("a library prints")
    start = source.getvalue()[:5]
    if spoilt or start in ({CRASH!r}, {KILL!r}):
        os.kill(os.getpid(), signal.SIGKILL if start == {KILL!r} else signal.SIGSEGV)
    spoilt = start == {SPOIL!r}
    return opened(source, *arguments, **options)
PIL.Image.open = crashing
"""


def crashing_decoder(folder: Path) -> Path:
    """Writes what Python reads at its start where the folder is in `PYTHONPATH`, and returns the folder."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_CODE)
    return folder
