"""What is made ready before mlx is imported, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from nested_core import backend

ROOT = Path(__file__).resolve().parents[2]
LINUX = sys.platform == "linux"


def run(code: str, **environment: str) -> str:
    """Standard output of a Python process that starts without our variables."""
    ours = (backend.GRAPHS_VARIABLE, backend.COMMIT_VARIABLE)
    clean = {k: v for k, v in os.environ.items() if k not in ours}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def with_cuda_package(tmp_path: Path) -> str:
    """A path on which the CUDA build of mlx is found to be installed."""
    folder = tmp_path / "mlx_cuda_13-0.32.4.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-cuda-13\nVersion: 0.32.4\n")
    return f"{ROOT}:{tmp_path}"


ASK = """
import nested_core, os
print(*(os.environ.get(name) for name in ("MLX_USE_CUDA_GRAPHS", "MLX_MAX_OPS_PER_BUFFER")))
"""


@pytest.mark.skipif(not LINUX, reason="CUDA is on Linux")
def test_with_mlx_for_cuda_kernels_are_started_without_graphs_unless_somebody_chose(
    tmp_path: Path,
) -> None:
    path = with_cuda_package(tmp_path)
    assert run(ASK, PYTHONPATH=path) == "0 25"
    chosen = {"MLX_USE_CUDA_GRAPHS": "1", "MLX_MAX_OPS_PER_BUFFER": "77"}
    assert run(ASK, PYTHONPATH=path, **chosen) == "1 77"


@pytest.mark.skipif(
    any(d.name.startswith("mlx-cuda") for d in metadata.distributions()), reason="mlx is for CUDA"
)
def test_without_mlx_for_cuda_its_settings_are_left_alone() -> None:
    assert run(ASK) == "None None"


FAULTS = """
import os, resource
import nested_core
import mlx.core as mx
a = mx.random.normal((1024, 1024))
def step(): mx.eval([a + i for i in range(20)])
step()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5): step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(3)))  # the system may take idle pages back meanwhile
"""


@pytest.mark.skipif(not LINUX or backend.device() != "cpu", reason="about glibc and a Linux CPU")
def test_arrays_take_memory_that_is_free_again_and_not_new_pages() -> None:
    pages_of_an_array = 1024 * 1024 * 4 // 4096
    assert int(run(FAULTS)) < pages_of_an_array  # of 100 arrays together


AT_THE_END = """
import atexit, sys

def held():
    '''How many compiled functions modules hold.'''
    everything = [v for m in list(sys.modules.values()) for v in vars(m).values()]
    return sum(type(value).__name__ == "_gc_func" for value in everything)

atexit.register(lambda: print(held()))  # registered first, it runs last
import nested_core, mlx.core as mx, mlx.nn as nn
mx.eval(nn.silu(mx.ones(3)))
assert type(nn.silu) is type(mx.compile(held))
print(held() > 0)
"""


def test_at_the_end_of_a_process_no_module_holds_a_compiled_function() -> None:
    assert run(AT_THE_END).split() == ["True", "0"]
