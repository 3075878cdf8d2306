"""What surrounds the stages of the Ray Data graph; the graph itself runs in tests/integration."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from manifpt.errors import ConfigError
from manifpt.pipeline import _Computing
from manifpt.resources import KEPT_BLOCKS
from manifpt.stages import Shard

# Blocks of 64 MB, taken and given back in a thread, as a network's activations are; prints page faults a block.
_BLOCKS = """
import ctypes, resource, threading

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def work():
    for number in range(22):
        if number == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(1 << 26)
        libc.memset(block, 1, 1 << 26)
        libc.free(block)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_an_actor_computes_in_the_thread_in_which_it_was_made() -> None:
    made: list[int] = []

    def make() -> Callable[[Shard], Shard]:
        made.append(threading.get_ident())
        return lambda shard: shard | {"thread": threading.get_ident()}

    computing = _Computing(make)
    threads = {computing({})["thread"] for _ in range(3)}
    assert threads == set(made) != {threading.get_ident()}


def test_what_an_actor_lacks_is_told_with_every_shard() -> None:
    def make() -> Callable[[Shard], Shard]:
        raise ConfigError("The reference was built again.")

    computing = _Computing(make)
    for _ in range(2):
        with pytest.raises(ConfigError, match="built again"):
            computing({})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc, with another allocator")
def test_blocks_of_activations_are_kept() -> None:
    """Without, 16,384 pages of each are taken anew, where the system doesn't give huge pages unasked."""
    env = {**os.environ, **KEPT_BLOCKS}
    done = subprocess.run([sys.executable, "-c", _BLOCKS], env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100


def test_a_process_of_a_job_imports_only_what_its_stage_needs() -> None:
    """Each that decodes or commits pays for what this module imports; SciPy alone would be a third of a second."""
    heavy = "[name for name in ('faiss', 'scipy', 'sklearn', 'torch', 'tyro') if name in sys.modules]"
    command = [sys.executable, "-c", f"import sys, manifpt.pipeline; print({heavy})"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
