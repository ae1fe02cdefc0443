"""validation-losses.jsonl: the loss of each validation example at every step that could be offered.

The gate needs them if the examples that chose the step also judge it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

from nested_core.errors import MissingFileError, naming_damaged_file
from nested_core.storage.atomic import write_bytes
from nested_core.storage.untrusted_files import append_regular, read_regular


class StepLosses(BaseModel):
    """The losses of one evaluation, at a step whose adapter the run could offer.

    step: the optimizer step before the evaluation.
    contents: the digest of each example's content.
    losses: the mean loss of each example in nats/token; null if not finite. Both lists are None if
        the losses of single examples are not known.
    wrong: the share of wrong answers to the suite that selects the step; 0 without one.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="forbid")
    step: int
    contents: list[int] | None
    losses: list[float | None] | None
    wrong: float = 0.0

    @model_validator(mode="after")
    def _require_a_loss_for_each_example(self) -> StepLosses:
        """Check that there are as many losses as digests."""
        if len(self.contents or ()) != len(self.losses or ()):
            raise ValueError("as many losses as digests are expected")
        return self


def append_step_losses(path: Path, losses: StepLosses) -> None:
    """Append one evaluation to the file."""
    append_regular(path, _render([losses]))


def truncate_step_losses(path: Path, last_step: int) -> None:
    """Remove the evaluations after the step from which training resumes."""
    kept = [losses for losses in read_step_losses(path) if losses.step <= last_step]
    write_bytes(path, _render(kept))


def read_step_losses(path: Path) -> list[StepLosses]:
    """Read the last evaluation of each step, in order of the steps; empty without the file.

    A last line that a killed process left half-written is skipped. Raises DamagedError for any
    other line of another form.
    """
    try:
        content = read_regular(path)
    except MissingFileError:
        return []
    *lines, _ = content.split(b"\n")
    with naming_damaged_file(path):
        read = [StepLosses.model_validate_json(line) for line in lines]
    return sorted({losses.step: losses for losses in read}.values(), key=lambda one: one.step)


def _render(several: Sequence[StepLosses]) -> bytes:
    """Encode evaluations as JSON lines."""
    return "".join(f"{json.dumps(losses.model_dump())}\n" for losses in several).encode()
