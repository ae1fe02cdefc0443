"""The example's fine-tune as a whole process, against stock mlx_lm.lora with the same file.

Ours reads and judges the data, trains, evaluates the whole validation set, writes checkpoints and
passes the gate in that time; mlx_lm.lora trains and evaluates.
"""

from __future__ import annotations

import sys
import tempfile
from ctypes.util import find_library
from pathlib import Path

from benchmarks.timing import Arm, report, time_in_turn

REPEATS = 5
CONFIG = "examples/geography.yaml"
WITHOUT = {"NESTED_TUNE_NO_OPENBLAS": "1"}


def main() -> None:
    """Run the comparison from the root of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = time_in_turn(_arms(Path(folder)), REPEATS)
    report("finetune_example", seconds, "mlx_lm.lora")


def _arms(folder: Path) -> list[Arm]:
    stock = [sys.executable, "-m", "mlx_lm", "lora", "-c", CONFIG, "--train", "--adapter-path"]
    ours = [str(Path(sys.executable).with_name("nested-tune")), "train", "-c", CONFIG, "--run-dir"]
    arms = [
        Arm("mlx_lm.lora", [*stock, str(folder / "stock-{n}")], {}),
        Arm("nested-tune", [*ours, str(folder / "plain-{n}")], WITHOUT),
    ]
    library = find_library("openblas")
    if library is None:
        print("OpenBLAS is not installed: its rows are left out.", file=sys.stderr)
        return arms
    preload = {"LD_PRELOAD": library}
    return [
        *arms,
        Arm("nested-tune with OpenBLAS", [*ours, str(folder / "fast-{n}")], {}),
        Arm("mlx_lm.lora with OpenBLAS", [*stock, str(folder / "stock-fast-{n}")], preload),
    ]


if __name__ == "__main__":
    main()
