"""Small base models of several families with tokenizers of their kind, and adapters that gain.

The weights are random and the tokenizers are made of the example's rows; an adapter is trained for
some steps on those, so that its loss is far below the base's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import MODEL_REMAPPING, quantize_model, save_config, save_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nested_core.backend import to_float
from nested_core.rooms.export.gguf.vocabulary import SPLIT_PATTERNS
from nested_core.storage.adapter import write_adapter
from tests.example import DATA

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
ENDS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"tie_word_embeddings": False, "sliding_window": 4096},
    "qwen2": {"head_dim": 16},
    "gemma3_text": {"sliding_window": 16, "sliding_window_pattern": 3, "query_pre_attn_scalar": 32},
}
KEYS = [
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]
LORA: dict[str, Any] = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": KEYS}


@dataclass(frozen=True)
class Trained:
    """A base and an adapter that gains on the example's rows."""

    base: Path
    adapter: Path


def example_rows() -> list[dict[str, Any]]:
    """The example's training rows."""
    return [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()]


def make_base(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    bits: int | None = None,
    dtype: mx.Dtype = mx.bfloat16,
) -> Path:
    """A base of a family in a dtype, or in so many bits; returns its folder."""
    tokenizer = make_tokenizer(family)
    tokenizer.chat_template = TEMPLATE
    module = import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(family, family)}")
    config = {"model_type": family, "vocab_size": -(-len(tokenizer) // 32) * 32, **SIZES}
    config |= OWN_SIZES.get(family, {})
    config |= {"eos_token_id": [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]}
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    for name, each in model.named_modules():  # larger than by default: random answers that differ
        if isinstance(each, nn.Linear):
            each.weight = each.weight * 2
            if "bias" in each:
                each.bias = 0.1 * mx.random.normal(each.bias.shape)
        if "norm" in name.rpartition(".")[2] and "weight" in each:
            spread = 0.2 * mx.random.normal(each.weight.shape)
            each.weight = each.weight + spread
    model.set_dtype(dtype)
    if bits is not None:
        model, config = quantize_model(model, config, 32, bits)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of the family's kind, made of the example's rows."""
    texts = [message["content"] for row in example_rows() for message in row["messages"]]
    if family in ("gemma3_text", "mistral"):
        return _make_sentencepiece(texts, has_space_in_front=family == "mistral")
    tokenizer = Tokenizer(models.BPE(ignore_merges=family == "llama"))
    name = "llama-bpe" if family == "llama" else "qwen2"
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERNS[name]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if family != "llama":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=ENDS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=ENDS[0])


def _make_sentencepiece(
    texts: Sequence[str], *, has_space_in_front: bool
) -> PreTrainedTokenizerFast:
    """BPE over characters with bytes for unknown ones, as Gemma's tokenizer.json has it.

    has_space_in_front: of each text, as Mistral's tokenizer.json has it.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    pieces = json.loads(trained.to_str())["model"]
    first = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*first, *sorted(pieces["vocab"], key=pieces["vocab"].get)]
    # SentencePiece merges any two pieces that make a piece, the earliest piece first.
    order = {first_ + second: rank for rank, (first_, second) in enumerate(pieces["merges"])}
    merges = [
        (text[:cut], text[cut:])
        for text in sorted(order, key=order.get)  # type: ignore[arg-type]
        for cut in range(1, len(text))
        if text[:cut] in pieces["vocab"] and text[cut:] in pieces["vocab"]
    ]
    vocabulary = {text: number for number, text in enumerate(tokens)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    in_front = [normalizers.Prepend("▁")] if has_space_in_front else []
    tokenizer.normalizer = normalizers.Sequence([*in_front, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if has_space_in_front else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = {"eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.add_special_tokens({"additional_special_tokens": ENDS[1:]})
    return made


def train_adapter(base: Path, folder: Path, *, steps: int = 30, seed: int = 0) -> Path:
    """An adapter of a base, trained on the example's rows; returns its folder."""
    model, tokenizer = load(str(base))[:2]
    model.set_dtype(mx.float32)
    model.freeze()
    mx.random.seed(seed)
    linear_to_lora_layers(model, 3, LORA)
    batch = _encode(tokenizer)

    def loss(model: nn.Module) -> mx.array:
        logits = model(batch[:, :-1])
        losses = nn.losses.cross_entropy(logits, batch[:, 1:])
        counted = batch[:, 1:] != 0
        return (losses * counted).sum() / counted.sum()

    optimizer = mlx.optimizers.Adam(2e-3)
    step = nn.value_and_grad(model, loss)
    first = to_float(loss(model))
    for _ in range(steps):
        value, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    assert to_float(value) < first - 0.3, "the adapter was to gain"
    tensors: Any = dict(tree_flatten(model.trainable_parameters()))
    config = {"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": LORA}
    folder.mkdir()
    write_adapter(folder, tensors, config | {"model": str(base)})
    return folder


def _encode(tokenizer: Any) -> mx.array:
    """Eight rows in token ids, padded with 0 to the longest."""
    rows = [
        tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        for row in example_rows()[:24]
    ]
    width = max(map(len, rows))
    return mx.array([[*row, *[0] * (width - len(row))] for row in rows])
