"""The canary of a version: the server's own weights and what they answer, against what is recorded.

It finds faults of serving, such as a tensor that was not exchanged or a base that was loaded
otherwise than it was judged. Whether an adapter is any good is for the gate.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from nested_core.errors import NestedTuneError
from nested_core.gate.proof.canary import describe_computation
from nested_core.gate.proof.fresh_process_check import (
    TOLERANCE_FLOAT32,
    TOLERANCE_NARROW_DTYPES,
    relative_distance,
)
from nested_core.optim.named_updates import UNSIGNED_DTYPE_BY_BYTES
from nested_core.storage.canary_file import Canary, CanaryLogits, CanaryQuestion
from nested_core.storage.safetensors_files import StoredTensor

PREFILL_TOKENS = 512  # of a question, between two looks at the requests
DIFFERING_SHARE = 0.05  # of the answers; one may always differ
NEAR_TIE = 0.01  # of the largest logit; bfloat16 was seen to round by half of that


class CanaryFailed(NestedTuneError):
    """A version whose logits or answers, in this server, are not those that were recorded."""


def require_version_in_layers(
    model: nn.Module, stored: Mapping[str, StoredTensor], base_arrays: Collection[int]
) -> None:
    """Compare each array of a version's model with where it is to come from, bit by bit.

    stored: the tensors of the version's file, by name; the model has to have their bits there.
    base_arrays: the id() of each array that the base was loaded with; all others have to be those.
    Raises CanaryFailed. Unlike logits it allows for no rounding, so that a tensor which moves them
    little is found as well. Call it in the thread that generates.
    """
    leaves: Any = tree_flatten(model.parameters())
    arrays: dict[str, mx.array] = dict(leaves)
    wrong = [name for name, tensor in stored.items() if not _has_bits(arrays.get(name), tensor)]
    if wrong:
        raise CanaryFailed(
            f"canary: {len(wrong)} of {len(stored)} tensors in the layers are not those of the "
            f"version's file, such as {min(wrong)}"
        )
    foreign = [
        name
        for name, array in arrays.items()
        if name not in stored and id(array) not in base_arrays
    ]
    if foreign:
        raise CanaryFailed(
            f"canary: {len(foreign)} tensors in the layers are neither the version's nor those "
            f"that the base was loaded with, such as {min(foreign)}"
        )


def _has_bits(array: mx.array | None, tensor: StoredTensor) -> bool:
    if array is None or array.shape != tensor.shape or array.nbytes != len(tensor.data):
        return False
    words = np.array(array.reshape(-1).view(UNSIGNED_DTYPE_BY_BYTES[array.dtype.size]))
    return array.dtype == tensor.to_mlx().dtype and words.tobytes() == tensor.data


def check_canary(canary: Canary, model: nn.Module) -> Iterator[None]:
    """Compute what the canary recorded, and compare; yields between parts of the work.

    Raises CanaryFailed. Call it in the thread that generates.
    """
    _require_logits(canary.logits, model)
    yield
    differing = []
    for question in canary.questions:
        if not (yield from _answers_as_recorded(question, model)):
            differing.append(question)
    asked = len(canary.questions)
    if len(differing) > max(1, DIFFERING_SHARE * asked):
        first = differing[0]
        raise CanaryFailed(
            f"canary: {len(differing)} of {asked} answers are not those that were recorded, such "
            f"as to line {first.line} of the eval set {first.suite}"
        )


def _require_logits(recorded: CanaryLogits, model: nn.Module) -> None:
    """Raise CanaryFailed where logits are further off than the proof of a fresh process allows.

    The CPU of the same machine, with the same BLAS and versions of MLX, gives the same logits in
    every type. Another BLAS was seen to move those of a bfloat16 base by 0.005, and nothing was
    measured on a GPU.
    """
    is_repeatable = recorded.computation["device"].startswith("cpu")
    is_same = is_repeatable and recorded.computation == describe_computation()
    tolerance = TOLERANCE_FLOAT32 if is_same else TOLERANCE_NARROW_DTYPES
    expected = np.array(recorded.values, np.float64)  # None becomes NaN
    columns = mx.array(list(recorded.columns))
    logits = (_compute_logits(model, prompt)[-1] for prompt in recorded.prompts)
    rows = [of_last.astype(mx.float32)[columns].tolist() for of_last in logits]
    distance = relative_distance(np.array(rows, np.float64), expected)
    if not distance <= tolerance:
        raise CanaryFailed(
            f"canary: the logits are not those that were recorded: relative distance "
            f"{distance:.3g}, tolerance {tolerance:g}"
        )


def _compute_logits(model: nn.Module, tokens: Sequence[int], cache: Any = None) -> mx.array:
    """Compute logits of shape (tokens, vocabulary), after what `cache` holds."""
    output = model(mx.array([list(tokens)]), cache=cache)
    logits: mx.array = (output[0] if isinstance(output, tuple) else output)[0]
    return logits


def _answers_as_recorded(question: CanaryQuestion, model: nn.Module) -> Generator[None, None, bool]:
    """Tell if each token of the recorded greedy answer is the likeliest after those before it.

    All are looked at in one pass, a tenth of the work of an answer token by token. It may round
    otherwise, so that a token is also right where only rounding is between it and the likeliest.
    """
    cache = make_prompt_cache(model)
    *before, last = question.prompt
    for start in range(0, len(before), PREFILL_TOKENS):
        _compute_logits(model, before[start : start + PREFILL_TOKENS], cache)
        mx.eval([layer.state for layer in cache])  # and not the logits, of which none is needed
        yield
    logits = _compute_logits(model, [last, *question.answer[:-1]], cache).astype(mx.float32)
    recorded = mx.take_along_axis(logits, mx.array(question.answer)[:, None], axis=-1)[:, 0]
    is_likeliest = logits.max(axis=-1) - recorded <= NEAR_TIE * mx.abs(logits).max()
    yield
    return bool(is_likeliest.all().item())
