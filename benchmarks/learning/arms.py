"""The trainings of the arms, each from a base and a data folder to an adapter's folder.

mlx_lm's are mlx_lm.lora's own `run` with its own defaults. Ours are what `nested-tune init` writes
and `nested-tune train` does, up to the adapter: the gate is left out, for mlx_lm.lora has none.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from benchmarks.learning.bases import GENERAL_NAME
from benchmarks.learning.fresh import read_fresh
from benchmarks.learning.general import INSTRUCTIONS_NAME
from benchmarks.learning.judge import Judge, Judged, encode, read_base
from benchmarks.learning.meter import Meter
from benchmarks.learning.rehearsal import REHEARSAL_LENGTH, REHEARSAL_NAME
from benchmarks.learning.study import (
    CHOOSING_SEED,
    CORRECTED,
    LIKE_K,
    NO_ADAPTER,
    OF_MLX_LM,
    PEFT,
    QUIET_SEED,
    REHEARSED,
    UNCORRECTED,
    WITH_LAST_STEP,
    Cell,
    Study,
)
from benchmarks.learning.tasks import Counts, Row, Splits, read_task

ASKING_SEED = 1  # whose adapters answer the general instructions
ADAM_BETAS = (0.9, 0.999)  # of mlx's and of PyTorch's
KEPT = 16  # judges and data sets in memory, of a task and a size each
FOLLOWED_SEEDS = (QUIET_SEED + 1,)  # timed, with adapters judged on the way
SAVED_STEPS = 0.1  # of a training between two of those adapters, as in `init`'s file
SUITE = "choose"  # of the rows that choose, for arms whose step or setting answers choose
LONG = {"training": {"epochs": 5}}  # fill the seconds of arm k, with 3 epochs in arm c
BY_ANSWERS = {"training": {"evaluate_tasks": [SUITE], "select_by": SUITE}}
TIERS = {"frequencies": [1, 2, 4]}
CHANGES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "c": (),
    "c-256MB": ({"clear_cache_threshold": 2**28},),
    "c-512MB": ({"clear_cache_threshold": 2**29},),
    "d": (),
    "e": (),
    "g-deep": ({"nested": TIERS | {"fast": "deep"}},),
    "g-shallow": ({"nested": TIERS | {"fast": "shallow"}},),
    "c-long": (LONG,),
    "c-long-answers": (LONG, BY_ANSWERS),
    "c-long-32": (LONG, {"lora_parameters": {"rank": 32}}),
    "c-unclipped": ({"training": {"max_grad_norm": 0.0}},),
    "c-2e-4": ({"learning_rate": 2e-4},),
    "c-3e-4-corrected": ({"learning_rate": 3e-4, **CORRECTED},),
    **dict.fromkeys(REHEARSED, ()),
}
SWEPT = {"learning_rate": (2e-4, 3e-4)}  # of arm e where answers choose, beside `init`'s own rate


Training = Callable[[], Path]  # trains, and returns the adapter's folder


def run_cell(cell: Cell, study: Study, bases: Path, data: Path | None) -> dict[str, Any]:
    """Train once and judge the adapter; the row of the result.

    Seconds are of the training command's work, from loading the base to the adapter on disk;
    joules are the whole GPU's meanwhile, and mean something where it does nothing else. What
    `init` does is not timed.
    """
    base = bases / cell.size
    with tempfile.TemporaryDirectory() as scratch:
        splits = read_splits(cell.task, data, study.counts)
        splits.write(Path(scratch) / "data")
        training: Training | None = None
        if cell.arm in OF_MLX_LM:
            training = prepare_mlx_lm(cell, study.iterations.get(cell.task), base, Path(scratch))
        elif cell.arm in (PEFT, UNCORRECTED):
            training = prepare_peft(cell, base, Path(scratch))
        elif cell.arm != NO_ADAPTER:
            training = prepare_ours(cell, study, splits, base, Path(scratch))
        mx.clear_cache()
        mx.reset_peak_memory()
        with Meter() as meter:
            adapter = training() if training else None
        measured = {
            "seconds": round(meter.seconds, 3),
            "joules": round(meter.joules, 1),
            "peak_gb": round(mx.get_peak_memory() / 1e9, 4),
            "device_gb": round(meter.added_bytes / 1e9, 4),
        }
        split = "choose" if cell.seed == CHOOSING_SEED else "judge"
        judge = read_judge(cell.task, base, data, study.counts, split)
        asks = study.asks_each_seed or cell.seed == ASKING_SEED
        judged = judge.judge(adapter, asks=asks)
        if cell.seed in FOLLOWED_SEEDS:
            measured["on_the_way"] = list(follow(Path(scratch), meter, judge))
        if adapter:
            measured["moved"] = distance_moved(adapter)
        if study.judges_last_step and cell.arm in WITH_LAST_STEP:
            last = max(Path(scratch).glob("run/checkpoints/step-*"))
            measured["last"] = {
                "step": int(last.name.removeprefix("step-")),
                "moved": distance_moved(last),
            } | row_of(judge.judge(last))
    mx.clear_cache()
    return vars(cell) | measured | row_of(judged)


def row_of(judged: Judged) -> dict[str, Any]:
    """What a row says of the judgement of one adapter."""
    return {
        "rows": len(judged.right),
        "right_share": round(float(judged.right.mean()), 6),
        "right": np.packbits(judged.right).tobytes().hex(),
        "loss": round(judged.loss, 6),
        "kl": round(judged.kl, 6),
        "general_loss": judged.general_loss and round(judged.general_loss, 6),
        "kept": judged.kept and round(judged.kept, 6),
        "like_task": judged.like_task,
    }


def distance_moved(adapter: Path) -> float:
    """The norm of all lora_b together, which are 0 before training."""
    weights: Any = mx.load(str(adapter / "adapters.safetensors"))
    moved = [value for name, value in weights.items() if name.endswith("lora_b")]
    total = sum(mx.square(value.astype(mx.float32)).sum() for value in moved)
    return round(math.sqrt(float(total)), 4)


def follow(folder: Path, meter: Meter, judge: Judge) -> Iterator[tuple[float, float, float]]:
    """Seconds, joules and the share of right answers of each adapter saved below a cell's folder.

    They are judged after the training, whose seconds and joules are those until each was written.
    """
    saved = [*folder.glob("run/checkpoints/step-*/adapters.safetensors")]
    saved += folder.glob("adapter/*_adapters.safetensors")  # mlx_lm.lora's
    saved += folder.glob("adapter/*/adapters.safetensors")  # of peft_training.py
    for path in sorted(saved):
        written = path.stat().st_mtime
        adapter = path.parent
        if path.name != "adapters.safetensors":
            adapter = folder / "followed" / path.stem
            adapter.mkdir(parents=True)
            for name, source in (
                ("adapters.safetensors", path),
                ("adapter_config.json", path.with_name("adapter_config.json")),
            ):
                (adapter / name).symlink_to(source)
        yield (
            round(written - meter.samples[0].time, 2),
            round(meter.joules_until(written), 1),
            round(judge.right_share(adapter), 6),
        )


@lru_cache(KEPT)
def read_splits(task: str, data: Path | None, counts: Counts) -> Splits:
    """A task's rows."""
    return (read_fresh if counts.is_fresh else read_task)(task, data, counts)


