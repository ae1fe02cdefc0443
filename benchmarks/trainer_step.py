"""A step of the trainer, as a run takes it, against the step alone, on rows of one length.

    python -m benchmarks.trainer_step ROWS.jsonl --sizes 0.5B 3B 8B

The step alone is that of `python -m benchmarks.gpu`, arm `ours`: batches in memory, one step in
flight, the loss read every fourth. The trainer takes its batches from the data set, reports every
10 steps, and looks whether each tensor that is due has changed. It does not start the process that
the gate asks: a run does so in its last 20 seconds, which are all of this one. The two take turns,
each time in a process of its own; a row of ROWS.jsonl has all windows of one, and the most memory
of MLX while it trained. Rows that are there already are not measured again, so that a table can be
made in several goes; `--report` prints the table alone.

What differs besides: the trainer's model has an output layer of its own, where the other's is the
embedding, which is memory alone; and on a CPU the two compute in different types.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.commands import SPECIAL_TOKENS, read_rows, write_model
from benchmarks.gpu.shapes import KEYS, RANK, RATE, SCALE, SHAPES, Shape
from nested_core.backend import hide_torch_from_transformers, prepare, prepare_for_model_size

REPORT, WARM, WINDOWS = 10, 4, 12  # steps a window, windows not counted, windows counted
ROWS = 64
ALONE, TRAINER = "alone", "trainer"
INPUTS = "inputs"  # what is made once, in a process that leaves no memory to the measured ones


def main() -> None:
    """Measure what is missing in the file, then print the table; or do one process's part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--sizes", nargs="+", default=["0.5B", "3B"], choices=SHAPES)
    parser.add_argument("--times", type=int, default=2, help="processes of each")
    parser.add_argument("--seconds", type=float, default=3600, help="begin none after so long")
    parser.add_argument("--folder", type=Path, default=Path("build/trainer_step"))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--only", choices=(INPUTS, ALONE, TRAINER), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only is not None:
        (size,) = arguments.sizes
        print(json.dumps(run_part(arguments.only, SHAPES[size], arguments.folder / size)))
        return
    end = time.monotonic() + arguments.seconds
    for size in () if arguments.report else arguments.sizes:
        measure_missing(size, arguments, end)
    for line in make_table(read_rows(arguments.rows)):
        print(line, flush=True)


def measure_missing(size: str, arguments: argparse.Namespace, end: float) -> None:
    """Append the rows of a size that are missing, as far as the time goes."""
    for turn in range(arguments.times):
        for what in (ALONE, TRAINER):
            key = {"size": size, "what": what, "turn": turn}
            known = [{name: row[name] for name in key} for row in read_rows(arguments.rows)]
            if key in known or time.monotonic() > end:
                continue
            if what == TRAINER and not config_path(arguments.folder / size).exists():
                start_process(INPUTS, size, arguments.folder)
            row = key | start_process(what, size, arguments.folder)
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def start_process(what: str, size: str, folder: Path) -> dict[str, Any]:
    """What `run_part` returned in a process of its own."""
    words = ["unused", "--folder", str(folder), "--sizes", size, "--only", what]
    command = [sys.executable, "-m", "benchmarks.trainer_step", *words]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    return answer


def run_part(what: str, shape: Shape, folder: Path) -> dict[str, Any]:
    """Write the inputs, or measure one of the two; this process's first use of MLX."""
    prepare()
    hide_torch_from_transformers()
    prepare_for_model_size(shape.weights)
    if what == INPUTS:
        write_inputs(shape, folder)
        return {}
    return measure_step_alone(shape) if what == ALONE else measure_trainer(shape, folder)


def measure_step_alone(shape: Shape) -> dict[str, Any]:
    """The row of the step alone, on a model that is made in memory."""
    import mlx.core as mx

    from benchmarks.gpu.mlx_arms import build, our_loop

    model = build(shape, 16)
    mx.reset_peak_memory()
    return describe(our_loop(model, shape, {})["seconds"])


