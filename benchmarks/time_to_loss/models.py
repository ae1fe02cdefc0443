"""Small Llamas pretrained here by a plain loop, saved as folders that mlx-lm reads.

A pretraining that was cut off goes on from where it last saved. No tokenizer: see corpus.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.time_to_loss.corpus import SEED, VOCABULARY, Corpus, Tokens

RANK, SCALE = 8, 20.0
WARM_UP, DECAY = 100, 0.01
SAVE_SECONDS, REPORT = 60.0, 100
SHARD_BYTES = 15 * 2**20  # small enough to be carried between machines file by file


@dataclass(frozen=True)
class Size:
    """A Llama's sizes, how long it is pretrained, and the steps of one fine-tuning."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    pretraining: int
    rows: int = 64  # a pretraining step
    peak_rate: float = 1e-3
    text_tokens: int = 3_000_000
    batch: int = 16
    steps: int = 320
    knows: float = 0.95  # of the facts, after pretraining: else there is nothing to fine-tune


SIZES = {
    "tiny": Size(32, 3, 64, 2, 20, rows=4, text_tokens=20_000, steps=48, knows=0.0),
    "1M": Size(128, 6, 352, 4, 1200, rows=32, peak_rate=2e-3),
    "2M": Size(160, 6, 448, 5, 1500, peak_rate=2e-3),
    "10M": Size(256, 12, 704, 8, 1500),
    "22M": Size(384, 12, 1024, 6, 1500, batch=64, steps=160),
    "85M": Size(768, 12, 2048, 12, 1500, peak_rate=6e-4, batch=64, steps=160),
}


def is_made(folder: Path) -> bool:
    """Whether the model is there whole: its config.json is written last."""
    return (folder / "config.json").exists()


def digest_of(folder: Path) -> str:
    """What tells a model's weights from those of another pretraining."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def config_of(size: Size) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "model_type": "llama",
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
    }


def text_batch(text: Tokens, rows: int, step: int) -> Tokens:
    """The rows of a pretraining step, counted from 0: every row once an epoch."""
    each = len(text) // rows
    order = np.random.default_rng((SEED, 4, step // each)).permutation(len(text))
    place = step % each * rows
    return text[order[place : place + rows]]


def pretrain(folder: Path, size: Size, save_seconds: float = SAVE_SECONDS) -> None:
    """Make a model, or go on making it; about the loss it prints a line now and then."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(SEED)
    model = Model(ModelArgs.from_dict(config_of(size)))
    warm = min(WARM_UP, size.pretraining // 2)
    rise = optim.linear_schedule(0.0, size.peak_rate, warm)
    fall = optim.cosine_decay(size.peak_rate, size.pretraining - warm, size.peak_rate / 20)
    optimizer = optim.AdamW(optim.join_schedules([rise, fall], [warm]), weight_decay=DECAY)
    optimizer.init(model.trainable_parameters())
    text, begun = Corpus().text(size.text_tokens), _restore(folder, model, optimizer)
    state = [model.state, optimizer.state]

    def loss(tokens: mx.array) -> mx.array:
        logits = model(tokens[:, :-1])
        mean: mx.array = nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")
        return mean

    @partial(mx.compile, inputs=state, outputs=state)
    def take(tokens: mx.array) -> Any:
        value, gradients = nn.value_and_grad(model, loss)(tokens)
        optimizer.update(model, gradients)
        return value

    saved = time.monotonic()
    for step in range(begun, size.pretraining):
        value = take(mx.array(text_batch(text, size.rows, step)))
        mx.eval(value, state)
        if (step + 1) % REPORT == 0:
            told = f"loss {value.item():.3f}, {known(model):.1%} of the facts known"
            print(f"{folder.name}: step {step + 1}, {told}", file=sys.stderr)
        if time.monotonic() - saved > save_seconds:
            _save_state(folder, model, optimizer)
            saved = time.monotonic()
    if known(model) < size.knows:
        raise SystemExit(f"{folder.name} knows {known(model):.1%} of the facts: pretrain it longer")
    _save_model(folder, model, size)


def known(model: Any) -> float:
    """The share of the facts that a model tells when it is asked."""
    import mlx.core as mx

    rows, values = Corpus().asked()
    return float(np.mean(np.array(model(mx.array(rows))[:, -1].argmax(axis=-1)) == values))


def _state_file(folder: Path) -> Path:
    return folder / "pretraining.safetensors"


def _restore(folder: Path, model: Any, optimizer: Any) -> int:
    """Put back what a pretraining saved, if there is any; return the steps it had done."""
    import mlx.core as mx
    from mlx.utils import tree_unflatten

    if not _state_file(folder).exists():
        return 0
    held: Any = mx.load(str(_state_file(folder)))
    mx.eval(held)
    parts: Any = tree_unflatten(list(held.items()))
    model.update(parts["model"])
    optimizer.state = parts["optimizer"]
    return int(optimizer.step.item())


def _save_state(folder: Path, model: Any, optimizer: Any) -> None:
    from mlx.utils import tree_flatten

    held: Any = tree_flatten({"model": model.parameters(), "optimizer": optimizer.state})
    _replace(_state_file(folder), dict(held))


def _save_model(folder: Path, model: Any, size: Size) -> None:
    """The weights in bfloat16, in files of at most SHARD_BYTES, and the configuration."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    shards: list[dict[str, mx.array]] = [{}]
    held: Any = tree_flatten(model.parameters())
    for name, value in held:
        if sum(v.nbytes for v in shards[-1].values()) + value.nbytes // 2 > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = value.astype(mx.bfloat16)
    for number, shard in enumerate(shards, 1):
        _replace(folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors", shard)
    (folder / "config.json").write_text(json.dumps(config_of(size), indent=2) + "\n")
    _state_file(folder).unlink(missing_ok=True)


def _replace(path: Path, arrays: Any) -> None:
    import mlx.core as mx

    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f"partial-{path.name}")
    mx.save_safetensors(str(partial_file), arrays)
    os.replace(partial_file, path)


def load_with_lora(folder: Path, seed: int) -> Any:
    """A pretrained model, frozen, with fresh LoRA on every linear layer of all layers.

    bfloat16 on a GPU; float32 on a CPU, where bfloat16 is many times slower.
    """
    import mlx.core as mx
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    if mx.default_device() != mx.Device(mx.gpu):
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    model.freeze()
    mx.random.seed(seed)
    settings = {"rank": RANK, "dropout": 0.0, "scale": SCALE}
    linear_to_lora_layers(model, len(model.layers), settings)
    mx.eval(model.parameters())
    return model
