"""Files of others are opened in one place: untrusted_files.py, for all that others have written.

A plain open would follow a link, wait for a pipe, or read a device without end.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
THE_ONE_PLACE = "nested_core/storage/untrusted_files.py"
# Names of what opens a path: the built-in, functions of modules, methods of paths.
OPENING = {"open", "read_text", "read_bytes", "safe_open", "memmap", "fromfile", "load_file"}
MODULES_THAT_LOAD = {"mx", "np", "numpy", "json", "yaml", "pickle"}  # their load() of a path
# How often a file may do so at most, and why that is no path of others.
EXCEPTIONS = {
    "flows/cli.py": (2, "/dev/null"),
    "flows/flow_runs/prefect_logs.py": (1, "/dev/null"),
    "flows/commands/prefect_notice.py": (1, "this user's own profiles of Prefect"),
    "flows/process/stop_signals.py": (1, "a pipe of its own"),
    "nested_core/storage/main_memory.py": (1, "a limit that the kernel shows in /sys"),
    "nested_core/rooms/housekeeping/removal.py": (1, "what the kernel says in /proc of mounts"),
    "nested_core/rooms/kernel_folder/compiled_kernels.py": (
        3,
        "its own folder, mode 0700, owner checked",
    ),
    "nested_core/process/child_main.py": (1, "/dev/null"),
    "nested_core/rooms/restart/restarting.py": (4, "what the kernel says in /sys and /proc"),
    "nested_core/rooms/export/gguf/gguf_file.py": (1, "a GGUF, which MLX reads from its path"),
    "nested_core/rooms/scorers/scoring_process.py": (1, "/dev/null"),
    "nested_core/measure/fresh_process/mlx_lm_program.py": (
        3,
        "imports nothing of ours: adapters as mlx_lm reads them",
    ),
    "nested_core/rooms/mirror/object_storage.py": (1, "writes a file in a new folder"),
    "nested_core/rooms/near_duplicates/word_ngrams.py": (1, "bytes that were read strictly before"),
    "nested_core/process/cell.py": (
        2,
        "what the system says of a process; whether a file has data, with O_NONBLOCK",
    ),
    "nested_core/rooms/cuda/kernel_launch.py": (1, "a file of this package"),
    "nested_core/text/html_markup.py": (1, "a file of this package"),
    "nested_core/rooms/controls/results.py": (1, "a file of this package"),
    "nested_core/rooms/controls/probes.py": (1, "a file of this package"),
    "nested_core/rooms/suspect_rows/rows_compared.py": (1, "a file of this package"),
    "nested_core/rooms/export/server_process.py": (1, "a file that its parent made"),
    "nested_core/measure/fresh_process/questions.py": (1, "a file that its parent made"),
    "nested_core/seams.py": (1, "a file of this package"),
    "nested_core/data/sources/split_files.py": (2, "writes files in a new folder"),
    "nested_core/data/tokens/example_encoding.py": (1, "writes a file in a new folder"),
    "nested_core/data/tokens/tokenized_split.py": (1, "writes a file in a new folder"),
    "nested_core/data/rules/related_lines.py": (1, "a file that a worker of its own wrote there"),
    "nested_core/storage/atomic.py": (
        3,
        "writes under a new name, with its mode; syncs what was written",
    ),
    "nested_core/storage/safetensors_files.py": (1, "opened strictly before"),
    "nested_core/models/base_model.py": (1, "weights, which were hashed strictly before"),
    "nested_core/data/tokens/parallel_tokenization.py": (1, "writes a file in a new folder"),
    "nested_core/pipeline/device_lock.py": (2, "a lock in a folder of this user"),
    "nested_core/registry/folders.py": (3, "a lock, opened with O_NOFOLLOW and O_NONBLOCK"),
    "nested_core/storage/lock_file.py": (4, "locks, opened with O_NOFOLLOW and O_NONBLOCK"),
    "nested_core/storage/run_directory.py": (4, "a lock"),
    "nested_core/registry/ledger.py": (2, "appends and cuts, with O_NOFOLLOW, under the lock"),
}


def openings(source: str) -> Iterator[ast.Call]:
    """The calls that open a path."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in OPENING:
            yield node
        elif isinstance(function, ast.Attribute):
            module = function.value.id if isinstance(function.value, ast.Name) else ""
            is_loading = function.attr == "load" and module in MODULES_THAT_LOAD
            if is_loading or (function.attr in OPENING and module != "BaseModules"):
                yield node


def sources() -> dict[str, str]:
    folders = (ROOT / name for name in ("nested_core", "tasks", "flows"))
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


@pytest.mark.slow("reads the syntax of every source file")
def test_only_one_module_opens_what_others_may_have_made() -> None:
    counts = Counter(name for name, source in sources().items() for _ in openings(source))
    del counts[THE_ONE_PLACE]
    allowed = Counter({name: count for name, (count, _) in EXCEPTIONS.items()})
    assert counts - allowed == Counter()


@pytest.mark.parametrize(
    "line",
    [
        'open("x")',
        'Path("x").open()',
        'path.read_text(encoding="utf-8")',
        "(folder / name).read_bytes()",
        "os.open(path, os.O_RDONLY)",
        "gzip.open(path)",
        "mx.load(str(path))",
        "json.load(file)",
    ],
)
def test_a_plain_open_is_seen(line: str) -> None:
    assert len(list(openings(f"def read(path):\n    return {line}\n"))) == 1


@pytest.mark.parametrize("line", ["read_regular(path)", "mlx_lm.load(path)", "window.reopen(x)"])
def test_what_opens_no_path_is_passed_over(line: str) -> None:
    assert list(openings(line)) == []
