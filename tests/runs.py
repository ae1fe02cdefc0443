"""Run folders made of files alone, in the states and sizes that pages are tested with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from nested_core.config.loading import render_config
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.measure.losses.loss_figures import (
    summarise_champion,
    summarise_drift,
    summarise_losses,
)
from nested_core.records.answers import AnsweringRole, AnswerRecord, write_answers
from nested_core.records.dataset import DatasetReport, Finding, SplitStats
from nested_core.records.judged_run import JudgedRun
from nested_core.records.losses import ExampleLosses
from nested_core.records.plan import TrainingPlan, write_plan
from nested_core.records.result import TrainResult, write_result
from nested_core.records.verdict import (
    JudgedAdapter,
    Reason,
    TaskResult,
    TensorChange,
    TierChange,
    Verdict,
)
from nested_core.records.verdict_file import BoundVerdict, write_verdict
from nested_core.storage.adapter import Adapter
from nested_core.storage.atomic import write_json
from nested_core.storage.checkpoint_verification import checkpoint_path
from nested_core.storage.manifest import describe_file
from nested_core.storage.run_directory import RunDirectory
from tests import gate_files
from tests.example import example_config

MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
HOSTILE_ROW = (
    '</script><script>alert("row")</script><style>body{display:none}</style>'
    "<img src=https://example.org/x onerror=alert(1)> **bold** [link](https://example.org) "
    "\x1b[2J\x1b[31mred\x1b[0m \u202edeliaf \u200b`code`"
)


def begin_run(
    path: Path,
    *,
    text: str = "How much is a pump?",
    findings: Sequence[Finding] = (),
    **changes: Any,
) -> RunDirectory:
    """A run that is validated: configuration, tiers, a data set whose rows hold `text`."""
    data = path.parent / f"{path.name}-data"
    data.mkdir(parents=True)
    line = json.dumps({"messages": [{"role": "user", "content": text}]})
    (data / "valid.jsonl").write_text(f"{line}\n" * 12, encoding="utf-8")
    path.mkdir()
    run = RunDirectory(path)
    config = example_config(data=str(data), **changes)
    run.config.write_bytes(render_config(config))
    write_json(run.tiers, {"frequencies": [1, 2, 4], "tensors": {}})
    write_dataset(run, findings, folder=str(data), train=40, valid=12)
    run.initial.mkdir()
    write_json(run.initial / "adapter_config.json", {"base_fingerprint": "f" * 64})
    return run


def add_metrics(run: RunDirectory, steps: int, *, every: int = 1, samples: Any = None) -> None:
    """A report each `every` steps, an evaluation each tenth report."""
    records: list[dict[str, Any]] = [{"step": 0, "iteration": 0, "val_loss": 8.0}]
    for number, step in enumerate(range(every, steps + 1, every), 1):
        record: dict[str, Any] = {
            "step": step,
            "iteration": step,
            "loss": 7.0 / math.sqrt(step) + 0.05 * math.sin(step),
            "tokens_per_second": 900.0 + step % 7,
            "iterations_per_second": 20.0,
            "learning_rate": 1e-3 * (1 - step / (2 * steps)),
            "grad_norm": 4.0 / step,
            "clipped_grad_norm": min(1.0, 4.0 / step),
            "updates": [step, step // 2, step // 4],
            "skipped": [0, 0, 0],
            "trained_tokens": 88 * step,
            "peak_memory_gb": 0.5,
        }
        if number % 10 == 0 or step == steps:
            record["val_loss"] = 7.5 / math.sqrt(step)
            if samples is not None:
                record["samples"] = samples
        records.append(record)
    run.metrics.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def make_losses(*, champion: bool = False, with_drift: bool = True) -> ExampleLosses:
    """Twelve examples, of which the candidate is worse on the third alone."""
    before = np.linspace(3.0, 4.1, 12)
    after = before - 1.0
    after[2] = before[2] + 0.5
    return ExampleLosses(
        file="valid.jsonl",
        lines=np.arange(1, 13),
        tokens=np.full(12, 10.0),
        before=before,
        after=after,
        champion=before - 0.5 if champion else None,
        drift=np.full(12, 0.25) if with_drift else None,
    )


def make_answer(
    model: AnsweringRole, line: int, text: str, question: str = "", **changes: Any
) -> AnswerRecord:
    """An answer to the question of a line, which is right where it is `Paris`."""
    values: dict[str, Any] = {
        "task": "capitals",
        "model": model,
        "line": line,
        "question": question or f"Question {line}?",
        "answer": text,
        "score": float(text == "Paris"),
        "tokens": 4,
        "empty": False,
        "endless": False,
        "repeated": False,
        "seconds": 0.1,
    }
    return AnswerRecord(**values | changes)


def make_answers(text: str, questions: int = 3) -> list[AnswerRecord]:
    """The base is wrong on all questions and the candidate right on all but the first."""
    roles: tuple[AnsweringRole, ...] = ("base", "candidate")
    return [
        make_answer(
            role,
            line,
            f"{role}: {text}",
            f"line {line} ({text})",
            score=float(role == "candidate" and line > 1),
        )
        for role in roles
        for line in range(1, questions + 1)
    ]


def make_verdict(
    losses: ExampleLosses | None,
    *,
    reasons: Sequence[Reason] = (),
    step: int = 8,
    layers: int = 4,
    with_task: bool = True,
    trained: str = "b" * 64,
) -> Verdict:
    """A verdict on `layers` layers of three modules, a tier for each stretch of layers."""
    tensors = tuple(
        TensorChange(f"model.layers.{layer}.{module}.{factor}", layer % 3, True, 0.1, share, True)
        for layer in range(layers)
        for module in MODULES
        for factor, share in (("lora_a", 0.5 + layer / (4 * layers)), ("lora_b", 1.0))
    )
    counts = [sum(t.tier == tier for t in tensors) for tier in range(3)]
    tiers = tuple(
        TierChange(tier, 2**tier, count, count, step >> tier, step >> tier, 0)
        for tier, count in enumerate(counts)
    )
    champion = None
    if losses is not None and losses.champion is not None:
        champion = summarise_champion("c" * 64, losses, GateSection())
    task = TaskResult(
        name="capitals",
        questions=3,
        base=0.0,
        parent=None,
        champion=None,
        candidate=2 / 3,
        difference=2 / 3,
        interval=None,
        smallest_visible=0.5,
        verdict="passed",
        seconds={},
        odd={},
    )
    return Verdict(
        reasons=tuple(reasons),
        adapter_step=step,
        initial=JudgedAdapter("initial", "a" * 64),
        trained=JudgedAdapter("adapter", trained),
        tensors=tensors,
        tiers=tiers,
        last_step=step,
        validation=None
        if losses is None
        else summarise_losses(losses, GateSection(), selected_on_same_data=True),
        drift=None if losses is None else summarise_drift(losses),
        champion=champion,
        thresholds={"max_kl": 2.5},
        tasks=(task,) if with_task else (),
    )


def write_dataset(
    run: RunDirectory, findings: Sequence[Finding] = (), *, folder: str = "data", **rows: int
) -> None:
    """A dataset.json with so many examples of each split, whose digest is `<split>-digest`."""
    splits = {
        split: SplitStats(f"{split}.jsonl", "chat", count, 0, 0, count, {}, f"{split}-digest")
        for split, count in rows.items()
    }
    report = DatasetReport(folder, "da7a" * 16, splits, tuple(findings), tokenizer="70" * 32)
    write_json(run.dataset, report.to_json())


def not_registered(run: RunDirectory) -> JudgedRun:
    """A run with a verdict on an adapter that no registry has."""
    adapters = (JudgedAdapter("initial", "1" * 64), JudgedAdapter("adapter", "0" * 64))
    bound = BoundVerdict(run.path, b"", Verdict((), 4, *adapters, ()), {})
    return JudgedRun(run, bound, Adapter(run.adapter, {}, {}))


def judge(run: RunDirectory, verdict: Verdict, losses: ExampleLosses | None, text: str) -> None:
    """Write the verdict with its manifest, and what it was measured on."""
    paths = [run.metrics, run.answers]
    write_answers(run.answers, make_answers(text))
    if losses is not None:
        run.gate_losses.write_bytes(losses.render())
        paths.append(run.gate_losses)
    judged = {path.name: describe_file(path) for path in paths}
    write_verdict(run.path, verdict, judged)


def finished_run(
    path: Path,
    *,
    steps: int = 8,
    text: str = "How much is a pump?",
    reasons: Sequence[Reason] = (),
    champion: bool = False,
    trained: str = "b" * 64,
    **changes: Any,
) -> RunDirectory:
    """A run that was trained and judged: passed, or rejected where there are reasons.

    trained: the digest of its adapter, which is its version's in a registry.
    """
    run = begin_run(path, text=text, **changes)
    add_metrics(run, steps)
    losses = make_losses(champion=champion)
    verdict = make_verdict(losses, reasons=reasons, step=steps, trained=trained)
    judge(run, verdict, losses, text)
    return run


def judged_night(
    runs: Path, day: int, registry: Path, name: str, difference: float
) -> RunDirectory:
    """A run of an adapter on a day of November, of this difference to the champion's loss."""
    path = runs / f"202611{day:02d}T020000Z-{uuid4().hex[:8]}"
    run = finished_run(path, champion=True, registry={"path": str(registry), "name": name})
    gate = gate_files.read_gate(run.gate)
    gate["champion"] |= {"difference": difference}
    gate_files.write_gate(run.path, gate, gate_files.judged_files(run.path))
    return run


