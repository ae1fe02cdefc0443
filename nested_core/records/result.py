"""result.json: what training ended with; it is written last, and names the offered checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from nested_core.errors import DamagedError, describe_first_problem
from nested_core.storage.atomic import Confirm, finite_or_none, write_json
from nested_core.storage.untrusted_files import read_json

MAX_RESULT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class TrainResult:
    """What training ended with, as in result.json.

    step, adapter_step: the last optimizer step, and the one whose adapter is selected.
    evidence: SHA-256 of the files that training wrote; the gate compares the folder with them.
    """

    run_dir: str
    step: int
    adapter_step: int
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    verified_steps: int
    red_flags: tuple[str, ...]
    evidence: dict[str, str]


_VALIDATOR = TypeAdapter(TrainResult)


def write_result(path: Path, result: TrainResult, *, confirm: Confirm) -> None:
    """Write result.json; `confirm` is called just before, and raises to leave the old."""
    write_json(path, finite_or_none(asdict(result)), confirm=confirm)


def read_result(path: Path) -> TrainResult:
    """Read result.json; DamagedError if it is not what training wrote."""
    values = read_json(path, MAX_RESULT_BYTES)
    try:
        return _VALIDATOR.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise DamagedError(f"{path}: {describe_first_problem(error)}.") from error
