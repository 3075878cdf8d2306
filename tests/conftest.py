from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.helpers.cluster import ROOT, ray_head
from tests.helpers.s3 import environment, s3_server

# A busy machine makes one example slow; what must be fast says so itself.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def cluster(s3: dict[str, str]) -> Iterator[dict[str, str]]:
    """Environment of one Ray head for all tests that don't need their own; its nodes may use the S3 server."""
    with ray_head(node_env=s3) as env:
        yield env


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a real S3 server with the bucket `images`."""
    with s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        yield environment(endpoint)


@pytest.fixture(scope="session")
def cifar() -> Path:
    """Published images of real generators; beside the project where its developers have them."""
    path = ROOT.parent / "shared" / "data" / "gm_cifar10"
    if not path.exists():
        pytest.skip("needs the image set gm_cifar10 beside the project")
    return path
