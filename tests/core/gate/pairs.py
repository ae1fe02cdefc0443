"""Adapters written by hand, and changes to them: the two sides that a gate is asked to judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nested_core.gate.judge import verify_adapters
from nested_core.records.verdict import Verdict

Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors], None]

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
A, B = (f"{MODULES[0]}.{leaf}" for leaf in ("lora_a", "lora_b"))
A2, B2 = (f"{MODULES[1]}.{leaf}" for leaf in ("lora_a", "lora_b"))
CONFIG: dict[str, Any] = {
    "model": "base",
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
    "base_fingerprint": "sha256:" + "ba5e" * 16,
}


def trained_tensors(dtype: str = "f4") -> Tensors:
    """Two modules with factors (12, 4) and (4, 16), as after some training."""
    values = np.random.default_rng(7)
    shapes = {A: (12, 4), B: (4, 16), A2: (12, 4), B2: (4, 16)}
    return {name: values.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def fresh_tensors() -> Tensors:
    """The same with lora_b = 0, as LoRA begins."""
    return {
        name: np.zeros_like(value) if name.endswith("lora_b") else value
        for name, value in trained_tensors().items()
    }


def write(folder: Path, tensors: Tensors, config: dict[str, Any] = CONFIG) -> Path:
    """Write an adapter directory."""
    folder.mkdir(parents=True)
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def judge_pair(
    folder: Path,
    before: Tensors,
    after: Tensors,
    configs: tuple[dict[str, Any], dict[str, Any]] = (CONFIG, CONFIG),
    **bounds: Any,
) -> Verdict:
    """Write both sides and let the gate judge them from disk."""
    initial = write(folder / "initial", before, configs[0])
    return verify_adapters(initial, write(folder / "trained", after, configs[1]), **bounds)


def codes(verdict: Verdict) -> list[str]:
    """The reason codes, in order."""
    return [reason.code for reason in verdict.reasons]


def learned(tensors: Tensors) -> None:
    """What training does: every tensor moves a little, in a direction of its own."""
    values = np.random.default_rng(8)
    for name, value in tensors.items():
        tensors[name] = value + 0.01 * values.normal(size=value.shape).astype(value.dtype)
