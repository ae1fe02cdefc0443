"""The gate's checks of files on a rank-8 adapter of a 7B-shaped model, against a plain read.

Both adapters are read, hashed, compared tensor by tensor and judged module by module in effect. The
rival reads the same two files by `read_bytes`; the page cache is warm for both.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.timing import report
from nested_core.gate import verify_adapters

REPEATS = 5
LAYERS, RANK = 32, 8
RIVAL, GATE = "a plain read", "the gate's file checks"
SIDES = {"mlp.gate_proj": (4096, 11008), "mlp.up_proj": (4096, 11008)}
SIDES |= {"mlp.down_proj": (11008, 4096)}
SIDES |= {f"self_attn.{letter}_proj": (4096, 4096) for letter in "qkvo"}
CONFIG = {"model": "7B", "num_layers": LAYERS, "lora_parameters": {"rank": RANK, "scale": 20.0}}
Tensors = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def main() -> None:
    """Run the comparison; about 160 MB of files are written to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = _time(_write_pair(Path(folder)))
    report("gate_files", seconds, RIVAL)
    speed = statistics.median(
        read / own for read, own in zip(seconds[RIVAL], seconds[GATE], strict=True)
    )
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    print(f"gate_files: {speed:.2f} of the speed of {RIVAL}, {resident:.0f} MB resident at most")


def _time(pair: list[Path]) -> dict[str, list[float]]:
    """Wall seconds of each, A B A B ..., after a warm-up of each that is not counted."""
    works: dict[str, Callable[[], Any]] = {
        RIVAL: lambda: [(path / "adapters.safetensors").read_bytes() for path in pair],
        GATE: lambda: _require(verify_adapters(*pair).has_passed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(REPEATS + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _require(is_right: bool) -> None:
    if not is_right:
        raise SystemExit("The gate gave the wrong verdict.")


def _write_pair(folder: Path) -> list[Path]:
    """A fresh adapter, and the same with a little of everything added."""
    values = np.random.default_rng(0)
    fresh, trained = Tensors(), Tensors()
    for layer in range(LAYERS):
        for module, (rows, columns) in SIDES.items():
            a, b = (f"model.layers.{layer}.{module}.{leaf}" for leaf in ("lora_a", "lora_b"))
            fresh[a] = values.uniform(-1, 1, (rows, RANK)).astype("f4") / np.float32(rows**0.5)
            fresh[b] = np.zeros((RANK, columns), np.float32)
            for name in (a, b):
                noise = values.normal(size=fresh[name].shape).astype("f4")
                trained[name] = fresh[name] + np.float32(1e-3) * noise
    return [_write(folder / "fresh", fresh), _write(folder / "trained", trained)]


def _write(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


if __name__ == "__main__":
    main()
