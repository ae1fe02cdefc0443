"""The gate's check that runs the controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from nested_core.gate.checks.judged import Check, CheckedRun, GateChecks, GateWork, RunToJudge
from nested_core.gate.checks.losses import LOSSES, WITHOUT_MODEL
from nested_core.measure.losses.held_out_loss import read_nonempty_splits
from nested_core.models.generation import encode_prompt
from nested_core.records.dataset import read_dataset_record
from nested_core.records.plan import read_plan
from nested_core.records.verdict import CheckRow, Reason
from nested_core.rooms.controls import answer_losses, lookup, plan_invariants, probes, shapes
from nested_core.rooms.controls.answer_rows import RunRows
from nested_core.rooms.controls.results import NotApplicableError, Told, add_to_verdict

MIN_STEPS, MIN_PASSES = 100, 3  # before which an adapter has learnt the form of the answers alone


@dataclass(frozen=True)
class Control:
    """A control: its key under `gate.controls`, the name of its row, and what measures it.

    measure: yields rows for the table and warnings, of the rows of the run that is judged.
    is_of_learning: whether it tells nothing of a run that is too short to learn from.
    """

    key: str
    name: str
    measure: Callable[[RunRows], Told]
    is_of_learning: bool = False

    def run(self, run: RunRows) -> Told:
        """Run the control; where it has nothing to compare, yield a row that says why."""
        plan = read_plan(run.judged.run.plan)
        try:
            if self.is_of_learning and plan and plan.steps < MIN_STEPS and plan.epochs < MIN_PASSES:
                raise NotApplicableError(f"{plan.steps} steps, fewer than {MIN_PASSES} passes")
            yield from self.measure(run)
        except NotApplicableError as error:
            yield CheckRow(self.name, verdict=f"not applicable: {error}")


CONTROLS = (  # in the order of the table
    Control("prompts", answer_losses.PROMPTS_NAME, answer_losses.measure_prompts, True),
    Control("surprises", answer_losses.SURPRISES_NAME, answer_losses.measure_surprises, True),
    Control("probes", probes.NAME, probes.measure_probes, True),
    Control("plan", plan_invariants.NAME, plan_invariants.measure_plan),
    Control("lookup", lookup.NAME, lookup.measure_lookup),
    Control("shapes", shapes.NAME, shapes.measure_shapes),
)


def _run_controls(judged: CheckedRun) -> Iterator[Reason]:
    """Run the controls that are asked for; store rows and warnings. They give no reason.

    Nothing is compared for a loss of pairs, whose rows are no prompt with one answer.
    """
    if judged.config.training.loss is None:
        run = RunRows(judged, read_nonempty_splits(judged.config, judged.run)["train"])
        asked = [one for one in CONTROLS if getattr(judged.bounds.controls, one.key)]
        add_to_verdict(judged, [(one.key, told) for one in asked for told in one.run(run)])
    yield from ()


def _plan_controls(run: RunToJudge) -> GateWork:
    """Plan the work of the controls asked for, as if the base's answers were not kept."""
    config, controls = run.config, run.config.gate.controls
    if config.training.loss is not None:
        return GateWork()
    train, rows = read_dataset_record(run.run.dataset).splits["train"].rows, 0
    if controls.prompts and run.held_out_rows:
        is_anew = run.goes_on or (config.mask_prompt, config.training.supervise) != (True, "last")
        rows += (1 + 2 * is_anew) * min(answer_losses.MAX_HELD_OUT_ROWS, run.held_out_rows)
        rows += min(answer_losses.MAX_TRAIN_ROWS, train)
    if controls.surprises:
        rows += answer_losses.count_rows_to_read(train, run.held_out_rows)
    if not controls.probes:
        return GateWork(rows=rows)
    prompts = [encode_prompt(run.tokenizer, text) for text in probes.list_probes(())]
    asked = run.ask(prompts, [probes.MAX_TOKENS] * 2)
    return replace(asked, rows=rows + 2 * len(prompts))


CONTROLS_CHECK = Check(
    "controls",
    _run_controls,
    stopped_by=(*WITHOUT_MODEL, LOSSES),
    after_answers=True,
    bounds=("controls",),
    is_asked=lambda bounds: any(bounds.controls.model_dump().values()),
    stage="controls: comparisons that only warn",
    plan_work=_plan_controls,
)
CHECKS = GateChecks((CONTROLS_CHECK,))
