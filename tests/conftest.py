"""What every test runs under: no hub, no telemetry, a Prefect home of its own, OpenBLAS first.

Temporary folders lie in memory where the machine has room for them: most of the suite's files are
synced. tests/left_out.py has the markers by which `make test` and `make test-all` divide the tests.
"""

from __future__ import annotations

import atexit
import gc
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nested_core.storage.user_cache import cache_folder
from nested_core.storage.user_tmpdir import KERNELS_FOLDER_VARIABLE, USER_TMPDIR_VARIABLE

SHARED_VARIABLE = "NESTED_TUNE_TESTS_SHARED"
_PREFECT_HOME = Path(tempfile.mkdtemp(prefix="nested-tune-prefect-"))
atexit.register(shutil.rmtree, _PREFECT_HOME, ignore_errors=True)

# Compiled kernels stay from session to session, in the user's own folder.
os.environ.setdefault(KERNELS_FOLDER_VARIABLE, str(cache_folder() / "kernels"))

# So does what is made once for all workers and sessions.
os.environ.setdefault(SHARED_VARIABLE, str(cache_folder() / "tests"))

# Set before anything is imported: Prefect and the tokenizers read them once. Children inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    DO_NOT_TRACK="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_HOME=str(_PREFECT_HOME),
    NESTED_TUNE_CACHE=str(_PREFECT_HOME / "cache"),
    MLX_ENABLE_TF32="0",  # on a GPU too, float32 is compared to its last bits
)
for _name in ("PREFECT_API_URL", "PREFECT_PROFILE", "COLUMNS"):
    os.environ.pop(_name, None)
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker a core: further threads only wait, spinning.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}

from hypothesis import HealthCheck, is_hypothesis_test, settings  # noqa: E402

from nested_core import backend  # noqa: E402

_FOLDER_OF_ALL_WORKERS = os.environ.get("TMPDIR", "")
backend.prepare()  # before a test imports mlx
if "PYTEST_XDIST_WORKER" in os.environ and _FOLDER_OF_ALL_WORKERS:
    os.environ["TMPDIR"] = _FOLDER_OF_ALL_WORKERS  # of two workers one compiles a kernel

from tests import child_output  # noqa: E402
from tests.fork_server import FORKED_PROGRAMS, forking_python  # noqa: E402
from tests.kernels import read_header_once  # noqa: E402
from tests.left_out import LeftOut, check_reasons  # noqa: E402
from tests.leftovers import WORKER_VARIABLE, Heard, Watch, explain  # noqa: E402
from tests.prefect_home import new_prefect_home  # noqa: E402

# Temporary files of this process and of those that it starts lie in a folder of their own.
TEMPORARY_FOLDER = Path(tempfile.gettempdir())
os.environ[USER_TMPDIR_VARIABLE] = tempfile.tempdir = tempfile.mkdtemp(prefix="tests-")
atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

