"""The gate's check that runs the controls, and what they add to the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace

from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.gate.checks.judged import Check, CheckedRun, GateChecks
from nested_core.gate.checks.losses import LOSSES, WITHOUT_MODEL
from nested_core.gate.checks.planned_work import GateWork, RunToJudge
from nested_core.measure.losses.held_out_loss import read_nonempty_splits
from nested_core.models.generation import encode_prompt
from nested_core.records.dataset import read_dataset_record
from nested_core.records.plan import read_plan
from nested_core.records.verdict import Reason
from nested_core.rooms.controls import (
    another_prompt,
    lookup,
    neutral_probes,
    plan_invariants,
    surprising_rows,
)
from nested_core.rooms.controls.results import (
    CONTROLS_BLOCK,
    FIGURES_BLOCK,
    ControlResult,
    not_applicable,
)

MIN_STEPS = 100
CONTROLS_OF_LEARNING = ("prompts", "surprises", "probes")
# In the order of the table, by the key under `gate.controls`
CONTROLS: Mapping[str, Callable[[CheckedRun, TokenizedSplit], ControlResult]] = {
    another_prompt.CONTROL: another_prompt.measure_prompts,
    surprising_rows.CONTROL: surprising_rows.measure_surprises,
    neutral_probes.CONTROL: neutral_probes.measure_probes,
    plan_invariants.CONTROL: plan_invariants.measure_plan,
    lookup.CONTROL: lookup.measure_lookup,
}


def _why_too_early(judged: CheckedRun) -> str | None:
    """Return why nothing can be said of what the adapter learnt; None after a pass or MIN_STEPS."""
    plan, step = read_plan(judged.run.plan), judged.verdict.adapter_step or 0
    if plan is None or step >= MIN_STEPS or plan.passes_until(step) >= 1:
        return None
    return f"the adapter is of step {step}, before the end of the first pass"


def _run_controls(judged: CheckedRun) -> Iterator[Reason]:
    """Run the controls that are asked for; store rows and warnings. They give no reason.

    Nothing is compared for a loss of pairs, whose rows are no prompt with one answer.
    """
    asked = judged.bounds.controls.model_dump()
    if judged.config.training.loss is not None:
        return
    train = read_nonempty_splits(judged.config, judged.run)["train"]
    reason = _why_too_early(judged)
    results = [
        not_applicable(name, name, reason)
        if reason is not None and name in CONTROLS_OF_LEARNING
        else run(judged, train)
        for name, run in CONTROLS.items()
        if asked.get(name)
    ]
    warnings = [warning for result in results for warning in result.warnings]
    figures = [asdict(row) for result in results for row in result.figures]
    judged.verdict = replace(
        judged.verdict,
        doubt=next((warning.doubt for warning in warnings if warning.doubt), None),
        blocks=judged.verdict.blocks
        | {CONTROLS_BLOCK: [warning.to_json() for warning in warnings], FIGURES_BLOCK: figures},
    )
    yield from ()


def _plan_controls(run: RunToJudge) -> GateWork:
    """Plan the work of the controls asked for, as if the base's answers were not kept."""
    controls = run.config.gate.controls
    if run.config.training.loss is not None or not run.held_out_rows:
        return GateWork()
    train, rows = read_dataset_record(run.run.dataset).splits["train"].rows, 0
    if controls.prompts:
        pairs = another_prompt.MAX_PARTNERS * run.held_out_rows
        rows += (2 + run.goes_on) * min(another_prompt.MAX_ROWS, pairs)
    if controls.surprises:
        rows += surprising_rows.count_rows_to_read(train, run.held_out_rows)
    if not controls.probes:
        return GateWork(rows=rows)
    prompts = [encode_prompt(run.tokenizer, text) for text in neutral_probes.choose_prompts(())]
    asked = run.ask(prompts, [neutral_probes.MAX_TOKENS] * 2)
    return replace(asked, rows=rows + 2 * len(prompts))


CONTROLS_CHECK = Check(
    "controls",
    _run_controls,
    stopped_by=(*WITHOUT_MODEL, LOSSES),
    after_answers=True,
    bounds=("controls",),
    is_asked=lambda bounds: any(bounds.controls.model_dump().values()),
    stage="controls: what should not matter",
    plan_work=_plan_controls,
)
CHECKS = GateChecks((CONTROLS_CHECK,))
