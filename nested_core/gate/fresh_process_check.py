"""The proof from a fresh process, which loads base and adapter by plain mlx_lm.load.

Its logits on fixed prompts must differ from those with the initial adapter and, if the trainer
recorded its own, equal those. No array of this process is trusted, only what the new one wrote.
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
from nested_core.storage.adapter import WEIGHTS_NAME
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.safetensors_files import read_tensors
from nested_core.storage.strict_files import parse_json, read_regular

PROGRAM = Path(__file__).with_name("fresh_process_main.py")
# Relative to the centred norm of the trainer's logits. If the trainer computes in float32 the
# process does too, with the same kernels; in narrower types the order of sums shows.
TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_NARROW = 5e-2
TIMEOUT_SECONDS = 3600
PROMPTS_WITHOUT_DATA = [list(range(start, start + 8)) for start in (1, 9, 17, 25)]
Rows = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class ProofRequest:
    """Base model, adapters and prompts; `expected` holds the trainer's logits, a row a prompt."""

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


def prove_in_fresh_process(request: ProofRequest) -> tuple[dict[str, Any], list[Reason]]:
    """The evidence for gate.json, and the reasons against the adapter.

    Raises NestedTuneError if the process was killed: that says nothing about the adapter.
    """
    evidence: dict[str, Any] = {"model": str(request.model), "prompts": len(request.prompts)}
    answers = _load_and_answer(request)
    if isinstance(answers, str):
        message = f"mlx_lm.load in a new process could not use the adapter: {answers}"
        return evidence | {"error": answers}, [Reason("unreadable", message)]
    tensors = read_tensors(request.trained / WEIGHTS_NAME, follow_links=True)
    empty = sorted(answers.factors - tensors.keys())
    if empty:
        message = f"mlx_lm.load makes {len(empty)} factors that the adapter has no tensors for"
        return evidence, [Reason("tensor_missing", message, tuple(empty))]
    moved = largest_difference(answers.trained, answers.initial)
    evidence |= {"max_abs_difference_from_initial": finite_or_none(moved)}
    if moved == 0:
        message = "in a new process, the logits on every prompt are those of the initial adapter"
        return evidence, [Reason("no_effect", message)]
    if request.expected is None:
        return evidence, []
    expected = np.array(request.expected, np.float64)  # None becomes NaN
    tolerance = TOLERANCE_FLOAT32 if request.is_float32 else TOLERANCE_NARROW
    distance = relative_distance(answers.trained, expected)
    evidence |= {"relative_distance_from_trainer": finite_or_none(distance), "tolerance": tolerance}
    if distance <= tolerance:
        return evidence, []
    message = (
        f"in a new process, the logits are not those that the trainer computed with this adapter: "
        f"relative distance {distance:.3g}, tolerance {tolerance:g}"
    )
    return evidence, [Reason("config_mismatch", message)]


def largest_difference(logits: Rows, other: Rows) -> float:
    """The largest absolute difference; infinity if only one of a pair is finite."""
    if not _are_finite_alike(logits, other):
        return math.inf
    finite = np.isfinite(logits)
    return float(np.abs(logits[finite] - other[finite]).max(initial=0.0))


def relative_distance(logits: Rows, expected: Rows) -> float:
    """Norm of the difference over the norm of `expected` minus its mean."""
    finite = np.isfinite(expected)
    if not _are_finite_alike(logits, expected) or not finite.any():
        return math.inf
    size = float(np.linalg.norm(expected[finite] - expected[finite].mean()))
    return float(np.linalg.norm(logits[finite] - expected[finite])) / size if size else math.inf


def _are_finite_alike(one: Rows, other: Rows) -> bool:
    """Whether two arrays have the same shape and are finite in the same places."""
    return one.shape == other.shape and bool((np.isfinite(one) == np.isfinite(other)).all())


def _load_and_answer(request: ProofRequest) -> Answers | str:
    """What the process computed, or the last line of its error."""
    document = {
        "model": str(request.model),
        "adapters": [str(request.initial.resolve()), str(request.trained.resolve())],
        "prompts": [list(prompt) for prompt in request.prompts],
        "columns": list(request.columns),
        "dtype": "float32" if request.is_float32 else None,
        "trust_remote_code": request.trusts_remote_code,
    }
    with tempfile.TemporaryDirectory(prefix="nested-tune-proof-") as folder:
        request_path, answer_path = Path(folder, "request.json"), Path(folder, "answer.json")
        request_path.write_text(json.dumps(document), encoding="utf-8")
        problem = _run([str(request_path), str(answer_path)])
        if problem is not None:
            return problem
        initial, trained = parse_json(read_regular(answer_path))
    return Answers(
        initial=np.array(initial["logits"], np.float64),
        trained=np.array(trained["logits"], np.float64),
        factors=set(trained["factors"]),
    )


def _run(arguments: Sequence[str]) -> str | None:
    """Run the program; None if it succeeded, else the last line of its error."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(PROGRAM), *arguments],
            env=_environment(),
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NestedTuneError(
            f"The proof process took more than {TIMEOUT_SECONDS} seconds."
        ) from error
    if done.returncode < 0:
        raise NestedTuneError(
            f"The process that loads base and adapter for the gate was killed by signal "
            f"{-done.returncode}; most often memory was short. Judge again with --resume."
        )
    if done.returncode == 0:
        return None
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no message"


def _environment() -> dict[str, str]:
    """This process's own environment, with the OpenBLAS that it computes with preloaded."""
    prepared = backend.preparation()
    if prepared is None or prepared.blas is None:
        return dict(os.environ)
    return os.environ | {"LD_PRELOAD": prepared.blas}
