"""What PEFT and PyTorch say: adapters that PEFT writes, and the logits that they give.

`python tests/rooms/peft/make_golden.py make` writes golden/ again; `... logits PEFT_DIR OUT`
loads any PEFT adapter onto the example model. Both need torch, transformers and peft, which the
project itself does not: golden/ is there so that the comparison is made on every machine.
Last made with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, safetensors 0.8.0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
from pathlib import Path
from typing import Any

MODEL = Path(__file__).resolve().parents[3] / "examples" / "geography-base"
GOLDEN = Path(__file__).parent / "golden"
TOKENS = [17, 301, 902, 44, 1203, 77]
SEED = 5
TARGETS = GOLDEN.with_name("golden_targets.json")
TARGET_CASES = 80
NAMES = [
    *(
        f"{stack}.{layer}.{key}"
        for stack in ("model.layers", "model.h", "layers", "enc.blocks.0.sub.layers")
        for layer in range(3)
        for key in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.1.up_proj")
    ),
    *("lm_head", "score", "model.norm_proj"),
]
ENDINGS = ["q_proj", "up_proj", "self_attn.q_proj", "lm_head", "proj", "1.q_proj", "score"]
ENDINGS += ["layers.2.mlp.up_proj", "model.layers.1.mlp.up_proj", "experts.1.up_proj", "model"]

# One for each way in which PEFT scales, places or stores an adapter.
CASES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora_some_layers_bfloat16": {
        "r": 8,
        "lora_alpha": 12,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "gate_proj"],
        "layers_to_transform": [1, 3],
        "layers_pattern": "layers",
    },
}


def wrapped(config: dict[str, Any]) -> Any:
    """The example model in float32 with a random adapter on it, which has an effect."""
    torch, peft = importlib.import_module("torch"), importlib.import_module("peft")
    torch.manual_seed(SEED)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
    model = peft.get_peft_model(base_model(), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
    return model


def base_model() -> Any:
    """The example model as transformers builds it, in float32."""
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def save_logits(model: Any, path: Path) -> None:
    """The logits at every position of TOKENS, in float32."""
    torch = importlib.import_module("torch")
    save_file = importlib.import_module("safetensors.torch").save_file
    with torch.no_grad():
        logits = model.eval()(torch.tensor([TOKENS])).logits[0]
    save_file({"logits": logits.float().contiguous()}, path)


def make(folder: Path) -> None:
    """Write every case: PEFT's own two files, and the logits of what they hold."""
    torch, peft = importlib.import_module("torch"), importlib.import_module("peft")
    for name, config in CASES.items():
        model = wrapped(config)
        if name.endswith("bfloat16"):
            adapter = [p for n, p in model.named_parameters() if "lora_" in n]
            for parameter in adapter:
                parameter.data = parameter.data.to(torch.bfloat16)
        model.peft_config["default"].base_model_name_or_path = "geography-base"
        model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink()
        loaded = peft.PeftModel.from_pretrained(base_model(), folder / name)
        save_logits(loaded, folder / name / "logits.safetensors")


def random_config(draw: random.Random) -> dict[str, Any]:
    """Some targets, exclusions and layers, of which most fit something in NAMES."""
    config: dict[str, Any] = {"target_modules": draw.sample(ENDINGS, draw.randint(1, 3))}
    if draw.random() < 0.4:
        config["exclude_modules"] = draw.sample(ENDINGS, draw.randint(0, 2))
    if draw.random() < 0.6:
        config["layers_to_transform"] = draw.choice([1, [0, 1], [], [3], 0, [2, 3]])
        config["layers_pattern"] = draw.choice([None, "layers", ["h", "blocks"], [], "sub"])
    return config


def make_targets(path: Path) -> None:
    """Which modules PEFT's own function takes for the targets of random configurations."""
    peft = importlib.import_module("peft")
    check = importlib.import_module("peft.tuners.tuners_utils").check_target_module_exists
    draw, cases = random.Random(SEED), []
    for _ in range(TARGET_CASES):
        config = random_config(draw)
        lora = peft.LoraConfig(**config)
        cases.append({"config": config, "targets": [name for name in NAMES if check(lora, name)]})
    path.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make")
    logits = commands.add_parser("logits")
    logits.add_argument("adapter", type=Path)
    logits.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(GOLDEN)
        make_targets(TARGETS)
    else:
        peft = importlib.import_module("peft")
        save_logits(peft.PeftModel.from_pretrained(base_model(), arguments.adapter), arguments.out)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
