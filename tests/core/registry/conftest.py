"""Run directories written by hand, as a finished run leaves them, and registries made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from nested_core.registry import promotion_outcome
from nested_core.registry.data_store import render_row
from nested_core.storage.adapter import ADAPTER_FILES, read_adapter
from nested_core.storage.canary_file import CANARY_NAME
from nested_core.storage.manifest import describe_file
from tests import gate_files
from tests.builders.registering import promote, register

MakeRun = Callable[..., Path]
Judged = Callable[..., str]
VALIDATION = {
    "loss_before": 4.1,
    "loss_after": 1.2,
    "selected_on_same_data": True,
    "file": "valid.jsonl",
    "examples": 10,
    "difference": -2.9,
    "interval": [-3.0, -2.8],
    "one_sided_high": -2.82,
    "smallest_visible": 0.1,
    "conclusion": "better",
}


def digest_row(row: dict[str, Any]) -> str:
    """The digest of a row in the data store."""
    return sha256(render_row(row)).hexdigest()


def write_run(
    run_dir: Path, seed: int, verdict: str = "passed", *, initial: str = "0" * 64
) -> Path:
    """A run directory with a small adapter, different for every seed, and its gate.json."""
    adapter = run_dir / "adapter"
    adapter.mkdir(parents=True)
    values = np.random.default_rng(seed)
    shapes = {"lora_a": (16, 4), "lora_b": (4, 16)}
    tensors = {
        f"model.layers.{layer}.self_attn.q_proj.{part}": values.normal(size=shape).astype("f4")
        for layer in range(2)
        for part, shape in shapes.items()
    }
    save_file(tensors, adapter / "adapters.safetensors")
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
        "base_fingerprint": "sha256:" + "ba5e" * 16,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    write_gate(run_dir, verdict, read_adapter(adapter).digest(), initial=initial)
    return run_dir


def write_gate(run_dir: Path, verdict: str, digest: str, *, initial: str = "0" * 64) -> None:
    """A gate.json in DESIGN's shape, bound to the adapter."""
    reasons = [{"code": "unchanged", "message": "Nothing moved.", "tensors": []}]
    gate = {
        "verdict": verdict,
        "reasons": [] if verdict == "passed" else reasons,
        "adapter_step": 30,
        "initial": {"path": "initial", "digest": initial},
        "trained": {"path": "adapter", "digest": digest},
        "tensors": [],
        "tiers": [],
        "validation": VALIDATION,
    }
    judged = [f"adapter/{name}" for name in ADAPTER_FILES]
    if (run_dir / CANARY_NAME).exists():
        judged.append(CANARY_NAME)
    gate_files.write_gate(run_dir, gate, {name: describe_file(run_dir / name) for name in judged})


@pytest.fixture
def no_time_to_decide() -> Iterator[None]:
    """A gc takes versions that were registered just now, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(promotion_outcome, "UNPROMOTED_GRACE_TIME", timedelta(0))
        yield


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write the run directory of a seed; `verdict` is "passed" unless told."""

    def make(seed: int = 1, **changes: Any) -> Path:
        return write_run(tmp_path / f"run-{seed}", seed, **changes)

    return make


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """A path for a registry; nothing is there yet."""
    return tmp_path / "registry"


@pytest.fixture
def add(make_run: MakeRun, registry: Path) -> Callable[[int], str]:
    """Register the run of a seed as a version of `capitals`."""
    return lambda seed: register(make_run(seed), registry, "capitals", {"seed": seed})


@pytest.fixture(scope="session")
def three_made_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, str, str]]:
    """A folder with three runs and a registry of them, and the versions."""
    folder = tmp_path_factory.mktemp("three")
    registry = folder / "registry"
    first, second, third = (
        register(write_run(folder / f"run-{seed}", seed), registry, "capitals", {"seed": seed})
        for seed in (1, 2, 3)
    )
    promote(registry, "capitals", first, by="ann")
    promote(registry, "capitals", second, by="ann")
    return folder, (first, second, third)


@pytest.fixture
def three(
    three_made_once: tuple[Path, tuple[str, str, str]], tmp_path: Path
) -> tuple[str, str, str]:
    """Versions A, B and C of `capitals`; A and then B have been promoted."""
    folder, versions = three_made_once
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    return versions


@pytest.fixture
def judged(make_run: MakeRun, registry: Path) -> Judged:
    """Register a run that asks for `mode`, judged by these bounds, better than a champion."""

    def judged(
        seed: int,
        *,
        mode: str = "always",
        champion: str | None = None,
        better_by: float = 1.0,
        reference: dict[str, Any] | None = None,
        **bounds: Any,
    ) -> str:
        run = make_run(seed)
        gate = gate_files.read_gate(run / "gate.json")
        thresholds = {"noise": "paired", "max_val_loss_increase": 0.02, "tasks": []} | bounds
        record = None
        if champion is not None:
            interval = [-better_by - 0.1, -better_by + 0.1]
            record = {"version": champion, "loss": 3.0, "difference": -better_by, "examples": 84}
            record |= {"interval": interval, "smallest_visible": 0.1}
        gate |= {"thresholds": thresholds, "champion": record, "reference": reference}
        gate_files.write_gate(run, gate, gate_files.judged_files(run))
        own = {"path": "x", "name": "capitals", "promote": mode}
        provenance = {"config": {"registry": own}, "champion_at_gate": champion}
        return register(run, registry, "capitals", provenance)

    return judged
