"""Start a fresh process that reads models, and describe the requests sent to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nested_core import backend
from nested_core.models.base_model import find_tokenizer_files, vocabulary_size
from nested_core.models.tokenizer_cell import try_to_load
from nested_core.process.child import Child
from nested_core.training.loss.logit_budget import positions_at_once

MLX_LM_PROGRAM = Path(__file__).with_name("mlx_lm_program.py")
QUESTIONS_PROGRAM = Path(__file__).with_name("questions.py")
MOST_WORDS = 2**18  # assumed vocabulary size of a base whose configuration does not say it
Rows = np.typing.NDArray[np.float64]


def start_reader(program: Path) -> Child:
    """Start a process that imports a reader of models and then waits for requests.

    It uses this process's BLAS.
    """
    blas = backend.find_openblas()
    preload = {} if blas is None else {"LD_PRELOAD": blas}
    return Child(program, environment=os.environ | preload)


def describe_request(
    models: Sequence[dict[str, object]], base: Path, *, trusts_remote_code: bool, **asked: object
) -> dict[str, Any]:
    """Build a request to compute what is asked of several models, one after the other.

    Args:
        models: results of `describe_model`.
        base: the folder whose configuration gives the size of the vocabulary.
        trusts_remote_code: whether code that a model brings may run.
        asked: what all models compute; the keys are those of `answer_questions`.

    Raises ConfigError if the base's tokenizer takes more than it may while it is loaded.
    """
    try_to_load(find_tokenizer_files(base, trusts_remote_code))
    defaults: dict[str, object] = dict.fromkeys(
        ("texts", "prompts", "columns", "rows", "questions"), ()
    )
    return {
        "models": list(models),
        "trust_remote_code": trusts_remote_code,
        "positions": positions_at_once(vocabulary_size(base) or MOST_WORDS),
        **defaults,
        **asked,
    }


def describe_model(
    name: str, base: Path, adapter: Path | None = None, *, dtype: str | None, **asked: object
) -> dict[str, Any]:
    """Build the entry of one model in a request.

    dtype: the type to compute in; None keeps the stored types.
    asked: what only this model computes, in addition to the request.
    """
    return {
        "name": name,
        "base": str(base),
        "adapter": None if adapter is None else str(adapter.resolve()),
        "dtype": dtype,
        "asked": asked,
    }
