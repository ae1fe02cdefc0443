"""Local stand-ins for what a lora.yaml names: tiny models, data of each kind, an adapter, wandb."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

from tests.example import DATA, MODEL
from tests.mlx_lm_variants import COMMON

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
QUANTISATION = {"group_size": 32, "bits": 4}
OWN_CODE = "from mlx_lm.models.llama import Model, ModelArgs\n"
# The example's template, which passes over tools, with the tools before the messages.
TOOLS_TEMPLATE = "{%- if tools -%}{{- tools | tojson -}}{%- endif -%}"
TOOLS = [{"type": "function", "function": {"name": "capital", "parameters": {"type": "object"}}}]
# In place of wandb: what is called on it stands in wandb.jsonl of the working directory.
WANDB = """
import json

id = "stand-in"
summary = {}

def _note(*what):
    with open("wandb.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\\n")

def init(**settings):
    _note("init", settings["project"])
    return __import__("wandb")

def log(values, step):
    _note("log", step, sorted(values))

def Artifact(*names):
    return __import__("wandb")

def add_file(path):
    pass

def log_artifact(artifact):
    pass

def finish():
    pass
"""


def make_stand_ins(folder: Path) -> Mapping[str, str]:
    """Make all of them below a folder; the path of each by the `$name` that stands for it."""
    makers = _models() | _data_sets()
    for name, make in makers.items():
        (folder / name).mkdir(parents=True)
        make(folder / name)
    paths = {name: str(folder / name) for name in makers}
    paths |= {"cache": str(folder / "cache"), "adapter": str(folder / "adapter.safetensors")}
    paths["other"] = str(folder / "other.yaml")
    _write_adapter(Path(paths["base"]), Path(paths["adapter"]))
    Path(paths["other"]).write_text(Template(COMMON).substitute(paths), encoding="utf-8")
    (folder / "modules").mkdir()
    (folder / "modules" / "wandb.py").write_text(WANDB, encoding="utf-8")
    return paths | {"modules": str(folder / "modules")}


def _models() -> dict[str, Any]:
    return {
        "base": lambda folder: _write_model(folder, layers=2),
        "deep": lambda folder: _write_model(folder, layers=16),
        "quantised": lambda folder: _write_model(folder, layers=2, quantised=True),
        "own_code": lambda folder: _write_model(folder, layers=2, own_code=True),
    }


def _write_model(
    folder: Path, *, layers: int, quantised: bool = False, own_code: bool = False
) -> None:
    """A random model with the example's vocabulary and tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, folder / name)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_bytes())
    tokenizer["chat_template"] = TOOLS_TEMPLATE + tokenizer["chat_template"]
    _write_json(folder / "tokenizer_config.json", tokenizer)
    config = json.loads((MODEL / "config.json").read_bytes()) | SIZES
    config |= {"num_hidden_layers": layers, "num_key_value_heads": 2, "torch_dtype": "float32"}
    mx.random.seed(layers)
    model: Any = Model(ModelArgs.from_dict(config))
    if quantised:
        nn.quantize(model, QUANTISATION["group_size"], QUANTISATION["bits"])
        config["quantization"] = QUANTISATION
    if own_code:
        (folder / "own.py").write_text(OWN_CODE, encoding="utf-8")
        config["model_file"] = "own.py"
    _write_json(folder / "config.json", config)
    parameters: Any = tree_flatten(model.parameters())
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(parameters), metadata={"format": "mlx"}
    )


def _write_adapter(base: Path, path: Path) -> None:
    """The weights of an adapter of mlx_lm.lora's default shape, with a B that is not zero."""
    config = json.loads((base / "config.json").read_bytes())
    model: Any = Model(ModelArgs.from_dict(config))
    mx.random.seed(5)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    leaves: Any = tree_flatten(model.trainable_parameters())
    weights = {name: value + 0.01 * mx.random.normal(value.shape) for name, value in leaves}
    mx.save_safetensors(str(path), weights)


def _data_sets() -> dict[str, Any]:
    """A maker for each; chats are the example's first."""
    pairs = [
        (chat["messages"][0]["content"], chat["messages"][1]["content"])
        for split in ("train", "valid")
        for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        for chat in [json.loads(line)]
    ]
    chats = [[_message("user", q), _message("assistant", a)] for q, a in pairs]
    rows: dict[str, list[dict[str, Any]]] = {
        "chats": [{"messages": chat} for chat in chats],
        "tools": [{"messages": chat, "tools": TOOLS} for chat in chats],
        "dialogues": [{"dialogue": chat} for chat in chats],
        "completions": [{"prompt": q, "completion": a} for q, a in pairs],
        "renamed": [{"input": q, "output": a} for q, a in pairs],
        "texts": [{"text": f"{q} {a}"} for q, a in pairs],
        "bodies": [{"body": f"{q} {a}"} for q, a in pairs],
    }
    makers: dict[str, Any] = {
        name: lambda folder, lines=lines: _write_splits(folder, lines)
        for name, lines in rows.items()
    }
    hub = {
        "questions": [{"text": q, "summary": a} for q, a in pairs[:12]],
        "conversations": [{"chosen": chat} for chat in chats[12:24]],
        "only_train": rows["chats"][:12],
    }
    return makers | {
        name: lambda folder, lines=lines: _write_lines(folder / "train.jsonl", lines)
        for name, lines in hub.items()
    }


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write_splits(folder: Path, rows: list[dict[str, Any]]) -> None:
    for split, lines in (("train", rows[:12]), ("valid", rows[40:44]), ("test", rows[44:48])):
        _write_lines(folder / f"{split}.jsonl", lines)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
