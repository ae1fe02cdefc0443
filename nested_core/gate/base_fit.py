"""Whether tensors fit what adapter_config.json says of them, and the base model that they are for.

mlx_lm.load takes the rank from the configuration and ignores what does not contradict it loudly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import mlx.core as mx

from nested_core.gate.verdict import Reason
from nested_core.storage.adapter import FLOATING, Adapter

LEAVES = {"lora": {"lora_a", "lora_b"}, "dora": {"lora_a", "lora_b", "m"}}


def declared_reasons(adapter: Adapter) -> list[Reason]:
    """Tensors that contradict the adapter's own configuration, and factors without the other."""
    meaning = adapter.meaning()
    kind, rank = str(meaning["fine_tune_type"]), meaning["rank"]
    reasons = []
    strange = [name for name in adapter.tensors if not _belongs(name, kind)]
    if strange:
        message = f"fine_tune_type {kind} has no tensors like {strange[0]}"
        reasons.append(Reason("config_mismatch", message, tuple(sorted(strange))))
    lone = sorted(_lone_factors(adapter, LEAVES.get(kind, set())))
    if lone:
        message = f"{len(lone)} tensors are not there, of modules that have others: {lone[0]} first"
        reasons.append(Reason("tensor_missing", message, tuple(lone)))
    wrong = [] if rank is None else sorted(_of_other_rank(adapter, rank))
    if wrong:
        shape = list(adapter.tensors[wrong[0]].shape)
        message = f"adapter_config.json says rank {rank}, {wrong[0]} has shape {shape}"
        reasons.append(Reason("config_mismatch", message, tuple(wrong)))
    return reasons


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _belongs(name: str, kind: str) -> bool:
    if kind in LEAVES:
        return _leaf(name) in LEAVES[kind]
    return _leaf(name) not in LEAVES["lora"]


def _lone_factors(adapter: Adapter, leaves: Iterable[str]) -> set[str]:
    modules = {name.rpartition(".")[0] for name in adapter.tensors if _leaf(name) in leaves}
    return {f"{module}.{leaf}" for module in modules for leaf in leaves} - adapter.tensors.keys()


def _of_other_rank(adapter: Adapter, rank: int) -> Iterable[str]:
    """Factors (in, rank) and (rank, out), or of experts (n, rank, in) and (n, out, rank)."""
    axes = {("lora_a", 2): 1, ("lora_b", 2): 0, ("lora_a", 3): 1, ("lora_b", 3): 2}
    for name, tensor in adapter.tensors.items():
        axis = axes.get((_leaf(name), len(tensor.shape)))
        if axis is not None and tensor.shape[axis] != rank:
            yield name


def base_reasons(adapter: Adapter, leaves: Mapping[str, mx.array], base: str) -> list[Reason]:
    """Whether the tensors are those that mlx-lm would make in the base, of shapes and kinds alike.

    `leaves` are the trainable leaves of the base with a fresh adapter of this configuration, `base`
    is its fingerprint.
    """
    meant = adapter.config.get("base_fingerprint")
    if meant is not None and meant != base:
        message = f"made for the base {meant[:12]}, and the model there is {base[:12]}"
        return [Reason("base_mismatch", message)]
    found = {name: tensor.shape for name, tensor in adapter.tensors.items()}
    wanted = {name: leaf.shape for name, leaf in leaves.items()}
    wrong = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
    wrong += [name for name, tensor in adapter.tensors.items() if tensor.dtype not in FLOATING]
    if not wrong:
        return []
    first = sorted(wrong)[0]
    message = f"{first}: shape {found.get(first)}, the base model wants {wanted.get(first)}"
    return [Reason("base_mismatch", message, tuple(sorted(set(wrong))))]
