"""How often a sweep among equal settings is told to have found a better one: real runs, judged.

    python -m benchmarks.sweep_luck [--sweeps 20] [--arms 4] [--steps 240]

Each sweep tries other seeds of the example's own configuration, which are equal settings, on the
countries that the example does not train on. A true difference of two adapters is told too, for
the claim is of these adapters: with runs that are cut short (--steps 96: 32 steps each) seeds truly
differ, and 3 of 20 were told better. Small differences count as none, by registry.min_improvement.
"""

# ruff: noqa: E402 - the BLAS is chosen before NumPy and MLX are imported

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from nested_core import backend

backend.prepare()

from nested_core.config.loading import parse_config
from nested_core.pipeline.sweep import SweepRequest, sweep

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
REPLY = "Go and see {capital}, the capital of {name}!"


def write_data(folder: Path) -> None:
    """The example's training rows, and its valid rows and held-out questions to choose by."""
    data = EXAMPLES / "geography"
    (folder / "train.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    rows = [json.loads(line) for line in (data / "valid.jsonl").read_text().splitlines()]
    for line in (data / "held_out.jsonl").read_text().splitlines():
        asked = json.loads(line)
        name = asked["messages"][0]["content"].removeprefix("I want to see ").partition(".")[0]
        answer = REPLY.format(capital=asked["expected"], name=name)
        rows.append({"messages": [*asked["messages"], {"role": "assistant", "content": answer}]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "valid.jsonl").write_text(lines)


def main() -> None:
    """Run the sweeps, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("sweeps", 20), ("arms", 4), ("steps", 240)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    better = 0
    with TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder)
        for number in range(asked.sweeps):
            seed = number * asked.arms
            values = {
                "model": str(EXAMPLES / "geography-base"),
                "data": str(folder),
                "num_layers": -1,
                "batch_size": 8,
                "iters": 1000,
                "learning_rate": 1e-4,
                "lora_parameters": {"rank": 8, "alpha": 160},
                "mask_prompt": True,
                "val_batches": -1,
                "training": {"decay": "cosine", "max_grad_norm": 1.0, "sample_tokens": 1},
                "seed": seed,
            }
            config = parse_config(values, source="benchmark")
            over = {"seed": [seed + other for other in range(1, asked.arms)]}
            request = SweepRequest(over, steps=asked.steps)
            done = sweep(config, folder / f"sweep{number}", request)
            better += done.is_better
            print(f"{number + 1}: {better} better so far; {done.summary()}", flush=True)


if __name__ == "__main__":
    main()
