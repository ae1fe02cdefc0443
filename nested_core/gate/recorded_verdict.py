"""Whether a recorded verdict is the one that its run's files give, field by field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from nested_core.config.gate import GateSection
from nested_core.errors import JUDGE_AGAIN, DamagedError
from nested_core.gate.chosen_candidate import Candidates, read_candidates
from nested_core.gate.example_losses import ExampleLosses, read_example_losses
from nested_core.gate.fresh_process_check import TOLERANCE_FLOAT32, TOLERANCE_NARROW_DTYPES
from nested_core.gate.held_out_choice import held_out_file
from nested_core.gate.loss_bounds import harm_reasons
from nested_core.gate.verdict import ChampionLoss, Drift, Validation, Verdict
from nested_core.storage.dataset_record import DatasetRecord, read_dataset_record
from nested_core.storage.run_directory import RunDirectory

NORM_TOLERANCE = 1e-4  # relative: sums of squares depend on the machine's BLAS
LOGIT_TOLERANCES = (TOLERANCE_FLOAT32, TOLERANCE_NARROW_DTYPES)
MISSING_FIGURE = "missing"
NORM_FIELDS = ("max_abs_delta", "relative_delta")


def require_same_verdict(verdict: Verdict, recorded: Mapping[str, Any], run: RunDirectory) -> None:
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


def _differing_fields(verdict: Verdict, recorded: Mapping[str, Any]) -> Iterator[str]:
    """The fields that were computed again, and came out otherwise."""
    now = json.loads(json.dumps(verdict.to_json()))
    for key in ("adapter_step", "last_step", "thresholds", "tiers"):
        if recorded.get(key) != now[key]:
            yield key
    if not _are_same_tensors(recorded.get("tensors"), now["tensors"]):
        yield "tensors"
    for side in ("initial", "trained"):
        judged = recorded.get(side)
        if not isinstance(judged, dict) or judged.get("digest") != now[side]["digest"]:
            yield side


def _are_same_tensors(recorded: Any, recomputed: list[dict[str, Any]]) -> bool:
    if not isinstance(recorded, list) or len(recorded) != len(recomputed):
        return False
    return all(_is_same_tensor(*pair) for pair in zip(recorded, recomputed, strict=True))


def _is_same_tensor(recorded: Any, recomputed: dict[str, Any]) -> bool:
    if not isinstance(recorded, dict) or recorded.keys() != recomputed.keys():
        return False
    exact = recomputed.keys() - set(NORM_FIELDS)
    return all(recorded[key] == recomputed[key] for key in exact) and all(
        _is_close_norm(recorded[key], recomputed[key]) for key in NORM_FIELDS
    )


def _is_close_norm(recorded: Any, recomputed: float | None) -> bool:
    if recomputed is None or not isinstance(recorded, int | float):
        return recorded is recomputed
    return math.isclose(recorded, recomputed, rel_tol=NORM_TOLERANCE)


def _missing_or_unexpected_fields(
    verdict: Verdict, recorded: Mapping[str, Any], dataset: DatasetRecord
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
        if isinstance(recorded.get(key), dict) is not is_expected:
            yield key
    has_drift = isinstance(recorded.get("drift"), dict)
    must_have_drift = bounds.get("max_kl") is not None
    if (has_drift and not has_held_out) or (must_have_drift and not has_drift):
        yield "drift"
    proof = recorded.get("proof")
    if isinstance(proof, dict) and proof.get("tolerance") not in LOGIT_TOLERANCES:
        yield "proof"  # or it was not held against the trainer's logits


def _differing_losses(
    verdict: Verdict, recorded: Mapping[str, Any], run: RunDirectory
) -> Iterator[str]:
    """The figures of held-out losses that gate-losses.jsonl does not give."""
    validation = recorded.get("validation")
    if not isinstance(validation, dict):
        champion = recorded.get("champion")
        if champion is not None and _get_key(champion, "not_compared") is None:
            yield "champion"
        return
    losses = read_example_losses(run.gate_losses)
    bounds = verdict.thresholds or {}
    gate = GateSection.model_validate(bounds)
    choice = gate.held_out
    # Whether a file of its own holds validation examples is not known here, and was recorded.
    candidates = Candidates()
    if losses.file == "valid.jsonl" or validation.get("chosen_among") != 1:
        candidates = read_candidates(run.validation_losses)
    judged = Validation.from_losses(
        losses, selected_on_same_data=False, bounds=gate, candidates=candidates
    )
    now = asdict(judged)
    for key in now.keys() - {"selected_on_same_data", "has_one_answer"}:
        if not is_close_figure(validation.get(key, MISSING_FIGURE), now[key]):
            yield f"validation.{key}"
    if harm_reasons(losses, judged, gate):
        yield "validation.harmed"
    if losses.file != held_out_file(choice, read_dataset_record(run.dataset)):
        yield "validation.file"
    yield from _differing_drift(
        recorded.get("drift"), losses, expects_base_drift=bool(bounds.get("drift"))
    )
    champion = recorded.get("champion", MISSING_FIGURE)
    yield from _differing_champion(champion, losses, gate, candidates)


def _differing_drift(
    drift: Any, losses: ExampleLosses, *, expects_base_drift: bool
) -> Iterator[str]:
    """The figures of drift that the divergences of the examples do not give."""
    now = Drift.from_losses(losses)
    if now is None or not isinstance(drift, dict):
        if drift is not None or now is not None or expects_base_drift:
            yield "drift"
        return
    if (losses.base_drift is not None) is not expects_base_drift:
        yield "drift.kl_base"
    for key, figure in asdict(now).items():
        if not is_close_figure(drift.get(key, MISSING_FIGURE), figure):
            yield f"drift.{key}"


def _get_key(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _differing_champion(
    champion: Any, losses: ExampleLosses, gate: GateSection, candidates: Candidates
) -> Iterator[str]:
    """The figures of the comparison with the champion that the losses do not give."""
    if champion is None or not isinstance(champion, dict):
        if champion is not None or losses.champion is not None:
            yield "champion"
        return
    is_compared = losses.champion is not None
    if is_compared is isinstance(champion.get("not_compared"), str):
        yield "champion.not_compared"
    elif is_compared:
        version = str(champion.get("version"))
        now = asdict(ChampionLoss.from_losses(version, losses, gate, candidates))
        for key in now:
            if not is_close_figure(champion.get(key, MISSING_FIGURE), now[key]):
                yield f"champion.{key}"


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
            isinstance(recorded, list)
            and len(recorded) == len(recomputed)
            and all(map(is_close_figure, recorded, recomputed))
        )
    if not isinstance(recomputed, float) or not isinstance(recorded, int | float):
        return bool(recorded == recomputed)
    return math.isclose(recorded, recomputed, rel_tol=NORM_TOLERANCE, abs_tol=NORM_TOLERANCE**2)
