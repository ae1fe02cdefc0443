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
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.commands import CASES, write_inputs
from benchmarks.learning.driver import code_commit

PROGRAMS = {"ours": "nested-tune train", "mlx_lm": "mlx_lm.lora"}
LOOK_SECONDS = 0.05
SHOWN_MIB = 64  # a smaller change of what all hold makes no entry
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

    `mib_of_all_and_of_processes` has seconds, what all hold beyond what was held before, and what
    each process holds, the largest first.
    """
    watch, lines = Watch(gpu), list[tuple[float, str]]()
    with subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines += ((watch.now(), line.rstrip()) for line in process.stdout or ())
    seconds = watch.now()
    seen = watch.stop()
    stages = [(at, line[:110]) for at, line in lines if any(one in line for one in STAGES)]
    return {
        "seconds": seconds,
        "code": process.returncode,
        "most_mib": max((every for _, every, _ in seen), default=0),
        "start": lines[0][0] if lines else None,
        "stages": stages,
        "mib_of_all_and_of_processes": seen,
    }


class Watch:
    """What processes hold of a GPU, from now on until it is stopped."""

    def __init__(self, gpu: int) -> None:
        """Begin to look."""
        self._began = time.monotonic()
        self._seen: list[tuple[float, int, list[int]]] = []
        self._most = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(gpu,))
        self._thread.start()

    def now(self) -> float:
        """The seconds since it began."""
        return round(time.monotonic() - self._began, 2)

    def stop(self) -> list[tuple[float, int, list[int]]]:
        """End it; what it saw, where that changed."""
        self._is_over.set()
        self._thread.join()
        return self._seen

    def _look(self, gpu: int) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            device = pynvml.nvmlDeviceGetHandleByIndex(gpu)
        except Exception:  # noqa: BLE001  # no NVIDIA GPU, or no library for one
            return
        before, last = int(pynvml.nvmlDeviceGetMemoryInfo(device).used), -SHOWN_MIB
        while not self._is_over.wait(LOOK_SECONDS):
            held = (int(pynvml.nvmlDeviceGetMemoryInfo(device).used) - before) // 2**20
            if abs(held - last) >= SHOWN_MIB or held > max(
                e for _, e, _ in [*self._seen, (0, 0, [])]
            ):
                processes = pynvml.nvmlDeviceGetComputeRunningProcesses(device)
                own = sorted(((one.usedGpuMemory or 0) // 2**20 for one in processes), reverse=True)
                self._seen.append((self.now(), held, own))
                last, self._most = held, max(held, self._most)


if __name__ == "__main__":
    main()
