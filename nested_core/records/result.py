"""result.json: what training ended with; it is written last, and names the offered checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from nested_core.storage.json_file import JsonFile


@dataclass(frozen=True)
class TrainResult:
    """What training ended with, as in result.json.

    step, adapter_step: the last optimizer step, and the step whose adapter is offered.
    verified_steps: after how many steps the updated parameters were read back and compared.
    red_flags: warnings about the course of training, such as a flat loss.
    ended: why training ended: `iterations`, `patience` of early stopping, or `time` that is over.
    evidence: SHA-256 of each file that training wrote; the gate compares the folder with them.
    """

    run_dir: str
    step: int
    adapter_step: int
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    verified_steps: int
    red_flags: tuple[str, ...]
    ended: str
    evidence: dict[str, str]


RESULT_FILE = JsonFile(TrainResult, 64 * 2**20)
read_result, write_result = RESULT_FILE.read, RESULT_FILE.write