@lru_cache(KEPT)
def read_judge(task: str, base: Path, data: Path | None, counts: Counts, split: str) -> Judge:
    """What judges adapters of this base on this split of the task."""
    general, instructions = (
        json.loads((base / name).read_bytes()) if (base / name).exists() else []
        for name in (GENERAL_NAME, INSTRUCTIONS_NAME)
    )
    return Judge(base, getattr(read_splits(task, data, counts), split), general, instructions)


def prepare_mlx_lm(cell: Cell, iterations: int | None, base: Path, folder: Path) -> Training:
    """`mlx_lm.lora --train` in this process: its defaults, and what the arm changes.

    Its default of 16 layers is refused for a model of fewer, which are all trained then.
    """
    from mlx_lm import lora
    from mlx_lm.tuner.datasets import CacheDataset

    layers = json.loads((base / "config.json").read_bytes())["num_hidden_layers"]
    changes: dict[str, Any] = {
        "num_layers": min(lora.CONFIG_DEFAULTS["num_layers"], layers) if cell.arm == "a" else -1,
        "mask_prompt": cell.arm == "h",
        "iters": iterations,
        "seed": cell.seed,
        "train": True,
        "model": str(base),
        "data": str(folder / "data"),
        "adapter_path": str(folder / "adapter"),
    }
    if cell.rate is not None:
        changes["learning_rate"] = cell.rate
    if cell.arm in LIKE_K:
        changes |= of_init(base, folder, LIKE_K[cell.arm])
    length = count_tokens if cell.arm == "k-sorted" else CacheDataset.itemlen
    if cell.seed in FOLLOWED_SEEDS:
        changes["save_every"] = math.ceil(SAVED_STEPS * changes["iters"])

    def training() -> Path:
        sorting = patch.object(CacheDataset, "itemlen", length)
        with contextlib.redirect_stdout(io.StringIO()), sorting:
            lora.run(SimpleNamespace(**lora.CONFIG_DEFAULTS | changes))
        return folder / "adapter"

    return training


