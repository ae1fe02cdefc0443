"""The trainings of a stream: night after night with some replay, each night alone, or all at once.

A night that is rebuilt is trained from the base on earlier nights too. Of the example's base the
third night crashes in its middle and is resumed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.learning.judge import Judge, Judged
from benchmarks.learning.streams import Fact, Night, Stream, read_stream
from benchmarks.learning.study import (
    AUTO_NIGHTS,
    CORRECTED,
    GOING_ON,
    REAL_BASE,
    TIER_ARMS,
    TIERED,
    Cell,
    kind_of,
    rate_share,
    replay_fraction,
)
from benchmarks.learning.tasks import Row, Splits
from nested_core.backend import device
from nested_core.config.loading import parse_config
from nested_core.models.session import Session
from nested_core.pipeline.hooks import Steps
from nested_core.storage.adapter import WEIGHTS_NAME
from nested_core.storage.run_directory import RunDirectory, open_run

CRASH_NIGHT = 2  # from 0, where `LENGTHS` has the stream


@dataclass(frozen=True)
class Length:
    """How long a night is trained: optimizer steps, and rows a step."""

    steps: int
    rows: int


LENGTHS = {"facts": Length(80, 25), "tasks": Length(80, 16)}  # others: the epochs that `init` says
LEARNING_RATE = 4e-4  # four times what `init` writes: with less this base learns no facts in time
RATE_OF_INIT = 1e-4  # for the real base
REAL_LENGTH = 512  # tokens, more than any row of real text has


@dataclass(frozen=True)
class Plan:
    """How a night is trained.

    share: of the first rate, at which it goes on from the night before; None begins anew.
    fraction: how much of each batch is replayed.
    has_earlier: whether it has the rows of the nights before beside its own.
    nights: how many nights' steps it has, where they are counted.
    """

    share: float | None = None
    fraction: float = 0.0
    has_earlier: bool = False
    nights: int = 1


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


def run_stream(cell: Cell, bases: Path, data: Path | None) -> dict[str, Any]:
    """Train what the arm says, and judge; the row of the result.

    `learnt` are the answers to each night's questions after it, `right` those to all nights'
    questions at the end, of which loss and KL are too. Seconds are of trainings alone: on a CPU the
    processor's, for others use the machine; on a GPU those that passed. `steps` are each night's.
    """
    stream, base = read_stream(cell.task, data), bases / cell.size
    learnt, steps, seconds = list[Any](), list[int](), 0.0
    with TemporaryDirectory() as scratch:
        for night, run, took in _train_nights(cell, stream, base, Path(scratch)):
            learnt.append(_judge(base, night.questions, run.adapter).right)
            steps.append(_count_steps(run))
            adapter = run.adapter
            seconds += took
        judged = _judge(base, stream.questions, adapter)
    return vars(cell) | {
        "seconds": round(seconds, 3),
        "steps": steps,
        "rows": len(judged.right),
        "right_share": round(float(judged.right[stream.is_current].mean()), 6),
        "right": np.packbits(judged.right).tobytes().hex(),
        "learnt": np.packbits(np.concatenate(learnt)).tobytes().hex(),
        "loss": round(judged.loss, 6),
        "kl": round(judged.kl, 6),
    }


def _judge(base: Path, questions: Any, adapter: Path) -> Judged:
    judged = Judge(base, [fact.row for fact in questions], []).judge(adapter)
    mx.clear_cache()
    return judged


def _count_steps(run: RunDirectory) -> int:
    lines = map(json.loads, run.metrics.read_text(encoding="utf-8").splitlines())
    return max(line.get("step") or 0 for line in lines)


def _train_nights(
    cell: Cell, stream: Stream, base: Path, scratch: Path
) -> Iterator[tuple[Night, RunDirectory, float]]:
    """Each night with its finished run and the seconds of its training."""
    clock = time.process_time if device() == "cpu" else time.perf_counter
    length = LENGTHS.get(kind_of(cell.task))
    plans = [plan_night(cell.arm, number) for number in range(len(stream.nights))]
    if cell.arm == "joint":
        plans = [Plan(nights=len(stream.nights))]
        facts = tuple(Fact(row, "") for row in stream.joined())
        every_choose = tuple(fact for night in stream.nights for fact in night.choose)
        stream = Stream((Night(facts, tuple(stream.questions), every_choose),))
    start: Path | None = None
    earlier = list[str]()  # newest first
    first = dict[str, Any]()  # what `init` wrote for the first night
    with Session() as session:
        for number, (night, plan) in enumerate(zip(stream.nights, plans, strict=True)):
            folder = scratch / str(number)
            choose = tuple(fact.row for fact in night.choose)
            own = folder / "own"
            Splits(tuple(fact.row for fact in night.train), choose, ()).write(own / "data")
            rows = rows_of_night(stream, number, plan)
            Splits(rows, choose, ()).write(folder / "data")
            if length is not None:
                values = _write_config(base, Length(length.steps * plan.nights, length.rows))
            else:
                first = first or _write_config_of_init(base, own)
                values = dict(first)
            values |= {"data": str(folder / "data"), "seed": cell.seed}
            if start is not None and plan.share is not None:
                values["resume_adapter_file"] = str(start / WEIGHTS_NAME)
                values["learning_rate"] *= plan.share
                if name := TIER_ARMS.get(cell.arm):
                    values |= {"nested": TIERED[name], **CORRECTED}
                if plan.fraction:
                    replay = {"fraction": plan.fraction, "sources": earlier}
                    values["continual"] = {"replay": replay}
            crash = None
            if length is not None and number == CRASH_NIGHT:
                crash = length.steps * plan.nights * 3 // 4
            began = clock()
            run = _train(values, folder / "run", session, crash)
            start = run.adapter
            yield night, run, clock() - began
            earlier = [str(own / "data" / "train.jsonl"), *earlier]


def plan_night(arm: str, number: int) -> Plan:
    """What an arm does in a night, from 0."""
    if arm == "auto-go":
        arm = "rebuild" if number < AUTO_NIGHTS else GOING_ON
    if arm.startswith("rebuild"):
        return Plan(has_earlier=True, nights=number + 1 if arm == "rebuild" else 1)
    if arm.startswith("all-") and number:
        return Plan(share=rate_share(arm), has_earlier=True)
    if arm in TIER_ARMS and number:
        return Plan(share=rate_share(arm))
    fraction = replay_fraction(arm)
    if fraction is None or not number:
        return Plan()
    return Plan(share=rate_share(arm), fraction=fraction)


def rows_of_night(stream: Stream, number: int, plan: Plan) -> tuple[Row, ...]:
    """A night's own rows, and where its plan has them those of the nights before.

    Of a prompt the newest answer alone is there.
    """
    own = tuple(fact.row for fact in stream.nights[number].train)
    if not plan.has_earlier:
        return own
    prompts = {row.prompt for row in own}
    before = Stream(stream.nights[:number]).joined()
    return (*own, *(row for row in before if row.prompt not in prompts))


def _write_config(base: Path, length: Length) -> dict[str, Any]:
    """What `init` writes, but for the example's rate and the length; the last step counts."""
    return {
        "model": str(base),
        "num_layers": -1,
        "lora_parameters": {"rank": 8, "alpha": 160},
        "learning_rate": RATE_OF_INIT if base.name == REAL_BASE else LEARNING_RATE,
        "mask_prompt": True,
        "iters": length.steps,
        "batch_size": length.rows,
        "training": {"warmup_steps": 0.05, "decay": "cosine", "max_grad_norm": 1.0},
        "val_batches": 0,
        "steps_per_report": length.steps,
        "save_every": length.steps // 2,
    }


def _write_config_of_init(base: Path, folder: Path) -> dict[str, Any]:
    """What `init` writes for the first night, with room for longer rows of later ones."""
    from benchmarks.learning.arms import suggest

    return suggest(base, folder) | {"max_seq_length": REAL_LENGTH}


def _train(
    values: Mapping[str, Any], folder: Path, session: Session, crash: int | None
) -> RunDirectory:
    """Train in this process; where a crash is wanted, once more from the checkpoint before it."""
    config, run = parse_config(dict(values), source="stream"), open_run(folder)
    with run.locked():
        for steps in (Steps() if crash is None else _CrashingSteps(crash), Steps()):
            steps.begin(config, run, resume=run.config.exists())
            steps.validate(config, run)
            steps.load(config, run, session)
            with suppress(_Crash):
                steps.train(config, run, session)
                break
    return run
