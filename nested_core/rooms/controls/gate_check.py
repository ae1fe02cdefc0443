"""The gate's check that runs the controls, and what they add to the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

from nested_core.gate.checks.judged import Check, CheckedRun, GateChecks, GateWork, RunToJudge
from nested_core.gate.checks.losses import LOSSES, WITHOUT_MODEL
from nested_core.measure.losses.held_out_loss import read_nonempty_splits
from nested_core.models.generation import encode_prompt
from nested_core.records.dataset import read_dataset_record
from nested_core.records.verdict import CheckRow, Reason
from nested_core.rooms.controls import answer_losses as losses
from nested_core.rooms.controls.answer_rows import RunRows
from nested_core.rooms.controls.lookup import LOOKUP
from nested_core.rooms.controls.neutral_probes import MAX_TOKENS, PROBES
from nested_core.rooms.controls.plan_invariants import PLAN
from nested_core.rooms.controls.results import CONTROLS_BLOCK, DOUBTS, FIGURES_BLOCK, ControlWarning
from nested_core.rooms.controls.shapes import SHAPES
from nested_core.rooms.controls.texts import list_probes
from nested_core.storage.atomic import canonical_json

CONTROLS = (losses.PROMPTS, losses.SURPRISES, PROBES, PLAN, LOOKUP, SHAPES)  # as in the table


def _run_controls(judged: CheckedRun) -> Iterator[Reason]:
    """Run the controls that are asked for; store rows and warnings. They give no reason.

    Nothing is compared for a loss of pairs, whose rows are no prompt with one answer.
    """
    if judged.config.training.loss is not None:
        return
    run = RunRows(judged, read_nonempty_splits(judged.config, judged.run)["train"])
    asked = [one for one in CONTROLS if getattr(judged.bounds.controls, one.key)]
    told = [(one.key, x) for one in asked for x in one.run(run)]
    warnings = [(key, one) for key, one in told if isinstance(one, ControlWarning)]
    rows = [asdict(one) for _, one in told if isinstance(one, CheckRow)]
    blocks = {CONTROLS_BLOCK: [one.to_json(key) for key, one in warnings], FIGURES_BLOCK: rows}
    texts = [canonical_json(text) for _, one in warnings for text in one.list_texts()]
    if content := b"".join(text + b"\n" for text in texts):
        judged.written_files[judged.run.suspect_rows.name] = content
    doubt = next((DOUBTS[one.kind] for _, one in warnings if one.kind in DOUBTS), None)
    judged.verdict = replace(judged.verdict, doubt=doubt, blocks=judged.verdict.blocks | blocks)
    yield from ()


def _plan_controls(run: RunToJudge) -> GateWork:
    """Plan the work of the controls asked for, as if the base's answers were not kept."""
    config, controls = run.config, run.config.gate.controls
    if config.training.loss is not None or not run.held_out_rows:
        return GateWork()
    train, rows = read_dataset_record(run.run.dataset).splits["train"].rows, 0
    if controls.prompts:
        is_anew = run.goes_on or (config.mask_prompt, config.training.supervise) != (True, "last")
        rows += (1 + 2 * is_anew) * min(losses.MAX_HELD_OUT_ROWS, run.held_out_rows)
        rows += min(losses.MAX_TRAIN_ROWS, train)
    if controls.surprises:
        rows += losses.count_rows_to_read(train, run.held_out_rows)
    if not controls.probes:
        return GateWork(rows=rows)
    prompts = [encode_prompt(run.tokenizer, text) for text in list_probes(())]
    asked = run.ask(prompts, [MAX_TOKENS] * 2)
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
