"""The proof from outside: a new process loads base and adapter by plain mlx_lm.load and answers.

Its logits on fixed prompts must differ from those with the initial adapter and, where the trainer
recorded its own, equal those. Trusts no array of this process; judges only what the new one wrote.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nested_core import backend
from nested_core.errors import NestedTuneError
from nested_core.gate.verdict import Reason

PROGRAM = Path(__file__).with_name("plain_load.py")
# Relative to the centred norm of the trainer's logits. Where the trainer computes in float32 the
# process does too, with the same kernels; in narrower types the order of sums shows.
TOLERANCE_FLOAT32, TOLERANCE_NARROW = 1e-3, 5e-2
SECONDS = 3600
PROMPTS_WITHOUT_DATA = [list(range(start, start + 8)) for start in (1, 9, 17, 25)]
Rows = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class ProofRequest:
    """Base model, adapters and prompts; `expected` is what the trainer computed, row by row."""

    model: Path
    initial: Path
    trained: Path
    prompts: Sequence[Sequence[int]] = tuple(PROMPTS_WITHOUT_DATA)
    columns: Sequence[int] = ()
    expected: Sequence[Sequence[float | None]] | None = None
    is_float32: bool = False
    trusts_remote_code: bool = False


def prove(request: ProofRequest) -> tuple[dict[str, Any], list[Reason]]:
    """The evidence for gate.json, and the reasons that speak against the adapter.

    Raises NestedTuneError where the process was killed: that says nothing about the adapter.
    """
    evidence: dict[str, Any] = {"model": str(request.model), "prompts": len(request.prompts)}
    answers = _ask(request)
    if isinstance(answers, str):
        message = f"mlx_lm.load in a new process could not use the adapter: {answers}"
        return evidence | {"error": answers}, [Reason("unreadable", message)]
    initial, trained = answers
    moved = float(np.abs(trained - initial).max(initial=0.0))
    evidence |= {"max_abs_difference_from_initial": _finite(moved)}
    if moved == 0:
        message = "in a new process, the logits on every prompt are those of the initial adapter"
        return evidence, [Reason("no_effect", message)]
    if request.expected is None:
        return evidence, []
    expected = np.array(request.expected, np.float64)  # None becomes NaN
    tolerance = TOLERANCE_FLOAT32 if request.is_float32 else TOLERANCE_NARROW
    distance = relative_distance(trained, expected)
    evidence |= {"relative_distance_from_trainer": _finite(distance), "tolerance": tolerance}
    if distance <= tolerance:
        return evidence, []
    message = (
        f"in a new process, the logits are not those that the trainer computed with this adapter: "
        f"relative distance {distance:.3g}, tolerance {tolerance:g}"
    )
    return evidence, [Reason("config_mismatch", message)]


def relative_distance(found: Rows, expected: Rows) -> float:
    """Norm of the difference over the norm of `expected` with each row's mean taken out."""
    if found.shape != expected.shape:
        return float("inf")
    centred = expected - expected.mean(axis=-1, keepdims=True)
    size = float(np.linalg.norm(centred))
    return float(np.linalg.norm(found - expected)) / size if size else float("inf")


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _ask(request: ProofRequest) -> tuple[Rows, Rows] | str:
    """The logits with the initial and with the trained adapter, or why there are none."""
    asked = {
        "model": str(request.model),
        "adapters": [str(request.initial.resolve()), str(request.trained.resolve())],
        "prompts": [list(prompt) for prompt in request.prompts],
        "columns": list(request.columns),
        "dtype": "float32" if request.is_float32 else None,
        "trust_remote_code": request.trusts_remote_code,
    }
    with tempfile.TemporaryDirectory(prefix="nested-tune-proof-") as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        question.write_text(json.dumps(asked), encoding="utf-8")
        problem = _run([str(question), str(answer)])
        if problem is not None:
            return problem
        initial, trained = json.loads(answer.read_bytes())
    return np.array(initial, np.float64), np.array(trained, np.float64)


def _run(arguments: Sequence[str]) -> str | None:
    """Run the program; None where it ended well, else the last line that it complained with."""
    command = [sys.executable, "-P", str(PROGRAM), *arguments]
    try:
        done = subprocess.run(
            command, env=_environment(), capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NestedTuneError(f"The proof process took more than {SECONDS} seconds.") from error
    if done.returncode < 0:
        raise NestedTuneError(
            f"The process that loads base and adapter for the gate was killed by signal "
            f"{-done.returncode}; most often memory was short. Judge again with --resume."
        )
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return None if done.returncode == 0 else (lines or ["no message"])[-1][:300]


def _environment() -> dict[str, str]:
    """This process's own, with the BLAS that it computes with put in front there too."""
    library = backend.prepare()
    return os.environ | ({} if library is None else {"LD_PRELOAD": library})
