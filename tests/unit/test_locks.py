"""The lock files: what an image of the project is made of, to the byte."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[2]
CPU, CUDA = "requirements-cpu.txt", "requirements-cuda.txt"
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "python_version": "3.11"}


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes by package, read as pip reads them: a backslash joins lines."""
    text = (ROOT / "cluster" / name).read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            pin, *options = line.split()
            package, separator, version = pin.partition("==")
            assert separator, line
            found[package] = (version, options)
    return found


def wanted() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(text) for text in (*project["dependencies"], *extras["timm"], *extras["pretrain"])]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", [CPU, CUDA])
def test_every_line_is_one_version_with_its_hashes_and_nothing_else(name: str) -> None:
    packages = locked(name)
    assert len(packages) > 100
    for package, (version, options) in packages.items():
        assert re.fullmatch(r"[0-9][0-9A-Za-z.+]*", version), package
        assert options, f"{package} has no hash"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", option) for option in options), package


@pytest.mark.parametrize("name", [CPU, CUDA])
def test_a_lock_satisfies_every_range_of_the_project(name: str) -> None:
    packages = locked(name)
    for requirement in wanted():
        if requirement.marker is not None and not requirement.marker.evaluate(LINUX):
            continue
        if name == CPU and requirement.name == "faiss-gpu":
            requirement = Requirement("faiss-cpu>=1.9")
        version, _ = packages[canonical(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but {version}: make lock"


def test_the_two_differ_in_faiss_and_in_what_it_needs_of_cuda_alone() -> None:
    cpu, cuda = locked(CPU), locked(CUDA)
    assert set(cpu) - set(cuda) == {"faiss-cpu"}
    only_cuda = set(cuda) - set(cpu)
    assert "faiss-gpu" in only_cuda
    assert all(package == "faiss-gpu" or package.startswith("nvidia-") for package in only_cuda)
    assert all(cpu[package] == cuda[package] for package in set(cpu) & set(cuda))


@pytest.mark.parametrize("name", [CPU, CUDA])
def test_a_lock_names_no_place_to_install_from(name: str) -> None:
    lines = (ROOT / "cluster" / name).read_text().splitlines()
    assert not [line for line in lines if "://" in line or line.startswith("-") or " @ " in line]


def test_the_bill_of_materials_lists_every_locked_package_with_its_hashes(tmp_path: Path) -> None:
    target = tmp_path / "sbom-cuda.json"
    bin_folder = Path(sys.executable).parent
    command = ["make", "--old-file", ".venv/installed", f"BIN={bin_folder}", f"DIST={tmp_path}", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    document = json.loads(target.read_text())
    assert (document["bomFormat"], document["metadata"]["component"]["name"]) == ("CycloneDX", "manifpt")
    components = {component["name"]: component for component in document["components"]}
    packages = locked(CUDA)
    assert {package: component["version"] for package, component in components.items()} == {
        package: version for package, (version, _) in packages.items()
    }
    for package, (_, options) in packages.items():
        hashes = components[package]["externalReferences"][0]["hashes"]
        assert {each["content"] for each in hashes} == {option.rpartition(":")[2] for option in options}
