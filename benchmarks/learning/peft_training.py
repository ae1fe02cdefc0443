"""PEFT on the data and the settings of arm k, in a process of its own: `... SETTINGS.json`.

It says "ready" once PyTorch is imported and has the GPU, trains when it is told to, and writes the
adapter after every so many steps, in the format of mlx_lm, which judges it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

NOT_LEARNT = -100  # a label that transformers' loss ignores
WIDTH_MULTIPLE = 8  # as PEFT's users set pad_to_multiple_of
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Get ready, wait for a line on standard input, and train."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.zeros(1, device=DEVICE)
    print("ready", flush=True)
    sys.stdin.readline()
    train(settings)


def train(settings: dict[str, Any]) -> None:
    """LoRA in float32 on the bfloat16 base under autocast; Adam with a given rate an update."""
    torch.manual_seed(settings["seed"])
    torch.set_float32_matmul_precision("high")
    base, lora = settings["model"], settings["lora_parameters"]
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    model = get_peft_model(
        model.to(DEVICE),
        LoraConfig(
            r=lora["rank"],
            lora_alpha=int(lora["rank"] * lora["scale"]),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(parameters, fused=DEVICE == "cuda")
    rows = read_rows(settings)
    for step, (tokens, labels) in enumerate(batches(rows, settings), 1):
        optimizer.param_groups[0]["lr"] = settings["rates"][step - 1]
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = model(input_ids=tokens.to(DEVICE), labels=labels.to(DEVICE)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % settings["save_every"] == 0 or step == settings["iters"]:
            save(model, Path(settings["adapter_path"]) / f"{step:07d}", lora)


def read_rows(settings: dict[str, Any]) -> list[tuple[list[int], int]]:
    """The tokens of each row through the chat template, and where its answer begins."""
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    rows = []
    for line in (Path(settings["data"]) / "train.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        turns.append({"role": "assistant", "content": row["completion"]})
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        rows.append((whole[: settings["max_seq_length"]], len(prompt)))
    return rows


def batches(
    rows: list[tuple[list[int], int]], settings: dict[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """Tokens and labels (batch, width) of each step; padding at the end needs no mask."""
    dice, size = np.random.default_rng(settings["seed"]), settings["batch_size"]
    order: list[int] = []
    for _ in range(settings["iters"]):
        if len(order) < size:
            order = dice.permutation(len(rows)).tolist()
        chosen, order = order[:size], order[size:]
        width = max(len(rows[number][0]) for number in chosen)
        width = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        tokens = np.zeros((size, width), np.int64)
        labels = np.full((size, width), NOT_LEARNT)
        for place, number in enumerate(chosen):
            row, start = rows[number]
            tokens[place, : len(row)] = row
            labels[place, start : len(row)] = row[start:]
        yield torch.from_numpy(tokens), torch.from_numpy(labels)


def save(model: Any, folder: Path, lora: dict[str, Any]) -> None:
    """Write the factors as mlx_lm names and turns them."""
    folder.mkdir(parents=True)
    factors = {}
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        layer, _, factor = name.removesuffix(".default.weight").rpartition(".")
        layer = layer.removeprefix("base_model.model.")
        transposed = value.detach().float().cpu().numpy().T
        factors[f"{layer}.{factor.lower()}"] = np.ascontiguousarray(transposed)
    save_file(factors, str(folder / "adapters.safetensors"))
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    main()
