"""The proof from outside: a new process loads base and adapter by plain mlx_lm.load and answers.

Its logits on fixed prompts must differ from those with the initial adapter and, where the trainer
recorded its own, equal those. Trusts no array of this process; judges only what the new one wrote.
"""

from __future__ import annotations

import json
import math
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
from nested_core.storage.adapter import WEIGHTS_NAME, read_tensors
from nested_core.storage.strict_json import finite_or_none

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


@dataclass(frozen=True)
class Answers:
    """The logits with either adapter, and the factors that the model has with the trained one."""

    initial: Rows
    trained: Rows
    factors: set[str]


def prove(request: ProofRequest) -> tuple[dict[str, Any], list[Reason]]:
    """The evidence for gate.json, and the reasons that speak against the adapter.

    Raises NestedTuneError where the process was killed: that says nothing about the adapter.
    """
    evidence: dict[str, Any] = {"model": str(request.model), "prompts": len(request.prompts)}
    answers = _ask(request)
    if isinstance(answers, str):
        message = f"mlx_lm.load in a new process could not use the adapter: {answers}"
        return evidence | {"error": answers}, [Reason("unreadable", message)]
    empty = sorted(answers.factors - _names(request.trained))
    if empty:
        message = f"mlx_lm.load makes {len(empty)} factors that the adapter has no tensors for"
        return evidence, [Reason("tensor_missing", message, tuple(empty))]
    initial, trained = answers.initial, answers.trained
    moved = largest_difference(trained, initial)
    evidence |= {"max_abs_difference_from_initial": finite_or_none(moved)}
    if moved == 0:
        message = "in a new process, the logits on every prompt are those of the initial adapter"
        return evidence, [Reason("no_effect", message)]
    if request.expected is None:
        return evidence, []
    expected = np.array(request.expected, np.float64)  # None becomes NaN
    tolerance = TOLERANCE_FLOAT32 if request.is_float32 else TOLERANCE_NARROW
    distance = relative_distance(trained, expected)
    evidence |= {"relative_distance_from_trainer": finite_or_none(distance), "tolerance": tolerance}
    if distance <= tolerance:
        return evidence, []
    message = (
        f"in a new process, the logits are not those that the trainer computed with this adapter: "
        f"relative distance {distance:.3g}, tolerance {tolerance:g}"
    )
    return evidence, [Reason("config_mismatch", message)]


def largest_difference(found: Rows, other: Rows) -> float:
    """The largest absolute difference; infinity where one is finite and the other is not."""
    if not _finite_alike(found, other):
        return math.inf
    both = np.isfinite(found)
    return float(np.abs(found[both] - other[both]).max(initial=0.0))


def relative_distance(found: Rows, expected: Rows) -> float:
    """Norm of the difference over the norm of how `expected` varies about its mean."""
    if not _finite_alike(found, expected):
        return math.inf
    both = np.isfinite(expected)
    size = float(np.linalg.norm(expected[both] - expected[both].mean())) if both.any() else 0.0
    return float(np.linalg.norm(found[both] - expected[both])) / size if size else math.inf


def _finite_alike(one: Rows, other: Rows) -> bool:
    """Whether two tables have one shape and are finite in the same places."""
    return one.shape == other.shape and bool((np.isfinite(one) == np.isfinite(other)).all())


def _names(adapter: Path) -> set[str]:
    return set(read_tensors(adapter / WEIGHTS_NAME))


def _ask(request: ProofRequest) -> Answers | str:
    """What the process found, or the last line that it complained with."""
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
    rows = [np.array(each["logits"], np.float64) for each in (initial, trained)]
    return Answers(rows[0], rows[1], set(trained["factors"]))


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
    """This process's own environment, with the OpenBLAS that it computes with preloaded."""
    prepared = backend.preparation()
    if prepared is None or prepared.blas is None:
        return dict(os.environ)
    return os.environ | {"LD_PRELOAD": prepared.blas}
