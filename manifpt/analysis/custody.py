"""Chain of custody: which bytes and which code a piece of evidence comes from."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import manifpt
from manifpt.decode import content_hash
from manifpt.errors import BadImage, ConfigError
from manifpt.fetch import fetch
from manifpt.isolated import IsolatedDecoder
from manifpt.metrics.codec import container_facts
from manifpt.storage import store_of

__all__ = ["code_digest", "read_image"]

_PACKAGE = Path(manifpt.__file__).parent


def read_image(uri: str) -> tuple[np.ndarray, dict[str, Any]]:
    """One image and what identifies it.

    Args:
        uri: of `normalize`.

    Returns:
        image_hwc: uint8 [H, W, 3]; and `uri`, `sha256` of the bytes, `content_hash` of the pixels, `format` as the
        bytes say it, `width_px`, `height_px`.

    Raises:
        ConfigError: it isn't there, may not be read, or is no image that the decoder takes.
    """
    try:
        entry = store_of(uri).stat(uri)
        if entry is None:  # a folder, or a pipe, which would be waited for without end
            raise ConfigError(f"There is no file at {uri}; --image is one image file.")
        row = {"uri": uri, "container": None, "offset": None, "size_bytes": entry.size_bytes}
        (data,) = fetch([row])
        if isinstance(data, BadImage):
            raise data
        with IsolatedDecoder() as decode:  # who asks has one image, of unknown hands
            image_hwc = decode(data)
    except PermissionError as error:
        raise ConfigError(f"No permission to read {uri}.") from error
    except BadImage as bad:
        raise ConfigError(
            f"{uri} can't be explained ({bad.reason.value}: {bad.detail}); choose another --image."
        ) from bad
    height_px, width_px = image_hwc.shape[:2]
    return image_hwc, {
        "uri": uri,
        "sha256": hashlib.sha256(data).hexdigest(),
        "content_hash": content_hash(image_hwc),
        "format": str(container_facts(data)["format"]),
        "width_px": width_px,
        "height_px": height_px,
    }


def code_digest(package: Path = _PACKAGE) -> dict[str, str]:
    """What identifies the code: `kind` and `value`.

    The commit, in a checkout whose package is as committed; else a SHA-256 over the package's own Python files, by
    name in ascending order: each name, its length in bytes, and its bytes.
    """
    commit = _commit(package)
    if commit:
        return {"kind": "git commit", "value": commit}
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(data)}\0".encode() + data)
    return {"kind": "sha256 of the package's Python files", "value": digest.hexdigest()}


def _commit(package: Path) -> str:
    """Of a package that is committed as it is; "" elsewhere."""
    if not (package.parent / ".git").exists():  # an installed package may lie in somebody else's checkout
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        return "" if git("status", "--porcelain", "--", ".") else git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return ""
