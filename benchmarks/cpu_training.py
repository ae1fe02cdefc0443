"""Training a 10M-parameter Llama on a CPU, whole commands, against mlx_lm.lora with the same file.

12 layers of 256 and a vocabulary of 4,096, random float32 weights made here, 4 x 128 tokens a step;
with `--bits 4` quantised in groups of 64, where MLX's own product uses no BLAS. With `--mixed` rows
have 45 words in the median, log-normal, in place of as many tokens as a step is wide.
Each arm's rate is the median of the tokens/s of its own reports, those left out that compile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import keep

EXAMPLE = Path("examples/geography-base")
SIZES = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "eos_token_id": 0,
}
BATCH, WIDTH, ROWS = 4, 128, 64
REPEATS, REPORT = 5, 4
MIXED_ROWS, MIXED_REPORTS = 240, 15  # a report is of REPORT steps; the first two thirds compile
WITHOUT = {"NESTED_TUNE_NO_OPENBLAS": "1"}


def main() -> None:
    """Run the arms in turn, from the root of a checkout, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=32, choices=(32, 8, 4))
    parser.add_argument("--mixed", action="store_true", help="rows of mixed lengths")
    options = parser.parse_args()
    bits = options.bits
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", bits)
        make_data(folder / "data", is_mixed=options.mixed)
        rates: dict[str, list[float]] = {}
        for turn in range(REPEATS):
            for arm, iterations, environment in arms(bits, is_mixed=options.mixed):
                run = f"{turn}-{arm.replace(' ', '-')}"
                rate = measure(arm, folder, run, iterations, environment)
                rates.setdefault(arm, []).append(rate)
    name = "cpu_training" if bits == 32 else f"cpu_training_{bits}_bits"
    report(rates, f"{name}_mixed" if options.mixed else name)


def arms(bits: int, *, is_mixed: bool) -> list[tuple[str, int, dict[str, str]]]:
    """Name, iterations and environment of each; with OpenBLAS where it is installed."""
    library = find_library("openblas")
    if is_mixed:
        preload = {"LD_PRELOAD": library} if library and bits == 32 else {}
        steps = MIXED_REPORTS * REPORT
        return [("mlx_lm.lora", steps, preload), ("nested-tune", steps, {})]
    if bits < 32:
        return [("mlx_lm.lora", 2 * REPORT, {}), ("nested-tune", 6 * REPORT, {})]
    plain = [("mlx_lm.lora", 2 * REPORT, {}), ("nested-tune", 2 * REPORT, WITHOUT)]
    if library is None:
        print("OpenBLAS is not installed: its rows are left out.", file=sys.stderr)
        return plain
    fast = [("mlx_lm.lora with OpenBLAS", 6 * REPORT, {"LD_PRELOAD": library})]
    return [*plain, *fast, ("nested-tune with OpenBLAS", 6 * REPORT, {})]


def make_model(folder: Path, bits: int) -> None:
    """Random weights of the sizes above, beside the example's tokenizer."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    model, config = Model(ModelArgs.from_dict(SIZES)), dict(SIZES)
    if bits < 32:
        nn.quantize(model, group_size=64, bits=bits)
        config["quantization"] = {"group_size": 64, "bits": bits}
    weights: Any = dict(tree_flatten(model.parameters()))
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for path in EXAMPLE.glob("tokenizer*"):
        shutil.copy(path, folder)


def make_data(folder: Path, *, is_mixed: bool) -> None:
    """Rows that are longer than a step is wide, which both commands cut; or of mixed lengths."""
    lines = (EXAMPLE.parent / "geography" / "train.jsonl").read_text().splitlines()
    words = " ".join(m["content"] for line in lines for m in json.loads(line)["messages"]).split()
    count = MIXED_ROWS if is_mixed else ROWS
    lengths = np.full(count + BATCH, len(words))
    if is_mixed:
        lengths = np.random.default_rng(0).lognormal(np.log(45), 0.6, count + BATCH).clip(3, 110)
    rows = [(words[at:] + words[:at])[: int(length)] for at, length in enumerate(lengths)]
    lines = [json.dumps({"text": " ".join(row)}) + "\n" for row in rows]
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(lines[BATCH:]))
    (folder / "valid.jsonl").write_text("".join(lines[:BATCH]))


def settings(folder: Path, iterations: int) -> dict[str, Any]:
    """What both commands are given; our default is one tier of frequency 1, as theirs."""
    return {
        "model": str(folder / "model"),
        "data": str(folder / "data"),
        "train": True,
        "num_layers": -1,
        "batch_size": BATCH,
        "max_seq_length": WIDTH + 1,
        "iters": iterations,
        "steps_per_report": REPORT,
        "steps_per_eval": 10**6,
        "save_every": 10**6,
        "val_batches": 0,
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
    }


def measure(
    arm: str, folder: Path, run: str, iterations: int, environment: dict[str, str]
) -> float:
    """Tokens a second of one command."""
    values = settings(folder, iterations)
    if arm.startswith("mlx_lm"):
        values["adapter_path"] = str(folder / run)
        command = [sys.executable, "-m", "benchmarks.cpu_training", json.dumps(values)]
        lines = execute(command, environment).splitlines()
        rates = [json.loads(line)["rate"] for line in lines if line.startswith('{"rate"')]
    else:
        config, target = folder / f"{run}.json", folder / f"run-{run}"
        config.write_text(json.dumps(values))
        program = str(Path(sys.executable).with_name("nested-tune"))
        execute([program, "train", "-c", str(config), "--run-dir", str(target)], environment)
        records = [json.loads(line) for line in (target / "metrics.jsonl").open()]
        rates = [each["tokens_per_second"] for each in records if each.get("loss")]
    compiling = 2 * MIXED_REPORTS // 3 if len(rates) == MIXED_REPORTS else 1
    rate = statistics.median(rates[compiling:])
    print(f"{arm}: {rate:,.0f} tokens/s", flush=True)
    return rate


def execute(command: list[str], environment: dict[str, str]) -> str:
    """Standard output of a command that has to succeed, but for the gate's verdict (exit 4)."""
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 4):
        raise SystemExit(f"{command[:4]} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def stock(values: dict[str, Any]) -> None:
    """`mlx_lm.lora` itself, with a callback in the place of its services that prints its rates."""
    from types import SimpleNamespace

    from mlx_lm import lora
    from mlx_lm.tuner.trainer import TrainingCallback

    class Rates(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            print("\n" + json.dumps({"rate": train_info["tokens_per_second"]}), flush=True)

    lora.get_reporting_callbacks = lambda *args, **kwargs: Rates()
    lora.run(SimpleNamespace(**(lora.CONFIG_DEFAULTS | values)))


def report(rates: dict[str, list[float]], name: str) -> None:
    """Print each arm's ratio to each rival, the median over the turns, and keep all as JSON."""
    rows: dict[str, Any] = {arm: {"tokens_per_second": own} for arm, own in rates.items()}
    for rival in [arm for arm in rates if arm.startswith("mlx_lm")]:
        for arm in [arm for arm in rates if arm.startswith("nested-tune")]:
            ratios = [a / b for a, b in zip(rates[arm], rates[rival], strict=True)]
            rows[arm][f"of {rival}"] = statistics.median(ratios)
            spread = f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} turns"
            print(f"{name}: {arm} is {statistics.median(ratios):.2f} x {rival} ({spread})")
    keep(name, {"arms": rows})


if __name__ == "__main__":
    stock(json.loads(sys.argv[1])) if sys.argv[-1].startswith("{") else main()
