"""Start a fresh process that reads models, and say what it is asked of each of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nested_core import backend
from nested_core.models.base_model import vocabulary_size
from nested_core.process.child import Child
from nested_core.training.loss.logit_budget import positions_at_once

MLX_LM_PROGRAM = Path(__file__).with_name("mlx_lm_program.py")
QUESTIONS_PROGRAM = Path(__file__).with_name("questions.py")
MOST_WORDS = 2**18  # a base whose configuration says no number has no more
Rows = np.ndarray[Any, np.dtype[np.float64]]


def start_reader(program: Path) -> Child:
    """A process that imports what reads models, with this process's BLAS, and awaits a request."""
    prepared = backend.get_process_preparation()
    preload = {} if prepared is None or prepared.blas is None else {"LD_PRELOAD": prepared.blas}
    return Child(program, environment=os.environ | preload)


def describe_request(
    models: Sequence[dict[str, Any]], base: Path, *, trusts_remote_code: bool, **asked: Any
) -> dict[str, Any]:
    """A request to compute what is asked of these models, one after the other.

    Args:
        models: of `describe_model`.
        base: the folder whose configuration says how large the vocabulary is.
        trusts_remote_code: whether code that a model brings is run.
        asked: of all models; questions.py says what can be.
    """
    nothing: dict[str, Any] = dict.fromkeys(
        ("texts", "prompts", "columns", "rows", "questions"), ()
    )
    return {
        "models": list(models),
        "trust_remote_code": trusts_remote_code,
        "positions": positions_at_once(vocabulary_size(base) or MOST_WORDS),
        **nothing,
        **asked,
    }


def describe_model(
    name: str, base: Path, adapter: Path | None = None, *, dtype: str | None, **asked: Any
) -> dict[str, Any]:
    """A model of a request, computed in a type or as it is stored, with what it alone is asked."""
    return {
        "name": name,
        "base": str(base),
        "adapter": None if adapter is None else str(adapter.resolve()),
        "dtype": dtype,
        "asked": asked,
    }
