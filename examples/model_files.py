"""The files of the base model's folder, in the layout that `mlx_lm.load` opens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nested_core.optim.named_updates import flatten
from nested_core.storage import atomic

END, PAD = "<|endoftext|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (END, PAD, *(f"<|{role}|>" for role in ROLES))
END_ID, PAD_ID = 0, 1  # mlx-lm pads with 0 and counts one such token in its loss: a known one

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('Unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
LARGEST_VOCABULARY = 8192
MARKER = re.compile(r"<\|\w+\|>")  # a special token in a text


def train_tokenizer(sentences: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that merges until every word of `sentences` is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LARGEST_VOCABULARY,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for sentence in sentences for text in MARKER.split(sentence))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def architecture(vocabulary_size: int, row_length: int) -> dict[str, Any]:
    """The model's config.json: a Llama of six narrow layers with tied embeddings."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary_size,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": row_length,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "bfloat16",
    }


def tokenizer_config(row_length: int) -> dict[str, Any]:
    """The tokenizer_config.json, chat template included."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": row_length,
        "chat_template": CHAT_TEMPLATE,
    }


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights in bfloat16, tensors in order of their names so that bytes repeat."""
    weights = {name: value.astype(mx.bfloat16) for name, value in sorted(flatten(model).items())}
    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})


def save_model(
    folder: Path, model: nn.Module, tokenizer: Tokenizer, config: dict[str, Any]
) -> None:
    """Write weights, tokenizer and configuration files into `folder`, which exists."""
    save_weights(model, folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    row_length = config["max_position_embeddings"]
    atomic.write_json(folder / "tokenizer_config.json", tokenizer_config(row_length))
    atomic.write_json(folder / "config.json", config)
    generation = {"eos_token_id": END_ID, "pad_token_id": PAD_ID, "do_sample": False}
    atomic.write_json(folder / "generation_config.json", generation)