def prepare_peft(cell: Cell, base: Path, folder: Path) -> Training:
    """The settings of arm k in PEFT, in a process of its own that has PyTorch imported already."""
    settings = of_init(base, folder, {})
    settings |= {
        "rates": update_rates(settings, corrects=cell.arm == PEFT),
        "model": str(base),
        "data": str(folder / "data"),
        "adapter_path": str(folder / "adapter"),
        "seed": cell.seed,
    }
    followed = SAVED_STEPS if cell.seed in FOLLOWED_SEEDS else 1
    settings["save_every"] = math.ceil(followed * settings["iters"])
    (folder / "peft.json").write_text(json.dumps(settings), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.learning.peft_training", str(folder / "peft.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.stdout is None or process.stdout.readline() != "ready\n":
        raise RuntimeError(f"PEFT did not begin: exit code {process.wait()}")

    def training() -> Path:
        process.communicate("train\n")
        if process.returncode:
            raise RuntimeError(f"PEFT did not end: exit code {process.returncode}")
        return folder / "adapter" / f"{settings['iters']:07d}"

    return training


def suggest(base: Path, folder: Path) -> dict[str, Any]:
    """What `init` writes for this base and the data in the folder, as a dict."""
    from nested_core.config.loading import parse_yaml
    from nested_core.rooms.planning.suggested_config import suggest_config

    return parse_yaml(suggest_config(str(base), str(folder / "data")).text)


def of_init(base: Path, folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What mlx_lm.lora can do of the file that `init` writes, in its own keys, with some changes.

    It cannot clip gradients, nor offer the step that was best, so it evaluates as seldom as by
    default.
    """
    values = suggest(base, folder)
    lora_parameters, plan = values["lora_parameters"], values["training"]
    rows = len((folder / "data" / "train.jsonl").read_bytes().splitlines())
    steps = int(plan["epochs"] * math.ceil(rows / values["batch_size"]))
    warm_up = round(plan["warmup_steps"] * steps)
    rate = changes.get("learning_rate", values["learning_rate"])
    return {
        "learning_rate": rate,
        "optimizer_config": changes.get("optimizer_config", {}),
        "lr_schedule": {
            "name": "cosine_decay",
            "arguments": [rate, steps - warm_up, rate / 10],
            "warmup": warm_up,
        },
        "iters": steps,
        "batch_size": values["batch_size"],
        "max_seq_length": values["max_seq_length"],
        "mask_prompt": values["mask_prompt"],
        "lora_parameters": {
            "rank": lora_parameters["rank"],
            "scale": lora_parameters["alpha"] / lora_parameters["rank"],
            "dropout": 0.0,
        },
    }


def count_tokens(rows: Any, index: int) -> int:
    """The length by which mlx_lm's data set means to sort its rows; it has the number of keys."""
    return len(rows[index][0])


def update_rates(settings: Mapping[str, Any], *, corrects: bool) -> list[float]:
    """The rate of each update of arm k for an Adam that corrects its bias, as PyTorch's does.

    mlx's does not unless it is asked to: `corrects` is False for rates with which PyTorch's moves
    as far as that at every update, but for its epsilon.
    """
    rate, cosine_steps, end = settings["lr_schedule"]["arguments"]
    warm_up = settings["lr_schedule"]["warmup"]
    rates = []
    for step in range(settings["iters"]):
        done = min(1.0, (step - warm_up) / cosine_steps)
        falling = end + (rate - end) * 0.5 * (1 + math.cos(math.pi * done))
        scheduled = rate * step / warm_up if step < warm_up else falling
        first, second = (1 - beta ** (step + 1) for beta in ADAM_BETAS)
        rates.append(scheduled if corrects else scheduled * first / math.sqrt(second))
    return rates


def prepare_ours(cell: Cell, study: Study, splits: Splits, base: Path, folder: Path) -> Training:
    """What `init` writes for this base and the rows to train on, with the arm's changes, trained.

    A sweep has the optimizer steps that the study allows it, and judges its winner.
    """
    from nested_core.config.loading import parse_config
    from nested_core.models.session import Session
    from nested_core.pipeline.hooks import Steps
    from nested_core.rooms.sweep.search import sweep
    from nested_core.storage.run_directory import open_run

    values = suggest(base, folder)
    changes = [*CHANGES[cell.arm]]
    by_answers = BY_ANSWERS in changes or (cell.arm == "e" and study.sweeps_by_answers)
    for change in changes:
        for section, keys in change.items():
            is_section = isinstance(keys, Mapping)
            values[section] = values.get(section, {}) | keys if is_section else keys
    if by_answers:
        suite = folder / f"{SUITE}.jsonl"
        suite.write_text("".join(map(question, splits.choose)), encoding="utf-8")
        task = {"name": SUITE, "file": str(suite), "score": "exact"}
        longest = longest_answer(base, splits.choose)
        values["gate"] |= {"tasks": [task | {"max_tokens": longest}]}
    if share := REHEARSED.get(cell.arm):
        replay = {"fraction": share, "sources": [str(base / REHEARSAL_NAME)], "missing": "error"}
        values["continual"] = {"replay": replay}
        values["max_seq_length"] = max(values["max_seq_length"], REHEARSAL_LENGTH)
    values["seed"] = cell.seed
    if cell.seed in FOLLOWED_SEEDS:
        values["training"]["keep_checkpoints"] = round(1 / SAVED_STEPS) + 1
    if cell.rate is not None:
        values["learning_rate"] = cell.rate
    config = parse_config(values, source=f"arm {cell.arm}")
    if cell.arm == "e":
        one_run = config.training.epochs * math.ceil(len(splits.train) / config.batch_size)
        request = sweep_request(study, int(study.sweep_runs * one_run))
        return lambda: sweep(config, folder / "sweep", request).run.adapter
    run, hooks = open_run(folder / "run"), Steps()

    def training() -> Path:
        with run.locked(), Session() as session:
            hooks.begin(config, run, resume=False)
            hooks.validate(config, run)
            hooks.load(config, run, session)
            hooks.train(config, run, session)
        return run.adapter

    return training


def sweep_request(study: Study, steps: int) -> Any:
    """The SweepRequest of arm e, of so many optimizer steps."""
    from nested_core.rooms.sweep.search import SweepRequest

    if study.sweeps_by_answers:
        return SweepRequest(SWEPT, SUITE, steps=steps)
    return SweepRequest({}, steps=steps)


def longest_answer(base: Path, rows: Sequence[Row]) -> int:
    """The tokens of the longest expected answer: a longer one is wrong, and need not be awaited."""
    _, tokenizer = read_base(base)
    return max(len(tokens) - start for tokens, start in (encode(tokenizer, row) for row in rows))


def question(row: Row) -> str:
    """A line of a suite: the row's prompt, and its answer as the expected one."""
    turns = [{"role": "user", "content": row.prompt}]
    return json.dumps({"messages": turns, "expected": row.answer}) + "\n"
