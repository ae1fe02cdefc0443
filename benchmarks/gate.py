"""The gate's checks of files on a rank-8 adapter of a 7B-shaped model, against a plain read.

Both adapters are read, hashed, compared tensor by tensor and judged module by module in effect. The
rival reads the same two files by `read_bytes`; the page cache is warm for both.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.timing import report
from nested_core.gate.judge import verify_adapters

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
        pair = _write_pair(Path(folder))
        seconds, resident = _time_in_turn(pair)
    report("gate_files", seconds, RIVAL)
    speed = statistics.median(
        read / own for read, own in zip(seconds[RIVAL], seconds[GATE], strict=True)
    )
    print(f"gate_files: {speed:.2f} of the speed of {RIVAL}, {resident / 1e6:.0f} MB resident")


def _time_in_turn(pair: list[Path]) -> tuple[dict[str, list[float]], int]:
    """Wall seconds of each, A B A B ..., and the most bytes resident; the first pair is left out.

    Each time in a new process, as a gate runs: what an earlier call has left of memory is no help.
    """
    seconds: dict[str, list[float]] = {RIVAL: [], GATE: []}
    most = 0
    for repeat in range(REPEATS + 1):
        for name, times in seconds.items():
            command = [sys.executable, "-m", "benchmarks.gate", name, *map(str, pair)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            took, resident = json.loads(done.stdout)
            most = max(most, resident)
            if repeat:
                times.append(took)
    return seconds, most


def measure(name: str, pair: list[Path]) -> None:
    """Do one of the two once; print its wall seconds and the bytes resident at most."""
    began = time.perf_counter()
    if name == RIVAL:
        held = [(path / "adapters.safetensors").read_bytes() for path in pair]
        _require(len(held) == len(pair))
    else:
        _require(verify_adapters(*pair).has_passed)
    took = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps([took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit]))


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
    measure(sys.argv[1], [Path(each) for each in sys.argv[2:]]) if len(sys.argv) > 1 else main()
