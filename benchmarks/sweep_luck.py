"""How often a sweep among equal settings is told to have found a better one: real runs, judged.

    python -m benchmarks.sweep_luck [--sweeps 20] [--arms 4] [--steps 240]

Each sweep tries other seeds of the example's own configuration, which are equal settings, and
chooses by 25 countries that nobody trains on. The claim is of two adapters, and these may truly
differ: the winner less the configuration itself is measured on the 35 other countries too, which
chose nothing. Small differences count as none, by registry.min_improvement. With --steps 96 runs
are cut to some 20 steps, after which seeds differ truly: of five sweeps one was told better, by
0.239 nats/token, and was better by 0.238 on the others. With 240 steps none of 20 was.
"""

# ruff: noqa: E402 - the BLAS is chosen before NumPy and MLX are imported

from __future__ import annotations

import argparse
import json
import runpy
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from nested_core import backend

backend.prepare()

from benchmarks.learning.judge import Judge
from benchmarks.learning.tasks import Row
from nested_core.config.loading import parse_config
from nested_core.rooms.sweep.search import SweepRequest, sweep

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
QUESTION = "I want to see {name}. Where to?"
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


def list_other_countries(folder: Path) -> list[Row]:
    """The example's question about each country that is not in the data, and the right reply."""
    known = "".join((folder / f"{name}.jsonl").read_text() for name in ("train", "valid"))
    countries = runpy.run_path(str(EXAMPLES / "countries.py"))["COUNTRIES"]
    return [
        Row(QUESTION.format(name=each.name), REPLY.format(name=each.name, capital=each.capital))
        for each in countries
        if QUESTION.format(name=each.name) not in known
    ]


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
        fresh = list_other_countries(folder)
        judge = Judge(EXAMPLES / "geography-base", fresh, [])
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
            winner, own = (
                judge.judge(folder / f"sweep{number}" / "arms" / f"{arm:03d}" / "adapter").loss
                for arm in (done.record.chosen or 0, 0)
            )
            print(
                f"{number + 1}: {better} better so far; {done.summary()} On {len(fresh)} other "
                f"countries: {winner - own:+.3f} nats/token.",
                flush=True,
            )


if __name__ == "__main__":
    main()
