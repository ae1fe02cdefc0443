"""Whether a recorded verdict is the one that its run's files give, field by field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from nested_core.config.sections import GateSection
from nested_core.errors import JUDGE_AGAIN, DamagedError
from nested_core.gate.chosen_candidate import Candidates, read_candidates
from nested_core.gate.example_losses import read_example_losses
from nested_core.gate.fresh_process_check import TOLERANCE_FLOAT32, TOLERANCE_NARROW_DTYPES
from nested_core.gate.held_out_choice import held_out_file
from nested_core.gate.loss_bounds import harm_reasons
from nested_core.gate.loss_figures import summarise_champion, summarise_drift, summarise_losses
from nested_core.records.verdict import ChampionLoss, Drift, TensorChange, Validation, Verdict
from nested_core.storage.dataset_record import DatasetRecord, read_dataset_record
from nested_core.storage.run_directory import RunDirectory

NORM_TOLERANCE = 1e-4  # relative: sums of squares depend on the machine's BLAS
LOGIT_TOLERANCES = (TOLERANCE_FLOAT32, TOLERANCE_NARROW_DTYPES)
NORM_FIELDS = ("max_abs_delta", "relative_delta")


def require_same_verdict(verdict: Verdict, recorded: Verdict, run: RunDirectory) -> None:
    """Raise DamagedError if `recorded` differs from `verdict`, which was given without a model.

    Losses of single examples and the proof are not computed again; they must be there if
    configuration and data ask for them. All figures of losses are, from those of the examples.
    """
    wrong = list(_differing_fields(verdict, recorded))
    wrong += _missing_or_unexpected_fields(verdict, recorded, read_dataset_record(run.dataset))
    wrong += _differing_losses(verdict, recorded, run)
    if wrong:
        raise DamagedError(
            f"{run.gate} is not the verdict on the files beside it: {', '.join(wrong)} differ.",
            advice=JUDGE_AGAIN,
        )


def _differing_fields(verdict: Verdict, recorded: Verdict) -> Iterator[str]:
    """The fields that were computed again, and came out otherwise."""
    for key in ("adapter_step", "last_step", "tiers"):
        if getattr(recorded, key) != getattr(verdict, key):
            yield key
    if not _are_same_bounds(recorded.thresholds, verdict.thresholds or {}):
        yield "thresholds"
    same = zip(recorded.tensors, verdict.tensors, strict=False)
    is_as_many = len(recorded.tensors) == len(verdict.tensors)
    if not is_as_many or not all(_is_same_tensor(*pair) for pair in same):
        yield "tensors"
    for side in ("initial", "trained"):
        if getattr(recorded, side).digest != getattr(verdict, side).digest:
            yield side


def _are_same_bounds(recorded: dict[str, Any] | None, configured: dict[str, Any]) -> bool:
    """Whether the recorded bounds are those of the run's configuration.

    One that is not recorded was not asked for when the verdict was given: the run's configuration
    cannot have set it.
    """
    if recorded is None or not recorded.keys() <= configured.keys():
        return False
    defaults = GateSection().model_dump()
    given = defaults | recorded
    return bool(json.loads(json.dumps(given)) == json.loads(json.dumps(configured)))


def _is_same_tensor(recorded: TensorChange, recomputed: TensorChange) -> bool:
    norms = {key: getattr(recomputed, key) for key in NORM_FIELDS}
    return replace(recorded, **norms) == recomputed and all(
        _is_close_norm(getattr(recorded, key), norm) for key, norm in norms.items()
    )


def _is_close_norm(recorded: float | None, recomputed: float | None) -> bool:
    if recomputed is None or recorded is None:
        return recorded is recomputed
    return math.isclose(recorded, recomputed, rel_tol=NORM_TOLERANCE)


def _missing_or_unexpected_fields(
    verdict: Verdict, recorded: Verdict, dataset: DatasetRecord
) -> Iterator[str]:
    """The fields that are there, or not, against what was configured and what data there is."""
    bounds = verdict.thresholds or {}
    has_held_out = held_out_file(str(bounds.get("held_out", "auto")), dataset) is not None
    expected = {
        "validation": has_held_out,
        "general": bounds.get("general_data") is not None,
        "fused": bool(bounds.get("check_fused")),
        "proof": True,
    }
    for key, is_expected in expected.items():
        if (getattr(recorded, key) is not None) is not is_expected:
            yield key
    has_drift = recorded.drift is not None
    must_have_drift = bounds.get("max_kl") is not None
    if (has_drift and not has_held_out) or (must_have_drift and not has_drift):
        yield "drift"
    if recorded.proof is not None and recorded.proof.get("tolerance") not in LOGIT_TOLERANCES:
        yield "proof"  # or it was not held against the trainer's logits


def _differing_losses(verdict: Verdict, recorded: Verdict, run: RunDirectory) -> Iterator[str]:
    """The figures of held-out losses that gate-losses.jsonl does not give."""
    validation, champion = recorded.validation, recorded.champion
    if validation is None:
        if champion is not None and champion.not_compared is None:
            yield "champion"
        return
    losses = read_example_losses(run.gate_losses)
    gate = GateSection.model_validate(verdict.thresholds or {})
    # Whether a file of its own holds validation examples is not known here, and was recorded.
    candidates = Candidates()
    if losses.file == "valid.jsonl" or validation.chosen_among != 1:
        candidates = read_candidates(run.validation_losses)
    judged = summarise_losses(
        losses,
        selected_on_same_data=validation.selected_on_same_data,
        has_one_answer=validation.has_one_answer,
        bounds=gate,
        candidates=candidates,
    )
    yield from _differing_figures("validation", validation, judged)
    is_asked = "max_harmed_share" in (recorded.thresholds or {})
    if is_asked and harm_reasons(losses, judged, gate):
        yield "validation.harmed"
    if losses.file != held_out_file(gate.held_out, read_dataset_record(run.dataset)):
        yield "validation.file"
    yield from _differing_figures("drift", recorded.drift, summarise_drift(losses))
    if (losses.base_drift is not None) is not gate.drift:
        yield "drift.kl_base"
    if champion is None or losses.champion is None:
        is_not_compared = champion is not None and champion.not_compared is not None
        if losses.champion is not None or (champion is not None and not is_not_compared):
            yield "champion"
        return
    now = summarise_champion(champion.version, losses, gate, candidates)
    yield from _differing_figures("champion", champion, now)


def _differing_figures(
    name: str,
    recorded: Validation | Drift | ChampionLoss | None,
    recomputed: Validation | Drift | ChampionLoss | None,
) -> Iterator[str]:
    """The fields in which figures differ; their name alone where only one of both is there."""
    if recorded is None or recomputed is None:
        if recorded is not recomputed:
            yield name
        return
    given = asdict(recorded)
    for key, figure in asdict(recomputed).items():
        if not is_close_figure(given[key], figure):
            yield f"{name}.{key}"


def is_close_figure(recorded: Any, recomputed: Any) -> bool:
    """Whether a figure, or a list or an object of figures, is what another machine may compute."""
    if isinstance(recomputed, dict):
        return (
            isinstance(recorded, dict)
            and recorded.keys() == recomputed.keys()
            and all(is_close_figure(recorded[key], recomputed[key]) for key in recomputed)
        )
    if isinstance(recomputed, tuple | list):
        return (
            isinstance(recorded, tuple | list)
            and len(recorded) == len(recomputed)
            and all(map(is_close_figure, recorded, recomputed))
        )
    if not isinstance(recomputed, float) or not isinstance(recorded, int | float):
        return bool(recorded == recomputed)
    return math.isclose(recorded, recomputed, rel_tol=NORM_TOLERANCE, abs_tol=NORM_TOLERANCE**2)
