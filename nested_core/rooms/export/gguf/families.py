"""The model families that GGUF is written of: names of tensors, and what llama.cpp needs to know.

Each is described by what llama.cpp's own converter writes for it (conversion/llama.py, qwen.py and
gemma.py of llama.cpp). What a family could have and llama.cpp would compute otherwise is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core.errors import ConfigError

ARCHITECTURE_BY_MODEL_TYPE = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
}
ROPE_SCALING_KEY = "nested_tune.rope_scaling"  # what rope_freqs was computed from, to be read back
ROPE_FREQS = "rope_freqs.weight"
MODULES = ("model.embed_tokens", "model.norm", "lm_head")  # as Hugging Face and mlx_lm name them
LAYER_MODULES = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
# GGUF's key for a field of a model's configuration
KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}
GEMMA3_KEYS = {
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "rope_local_base_freq": "rope.freq_base_swa",
}
# What follows the module in a tensor's name, here and in GGUF
KINDS = {"lora_a": "weight.lora_a", "lora_b": "weight.lora_b", "weight": "weight", "bias": "bias"}
FLOATS = ("rms_norm_eps", "rope_theta", "rope_local_base_freq")


@dataclass(frozen=True)
class Family:
    """A model that GGUF can be written of.

    architecture: llama.cpp's name of it.
    args: the model's ModelArgs in mlx_lm, of a model with pictures those of its text.
    prefix: of the text model's tensors among all of the model's.
    """

    architecture: str
    args: Any
    prefix: str = ""

    def metadata(self) -> dict[str, Any]:
        """Return the model's settings that llama.cpp needs beside the tensors, by GGUF's keys."""
        args = self.args
        head_dim = int(getattr(args, "head_dim", None) or _default_head_dim(vars(args)))
        data: dict[str, Any] = {
            key: (float if field in FLOATS else int)(getattr(args, field))
            for field, key in list_keys(self.architecture).items()
        }
        lengths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
        data |= dict.fromkeys(lengths, head_dim)
        scaling, kind = args.rope_scaling, rope_kind(args.rope_scaling)
        if kind == "linear":
            data |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
        metadata = {f"{self.architecture}.{key}": value for key, value in data.items()}
        return metadata | ({ROPE_SCALING_KEY: json.dumps(scaling)} if kind == "llama3" else {})

    def name_tensors(self, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the model's tensors by GGUF's names; ConfigError for one without such a name."""
        names = list_names(self.architecture, int(self.args.num_hidden_layers))
        named = {}
        for name, tensor in tensors.items():
            module, _, kind = name.removeprefix(self.prefix).rpartition(".")
            if module not in names or kind not in KINDS:
                raise ConfigError(f"--gguf: llama.cpp's {self.architecture} has no tensor {name}.")
            named[f"{names[module]}.{KINDS[kind]}"] = tensor
        return named

    def extra_tensors(self) -> dict[str, mx.array]:
        """Return tensors that only llama.cpp stores: what Llama 3 divides each frequency by."""
        from mlx_lm.models.rope_utils import Llama3RoPE

        args = self.args
        if rope_kind(args.rope_scaling) != "llama3":
            return {}
        dims = args.head_dim or args.hidden_size // args.num_attention_heads
        rope: Any = Llama3RoPE(dims, base=args.rope_theta, scaling_config=args.rope_scaling)
        return {ROPE_FREQS: rope._freqs / args.rope_theta ** (mx.arange(0, dims, 2) / dims)}


def list_keys(architecture: str) -> dict[str, str]:
    """List GGUF's keys of an architecture, by the fields of a model's configuration."""
    return KEYS | (GEMMA3_KEYS if architecture == "gemma3" else {})