os.environ[WORKER_VARIABLE] = str(os.getpid())
WATCH = pytest.StashKey[Watch]()

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


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option of `python -m tests.again`."""
    parser.addoption("--file-order-seed", type=int, help="shuffle the files by this seed")


def pytest_configure(config: pytest.Config) -> None:
    """Make ready, before the workers start, what their kernels are compiled from."""
    config.stash[WATCH] = Watch(Heard(), folders_to_write_in(config.rootpath))
    config.pluginmanager.register(LeftOut(config), "left-out")
    config.pluginmanager.register(child_output, "child-output")
    if config.getoption("numprocesses", None):
        read_header_once(_PREFECT_HOME / "include")
    folder = MEMORY_FOLDER if memory_has_room() else TEMPORARY_FOLDER
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(folder))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Any:
    """Look for no garbage among imports and tests, which stay: a quarter of the collection's time.

    They are left out of later looks, too.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a test that is slow without a reason, before `-m` selects; order the files.

    Those with tests of Prefect's server come first. The first worker begins with them, and when
    another has nothing left they are done: so there is one server, which takes ten seconds.
    """
    check_reasons(items)
    seed = config.getoption("file_order_seed")
    if seed is None:
        served = {item.path for item in items if "prefect_server" in fixture_names(item)}
        items.sort(key=lambda item: item.path not in served)
    else:
        files = list(dict.fromkeys(item.path for item in items))
        random.Random(seed).shuffle(files)
        items.sort(key=lambda item: files.index(item.path))


def fixture_names(item: pytest.Item) -> list[str]:
    """The fixtures that a test is made with, those of its fixtures included."""
    return item.fixturenames if isinstance(item, pytest.Function) else []


def folders_to_write_in(root: Path) -> list[Path]:
    """Where a test may leave files: temporary folders, and what tools keep from run to run."""
    caches = [Path(os.environ[name]) for name in (KERNELS_FOLDER_VARIABLE, SHARED_VARIABLE)]
    tools = [root / name for name in (".hypothesis", ".pytest_cache", "build")]
    return [TEMPORARY_FOLDER, MEMORY_FOLDER, *caches, *tools, Path("/dev"), Path("/proc")]


def memory_has_room() -> bool:
    """Whether temporary files may lie in memory: a folder that is ours to write, and large."""
    if not os.access(MEMORY_FOLDER, os.W_OK):
        return False
    system = os.statvfs(MEMORY_FOLDER)
    may_execute = not system.f_flag & os.ST_NOEXEC  # tests write programs and run them
    return may_execute and system.f_bavail * system.f_frsize >= MEMORY_BYTES


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the Prefect server's database."""
    return new_prefect_home(tmp_path_factory.mktemp("prefect"))


@pytest.fixture(scope="session")
def prefect_server(prefect_home: Path) -> Iterator[None]:
    """One Prefect server for all tests of a worker."""
    from tests.flows.conftest import serving_prefect  # imports Prefect, which most tests do not

    with serving_prefect(prefect_home):
        yield


@pytest.fixture(scope="session")
def command_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run of the example by `train --json`, that tests look at and do not change."""
    from tests.flows.conftest import make_command_run

    return make_command_run(tmp_path_factory.mktemp("command"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that tests have judged and copy: eight steps of tiers [1, 2, 4]."""
    from tests.builders.candidates import train_finished

    return train_finished(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def forked_ranks() -> Iterator[None]:
    """Fork the ranks that a test of this module starts, but not what starts and watches them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", forking_python())
        yield


@pytest.fixture(autouse=True)
def _a_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves something behind; by its name this is around all other fixtures."""
    watch = request.config.stash[WATCH]
    watch.begin()
    yield
    left = watch.end(compares_random_states=not is_hypothesis_test(request.function))
    if left:
        pytest.fail(explain(left), pytrace=False)


@pytest.fixture
def started_cell(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cell of this process is started, not forked, and ends with the test.

    Its memory is then that of the process started.
    """
    from nested_core.models.tokenizer_cell import end_kept_cell
    from nested_core.process import child

    monkeypatch.setattr(child, "subprocess", subprocess)
    end_kept_cell()
    yield
    end_kept_cell()


@pytest.fixture
def own_random_state() -> Iterator[None]:
    """Put the global states of `random` and numpy back, for code that seeds or draws from them."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    yield
    random.setstate(of_python)
    np.random.set_state(of_numpy)  # noqa: NPY002


@pytest.fixture(autouse=True, scope="session")
def _forked_proof() -> Iterator[None]:
    """Fork the process that loads an adapter for the gate, but for tests with `new_process`."""
    if "nested_core.gate" not in sys.modules:
        yield  # tests that judge nothing need not import the gate
        return
    from nested_core.process import child

    def fork(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        assert command[:3] == [sys.executable, "-P", str(child.PROGRAM)]
        if Path(command[3]).name in FORKED_PROGRAMS:
            env = {name: value for name, value in env.items() if name != "LD_PRELOAD"}
            command = [forking_python(), *command[1:]]
        return subprocess.Popen(command, env=env, **options)

    launched = SimpleNamespace(
        Popen=fork, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "subprocess", launched)
        yield
