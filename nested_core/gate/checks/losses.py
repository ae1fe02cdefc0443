"""The checks of losses: with either adapter in the base model, and in training.

The first check loads the base model, which the trained adapter has to fit. Two find training that
diverged: by the trainer's last logits, and by its training loss where no other loss was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Never

import numpy as np

from nested_core.data.held_out_rows import digest_held_out_file
from nested_core.gate.checks.file_checks import CHANGE, UNLOADABLE
from nested_core.gate.checks.judged import Check, CheckedRun, GateWork, RunToJudge, count_lines
from nested_core.gate.proof.fresh_process_check import is_constant
from nested_core.gate.tensors.base_compatibility import base_reasons
from nested_core.measure.losses.chosen_candidate import Candidates, read_candidates
from nested_core.measure.losses.held_out_loss import (
    LoadedBase,
    measure_example_losses,
    measure_general_loss,
    read_held_out_examples,
    read_nonempty_splits,
)
from nested_core.measure.losses.left_out_examples import read_run_rows
from nested_core.measure.losses.loss_figures import (
    drift_reasons,
    general_loss_reasons,
    harm_reasons,
    loss_reasons,
    non_finite_loss_reasons,
    summarise_drift,
    summarise_losses,
)
from nested_core.records.verdict import Code, Reason, describe_examples
from nested_core.storage.atomic import render_json


def _find_misfits(judged: CheckedRun) -> list[Reason]:
    """Load the base model, and give a reason if the trained adapter's tensors do not fit it."""
    judged.base = LoadedBase.load(judged.config, judged.session)
    return base_reasons(judged.after, judged.base.parameters, judged.base.folder)


def _measure_losses(judged: CheckedRun) -> Iterator[Reason]:
    """Measure the loss of each held-out example with the initial and the trained adapter.

    Examples that this run or an ancestor was trained on are left out. Stores in `judged`: the
    losses, the predictions that these are from, their summary in the verdict, the rows that were
    trained on, the candidates that the step was chosen from, and the files to write. Yields a
    reason if a mean loss is not finite.
    """
    config, run = judged.config, judged.run
    splits = read_nonempty_splits(config, run)
    judged.trained_on = read_run_rows(run)
    judged.written_files[run.training_examples.name] = render_json(judged.trained_on.to_json())
    judged.candidates = Candidates()
    file_sha256 = digest_held_out_file(config.gate.held_out)
    judged.held_out = held_out = read_held_out_examples(config, splits)
    if held_out is None:
        return
    losses, judged.predictions = measure_example_losses(
        judged.base, judged.evidence.before, judged.evidence.after, held_out
    )
    judged.losses = losses = losses.leaving_out(judged.trained_on.find_in(held_out.digests))
    judged.written_files[run.gate_losses.name] = losses.render()
    if held_out.has_validation_examples:
        judged.candidates = read_candidates(run.validation_losses, are_ties=True)
    # Of steps with equally many right answers the loss selects one
    is_by_loss = config.training.select_by == "loss" or judged.candidates.count > 1
    validation = summarise_losses(
        losses,
        judged.bounds,
        selected_on_same_data=held_out.selected_on_same_data and is_by_loss,
        has_one_answer=held_out.are_all_answers_equal,
        candidates=judged.candidates,
        are_rows_known=judged.trained_on.unknown is None,
    )
    drift = summarise_drift(losses)
    validation = replace(validation, file_sha256=file_sha256)
    judged.verdict = replace(judged.verdict, validation=validation, drift=drift)
    if validation.examples != 0:
        yield from non_finite_loss_reasons(validation, "loss")


def _find_worse_loss(judged: CheckedRun) -> Iterator[Reason]:
    """Yield a reason if the held-out loss rose by more than `gate.max_val_loss_increase`."""
    validation = judged.verdict.validation
    if validation is not None and validation.examples != 0:
        yield from loss_reasons(validation, judged.bounds)


