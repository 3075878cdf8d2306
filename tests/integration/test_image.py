"""What cluster/Dockerfile puts into an image, laid out here and run as it says: without root, by its own command."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cluster import ROOT

DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ")
HADOLINT = str(Path(sys.executable).parent / "hadolint")
IS_ROOT = os.geteuid() == 0
USER = 1000
# Root's own checkout and interpreter may be closed to others: this user may read them all the same, and write nothing.
AS_USER = [
    "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search", "--bounding-set=-all,+dac_read_search", "--no-new-privs",
]  # fmt: skip


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} (.+)$", DOCKERFILE, flags=re.MULTILINE)


@pytest.fixture
def image() -> Iterator[Path]:
    """`app`, which holds what COPY brings, and `home` and `tmp`, which are the user's."""
    root = Path(tempfile.mkdtemp(prefix="mf-"))
    root.chmod(0o755)
    for arguments in instructions("COPY"):
        *sources, target = shlex.split(arguments)
        if not sources[0].startswith(("--", "cluster/")):
            for source in sources:
                place = root / "app" / target / source if target == "./" else root / "app" / target
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                place.parent.mkdir(parents=True, exist_ok=True)
                copy(ROOT / source, place)
    for name in ("home", "tmp"):
        (root / name).mkdir()
        if IS_ROOT:
            os.chown(root / name, USER, USER)
    yield root
    shutil.rmtree(root, ignore_errors=True)


def test_the_command_of_the_image_runs_as_a_user_who_owns_nothing_of_it(image: Path) -> None:
    settings = dict(one.split("=", 1) for line in instructions("ENV") for one in shlex.split(line))
    settings |= {"HOME": str(image / "home"), "PYTHONPATH": str(image / "app"), "TMPDIR": str(image / "tmp")}
    settings["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    (command,) = instructions("CMD")
    *start, output = json.loads(command)
    assert output.startswith("/tmp/")
    result = subprocess.run(
        [*(AS_USER if IS_ROOT else []), *start, str(image / "tmp" / "sample")],
        cwd=image / "app", env=settings, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert (image / "tmp" / "sample" / "_SUCCESS").exists()
    assert not IS_ROOT or (image / "tmp" / "sample" / "_SUCCESS").stat().st_uid == USER


def test_every_image_ends_as_a_user_without_root() -> None:
    assert instructions("USER") == [f"{USER}:{USER}"]
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert [stage for stage, name in stages if name in ("cpu", "cuda")] == ["ready", "ready"]
    assert DOCKERFILE.index("USER ") < DOCKERFILE.index("FROM ready AS cpu")


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [one for line in instructions("COPY") if not line.startswith("--") for one in shlex.split(line)[:-1]]
    assert len(copied) == 5
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored


def test_hadolint_finds_nothing_and_would_find_something() -> None:
    path = ROOT / "cluster" / "Dockerfile"
    found = subprocess.run([HADOLINT, str(path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    worse = path.read_text().replace("# hadolint ignore", "# ")
    assert subprocess.run([HADOLINT, "-"], input=worse, capture_output=True, text=True, check=False).returncode == 1
