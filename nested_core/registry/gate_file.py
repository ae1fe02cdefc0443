"""gate.json: the verdict on a run, bound by RUN_DIR/MANIFEST.json to the files that it rests on.

The manifest holds the size and SHA-256 of gate.json and of each file that was judged. It finds
accidents and partial edits; whoever can write the whole folder can make another one that agrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nested_core.errors import (
    JUDGE_AGAIN,
    ConfigError,
    DamagedError,
    GateRejected,
    describe_first_problem,
    go_on_with,
)
from nested_core.storage.atomic import write_json
from nested_core.storage.manifest import (
    MANIFEST_NAME,
    FileEntry,
    describe_file,
    matches_entry,
    read_manifest,
    write_manifest,
)
from nested_core.storage.strict_files import file_type, read_json
from nested_core.text.loss_conclusion import Conclusion, conclude, margin_of_loss

GATE_NAME = "gate.json"
MAX_GATE_BYTES = 64 * 1024 * 1024
MAX_LISTED_REASONS = 5
MIN_CHANGE_LEFT_BY_FUSING = 0.5  # of the whole change, that fusing must leave


class _Losses(BaseModel):
    """The losses of a verdict that passed: both are numbers, unless no example was counted."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    loss_before: float | None
    loss_after: float | None
    examples: int | None = None
    difference: float | None = None
    interval: list[float] | None = Field(default=None, min_length=2, max_length=2)
    one_sided_high: float | None = None
    conclusion: Conclusion | None = None

    def contradictions(
        self, bound: float | None, noise: Literal["paired", "none"], key: str
    ) -> Iterator[str]:
        """Why these numbers are not those of losses that passed; `key` is theirs in gate.json."""
        what = "the loss" if key == "validation" else "the loss on general text"
        before, after = self.loss_before, self.loss_after
        if before is None or after is None:
            if self.examples != 0:
                yield f"{key}.{'loss_before' if before is None else 'loss_after'} is null"
            return
        if bound is None:
            return
        if self.conclusion is None or self.difference is None:
            interval = self.interval if noise == "paired" else None
            if not is_loss_within_bound(before, after, bound, interval):
                yield f"{what} rose beyond its bound"
            return
        if not math.isclose(after - before, self.difference, rel_tol=1e-6, abs_tol=1e-6):
            yield f"{what} changed by another figure than {key}.difference"
            return
        conclusion = conclude(
            self.difference,
            self.interval,
            self.one_sided_high,
            margin=margin_of_loss(bound, before, noise),
            loss_before=before,
            noise=noise,
        )
        if conclusion == "worse":
            yield f"{what} rose beyond its bound"
        elif conclusion != self.conclusion:
            yield f"{what} is {conclusion} by its figures, and not {self.conclusion}"


class _Tensor(BaseModel):
    model_config = ConfigDict(strict=True)
    changed: bool
    finite: bool


class _Tier(BaseModel):
    model_config = ConfigDict(strict=True)
    changed: int = Field(ge=1)
    expected_updates: int
    applied_updates: int
    skipped_updates: int


class _Proof(BaseModel):
    """What the fresh process found; `skipped` if the base model was not there to load."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    skipped: str | None = None
    error: None = None
    max_abs_difference_from_initial: float | None = None
    relative_distance_from_trainer: float = 0.0
    tolerance: float = 0.0

    def contradictions(self) -> Iterator[str]:
        """Why these numbers are no proof."""
        if not self.max_abs_difference_from_initial:
            yield "the proof found no change of a logit"
        if self.relative_distance_from_trainer > self.tolerance:
            yield "the proof's logits are not the trainer's"


class _FusedCheck(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    carried_share: float = Field(ge=MIN_CHANGE_LEFT_BY_FUSING)
    erased_modules: list[str] = Field(max_length=0)


class _Thresholds(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    noise: Literal["paired", "none"] = "none"  # what releases without the key judged by
    max_val_loss_increase: float | None = None
    max_general_loss_increase: float | None = None
    max_kl: float | None = None


class _Drift(BaseModel):
    """How far predictions moved; null where that is not finite or, from the base, not measured."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    kl_initial: float | None = Field(ge=0)
    kl_base: float | None = Field(ge=0)


