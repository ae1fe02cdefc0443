"""The model families that GGUF is written of: names of tensors, and what llama.cpp needs to know.

Each is described by what llama.cpp's own converter writes for it (conversion/llama.py, qwen.py and
gemma.py of llama.cpp). What a family could have and llama.cpp would compute otherwise is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core.errors import ConfigError

ARCHITECTURE_BY_MODEL_TYPE = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
}
ROPE_SCALING_KEY = "nested_tune.rope_scaling"  # what rope_freqs was computed from, to be read back
ROPE_FREQS = "rope_freqs.weight"
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA3_LAYER_NAMES = LAYER_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


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
        """What llama.cpp needs to know beside the tensors, by GGUF's keys."""
        args = self.args
        heads = int(args.num_attention_heads)
        head_dim = int(getattr(args, "head_dim", None) or args.hidden_size // heads)
        own: dict[str, Any] = {
            "context_length": int(args.max_position_embeddings or 2048),
            "embedding_length": int(args.hidden_size),
            "block_count": int(args.num_hidden_layers),
            "feed_forward_length": int(args.intermediate_size),
            "attention.head_count": heads,
            "attention.head_count_kv": int(args.num_key_value_heads),
            "attention.layer_norm_rms_epsilon": float(args.rms_norm_eps),
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "rope.dimension_count": head_dim,
            "rope.freq_base": float(args.rope_theta),
            "vocab_size": int(args.vocab_size),
        }
        if self.architecture == "gemma3":
            own |= {
                "attention.sliding_window": int(args.sliding_window),
                "attention.sliding_window_pattern": int(args.sliding_window_pattern),
                "rope.freq_base_swa": float(args.rope_local_base_freq),
            }
        scaling = args.rope_scaling or {}
        kind = rope_kind(scaling)
        if kind == "linear":
            own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
        named = {f"{self.architecture}.{key}": value for key, value in own.items()}
        return named | ({ROPE_SCALING_KEY: json.dumps(scaling)} if kind == "llama3" else {})

    def extra_tensors(self) -> dict[str, mx.array]:
        """Tensors that llama.cpp has and mlx_lm computes: what Llama 3's rotations divide by."""
        scaling = self.args.rope_scaling or {}
        return {ROPE_FREQS: rope_factors(self.args)} if rope_kind(scaling) == "llama3" else {}

    def tensor_name(self, name: str) -> str:
        """GGUF's name of a tensor of the model; ConfigError for one that it has none for."""
        module, _, kind = name.removeprefix(self.prefix).rpartition(".")
        if module in NAMES:
            return f"{NAMES[module]}.{kind}"
        layers, _, rest = module.partition("model.layers.")
        number, _, key = rest.partition(".")
        own = layer_names(self.architecture).get(key)
        if layers or own is None or kind not in ("weight", "bias"):
            raise ConfigError(f"--gguf: llama.cpp's {self.architecture} has no tensor for {name}.")
        return f"blk.{number}.{own}.{kind}"


def find_family(model: nn.Module) -> Family:
    """The family of a model; ConfigError, by name, where GGUF is not written of it."""
    given: Any = model
    architecture = ARCHITECTURE_BY_MODEL_TYPE.get(given.model_type)
    if architecture is None:
        raise ConfigError(
            f"--gguf: the base is of the family {given.model_type}, and GGUF is written for llama, "
            f"qwen2, qwen3 and gemma3. Give --fused for a folder that mlx_lm loads, and convert "
            f"that with llama.cpp's convert_hf_to_gguf.py."
        )
    is_wrapped = given.model_type == "gemma3"
    args = given.language_model.args if is_wrapped else given.args
    problems = list_unsupported(architecture, args)
    if problems:
        raise ConfigError(
            f"--gguf: llama.cpp's {architecture} does not compute what this base does: "
            f"{'; '.join(problems)}."
        )
    return Family(architecture, args, "language_model." if is_wrapped else "")


def list_unsupported(architecture: str, args: Any) -> list[str]:
    """What a model does that llama.cpp's architecture of that name does not."""
    problems = []
    kind = rope_kind(args.rope_scaling or {})
    if kind not in ("default", "linear", *(("llama3",) if architecture == "llama" else ())):
        problems.append(f"rope_scaling of type {kind}")
    if getattr(args, "rope_traditional", False):
        problems.append("rope_traditional")
    if "sliding_attention" in (getattr(args, "layer_types", None) or ()):
        problems.append("layers with a sliding window")
    if architecture == "gemma3" and args.query_pre_attn_scalar != args.head_dim:
        problems.append("query_pre_attn_scalar is not head_dim")
    return problems


def rope_kind(scaling: Mapping[str, Any]) -> str:
    """The kind of a rope_scaling in config.json, under either of its keys."""
    return str(scaling.get("type") or scaling.get("rope_type") or "default")


def rope_factors(args: Any) -> mx.array:
    """What each frequency of a Llama 3 rotation is divided by, float32 [head_dim / 2]."""
    from mlx_lm.models.rope_utils import Llama3RoPE

    dims = args.head_dim or args.hidden_size // args.num_attention_heads
    rope: Any = Llama3RoPE(dims, base=args.rope_theta, scaling_config=args.rope_scaling)
    plain = args.rope_theta ** (mx.arange(0, dims, 2) / dims)
    factors: mx.array = rope._freqs / plain
    return factors


def layer_names(architecture: str) -> dict[str, str]:
    """GGUF's names of a layer's modules, by their names in mlx_lm."""
    return GEMMA3_LAYER_NAMES if architecture == "gemma3" else LAYER_NAMES


def change_layout(
    architecture: str, name: str, tensor: mx.array, args: Any, *, back: bool = False
) -> mx.array:
    """A tensor as llama.cpp stores it, or with `back` as mlx_lm does; `name` is GGUF's.

    llama.cpp rotates neighbouring pairs of a llama's queries and keys, mlx_lm the two halves of a
    head, so their rows are in another order; and its norms of gemma3 hold 1 + weight.
    """
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return tensor.astype(mx.float32) + (-1 if back else 1)
    heads = {"attn_q": int(args.num_attention_heads), "attn_k": int(args.num_key_value_heads)}.get(
        name.split(".")[2] if name.startswith("blk.") else ""
    )
    if architecture != "llama" or heads is None:
        return tensor
    split = (heads, -1, 2) if back else (heads, 2, -1)
    rows = mx.arange(tensor.shape[0]).reshape(split).swapaxes(1, 2).reshape(-1)
    return tensor[rows]


def config_of(metadata: Mapping[str, Any], tensors: Mapping[str, object]) -> dict[str, Any]:
    """config.json of the model in a GGUF, as mlx_lm reads it; KeyError without a key of it."""
    architecture = str(metadata["general.architecture"])

    def own(key: str) -> Any:
        return metadata[f"{architecture}.{key}"]

    config: dict[str, Any] = {
        "model_type": "gemma3_text" if architecture == "gemma3" else architecture,
        "hidden_size": own("embedding_length"),
        "num_hidden_layers": own("block_count"),
        "intermediate_size": own("feed_forward_length"),
        "num_attention_heads": own("attention.head_count"),
        "num_key_value_heads": own("attention.head_count_kv"),
        "head_dim": metadata.get(
            f"{architecture}.attention.key_length",
            own("embedding_length") // own("attention.head_count"),
        ),
        "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
        "rope_theta": own("rope.freq_base"),
        "max_position_embeddings": own("context_length"),
        "vocab_size": own("vocab_size"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_output.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if architecture == "gemma3":
        config["query_pre_attn_scalar"] = config["head_dim"]
        config["sliding_window"] = own("attention.sliding_window")
        config["sliding_window_pattern"] = own("attention.sliding_window_pattern")
        config["rope_local_base_freq"] = own("rope.freq_base_swa")
    if f"{architecture}.rope.scaling.factor" in metadata:
        config["rope_scaling"] = {"type": "linear", "factor": own("rope.scaling.factor")}
    if ROPE_SCALING_KEY in metadata:
        config["rope_scaling"] = json.loads(str(metadata[ROPE_SCALING_KEY]))
    return config


def mlx_name(architecture: str, name: str) -> str:
    """mlx_lm's name of a tensor; ConfigError for one that the family does not have."""
    place, _, kind = name.rpartition(".")
    outer = {own: module for module, own in NAMES.items()}
    if place in outer:
        return f"{outer[place]}.{kind}"
    _, _, rest = place.partition("blk.")
    number, _, key = rest.partition(".")
    module = next((m for m, own in layer_names(architecture).items() if own == key), None)
    if module is None:
        raise ConfigError(f"The GGUF has a tensor {name}, which {architecture} has none of here.")
    return f"model.layers.{number}.{module}.{kind}"