def _find_forgetting(judged: CheckedRun) -> Iterator[Reason]:
    """Measure the loss on general text; give a reason if it rose by more than the gate allows."""
    general = measure_general_loss(judged.base, judged.run)
    judged.verdict = replace(judged.verdict, general=general)
    yield from () if general is None else general_loss_reasons(general, judged.bounds)


def _find_harmed_examples(judged: CheckedRun) -> Iterator[Reason]:
    """Yield a reason if the loss of too large a share of the held-out examples got worse."""
    validation = judged.verdict.validation
    if judged.losses is not None and validation is not None:
        yield from harm_reasons(judged.losses, validation, judged.bounds)


def _find_drift(judged: CheckedRun) -> Iterator[Reason]:
    """Yield a reason if the model's predictions drifted (KL divergence) beyond `gate.max_kl`."""
    validation = judged.verdict.validation
    if validation is not None:
        yield from drift_reasons(judged.verdict.drift, describe_examples(validation), judged.bounds)


def _find_collapse(judged: CheckedRun) -> Iterator[Reason]:
    """Yield a reason if the trainer's logits are all non-finite, or the same for every token."""
    values = np.array(judged.evidence.record.logits.values, np.float64)  # None becomes NaN
    if values.ndim != 2 or not values.size:
        return
    if not np.isfinite(values).any():
        yield Reason("non_finite", "no logit that the trainer computed with it is finite")
    elif is_constant(values):
        message = "every logit that the trainer computed with it is the same: numbers overflowed"
        yield Reason("non_finite", message)


def _find_risen_training_loss(judged: CheckedRun) -> Iterator[Reason]:
    """Yield a reason if the training loss diverged and no held-out losses were measured."""
    divergence, validation = judged.divergence, judged.verdict.validation
    is_measured = validation is not None and validation.examples != 0
    if divergence is not None and divergence.is_certain and not is_measured:
        code: Code = "non_finite" if divergence.loss is None else "loss_regressed"
        yield Reason(code, "the training loss is far above where it began")


def _plan_losses(run: RunToJudge) -> GateWork:
    return GateWork(rows=run.count_rows(run.held_out_rows, 2, is_base_among=not run.goes_on))


def _plan_general_text(run: RunToJudge) -> GateWork:
    gate = run.config.gate
    if gate.general_data is None or gate.max_general_loss_increase is None:
        return GateWork()
    return GateWork(rows=2 * count_lines(Path(gate.general_data)))


BASE = Check(
    "base", _find_misfits, stopped_by=UNLOADABLE, stage="the base model, which the tensors must fit"
)
# If one of these checks fails, no model with the trained adapter can be loaded to measure with.
WITHOUT_MODEL: tuple[Check[Never], ...] = (*UNLOADABLE, BASE)
LOSSES = Check(
    "losses",
    _measure_losses,
    stopped_by=WITHOUT_MODEL,
    stage="losses on held-out examples, before and after",
    plan_work=_plan_losses,
)
WORSE_LOSS = Check(
    "worse loss",
    _find_worse_loss,
    stopped_by=(*WITHOUT_MODEL, LOSSES),
    bounds=("max_val_loss_increase",),
)
GENERAL_TEXT = Check(
    "general text",
    _find_forgetting,
    stopped_by=WITHOUT_MODEL,
    bounds=("max_general_loss_increase",),
    plan_work=_plan_general_text,
)
HARMED_EXAMPLES = Check(
    "harmed examples", _find_harmed_examples, stopped_by=WITHOUT_MODEL, bounds=("max_harmed_share",)
)
DRIFT = Check("drift", _find_drift, stopped_by=WITHOUT_MODEL, bounds=("max_kl",))
COLLAPSE = Check(
    "trainer's logits", _find_collapse, stopped_by=(*WITHOUT_MODEL, *CHANGE, LOSSES), is_cause=True
)
TRAINING_LOSS = Check(
    "training loss", _find_risen_training_loss, stopped_by=(*WITHOUT_MODEL, *CHANGE, COLLAPSE)
)
