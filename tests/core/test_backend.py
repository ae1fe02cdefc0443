"""What is made ready before mlx is imported, each in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest

from nested_core import backend
from nested_core.measure.fresh_process.starting import MLX_LM_PROGRAM
from nested_core.models.base_model import estimate_weight_count
from tests.example import DATA, MODEL
from tests.left_out import slow_except

ROOT = Path(__file__).resolve().parents[2]
LINUX = sys.platform == "linux"


def run(code: str, *arguments: str, **environment: str) -> str:
    """Standard output of a Python process that starts without our variables."""
    ours = (
        backend.CUDA_GRAPHS_VARIABLE,
        backend.OPERATIONS_PER_COMMIT_VARIABLE,
        backend.OPENBLAS_WAIT_VARIABLE,
        backend.NO_OPENBLAS_VARIABLE,
    )
    clean = {k: v for k, v in os.environ.items() if k not in ours}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
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
import sys, os
from nested_core.backend import prepare_for_model_size, prepare
prepare()
import mlx.core as mx
limits = []
mx.set_cache_limit = limits.append
prepare_for_model_size(int(sys.argv[1]))
names = ("MLX_USE_CUDA_GRAPHS", "MLX_MAX_OPS_PER_BUFFER", "MLX_CUDA_SDPA_CACHE_SIZE")
print(*(os.environ.get(name) for name in (*names, "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE")), *limits)
"""


@pytest.mark.slow("a process that imports MLX")
@pytest.mark.skipif(not LINUX, reason="CUDA is on Linux")
def test_with_mlx_for_cuda_a_model_chooses_how_kernels_are_started_unless_somebody_did(
    tmp_path: Path,
) -> None:
    path = with_cuda_package(tmp_path)
    assert run(ASK, "199999999", PYTHONPATH=path) == f"0 100 8192 256 {64 * 2**20}"
    assert run(ASK, "200000000", PYTHONPATH=path) == "0 25 8192 256"
    assert run(ASK, "899999999", PYTHONPATH=path) == "0 25 8192 256"
    assert run(ASK, "1000000000", PYTHONPATH=path) == "0 8 8192 256"
    chosen = {"MLX_USE_CUDA_GRAPHS": "1", "MLX_MAX_OPS_PER_BUFFER": "77"}
    chosen |= {"MLX_CUDA_SDPA_CACHE_SIZE": "300", "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE": "9"}
    assert run(ASK, "1000000000", PYTHONPATH=path, **chosen) == "1 77 300 9"


@pytest.mark.skipif(
    any(d.name.startswith("mlx-cuda") for d in metadata.distributions()), reason="mlx is for CUDA"
)
def test_without_mlx_for_cuda_its_settings_are_left_alone() -> None:
    assert run(ASK, "1000") == "None None None None"


FAULTS = """
import os, resource
from nested_core import backend
backend.prepare()
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


PRODUCTS_WITH_PAUSES = """
import os, time
from nested_core import backend
backend.prepare()
import mlx.core as mx
a = mx.random.normal((256, 256))
mx.eval(a @ a)
def pause():
    mx.eval(a @ a)
    began = time.process_time()
    time.sleep(0.02)  # of this thread: what the process computes meanwhile is OpenBLAS' waiting
    return time.process_time() - began
print(os.environ.get("OPENBLAS_THREAD_TIMEOUT"), min(pause() for _ in range(30)))
"""


@pytest.mark.skipif(not LINUX or backend.device() != "cpu", reason="about OpenBLAS on a Linux CPU")
def test_threads_of_openblas_sleep_in_pauses_of_0_6_seconds_unless_somebody_set_how_long() -> None:
    variable, seconds = run(PRODUCTS_WITH_PAUSES, OPENBLAS_NUM_THREADS="2").split()
    assert variable == "18"
    # Measured: 0.0001; where the threads wait in a loop, as they do by themselves, 0.02.
    assert float(seconds) < 0.002
    assert run(PRODUCTS_WITH_PAUSES, OPENBLAS_THREAD_TIMEOUT="26").startswith("26 ")


AT_THE_END = """
import atexit, sys

def held():
    '''How many compiled functions modules hold.'''
    everything = [v for m in list(sys.modules.values()) for v in vars(m).values()]
    return sum(type(value).__name__ == "_gc_func" for value in everything)

atexit.register(lambda: print(held()))  # registered first, it runs last
from nested_core import backend
backend.prepare()
import mlx.core as mx, mlx.nn as nn
mx.eval(nn.silu(mx.ones(3)))
assert type(nn.silu) is type(mx.compile(held))
print(held() > 0)
"""


def test_at_the_end_of_a_process_no_module_holds_a_compiled_function() -> None:
    assert run(AT_THE_END).split() == ["True", "0"]


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ('{"quantization": {"bits": 4}}', 4000),
        ("{}", 1000),
        ('{"quantization": {"bits": 0}}', 1000),
        ('{"quantization": {"bits": "4"}}', 1000),
        ('{"quantization": []}', 1000),
        ("[" * 100_000, 1000),
        (None, 1000),
    ],
)
def test_the_weights_of_a_folder_are_counted_by_their_bits(tmp_path, config, weights) -> None:
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / name).write_bytes(b"0" * 1000)
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    if config is None:
        os.mkfifo(tmp_path / "config.json")  # nobody ever writes into it
    else:
        (tmp_path / "config.json").write_text(config)
    assert estimate_weight_count(tmp_path) == weights


LOADED = """
import os, sys
from pathlib import Path
from nested_core import backend
backend.prepare()
from nested_core.pipeline import steps
from nested_core.storage.run_directory import RunDirectory
from tests.example import example_config
config, run = example_config(), RunDirectory(Path(sys.argv[1]))
steps.write_initial_adapter_and_tiers(config, run)
print(os.environ["MLX_MAX_OPS_PER_BUFFER"])
"""


@pytest.mark.slow("a process that imports MLX")
@pytest.mark.skipif(not LINUX, reason="CUDA is on Linux")
def test_a_run_chooses_by_its_base_model(tmp_path: Path) -> None:
    path = with_cuda_package(tmp_path)
    assert run(LOADED, str(tmp_path / "run"), PYTHONPATH=path) == "100"


LOOK = """
import sys
from nested_core.data.tokens.tokenizer_source import TokenizerSource