def add_checkpoints(run: RunDirectory, *steps: int, offered: int) -> None:
    """Checkpoints of these steps, of which a run that has ended offers one."""
    for step in steps:
        path = checkpoint_path(run.checkpoints, step)
        path.mkdir(parents=True)
        (path / "optimizer.safetensors").write_bytes(bytes(10_000))
    result = TrainResult(str(run.path), steps[-1], offered, 1.0, 1.0, 1.0, 0, (), "iterations", {})
    write_result(run.result, result, confirm=lambda: None)


def config_of(run: RunDirectory) -> FineTuneConfig:
    """The configuration of a run that was made here."""
    from nested_core.config.resume import read_run_config

    return read_run_config(run)


def write_plan_of(run: RunDirectory, **changes: Any) -> None:
    """A plan.json of 100 steps on the run's data, with changes."""
    settings: dict[str, Any] = {
        "steps": 100,
        "iterations": 100,
        "epochs": 20.0,
        "first_step": 0,
        "frequencies": (1, 2, 4),
        "offers_best": True,
        "training_file": "train.jsonl",
        "validation_file": "valid.jsonl",
        "validation_examples": 12,
        "memory_forecast_gb": 0.4,
        "memory_limit_gb": 8.0,
    }
    write_plan(run.plan, TrainingPlan(**settings | changes))
