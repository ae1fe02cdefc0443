"""`python -m benchmarks.apple`: rows of our tables that fit in this machine, written as one file.

For Macs, where nothing of ours was measured yet; it runs wherever MLX does. Each row is trained by
mlx_lm's own loop and by ours, each in a process of its own (`benchmarks.gpu`). A row is left out
where our forecast says that mlx_lm would not fit. Models have random weights: nothing is fetched,
and nothing is sent.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.gpu.__main__ import measure, read, report
from benchmarks.gpu.shapes import RATE, shape_of

# (size, options of both sides), the cheapest first; `benchmarks.gpu.mlx_arms` says what they mean.
ROWS = (
    ("0.5B", ""),
    ("0.5B", "+checkpoint"),
    ("0.5B", "+bits=4"),
    ("Qwen2.5-0.5B", ""),
    ("hybrid", "+batch=1+length=256"),
    ("attention", "+batch=1+length=256"),
    ("1.7B", "+batch=1"),
    ("OLMoE", "+batch=1"),
    ("Qwen3-MoE", "+batch=1"),
    ("3B", "+batch=1+length=1024"),
    ("3B", "+batch=1+length=1024+bits=4"),
    ("3B", "+batch=1+length=1024+dora"),
    ("7B", "+batch=1+length=512+bits=4"),
    ("8B", "+batch=1"),
)
TINY_ROWS = (("tiny", ""), ("tiny-hybrid", ""), ("tiny-MoE", ""))
FEW_WINDOWS = "+windows=3"
MLX_LM_TO_OURS = 1.7  # peaks, at most, in the tables of benchmarks/README.md but for long rows
SECONDS_OF_AN_ARM = 900.0


def main() -> None:
    """Measure what fits and is missing in the file, and say how to send it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=Path("apple.json"))
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try this command")
    arguments = parser.parse_args()
    from nested_core.backend import device_memory_bytes, device_name, prepare

    prepare()
    memory = device_memory_bytes()
    rows, left_out = arguments.file.with_suffix(".jsonl"), []
    for size, options in TINY_ROWS if arguments.tiny else ROWS:
        needed = MLX_LM_TO_OURS * forecast_bytes(size, options)
        if needed > memory:
            left_out.append({"size": size, "options": options, "needs_gib": needed / 2**30})
            continue
        for name in ("mlx_lm", "ours"):
            arm = f"{name}{options}{FEW_WINDOWS}"
            if (size, arm) not in {(row["size"], row["arm"]) for row in read(rows)}:
                measure(rows, size, arm, SECONDS_OF_AN_ARM)
    document = {
        "machine": {
            "device": device_name(),
            "memory_gib": memory / 2**30,
            "processor": chip_name(),
            "system": platform.platform(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("mlx", "mlx-lm", "nested-tune")},
        },
        "rows": read(rows),
        "left_out": left_out,
    }
    arguments.file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    report(read(rows))
    print(
        f"\n{arguments.file} has {len(document['rows'])} rows; {len(left_out)} did not fit. Read "
        "it, and please send it: attach it to an issue of the project, titled 'Figures from Apple "
        "silicon'. It names the machine's kind and versions, and nothing of yours; the end of an "
        "error may name folders."
    )


def forecast_bytes(size: str, options: str) -> int:
    """The peak that we forecast for a row; the model is made, and none of it computed."""
    from benchmarks.gpu.mlx_arms import (
        add_lora,
        compute_dtype,
        forecast_row,
        make_model,
        read_options,
    )
    from benchmarks.tiers import one_tier, optimizer_for
    from nested_core.models.parameters import reference_trainable_parameters
    from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS

    read_as, shape = read_options(options, shape_of(size))
    model = make_model(shape, int(read_as.get("bits", "16")))
    add_lora(model, shape, read_as)
    refs = reference_trainable_parameters(model, dtype=compute_dtype(shape))
    optimizer = optimizer_for(one_tier(refs), refs, RATE)
    # To find the output layer, as the trainer does for a loss in chunks, is to compute it.
    loss_fn = replace(SUPERVISED_LOSS, compile_chunked_evaluation=_evaluate_nothing)
    return forecast_row(model, refs, optimizer, loss_fn, shape, read_as)


def _evaluate_nothing(assign: Any) -> Any:
    """In place of what a loss in chunks is evaluated by: a forecast evaluates none."""
    raise NotImplementedError("a forecast evaluates nothing")


def chip_name() -> str:
    """What the system calls its processor, such as "Apple M3 Max"."""
    if platform.system() != "Darwin":
        return platform.processor() or platform.machine()
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    done: Any = subprocess.run(command, capture_output=True, text=True, check=False)
    return str(done.stdout).strip()


if __name__ == "__main__":
    main()