def list_names(architecture: str, layers: int) -> dict[str, str]:
    """List llama.cpp's names of an architecture's modules, by their names in mlx_lm."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    name_map = get_tensor_name_map(known, layers)
    inner = (f"model.layers.{layer}.{own}" for layer in range(layers) for own in LAYER_MODULES)
    names = {module: name_map.get_name(module) for module in (*MODULES, *inner)}
    return {module: name for module, name in names.items() if name is not None}


def _default_head_dim(config: Mapping[str, Any]) -> int:
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def find_architecture(model_type: str) -> str:
    """Return llama.cpp's name for a model_type; ConfigError for one that is not written as GGUF."""
    architecture = ARCHITECTURE_BY_MODEL_TYPE.get(model_type)
    if architecture is None:
        raise ConfigError(
            f"--gguf: the base is of the family {model_type}, and GGUF is written for llama, "
            f"mistral, qwen2, qwen3 and gemma3. Give --fused for a folder that mlx_lm loads, and "
            f"convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    return architecture


def find_family(model: nn.Module) -> Family:
    """Return the family of a model; ConfigError, with its name, if it cannot be written as GGUF."""
    base: Any = model
    architecture = find_architecture(base.model_type)
    is_wrapped = base.model_type == "gemma3"
    args = base.language_model.args if is_wrapped else base.args
    problems = list_unsupported(architecture, args)
    if problems:
        raise ConfigError(
            f"--gguf: llama.cpp's {architecture} does not compute what this base does: "
            f"{'; '.join(problems)}."
        )
    return Family(architecture, args, "language_model." if is_wrapped else "")


def list_unsupported(architecture: str, args: Any) -> list[str]:
    """Return the settings of a model that llama.cpp does not compute in this architecture."""
    kind = rope_kind(args.rope_scaling)
    known = ("default", "linear", *(("llama3",) if architecture == "llama" else ()))
    is_gemma, layer_types = architecture == "gemma3", getattr(args, "layer_types", None)
    problems = {
        f"rope_scaling of type {kind}": kind not in known,
        "rope_traditional": getattr(args, "rope_traditional", False),
        "layers with a sliding window": "sliding_attention" in (layer_types or ()),
        "query_pre_attn_scalar is not head_dim": is_gemma
        and args.query_pre_attn_scalar != args.head_dim,
    }
    return [problem for problem, is_there in problems.items() if is_there]


def rope_kind(scaling: Mapping[str, Any] | None) -> str:
    """Return the kind of a rope_scaling in config.json, under either of its keys."""
    scaling = scaling or {}
    return str(scaling.get("type") or scaling.get("rope_type") or "default")


def change_layout(
    architecture: str, name: str, tensor: mx.array, args: Any, *, back: bool = False
) -> mx.array:
    """Return a tensor of mlx_lm as llama.cpp stores it, or with `back` the reverse.

    Two things differ. For llama, llama.cpp rotates neighbouring pairs of queries and keys, and
    mlx_lm the two halves of a head, so that the rows have another order. For gemma3, llama.cpp's
    norms hold 1 + weight.

    name: GGUF's name of the tensor.
    """
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return tensor.astype(mx.float32) + (-1 if back else 1)
    heads = {"attn_q": int(args.num_attention_heads), "attn_k": int(args.num_key_value_heads)}.get(
        name.split(".")[2] if name.startswith("blk.") else ""
    )
    if architecture != "llama" or heads is None or name.endswith(".lora_a"):
        return tensor
    split = (heads, -1, 2) if back else (heads, 2, -1)
    return tensor[mx.arange(tensor.shape[0]).reshape(split).swapaxes(1, 2).reshape(-1)]


def config_of(metadata: Mapping[str, Any], tensors: Mapping[str, object]) -> dict[str, Any]:
    """Return mlx_lm's config.json for the model in a GGUF; KeyError if its metadata lacks a key."""
    architecture = str(metadata["general.architecture"])
    prefix = f"{architecture}."
    keys = list_keys(architecture)
    config: dict[str, Any] = {field: metadata[prefix + key] for field, key in keys.items()}
    config["model_type"] = "gemma3_text" if architecture == "gemma3" else architecture
    config["head_dim"] = metadata.get(f"{prefix}attention.key_length", _default_head_dim(config))
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_output.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if architecture == "gemma3":
        config["query_pre_attn_scalar"] = config["head_dim"]
    if f"{prefix}rope.scaling.factor" in metadata:
        factor = metadata[f"{prefix}rope.scaling.factor"]
        config["rope_scaling"] = {"type": "linear", "factor": factor}
    if ROPE_SCALING_KEY in metadata:
        config["rope_scaling"] = json.loads(str(metadata[ROPE_SCALING_KEY]))
    return config


def rename_tensors(
    architecture: str, tensors: Mapping[str, mx.array], config: Mapping[str, Any]
) -> dict[str, mx.array]:
    """Return the tensors of a GGUF by mlx_lm's names and in its layout.

    Raises KeyError for a tensor that belongs to no known module.
    """
    args = SimpleNamespace(**config)
    names = list_names(architecture, args.num_hidden_layers)
    modules = {gguf_name: module for module, gguf_name in names.items()}
    renamed = {}
    for name, tensor in tensors.items():
        if name != ROPE_FREQS:
            gguf_name, _, kind = name.rpartition(".")
            restored = change_layout(architecture, name, tensor, args, back=True)
            renamed[f"{modules[gguf_name]}.{kind}"] = restored
    return renamed