class _TaskResult(BaseModel):
    """A suite of a verdict that passed."""

    model_config = ConfigDict(strict=True)
    verdict: Literal["passed"]


class _PassedVerdict(BaseModel):
    """The fields of a "passed" gate.json that must agree; earlier versions lack some of them."""

    model_config = ConfigDict(strict=True)
    tensors: list[_Tensor] = []
    tiers: list[_Tier] = []
    validation: _Losses | None = None
    general: _Losses | None = None
    drift: _Drift | None = None
    proof: _Proof | None = None
    fused: _FusedCheck | None = None
    tasks: list[_TaskResult] = []
    thresholds: _Thresholds | None = None

    def contradictions(self) -> Iterator[str]:
        """What is said in one field, and excluded by "passed" or another one."""
        if self.tensors and not any(tensor.changed for tensor in self.tensors):
            yield "no tensor changed"
        if not all(tensor.finite for tensor in self.tensors):
            yield "a tensor is not finite"
        for number, tier in enumerate(self.tiers):
            if tier.applied_updates + tier.skipped_updates != tier.expected_updates:
                yield f"the updates of tier {number} do not add up"
        bounds = self.thresholds or _Thresholds()
        if self.validation is not None:
            yield from self.validation.contradictions(
                bounds.max_val_loss_increase, bounds.noise, "validation"
            )
        if self.general is not None:
            yield from self.general.contradictions(
                bounds.max_general_loss_increase, bounds.noise, "general"
            )
        moved = None if self.drift is None else self.drift.kl_initial
        if bounds.max_kl is not None and not is_drift_within_bound(moved, bounds.max_kl):
            yield "the predictions drifted beyond their bound"
        if self.proof is not None and self.proof.skipped is None:
            yield from self.proof.contradictions()


def is_loss_within_bound(
    before: float | None,
    after: float | None,
    increase: float,
    interval: Sequence[float] | None = None,
) -> bool:
    """Whether both losses are finite, and the second exceeds the first by at most this share.

    A rise beyond that is chance where the 95 % interval of the paired differences, which holds the
    rise itself, holds 0 too. Without an interval the share alone counts.
    """
    if before is None or after is None:
        return False
    if after <= before * (1 + increase):
        return True
    return interval is not None and interval[0] <= 0 and after - before <= interval[1]


def is_drift_within_bound(divergence: float | None, bound: float) -> bool:
    """Whether a mean KL divergence is finite and at most the bound, both in nats a token."""
    return divergence is not None and divergence <= bound


def write_gate(run_dir: Path, gate: Mapping[str, Any], judged: Mapping[str, FileEntry]) -> None:
    """Write gate.json, and the manifest that binds it to the files that were judged.

    `judged` has the entries of those files, by their path in the run directory. A crash in between
    leaves a gate.json without a manifest, which is no verdict yet.
    """
    (run_dir / MANIFEST_NAME).unlink(missing_ok=True)
    write_json(run_dir / GATE_NAME, gate)
    files = {**judged, GATE_NAME: describe_file(run_dir / GATE_NAME)}
    write_manifest(run_dir, _describe_verdict(gate), files)


