"""Base models of 10M and 20M parameters, made once on public-domain English, as mlx-lm reads them.

Llamas with a byte-level BPE tokenizer of their own, trained for a number of seconds on one GPU. One
book in eight is cut into chats of two paragraphs, so that the chat template's tokens are known.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 8192
END, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = (END, PAD, "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
BOOK_BYTES = 60_000_000  # of all books together
CHAT_BOOKS = 8  # one in so many
ROWS, LENGTH = 64, 512  # of a step
PEAK_RATE, WARM_UP, LAST_SHARE = 2e-3, 0.02, 0.05
SEED = 1
GENERAL_ROWS, GENERAL_LENGTH = 32, 256  # of the held-out book
GENERAL_NAME = "general.json"  # its tokens, in the base's folder
SHARD_BYTES = 15 * 2**20


@dataclass(frozen=True)
class Size:
    """A Llama's shape; the embedding is the output layer too."""

    hidden: int
    layers: int
    heads: int
    intermediate: int


SIZES = {
    "tiny": Size(32, 2, 2, 64),  # for tests
    "10M": Size(320, 6, 5, 896),
    "20M": Size(448, 7, 7, 1216),
}


def choose_books(folder: Path) -> list[Path]:
    """Books in the order of their path's SHA-256, up to BOOK_BYTES; the first is held out."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.glob("*/*.md")}
    order = sorted(paths, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    chosen = []
    total = 0
    for name in order:
        total += paths[name].stat().st_size
        if total > BOOK_BYTES:
            break
        chosen.append(paths[name])
    return chosen


def as_documents(number: int, text: str) -> str:
    """A book as it stands, or as chats of two paragraphs."""
    if number % CHAT_BOOKS:
        return text + END
    paragraphs = [each.strip() for each in text.split("\n\n") if each.strip()]
    pairs = zip(paragraphs[::2], paragraphs[1::2], strict=False)
    return "".join(f"<|user|>{asked}<|assistant|>{answer}{END}" for asked, answer in pairs)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare_corpus(books: Path, out: Path) -> None:
    """Write the tokenizer, the tokens that train (uint16) and the held-out ones into `out`."""
    texts = [path.read_text(encoding="utf-8") for path in choose_books(books)]
    tokenizer = train_tokenizer(texts[1:])
    documents = [as_documents(number, text) for number, text in enumerate(texts[1:])]
    encoded = tokenizer.encode_batch(documents)
    tokens = np.concatenate([np.array(each.ids, np.uint16) for each in encoded])
    held_out = tokenizer.encode(texts[0]).ids
    rows = [held_out[n * GENERAL_LENGTH :][:GENERAL_LENGTH] for n in range(1, GENERAL_ROWS + 1)]
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    np.save(out / "tokens.npy", tokens)
    (out / GENERAL_NAME).write_text(json.dumps([row for row in rows if row]) + "\n")
    print(f"{len(texts)} books, {len(tokens):,} tokens", file=sys.stderr)


def config_of(size: Size) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "torch_dtype": "bfloat16",
    }


def rate_at(share: float) -> float:
    """The learning rate after a share of the time: a warm-up, then a cosine."""
    if share < WARM_UP:
        return PEAK_RATE * max(share, 1e-4) / WARM_UP
    fallen = (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2
    return PEAK_RATE * (LAST_SHARE + (1 - LAST_SHARE) * fallen)


def make_base(corpus: Path, name: str, seconds: float, out: Path) -> None:
    """Pretrain a model for so many seconds in bfloat16, with float32 masters, and save it."""
    mx.random.seed(SEED)
    model = Model(ModelArgs.from_dict(config_of(SIZES[name])))
    masters: Any = model.parameters()
    optimizer = optim.AdamW(PEAK_RATE, betas=[0.9, 0.95], weight_decay=0.1)
    optimizer.init(masters)

    def loss(parameters: Any, tokens: mx.array) -> mx.array:
        model.update(tree_map(lambda value: value.astype(mx.bfloat16), parameters))
        logits = model(tokens[:, :-1]).astype(mx.float32)
        mean: mx.array = nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")
        return mean

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def train_step(parameters: Any, tokens: mx.array) -> Any:
        value, gradients = mx.value_and_grad(loss)(parameters, tokens)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        return value, optimizer.apply_gradients(gradients, parameters)

    text, random = np.load(corpus / "tokens.npy"), np.random.default_rng(SEED)
    began, step, value = time.monotonic(), 0, mx.array(math.nan)
    while (elapsed := time.monotonic() - began) < seconds:
        optimizer.learning_rate = mx.array(rate_at(elapsed / seconds))
        starts = random.integers(0, len(text) - LENGTH - 1, ROWS)[:, None]
        batch = text[starts + np.arange(LENGTH + 1)].astype(np.int32)
        value, masters = train_step(masters, mx.array(batch))
        mx.eval(value, masters, optimizer.state)
        if step == 0:
            began = time.monotonic()  # compiling is not training
        step += 1
        if step % 100 == 0:
            print(f"{name}: step {step}, {elapsed:.0f} s, loss {value.item():.3f}", file=sys.stderr)
    save(out / name, corpus, config_of(SIZES[name]), dict(tree_flatten(masters)))
    count = sum(value.size for _, value in tree_flatten(masters))
    told = {"parameters": count, "steps": step, "tokens": step * ROWS * LENGTH}
    (out / name / "made.json").write_text(json.dumps(told | {"loss": value.item()}) + "\n")


def save(folder: Path, corpus: Path, config: dict[str, Any], weights: dict[str, mx.array]) -> None:
    """The model's folder; weights in bfloat16, in files of at most SHARD_BYTES."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, mx.array]] = [{}]
    for key, value in sorted(weights.items()):
        if sum(each.nbytes for each in shards[-1].values()) + 2 * value.size > SHARD_BYTES:
            shards.append({})
        shards[-1][key] = value.astype(mx.bfloat16)
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(path), shard, metadata={"format": "mlx"})
    for name in ("tokenizer.json", GENERAL_NAME):
        (folder / name).write_bytes((corpus / name).read_bytes())
    tokens = {"eos_token": END, "pad_token": PAD, "chat_template": CHAT_TEMPLATE}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | tokens) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
