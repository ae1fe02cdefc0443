"""The check that a fresh process, which loads base and adapter with mlx_lm, sees the change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from nested_core import backend
from nested_core.gate.checks.judged import Check, CheckedRun, Judged
from nested_core.gate.proof.canary import make_canary
from nested_core.gate.proof.fresh_process_check import ProofRequest, prove_effect_in_fresh_process
from nested_core.gate.tensors.base_compatibility import fingerprint_reasons
from nested_core.records.verdict import Reason
from nested_core.storage.canary_file import CANARY_NAME, render_canary


def _find_unproven_effect(judged: CheckedRun) -> tuple[Reason, ...]:
    """Return the reasons why the fresh process does not confirm the trained adapter's effect.

    If it does confirm it, also store the answers to the canary questions for the registry.
    """
    if judged.proof.running is None:
        judged.session.release_base()  # the new process needs the memory
        mx.clear_cache()
    shown = judged.proof.begin().judge()
    judged.verdict = replace(judged.verdict, proof=shown.evidence)
    if shown.canary is not None and not shown.reasons:
        canary = make_canary(judged.proof.questions, judged.proof.request, shown.canary)
        judged.written_files[CANARY_NAME] = render_canary(canary)
    return shown.reasons


def _find_unproven_effect_without_run(judged: Judged) -> Sequence[Reason]:
    """Compare the logits of any two adapters in a fresh process, without a trainer's record.

    Returns reasons to reject the second: it belongs to another base, or its logits are not finite
    or the same as the first one's.
    Skipped, with a note in the verdict, if their base model is not a folder on this machine.
    """
    model = judged.after.config.get("model")
    if not model or not Path(model, "config.json").is_file():
        skipped = f"the base model {model} is not a folder here: nothing was loaded"
        judged.verdict = replace(judged.verdict, proof={"skipped": skipped})
        return []
    base = Path(model)
    if mismatch := fingerprint_reasons(judged.after.config, base) or fingerprint_reasons(
        judged.before.config, base
    ):
        return mismatch
    is_float32 = backend.device() == "cpu"  # as training does on a CPU, to see smaller changes
    request = ProofRequest(base, judged.before.path, judged.after.path, is_float32=is_float32)
    shown = prove_effect_in_fresh_process(request)
    judged.verdict = replace(judged.verdict, proof=shown.evidence)
    return shown.reasons


PROOF = Check(
    "fresh process",
    _find_unproven_effect,
    needs_all=True,
    stage="a new process loads the adapter, and must see the change",
)
PROOF_WITHOUT_RUN = Check("fresh process", _find_unproven_effect_without_run, needs_all=True)
