"""Whether an adapter's tensors fit its adapter_config.json, and the base model that it is for.

mlx_lm.load takes rank and scale from the configuration, and does not check them against tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx

from nested_core.errors import DamagedError
from nested_core.models.adapter_fit import describe_other_base
from nested_core.models.lora_tensors import DORA_TENSORS, LORA_FACTORS, leaf_name, module_name
from nested_core.records.verdict import Reason
from nested_core.storage.adapter import Adapter
from nested_core.storage.safetensors_files import FLOATING_POINT_DTYPES

TENSOR_NAMES_BY_FINE_TUNE_TYPE = {"lora": {*LORA_FACTORS}, "dora": {*DORA_TENSORS}}
# By name and number of dimensions: (in, rank) and (rank, out), or for experts (n, rank, in) and
# (n, out, rank).
RANK_AXES = {("lora_a", 2): 1, ("lora_b", 2): 0, ("lora_a", 3): 1, ("lora_b", 3): 2}


def config_reasons(adapter: Adapter) -> list[Reason]:
    """Return reasons if an adapter's tensors contradict its own adapter_config.json.

    The tensor names must suit `fine_tune_type`, every module must have all its factors (lora_a and
    lora_b), and the factors must have the configured rank.
    """
    meaning = adapter.meaning()  # what the configuration says about the tensors
    fine_tune_type, rank = str(meaning["fine_tune_type"]), meaning["rank"]
    parts = TENSOR_NAMES_BY_FINE_TUNE_TYPE.get(fine_tune_type, set())  # empty for "full"
    lora_names = {name for name in adapter.tensors if leaf_name(name) in (parts or LORA_FACTORS)}
    reasons = []
    # Under lora and dora any other name is foreign; under "full" the names of factors are.
    if foreign := sorted(adapter.tensors.keys() - lora_names if parts else lora_names):
        message = f"fine_tune_type {fine_tune_type} has no tensors like {foreign[0]}"
        reasons.append(Reason("config_mismatch", message, tuple(foreign)))
    modules = {module_name(name) for name in lora_names}
    expected = {f"{module}.{part}" for module in modules for part in parts}
    if missing := sorted(expected - adapter.tensors.keys()):
        message = (
            f"{len(missing)} tensors are missing from modules that have others: {missing[0]} first"
        )
        reasons.append(Reason("tensor_missing", message, tuple(missing)))
    wrong = [] if rank is None else sorted(_tensors_of_other_rank(adapter, rank))
    if wrong:
        shape = list(adapter.tensors[wrong[0]].shape)
        message = f"adapter_config.json says rank {rank}, {wrong[0]} has shape {shape}"
        reasons.append(Reason("config_mismatch", message, tuple(wrong)))
    return reasons


def _tensors_of_other_rank(adapter: Adapter, rank: int) -> Iterable[str]:
    """Yield the names of LoRA factors whose rank axis does not have length `rank`."""
    for name, tensor in adapter.tensors.items():
        axis = RANK_AXES.get((leaf_name(name), len(tensor.shape)))
        if axis is not None and tensor.shape[axis] != rank:
            yield name


def fingerprint_reasons(adapter_config: Mapping[str, object], base: Path) -> list[Reason]:
    """Return a reason if the model in folder `base` is not the one that adapter_config.json names.

    A configuration without a fingerprint, as mlx_lm.lora writes it, gives no reason.
    """
    message = describe_other_base(adapter_config, base)
    return [] if message is None else [Reason("base_mismatch", message)]


def require_same_base(adapter: Adapter, base: Path) -> None:
    """Raise DamagedError if the model in folder `base` is not the one that the adapter names."""
    if reasons := fingerprint_reasons(adapter.config, base):
        raise DamagedError(
            f"{adapter.path}: {reasons[0].message}. The base model has changed since the adapter "
            f"was trained and evaluated, and the verdict does not hold for this one. Bring back "
            f"the model that was there, or train again on the one that is there now."
        )


def base_reasons(adapter: Adapter, expected: Mapping[str, mx.array], base: Path) -> list[Reason]:
    """Return a reason if the adapter names another base, or its tensors do not fit this one.

    A tensor does not fit if the base has no such parameter, if its shape is another, or if its
    dtype is not floating point. A parameter without a tensor is wrong too.

    expected: the trainable parameters of the base with a fresh adapter of this configuration.
    base: the folder of the base model.
    """
    if reasons := fingerprint_reasons(adapter.config, base):
        return reasons
    shapes = {name: tensor.shape for name, tensor in adapter.tensors.items()}
    expected_shapes = {name: array.shape for name, array in expected.items()}
    names = shapes.keys() | expected_shapes.keys()
    wrong = {name for name in names if shapes.get(name) != expected_shapes.get(name)}
    wrong |= {
        name
        for name, tensor in adapter.tensors.items()
        if tensor.dtype not in FLOATING_POINT_DTYPES
    }
    if not wrong:
        return []
    first, *_ = ordered = sorted(wrong)
    expected_shape = expected_shapes.get(first)
    message = f"{first}: shape {shapes.get(first)}, the base model wants {expected_shape}"
    return [Reason("base_mismatch", message, tuple(ordered))]