def load_tokenizer(request):
    TokenizerSource(request["model"]).load()
    return look()

def look():
    imported = ["mlx_lm" in sys.modules, "torch" in sys.modules]
    from transformers.utils import is_torch_available
    is_seen = is_torch_available()
    import torch
    return {"mlx_lm, torch": imported, "seen by transformers": is_seen, "later": torch.__version__}
"""
REQUEST = json.dumps(
    {"job": "look:load_tokenizer", "model": str(MODEL), "seconds_to_load": 60, "characters": 0}
)
# What imports mlx_lm in each process of nested-tune; a worker's job looks for itself.
PROCESSES = {
    "a command": f"""
from flows.cli import main
main(["validate", "--model", {str(MODEL)!r}, "--data", {str(DATA)!r}, "--show", "1"])
""",
    "a process that makes tokens": f"""
import json, sys
from nested_core.models.tokenizer_cell_program import do_job
print(json.dumps(do_job(json.loads({REQUEST!r}))))
sys.exit()
""",
    "a flow that a worker of Prefect runs": "import flows.finetune, mlx_lm",
    "the fresh process": f"import runpy; runpy.run_path({str(MLX_LM_PROGRAM)!r})",
}
FAST_PROCESSES = ("the fresh process",)


def install_torch(folder: Path) -> str:
    """Install a torch of one line; the path on which it is found, and the project."""
    (folder / "torch.py").write_text("__version__ = '2.11.0'")
    description = folder / "torch-2.11.0.dist-info"
    description.mkdir()
    (description / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    return f"{folder}:{ROOT}"


@pytest.mark.parametrize(
    "process", slow_except(PROCESSES, *FAST_PROCESSES, reason="imports what a training imports")
)
def test_no_process_of_ours_imports_an_installed_torch_and_whoever_wants_it_can(
    process: str, tmp_path: Path
) -> None:
    check_that_no_torch_is_imported(PROCESSES[process], tmp_path)


def check_that_no_torch_is_imported(process: str, folder: Path) -> None:
    """Assert that a process imports no torch, and that whoever asks for it later has it."""
    path = install_torch(folder)
    (folder / "look.py").write_text(LOOK)
    code = f"{process}\nimport json, look; print(json.dumps(look.look()))"
    printed = json.loads(run(code, PYTHONPATH=path).splitlines()[-1])
    assert printed == {
        "mlx_lm, torch": [True, False],
        "seen by transformers": False,
        "later": "2.11.0",
    }


HIDE = """
import sys
from nested_core.backend import hide_torch_from_transformers
def hide():
    hide_torch_from_transformers()
    hide_torch_from_transformers()
"""
TRANSFORMERS = """
from importlib.util import find_spec
print("with torch" if find_spec("torch") else "without")
"""


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("hide(); import transformers", "without"),
        ("import torch; hide(); import transformers", "with torch"),
        ("import transformers; hide()", "with torch"),
    ],
    ids=["nothing before", "torch before", "transformers before"],
)
def test_torch_stays_visible_where_somebody_imported_it_or_transformers_before(
    code: str, seen: str, tmp_path: Path
) -> None:
    path = install_torch(tmp_path)
    (tmp_path / "transformers.py").write_text(TRANSFORMERS)
    assert run(f"{HIDE}\n{code}; import torch", PYTHONPATH=path) == seen


def test_torch_can_be_imported_after_transformers_could_not(tmp_path: Path) -> None:
    path = install_torch(tmp_path)
    (tmp_path / "transformers.py").write_text("import no_such_module")
    code = "hide()\ntry: import transformers\nexcept ImportError as error: print(error.name)"
    end = "import torch; print(torch.__version__, len(set(sys.meta_path)) == len(sys.meta_path))"
    printed = run(f"{HIDE}\n{code}\n{end}", PYTHONPATH=path)
    assert printed.split() == ["no_such_module", "2.11.0", "True"]


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_is_looked_for_after_imports_as_before(was_enabled: bool) -> None:
    before = gc.isenabled(), gc.get_freeze_count()
    try:
        (gc.enable if was_enabled else gc.disable)()
        with suppress(ImportError), backend.collecting_no_garbage():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() is was_enabled
        assert gc.get_freeze_count() == before[1]  # nothing was imported
    finally:
        (gc.enable if before[0] else gc.disable)()


def test_what_is_imported_is_left_out_of_collections_and_garbage_made_later_is_not() -> None:
    code = """
import gc, weakref
from nested_core.backend import collecting_no_garbage
with collecting_no_garbage():
    import mlx.nn
class Node: pass
node = Node()
node.itself, gone = node, weakref.ref(node)
del node
gc.collect()
print(gc.get_freeze_count() > 10_000, gc.isenabled(), gone() is None)
"""
    assert run(code) == "True True True"
