"""The verdict, as gate.json holds it: passed, or failed with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from nested_core.errors import DamagedError
from nested_core.storage.manifest import FileEntry
from nested_core.storage.strict_files import read_regular

Code = Literal[
    "unchanged",
    "tier_unchanged",
    "updates_missing",
    "non_finite",
    "tensor_missing",
    "tensor_unexpected",
    "shape_mismatch",
    "dtype_mismatch",
    "no_effect",
    "loss_regressed",
    "forgetting",
    "unreadable",
    "config_mismatch",
    "base_mismatch",
]


@dataclass(frozen=True)
class Reason:
    """Why an adapter is rejected, and the tensors that it is about."""

    code: Code
    message: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorChange:
    """How one tensor changed from the initial to the trained adapter.

    `changed` compares bytes; `max_abs_delta` is None if a value is not finite; `relative_delta`
    is the norm of the difference over the larger of the two norms.
    """

    name: str
    tier: int | None
    changed: bool
    max_abs_delta: float | None
    relative_delta: float | None
    finite: bool


@dataclass(frozen=True)
class TierChange:
    """One tier: how many of its tensors changed, and its updates against those that were due."""

    tier: int
    frequency: int
    tensors: int
    changed: int
    expected_updates: int
    applied_updates: int
    skipped_updates: int


@dataclass(frozen=True)
class Validation:
    """The loss of the initial and of the trained adapter on one recorded list of examples."""

    loss_before: float | None
    loss_after: float | None
    selected_on_same_data: bool


@dataclass(frozen=True)
class GeneralLoss:
    """The loss of the initial and of the trained adapter on text unrelated to the task."""

    loss_before: float | None
    loss_after: float | None
    path: str
    sha256: str


@dataclass(frozen=True)
class JudgedAdapter:
    """An adapter that was judged: its path, and the digest of its meaning and tensors."""

    path: str
    digest: str


@dataclass(frozen=True)
class Verdict:
    """The content of gate.json, and the entries of the judged files for the run's manifest."""

    reasons: tuple[Reason, ...]
    adapter_step: int | None
    initial: JudgedAdapter
    trained: JudgedAdapter
    tensors: tuple[TensorChange, ...]
    tiers: tuple[TierChange, ...] = ()
    validation: Validation | None = None
    thresholds: dict[str, Any] | None = None
    general: GeneralLoss | None = None
    fused: dict[str, Any] | None = None
    proof: dict[str, Any] | None = None
    judged_files: Mapping[str, FileEntry] = field(default_factory=dict, compare=False)

    @property
    def has_passed(self) -> bool:
        """Whether there is no reason against the adapter."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """The content of gate.json."""
        fields = asdict(self)
        del fields["judged_files"]
        return {"verdict": "passed" if self.has_passed else "failed"} | fields

    def summary(self) -> str:
        """One line: the codes, or what changed."""
        if self.has_passed:
            changed = sum(tensor.changed for tensor in self.tensors)
            return f"passed: {changed} of {len(self.tensors)} tensors changed{self._loss_note()}"
        return "rejected: " + "; ".join(f"{r.code} ({r.message})" for r in self.reasons[:4])

    def _loss_note(self) -> str:
        if self.validation is None:
            return ""
        before, after = self.validation.loss_before, self.validation.loss_after
        return f", validation loss {before:.4g} -> {after:.4g}"


def read_verdict(path: Path) -> Verdict:
    """The verdict in a gate.json that this run's gate wrote; DamagedError if it holds none."""
    try:
        return TypeAdapter(Verdict).validate_json(read_regular(path))
    except ValidationError as error:
        raise DamagedError(f"{path} holds no verdict: {error.errors()[0]['msg']}.") from error
