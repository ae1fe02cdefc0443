"""Seconds until a verdict on a CPU: `python -m benchmarks.cpu_commands ROWS.jsonl --base --data`.

`nested-tune train` with its gate beside `mlx_lm.lora`, whole commands in turns, with one file: 100
rows three times, as `init` has it, in 38 steps of 8, all layers, the rows of valid.jsonl read
before and after. The base is copied in float32, for MLX multiplies bfloat16 on a CPU without BLAS;
both have the same OpenBLAS, which mlx_lm.lora does not load by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.commands import run_command

ROWS, VALID_ROWS, STEPS, BATCH, LENGTH = 100, 30, 38, 8, 128
PROGRAMS = ("nested-tune train", "mlx_lm.lora")
WITH_OPENBLAS = """
import ctypes, runpy, sys
ctypes.CDLL("libopenblas.so.0", ctypes.RTLD_GLOBAL)
sys.argv[0] = "mlx_lm.lora"
runpy.run_module("mlx_lm.lora", run_name="__main__")
"""


def main() -> None:
    """Measure the turns that the file lacks, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="has train.jsonl and valid.jsonl")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--label", default="", help="the commit, say")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.open()] if options.rows.exists() else []
    begun = sum(row["label"] == options.label for row in rows) // len(PROGRAMS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options.base, options.data)
        for turn in range(begun, options.turns):
            for program in PROGRAMS:
                row = {"turn": turn, "program": program, "label": options.label}
                rows.append(row | run(program, folder))
                with options.rows.open("a", encoding="utf-8") as file:
                    file.write(f"{json.dumps(rows[-1])}\n")
                print(rows[-1]["program"], rows[-1]["seconds"], rows[-1]["code"], flush=True)
    for key in ("seconds", "cpu_seconds"):
        ours, theirs = (
            [row[key] for row in rows if (row["program"], row["label"]) == (name, options.label)]
            for name in PROGRAMS
        )
        ratios = [round(a / b, 2) for a, b in zip(ours, theirs, strict=True)]
        print(f"{key}: median {statistics.median(ratios):.2f} of mlx_lm.lora's ({ratios})")


def write_inputs(folder: Path, base: Path, data: Path) -> None:
    """Write the base in float32, the first rows of both splits, and the file of both programs."""
    from nested_core.backend import prepare

    prepare()
    import mlx.core as mx

    model = shutil.copytree(base, folder / "base")
    weights: Any = mx.load(str(base / "model.safetensors"))
    wide = {name: array.astype(mx.float32) for name, array in weights.items()}
    mx.save_safetensors(str(model / "model.safetensors"), wide, metadata={"format": "mlx"})
    (folder / "data").mkdir()
    for split, count in (("train", ROWS), ("valid", VALID_ROWS)):
        lines = (data / f"{split}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines[:count]), "utf-8")
    settings = {
        "model": str(model),
        "data": str(folder / "data"),
        "train": True,
        "iters": STEPS,
        "batch_size": BATCH,
        "max_seq_length": LENGTH,
        "num_layers": -1,
        "learning_rate": 0.0001,
        "mask_prompt": True,
        "val_batches": -1,
        "training": {"sample_tokens": 24},  # as `init` writes it; mlx_lm.lora does not read it
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
    }
    (folder / "lora.yaml").write_text(json.dumps(settings))


def run(program: str, folder: Path) -> dict[str, Any]:
    """Run one program once, see `run_command`."""
    settings, out = ["-c", str(folder / "lora.yaml")], folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    if program == PROGRAMS[0]:
        words = ["-m", "flows.cli", "train", *settings, "--run-dir", str(out)]
    else:
        words = ["-c", WITH_OPENBLAS, *settings, "--adapter-path", str(out)]
    row = run_command(words, os.environ | {"PYTHONUNBUFFERED": "1"})
    return row | {"lines": [(at, line[:120]) for at, line in row["lines"]]}


if __name__ == "__main__":
    main()
