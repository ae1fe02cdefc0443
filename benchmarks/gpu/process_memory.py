"""Whole commands, and what each process holds of a GPU meanwhile.

`python -m benchmarks.gpu.process_memory ROWS.jsonl ITEM...`: an item is SIZE:PROGRAM[:ARM], run in
the order that is given: SIZE a case of `benchmarks.commands` (0.5B-300) or a task whose rows lie in
`--rows` (banking77, for `--base`, with `init`'s file); PROGRAM `ours` or `mlx_lm`; ARM a copy of
this tree, `--arm NAME=PATH`, in which something differs.
NVML is asked twenty times a second. Kernels are kept in `--folder`: the first run of a size
compiles them, and its row says so. Needs nvidia-ml-py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.commands import CASES, MemoryWatch, run_command, write_inputs
from benchmarks.learning.driver import code_commit

PROGRAMS = {"ours": "nested-tune train", "mlx_lm": "mlx_lm.lora"}
STAGES = (
    "run directory",
    "step 0",
    "trained ",
    "gate:",
    "outcome",
    "Loading pretrained",
    "Training",
)


def main() -> None:
    """Run the items for which there is time, and append a row of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("items", nargs="+", metavar="SIZE:PROGRAM[:ARM]")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600, help="begin no item after so long")
    parser.add_argument("--base", type=Path, help="of the tasks")
    parser.add_argument("--rows", type=Path, help="TASK/train.jsonl and valid.jsonl of each task")
    parser.add_argument("--arm", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--folder", type=Path, default=Path("build/process-memory"))
    options = parser.parse_args()
    trees = {"": Path.cwd()} | {
        one.partition("=")[0]: Path(one.partition("=")[2]) for one in options.arm
    }
    end = time.monotonic() + options.seconds
    for item in options.items:
        if time.monotonic() > end:
            print(f"left out: {item}", flush=True)
            continue
        size, program, arm = (*item.split(":"), "")[:3]
        folder = options.folder.resolve() / size
        is_first = not (folder / f"ran-{program}").exists()
        command = write_command(size, program, folder, options)
        row = run(command, make_environment(folder.parent, trees[arm], options.gpu), options.gpu)
        (folder / f"ran-{program}").touch()
        about = {"model": size, "program": PROGRAMS[program], "arm": arm, "first": is_first}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(about | {'commit': code_commit()} | row)}\n")
        print(item, row["code"], row["seconds"], "s, at most", row["most_mib"], "MiB", flush=True)


def write_command(size: str, program: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """Write the inputs of a size, once, and return the words of a program after Python's name."""
    out = folder / f"out-{program}"
    shutil.rmtree(out, ignore_errors=True)
    ours = ["-m", "flows.cli", "train", "--run-dir", str(out), "-c"]
    theirs = ["-m", "mlx_lm", "lora", "--train", "--adapter-path", str(out), "-c"]
    words = ours if program == "ours" else theirs
    if size in CASES:
        file = write_inputs(folder, CASES[size]) / "lora.yaml"
        return [*words, str(file), "--iters", str(CASES[size].iterations)]
    if not (folder / "data").exists():
        from benchmarks.learning.pairs import commands

        shutil.copytree(options.rows / size, folder / "data")
        for arm in ("c", "k"):
            commands(arm, options.base.resolve(), folder, seed=1)
    return [*words, str(folder / f"{'c' if program == 'ours' else 'k'}.yaml")]


def make_environment(folder: Path, tree: Path, gpu: int) -> dict[str, str]:
    """Return the variables of a command: the tree that it runs, its GPU, and a place of kernels."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])
    places = {
        "PYTHONPATH": path,
        "TMPDIR": str(folder / "tmp"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    return os.environ | places | {"CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1"}


def run(command: list[str], environment: dict[str, str], gpu: int) -> dict[str, Any]:
    """Run a command: its seconds and exit code, when stages began, and MiB over time.

    `mib_of_all_and_of_processes` is what `MemoryWatch.seen` has.
    """
    watch = MemoryWatch(gpu)
    row = run_command(command, environment)
    most, lines = watch.stop(), row.pop("lines")
    return row | {
        "most_mib": most // 2**20,
        "start": lines[0][0] if lines else None,
        "stages": [(at, line[:110]) for at, line in lines if any(one in line for one in STAGES)],
        "mib_of_all_and_of_processes": watch.seen,
    }


if __name__ == "__main__":
    main()
