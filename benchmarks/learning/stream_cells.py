"""The trainings of a stream: night after night with some replay, each night alone, or all at once.

A night that is rebuilt is trained from the base on all nights so far.

The third night crashes in its middle and is resumed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.learning.judge import Judge, Judged
from benchmarks.learning.streams import Fact, Night, Stream, read_stream
from benchmarks.learning.study import Cell, arm_of_night, kind_of, rate_share, replay_fraction
from benchmarks.learning.tasks import Splits
from nested_core.config.loading import parse_config
from nested_core.models.session import Session
from nested_core.pipeline.hooks import Steps
from nested_core.storage.adapter import WEIGHTS_NAME
from nested_core.storage.run_directory import open_run

CRASH_NIGHT = 2  # from 0


@dataclass(frozen=True)
class Length:
    """How long a night is trained: optimizer steps, and rows a step."""

    steps: int
    rows: int


LENGTHS = {"facts": Length(80, 25), "tasks": Length(80, 16)}
LEARNING_RATE = 4e-4  # four times what `init` writes: with less this base learns no facts in time


class _Crash(Exception):
    """Ends a training in its middle."""


class _CrashingSteps(Steps):
    """The steps of a run that crashes at a step."""

    def __init__(self, crash: int) -> None:
        self._crash = crash

    def on_step(self, step: int, steps: int) -> None:
        """Crash."""
        if step == self._crash:
            raise _Crash


def run_stream(cell: Cell, bases: Path) -> dict[str, Any]:
    """Train what the arm says, and judge; the row of the result.

    `learnt` are the answers to each night's questions after it, `right` those to all nights'
    questions at the end, of which loss and KL are too. Seconds are the processor's, of trainings
    alone: others use this machine.
    """
    stream, base, seconds = read_stream(cell.task), bases / cell.size, 0.0
    learnt = list[Any]()
    with TemporaryDirectory() as scratch:
        for night, adapter, took in _train_nights(cell, stream, base, Path(scratch)):
            learnt.append(_judge(base, night.questions, adapter).right)
            seconds += took
        judged = _judge(base, stream.questions, adapter)
    return vars(cell) | {
        "seconds": round(seconds, 3),
        "rows": len(judged.right),
        "right_share": round(float(judged.right[stream.is_current].mean()), 6),
        "right": np.packbits(judged.right).tobytes().hex(),
        "learnt": np.packbits(np.concatenate(learnt)).tobytes().hex(),
        "loss": round(judged.loss, 6),
        "kl": round(judged.kl, 6),
    }


def _judge(base: Path, questions: Any, adapter: Path) -> Judged:
    return Judge(base, [fact.row for fact in questions], []).judge(adapter)


def _train_nights(
    cell: Cell, stream: Stream, base: Path, scratch: Path
) -> Iterator[tuple[Night, Path, float]]:
    """Each night with the adapter after it and the seconds of its training."""
    length, nights = LENGTHS[kind_of(cell.task)], stream.nights
    if cell.arm == "joint":
        length = replace(length, steps=length.steps * len(nights))
        facts = tuple(Fact(row, "") for row in stream.joined())
        nights = (Night(facts, tuple(stream.questions)),)
    start: Path | None = None
    earlier = list[str]()  # newest first
    with Session() as session:
        for number, night in enumerate(nights):
            folder, arm = scratch / str(number), arm_of_night(cell.arm, number)
            is_whole = arm.startswith(("rebuild", "all-"))  # trained on all nights so far
            rows = tuple(fact.row for fact in night.train)
            if is_whole:
                rows = Stream(nights[: number + 1]).joined()
            Splits(rows, (), ()).write(folder / "data")
            factor = number + 1 if arm == "rebuild" else 1
            own = replace(length, steps=length.steps * factor)
            values = _write_config(base, folder, own, cell.seed)
            fraction = replay_fraction(arm)
            if start is not None and (fraction is not None or arm.startswith("all-")):
                values["resume_adapter_file"] = str(start / WEIGHTS_NAME)
                values["learning_rate"] = LEARNING_RATE * rate_share(arm)
            if start is not None and fraction:
                replay = {"fraction": fraction, "sources": earlier}
                values["continual"] = {"replay": replay}
            crash = own.steps * 3 // 4 if number == CRASH_NIGHT else None
            began = time.process_time()
            start = _train(values, folder / "run", session, crash)
            yield night, start, time.process_time() - began
            path = str(folder / "data" / "train.jsonl")
            earlier = [path] if is_whole else [path, *earlier]


def _write_config(base: Path, folder: Path, length: Length, seed: int) -> dict[str, Any]:
    """What `init` writes for such data, but for rate and length; nothing chooses a step."""
    return {
        "model": str(base),
        "data": str(folder / "data"),
        "num_layers": -1,
        "lora_parameters": {"rank": 8, "alpha": 160},
        "learning_rate": LEARNING_RATE,
        "mask_prompt": True,
        "iters": length.steps,
        "batch_size": length.rows,
        "training": {"warmup_steps": 0.05, "decay": "cosine", "max_grad_norm": 1.0},
        "val_batches": 0,
        "steps_per_report": length.steps,
        "save_every": length.steps // 2,
        "seed": seed,
    }


def _train(values: dict[str, Any], folder: Path, session: Session, crash: int | None) -> Path:
    """Train in this process; where a crash is wanted, once more from the checkpoint before it."""
    config, run = parse_config(values, source="stream"), open_run(folder)
    with run.locked():
        for steps in (Steps() if crash is None else _CrashingSteps(crash), Steps()):
            steps.begin(config, run, resume=run.config.exists())
            steps.validate(config, run)
            steps.load(config, run, session)
            with suppress(_Crash):
                steps.train(config, run, session)
                break
    return run.adapter
