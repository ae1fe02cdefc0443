"""What every test runs under: no hub, no telemetry, a Prefect home of its own, OpenBLAS first.

Temporary folders lie in memory where the machine has room for them: most of the suite's files are
synced. tests/left_out.py has the markers by which `make test` and `make test-all` divide the tests.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nested_core.storage.compiled_kernels import KERNELS_FOLDER_VARIABLE, cache_folder

_PREFECT_HOME = Path(tempfile.mkdtemp(prefix="nested-tune-prefect-"))
atexit.register(shutil.rmtree, _PREFECT_HOME, ignore_errors=True)

# Compiled kernels stay from session to session, in the user's own folder.
os.environ.setdefault(KERNELS_FOLDER_VARIABLE, str(cache_folder() / "kernels"))

# What is made once for all workers of a session lies in the folder of the process that starts them.
os.environ.setdefault("NESTED_TUNE_TESTS_SHARED", str(_PREFECT_HOME))

# Set before anything is imported: Prefect and the tokenizers read them once. Children inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_HOME=str(_PREFECT_HOME),
    NESTED_TUNE_CACHE=str(_PREFECT_HOME / "cache"),
)
for _name in ("PREFECT_API_URL", "PREFECT_PROFILE"):
    os.environ.pop(_name, None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a worker a core: further threads only wait, spinning

from hypothesis import HealthCheck, settings  # noqa: E402

from nested_core import backend  # noqa: E402

_FOLDER_OF_ALL_WORKERS = os.environ.get("TMPDIR", "")
backend.prepare()  # before a test imports mlx
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["TMPDIR"] = _FOLDER_OF_ALL_WORKERS  # of two workers one compiles a kernel

from tests.fork_server import forking_python, python  # noqa: E402
from tests.kernels import read_header_once  # noqa: E402
from tests.left_out import LeftOut, check_reasons  # noqa: E402

MEMORY_FOLDER = Path("/dev/shm")
MEMORY_BYTES = 4 * 2**30  # the suite keeps under 1 GiB of temporary files at a time

settings.register_profile(
    "default",
    deadline=None,  # the first call of an MLX operation compiles it
    derandomize=bool(os.environ.get("CI")),  # CI repeats itself; a developer's run explores
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    """Make ready, before the workers start, what their kernels are compiled from."""
    config.pluginmanager.register(LeftOut(config), "left-out")
    if config.getoption("numprocesses", None):
        read_header_once(_PREFECT_HOME / "include")
    if memory_has_room():
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_FOLDER))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test that is slow without a reason, before `-m` selects."""
    check_reasons(items)


def memory_has_room() -> bool:
    """Whether temporary files may lie in memory: a folder that is ours to write, and large."""
    if not os.access(MEMORY_FOLDER, os.W_OK):
        return False
    system = os.statvfs(MEMORY_FOLDER)
    may_execute = not system.f_flag & os.ST_NOEXEC  # tests write programs and run them
    return may_execute and system.f_bavail * system.f_frsize >= MEMORY_BYTES


@pytest.fixture(scope="module")
def forked_ranks() -> Iterator[None]:
    """Fork the ranks that a test of this module starts, but not what starts and watches them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", forking_python())
        yield


@pytest.fixture(autouse=True)
def _forked_proof(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the process that loads an adapter for the gate, except for tests with `new_process`."""
    if "nested_core.gate" not in sys.modules or "new_process" in request.fixturenames:
        return  # a test that judges nothing need not import the gate
    from nested_core.gate import fresh_process_check

    def run(command: list[str], *, env: dict[str, str], timeout: float, **_: Any) -> Any:
        assert command[:2] == [sys.executable, "-P"]
        done = python(*command[2:], env=env, timeout=timeout)
        return SimpleNamespace(returncode=done.returncode, stderr=done.stderr.encode())

    launched = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(fresh_process_check, "subprocess", launched)
