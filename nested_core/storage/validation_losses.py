"""validation-losses.jsonl: the loss of each validation example at every step that could be offered.

The gate needs them where the examples that chose the selected step judge it too.
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
    """One evaluation of an adapter that could be offered: every tier had been updated.

    step: the optimizer step after which it was made.
    lines, losses: the examples by their line, and the mean loss of each in nats/token, null where
        not finite; both None if single losses are not known.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="forbid")
    step: int
    lines: list[int] | None
    losses: list[float | None] | None

    @model_validator(mode="after")
    def _require_a_loss_for_each_line(self) -> StepLosses:
        if len(self.lines or ()) != len(self.losses or ()):
            raise ValueError("as many losses as lines are expected")
        return self


def append_step_losses(path: Path, losses: StepLosses) -> None:
    """Append one evaluation."""
    append_regular(path, _render([losses]))


def truncate_step_losses(path: Path, last_step: int) -> None:
    """Keep the evaluations up to a step, from which training goes on; none without the file."""
    kept = [losses for losses in read_step_losses(path) if losses.step <= last_step]
    write_bytes(path, _render(kept))


def read_step_losses(path: Path) -> list[StepLosses]:
    """The last evaluation of each step, in order of the steps; none if there is no file.

    A last line that a killed process left half-written is passed over. Raises DamagedError for
    anything else that is no evaluation.
    """
    try:
        content = read_regular(path)
    except MissingFileError:
        return []
    *lines, _ = content.split(b"\n")
    with naming_damaged_file(path):
        read = [StepLosses.model_validate_json(line) for line in lines]
    return sorted({losses.step: losses for losses in read}.values(), key=lambda own: own.step)


def _render(several: Sequence[StepLosses]) -> bytes:
    return "".join(f"{json.dumps(losses.model_dump())}\n" for losses in several).encode()