def _describe_verdict(gate: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says that it is of, under its key `facts`."""
    return {"kind": "verdict on a run", "verdict": gate["verdict"]}


def has_verdict_manifest(run_dir: Path) -> bool:
    """Whether there is a manifest beside gate.json; a run judged by an earlier version has none."""
    return file_type(run_dir / MANIFEST_NAME) != "missing"


def require_verdict_manifest(run_dir: Path, gate: Mapping[str, Any]) -> dict[str, FileEntry]:
    """The entries of the files that the verdict rests on, by their path in the run directory.

    Raises DamagedError if the manifest is missing or damaged, or gate.json is not the one that it
    was written with.
    """
    path = run_dir / GATE_NAME
    if not has_verdict_manifest(run_dir):
        raise DamagedError(
            f"{run_dir / MANIFEST_NAME} is missing: nothing says that {path} is the verdict on the "
            f"files beside it, as in a run that an earlier version judged.",
            advice=JUDGE_AGAIN,
        )
    manifest = read_manifest(run_dir)
    files: dict[str, FileEntry] = manifest["files"]
    if manifest["facts"] != _describe_verdict(gate) or not matches_entry(
        path, files.get(GATE_NAME)
    ):
        raise DamagedError(
            f"{path} has changed since the verdict was given: {MANIFEST_NAME} beside it holds "
            f"another digest of it. Bring back what was there; if it is lost:",
            advice=JUDGE_AGAIN,
        )
    return files


def read_gate(path: Path) -> dict[str, Any]:
    """Read gate.json; ConfigError if it is missing, DamagedError if it holds no verdict."""
    if file_type(path, follow_links=True) == "missing":
        raise ConfigError(
            f"{path} is not there: no gate has judged this adapter. Expected the directory of a "
            "finished run: let the run end; if it was stopped:",
            advice=go_on_with(),
        )
    gate = read_json(path, MAX_GATE_BYTES)
    if not isinstance(gate, dict) or gate.get("verdict") not in ("passed", "failed"):
        raise DamagedError(f'{path} holds no verdict. Expected "verdict": "passed" or "failed".')
    return gate


def reason_names(gate: Mapping[str, Any]) -> list[str]:
    """The code of each reason, with the suite that it is about: `task_below (capitals)`."""
    reasons = gate.get("reasons")
    found = [reason for reason in reasons or [] if isinstance(reason, dict)]
    return [
        f"{reason.get('code')} ({reason['suite']})" if reason.get("suite") else str(reason["code"])
        for reason in found
        if "code" in reason
    ]


def require_passed(gate: dict[str, Any], path: Path) -> None:
    """Raise GateRejected, with the gate's reasons, unless the verdict is "passed".

    DamagedError for "passed" with reasons, which the gate never writes.
    """
    reasons = gate.get("reasons")
    if gate["verdict"] == "passed":
        if reasons:
            raise DamagedError(f"{path} says passed and gives reasons against it: it was edited.")
        return
    listed = ", ".join(reason_names(gate)[:MAX_LISTED_REASONS]) or "no reason given"
    raise GateRejected(
        f"The gate rejected this adapter: {listed} (see {path}). Only an adapter that passed "
        "enters a registry; mend what the reasons name and train again."
    )


def require_consistent(gate: dict[str, Any], path: Path) -> None:
    """Raise DamagedError if a "passed" verdict contradicts itself, which no gate writes."""
    try:
        problems = list(_PassedVerdict.model_validate(gate).contradictions())
    except ValidationError as error:
        problems = [describe_first_problem(error)]
    if problems:
        listed = "; ".join(problems[:MAX_LISTED_REASONS])
        raise DamagedError(
            f"{path} says passed and contradicts itself: {listed}. It was edited.",
            advice=JUDGE_AGAIN,
        )


def require_verdict_on_adapter(gate: dict[str, Any], digest: str, path: Path) -> None:
    """Raise DamagedError unless the verdict was given on the adapter with this digest."""
    trained = gate.get("trained")
    judged = trained.get("digest") if isinstance(trained, dict) else None
    if judged != digest:
        raise DamagedError(
            f"{path} is a verdict on another adapter: it judged {judged!r:.80}, and the adapter "
            f"beside it has the digest {digest}. One of them has changed since; run the gate again."
        )