def measure_trainer(shape: Shape, folder: Path) -> dict[str, Any]:
    """The row of the trainer, in a run as `train` makes it from the written inputs."""
    import mlx.core as mx

    from nested_core.config.loading import load_config
    from nested_core.models.session import Session
    from nested_core.pipeline import steps
    from nested_core.storage.run_directory import RunDirectory

    config = load_config(config_path(folder))
    shutil.rmtree(folder / "run", ignore_errors=True)
    run = RunDirectory(folder / "run")
    run.path.mkdir()
    ends: list[float] = []

    def note_window(step: int, _: int) -> None:
        """Note when a window's last step was sent; its report is made in the next window."""
        if step % REPORT == 0:
            ends.append(time.perf_counter())

    def begin(trainer: Any) -> None:
        trainer.on_step = note_window
        trainer.on_near_end = None
        mx.reset_peak_memory()

    with run.locked(), Session() as session:
        steps.write_run_config(config, run, resume=False)
        steps.validate(config, run)
        steps.write_initial_adapter_and_tiers(config, run, session=session)
        steps.train(config, run, on_start=begin, session=session)
    pairs = list(zip(ends, ends[1:], strict=False))[WARM:]
    return describe([(end - start) / REPORT for start, end in pairs])


def describe(seconds: list[float]) -> dict[str, Any]:
    """The windows in milliseconds a step, and the most memory of MLX since it was last reset."""
    import mlx.core as mx

    return {
        "milliseconds": [round(1000 * each, 2) for each in seconds],
        "peak_gib": round(mx.get_peak_memory() / 2**30, 3),
    }


def config_path(folder: Path) -> Path:
    """Where the configuration of a size is, which is written last of its inputs."""
    return folder / "lora.yaml"


def write_inputs(shape: Shape, folder: Path) -> None:
    """Write a model of random weights, texts of exactly a row's tokens, and the configuration."""
    data = folder / "data"
    write_model(folder / "model", shape)
    data.mkdir(parents=True, exist_ok=True)
    write_rows(data / "train.jsonl", shape, range(ROWS))
    settings = {
        "model": str(folder / "model"),
        "data": str(data),
        "batch_size": shape.batch,
        "max_seq_length": shape.length + 1,  # the end of the text is a token too
        "num_layers": -1,
        "iters": REPORT * (WARM + WINDOWS + 1),
        "steps_per_report": REPORT,
        "steps_per_eval": 10**6,
        "save_every": 10**6,
        "learning_rate": RATE,
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": KEYS},
    }
    config_path(folder).write_text(json.dumps(settings).replace("1e-", "1.0e-"))


def write_rows(path: Path, shape: Shape, rows: range) -> None:
    """Write texts of exactly a row's tokens, other ones for other numbers."""
    words = shape.vocabulary - len(SPECIAL_TOKENS)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            drawn = [f"w{(row * 7919 + at * 104_729) % words}" for at in range(shape.length)]
            file.write(json.dumps({"text": " ".join(drawn)}) + "\n")


def make_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line a size: the median of each process, the trainer's share of the speed, and memory.

    The share is the ratio of the medians of these medians; it is left out until both are measured.
    """
    for size in dict.fromkeys(row["size"] for row in rows):
        told = []
        medians = {}
        for what, name in ((ALONE, "the step alone"), (TRAINER, "the trainer's")):
            own = [row for row in rows if (row["size"], row["what"]) == (size, what)]
            if own:
                each = [statistics.median(row["milliseconds"]) for row in own]
                medians[what] = statistics.median(each)
                listed = ", ".join(f"{milliseconds:.2f}" for milliseconds in each)
                peak = max(row["peak_gib"] for row in own)
                told.append(f"{name} {listed} ms (at most {peak:.2f} GiB)")
        share = ""
        if len(medians) == 2:
            share = f": {medians[ALONE] / medians[TRAINER]:.3f} of its speed"
        yield f"{size}: {', '.join(told)}{share}"


if __name__ == "__main__":
    main()
