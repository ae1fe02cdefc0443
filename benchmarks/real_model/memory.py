"""The GPU's memory at 135M, by the driver: our phases, mlx_lm's, and ten trainings at once.

`python -m benchmarks.real_model.memory ROWS.jsonl --base build/SmolLM2-135M-Instruct --data DATA`
appends a row for each program: gigabytes that the device held more than before it began, and the
peak of live arrays where the program says it. Nothing else may use the GPU meanwhile. The rows are
those of banking77 (benchmarks/learning/PROTOCOL-2.md), the settings `init`'s, cut to `--steps`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.learning.arms import of_init, question, suggest
from benchmarks.learning.meter import Meter
from benchmarks.learning.tasks import Counts, Splits, read_task

TASK = "banking77"
COUNTS = Counts(train=1336, choose=200, judge=500)
AT_ONCE = 10
GIGABYTE = 1e9
PHASES = "phases"  # the word that has this program train in phases, in a process of its own


def main() -> None:
    """Measure each program once and append its row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    base = options.base.resolve()
    rows = options.rows.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        splits = read_task(TASK, options.data, COUNTS)
        write_inputs(folder, base, splits, options.steps)
        python = [sys.executable, "-m"]
        ours, theirs = [*python, "flows.cli"], [*python, "mlx_lm", "lora", "-c", "theirs.yaml"]
        here = [*python, "benchmarks.real_model.memory"]
        train = [*ours, "train", "-c", "ours.yaml", "--run-dir"]
        asked = ["--suite", "questions.jsonl", "--max-tokens", "32", "--json"]
        measure(rows, folder, "mlx_lm.lora: training", [*theirs, "--train"])
        measure(rows, folder, "mlx_lm.lora: evaluation", [*theirs, "--test", "--data", "test"])
        measure(rows, folder, "mlx_lm: 500 answers", [*here, "answers", "theirs"])
        measure(rows, folder, "ours, phase by phase", [*here, PHASES, "run"])
        measure(rows, folder, "ours: train, whole", [*train, "whole"])
        measure(
            rows, folder, "ours: evaluate of 500 questions", [*ours, "evaluate", "whole", *asked]
        )
        several = [[*train, f"run-{number}"] for number in range(AT_ONCE)]
        measure(rows, folder, f"ours: {AT_ONCE} trainings at once", *several)


def write_inputs(folder: Path, base: Path, splits: Splits, steps: int) -> None:
    """Data, 500 questions, and the files of both programs."""
    splits.write(folder / "data")
    splits.write(folder / "test")
    (folder / "test" / "valid.jsonl").rename(folder / "test" / "test.jsonl")
    questions = "".join(map(question, splits.judge))
    (folder / "questions.jsonl").write_text(questions, encoding="utf-8")
    values = suggest(base, folder)
    values["training"] = {k: v for k, v in values["training"].items() if k != "epochs"}
    values["iters"] = steps
    (folder / "ours.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    theirs = of_init(base, folder) | {
        "model": str(base),
        "data": "data",
        "adapter_path": "theirs",
        "num_layers": -1,
        "iters": steps,
        "val_batches": -1,
        "test_batches": -1,
    }
    (folder / "theirs.yaml").write_text(yaml.safe_dump(theirs), encoding="utf-8")


def measure(rows: Path, folder: Path, name: str, *commands: Sequence[str]) -> None:
    """Run commands at the same time, wait for all, and append what the device held meanwhile."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "NESTED_TUNE_DEVICE_LOCK": "off",
    }
    time.sleep(1)  # the driver frees the memory of the process before
    logs = [folder / f"log-{number}" for number in range(len(commands))]
    with Meter() as meter:
        processes = [
            subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=log.open("wb"),
                stderr=subprocess.STDOUT,
            )
            for command, log in zip(commands, logs, strict=True)
        ]
        codes = [process.wait() for process in processes]
    said = "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)
    peaks = [float(found) for found in re.findall(r"[Pp]eak mem(?:ory)?\W+([\d.]+) GB", said)]
    row: dict[str, Any] = {
        "program": name,
        "device_gb": round(meter.added_bytes / GIGABYTE, 3),
        "held_before_gb": round(meter.samples[0].bytes_in_use / GIGABYTE, 3),
        "said_peak_gb": max(peaks, default=None),
        "seconds": round(meter.seconds, 1),
        "codes": codes,
        "phases": [json.loads(line) for line in said.splitlines() if line.startswith('{"phase"')],
    }
    if any(codes):
        row["said"] = said[-1500:]
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def run_phases(folder: Path) -> None:
    """Train and judge as `nested-tune train` does, and say the memory of each phase by itself."""
    from nested_core.backend import hide_torch_from_transformers, prepare

    hide_torch_from_transformers()
    prepare()
    import mlx.core as mx

    from nested_core.config.loading import parse_config, parse_yaml
    from nested_core.models.session import Session
    from nested_core.pipeline.hooks import Steps
    from nested_core.storage.run_directory import open_run

    config = parse_config(parse_yaml(Path("ours.yaml").read_text()), source="ours.yaml")
    run, hooks = open_run(folder), Steps()
    with run.locked(), Session() as session:
        hooks.begin(config, run, resume=False)
        hooks.validate(config, run)
        for phase in (hooks.load, hooks.train, hooks.judge):
            mx.clear_cache()
            mx.reset_peak_memory()
            with Meter() as meter:
                phase(config, run, session)
            told = {
                "phase": phase.__name__,
                "peak_gb": round(mx.get_peak_memory() / GIGABYTE, 3),
                "device_gb": round(meter.added_bytes / GIGABYTE, 3),
                "seconds": round(meter.seconds, 1),
            }
            print(json.dumps(told), flush=True)


def answer_with_mlx_lm(adapter: str) -> None:
    """Answer the questions with mlx_lm's own batches, 32 tokens at most."""
    import mlx.core as mx
    from mlx_lm import batch_generate, load

    base = yaml.safe_load(Path("theirs.yaml").read_text())["model"]
    model, tokenizer, *_ = load(base, adapter_path=adapter)
    lines = Path("questions.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [
        tokenizer.apply_chat_template(
            json.loads(line)["messages"], add_generation_prompt=True, return_dict=False
        )
        for line in lines
    ]
    batch_generate(model, tokenizer, prompts, max_tokens=32)
    print(f"Peak mem {mx.get_peak_memory() / GIGABYTE:.3f} GB", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == PHASES:
        run_phases(Path(sys.argv[2]))
    elif sys.argv[1] == "answers":
        answer_with_mlx_lm(sys.argv[2])
    else:
        main()
