"""The models that are measured, by their shapes, and how a measurement is taken; no framework."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

RANK, SCALE, RATE = 8, 20.0, 1e-5
KEYS = [f"self_attn.{name}_proj" for name in "qkvo"]
KEYS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
WINDOW, WARM, WINDOWS = 4, 3, 7  # steps a window, windows not counted, windows counted


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, and the batch it is trained on."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch * self.length

    @property
    def config(self) -> dict[str, Any]:
        """What mlx-lm makes the model of."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": True,
            "rope_theta": 10000.0,
        }

    @property
    def keys(self) -> list[str] | None:
        """The layers that get LoRA; None for all that mlx-lm knows."""
        return KEYS

    @property
    def weights(self) -> int:
        """Weights of all linear layers and of the embedding, which is the output layer too."""
        heads = 2 + 2 * self.kv_heads / self.heads  # queries and outputs, keys and values
        layer = int(heads * self.hidden**2) + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocabulary * self.hidden


SHAPES = {
    "tiny": Shape(64, 3, 192, 4, 2, 512, 2, 32),
    "135M": Shape(576, 30, 1536, 9, 3, 49152, 4, 512),
    "0.5B": Shape(1024, 24, 2816, 16, 16, 32000, 4, 512),
    "1.7B": Shape(2048, 24, 8192, 32, 32, 49152, 4, 1024),
    "3B": Shape(3072, 28, 8192, 24, 8, 128256, 2, 2048),
    "7B": Shape(4096, 32, 11008, 32, 32, 32000, 4, 1024),
    "8B": Shape(4096, 32, 14336, 32, 8, 128256, 2, 2048),
}


@dataclass(frozen=True)
class FamilyShape(Shape):
    """A model of another family than Llama, with LoRA on every layer that mlx-lm gives one."""

    family: str = "llama"
    more: Mapping[str, Any] = field(default_factory=dict)  # of its configuration

    @property
    def config(self) -> dict[str, Any]:
        """What mlx-lm makes the model of."""
        return {**super().config, "model_type": self.family, **self.more}

    @property
    def keys(self) -> None:
        """All layers that mlx-lm knows get LoRA."""

    @property
    def weights(self) -> int:
        """Weights as mlx-lm has them, counted by another process.

        In this one a model would have MLX read its settings before they are set.
        """
        asked = [sys.executable, "-m", "benchmarks.gpu.shapes", json.dumps(asdict(self))]
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
        return int(done.stdout.splitlines()[-1])


def gated_delta_sizes(heads: int, size: int) -> dict[str, Any]:
    """Of a hybrid's layers without attention: heads, and the width of each one's key and value."""
    return {
        "linear_num_value_heads": heads,
        "linear_num_key_heads": heads,
        "linear_key_head_dim": size,
        "linear_value_head_dim": size,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "rms_norm_eps": 1e-6,
    }


def expert_sizes(experts: int, active: int, width: int) -> dict[str, Any]:
    """Of a mixture of experts: how many, how many a token uses, and the width of each."""
    return {
        "num_experts": experts,
        "num_experts_per_tok": active,
        "moe_intermediate_size": width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 4096,
        "norm_topk_prob": True,
    }


# The attention model has as many parameters as the hybrid, within 0.3 %.
FAMILIES = {
    "hybrid": FamilyShape(
        *(2048, 16, 6144, 8, 2, 32000, 4, 2048),
        family="qwen3_5",
        more={"head_dim": 256, **gated_delta_sizes(16, 128)},
    ),
    "attention": FamilyShape(
        *(2048, 16, 7232, 16, 8, 32000, 4, 2048),
        family="qwen3",
        more={"head_dim": 128, "max_position_embeddings": 8192},
    ),
    "Qwen3-MoE": FamilyShape(
        *(2048, 16, 6144, 32, 4, 32000, 2, 1024),
        family="qwen3_moe",
        more={"head_dim": 128, **expert_sizes(16, 4, 768)},
    ),
    "OLMoE": FamilyShape(
        *(2048, 8, 1024, 16, 16, 50304, 2, 1024),
        family="olmoe",
        more={"num_experts": 16, "num_experts_per_tok": 4},
    ),
    "Gemma3-1B": FamilyShape(
        *(1152, 26, 6912, 4, 1, 262144, 4, 1024),
        family="gemma3_text",
        more={"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512},
    ),
    "Qwen2.5-0.5B": FamilyShape(
        *(896, 24, 4864, 14, 2, 151936, 4, 512),
        family="qwen2",
        more={"max_position_embeddings": 32768},
    ),
    "tiny-hybrid": FamilyShape(
        *(64, 4, 192, 1, 1, 512, 2, 40),
        family="qwen3_5",
        more={"head_dim": 64, **gated_delta_sizes(2, 16)},
    ),
    "tiny-MoE": FamilyShape(
        *(64, 2, 192, 4, 2, 512, 2, 32),
        family="qwen3_moe",
        more={"head_dim": 16, **expert_sizes(4, 2, 32)},
    ),
}


def count_weights(shape: FamilyShape) -> int:
    """Weights of the model that mlx-lm makes of a shape; none is computed."""
    from mlx.utils import tree_flatten

    from benchmarks.gpu.mlx_arms import make_model

    return sum(array.size for _, array in tree_flatten(make_model(shape).parameters()))


def shape_of(size: str) -> Shape:
    """The shape of this name."""
    return SHAPES[size] if size in SHAPES else FAMILIES[size]


MIXED_ROWS, CHATS = 2400, 8000
MIXED_WARM = MIXED_WINDOWS = 25  # windows of rows of unlike lengths: 100 steps each
Lengths = npt.NDArray[np.int64]


def mixed_rows(longest: int) -> tuple[Lengths, Lengths]:
    """Tokens of each row, log-normal and on average 0.54 of the longest, all learnt but the first.

    int64 [MIXED_ROWS], both.
    """
    drawn = np.random.default_rng(0).lognormal(np.log(0.5 * longest), 0.6, MIXED_ROWS)
    lengths = drawn.clip(longest // 50 + 2, longest).astype(np.int64)
    return lengths, lengths - 1


def chat_rows(longest: int) -> tuple[Lengths, Lengths]:
    """Tokens of chats of 1 to 5 turns, and of each one's last answer, the part that is learnt.

    int64 [CHATS], both. A template takes 30 tokens; questions have 16 on average in the median,
    answers 81, both log-normal, so that most chats are short and some reach the longest.
    """
    generator = np.random.default_rng(0)
    turns = generator.integers(1, 6, CHATS)
    happens = np.arange(5) < turns[:, None]
    questions = generator.lognormal(2.8, 0.7, (CHATS, 5)).astype(np.int64) * happens
    answers = generator.lognormal(4.4, 0.8, (CHATS, 5)).astype(np.int64) * happens
    lengths = (30 + (questions + answers).sum(axis=1)).clip(max=longest)
    last = answers[np.arange(CHATS), turns - 1] + 1
    return lengths, np.minimum(last, lengths - 1)


def rows_of(options: Mapping[str, str], longest: int) -> tuple[Lengths, Lengths] | None:
    """Rows of unlike lengths, where an arm has them.

    With `even` all have their mean length, with `even=259` so many tokens, of which the same share
    is learnt.
    """
    draw = next((draw for word, draw in ROWS.items() if word in options), None)
    if draw is None:
        return None
    lengths, learnt = draw(longest)
    if "even" in options:
        mean, given = float(lengths.mean()), options["even"]
        length = float(given) if given not in ("", "1") else mean
        share = float(learnt.mean()) / mean
        learnt = np.full_like(learnt, min(round(share * length), round(length) - 1))
        lengths = np.full_like(lengths, round(length))
    return lengths, learnt


ROWS = {"mixed": mixed_rows, "chats": chat_rows}


def windows_of(options: Mapping[str, str]) -> tuple[int, int]:
    """Windows that warm up, and windows that count, of rows of one length."""
    if "windows" not in options:
        return WARM, WINDOWS
    counted = int(options["windows"])
    return max(1, counted // 2), counted


def measure(
    window: Callable[[], None],
    warm: int = WARM,
    windows: int = WINDOWS,
    settle: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Seconds of windows of WINDOW steps, each of which ends when its loss has been read.

    With the energy of a step, in joules, where NVML tells it; the windows follow one another, so
    that a GPU comes to the power that it may take. `settle` is called between the windows that warm
    up and those that count.
    """
    began = time.perf_counter()
    for _ in range(warm):
        window()
    warmed, seconds = time.perf_counter() - began, []
    settle()
    before = energy()
    for _ in range(windows):
        start = time.perf_counter()
        window()
        seconds.append((time.perf_counter() - start) / WINDOW)
    joules = per_step(before, energy(), windows)
    return {"seconds": seconds, "warm_up": round(warmed, 2), "joules": joules}


def per_step(before: float | None, after: float | None, windows: int = WINDOWS) -> float | None:
    """Joules a step between two readings of `energy`, with so many windows between them."""
    if before is None or after is None:
        return None
    return round((after - before) / (windows * WINDOW), 2)


def energy() -> float | None:
    """Joules that the first GPU has taken since its driver was loaded; None without NVML."""
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(device)) / 1000


def median_ms(seconds: list[float]) -> float:
    """The median in milliseconds."""
    return 1000 * statistics.median(seconds)


def row(size: str, arm: str, shape: Shape, found: dict[str, Any], peak: float) -> str:
    """One line of the result file: the median, every window, and the whole run's peak in GiB."""
    seconds = found["seconds"]
    line = {
        "size": size,
        "arm": arm,
        "tokens_per_second": round(1000 * shape.tokens / median_ms(seconds)),
        "milliseconds": round(median_ms(seconds), 2),
        "windows": [round(1000 * each, 2) for each in seconds],
        "peak_gib": round(peak / 2**30, 4),
        "shape": asdict(shape),
    }
    if "real_tokens" in found:  # of each window's steps, without padding
        steps = WINDOW * len(seconds)
        line["tokens_per_second"] = round(sum(found["real_tokens"]) / WINDOW / sum(seconds))
        line["real_tokens_per_step"] = round(sum(found.pop("real_tokens")) / steps)
    line |= {name: value for name, value in found.items() if name != "seconds"}
    return json.dumps(line)


if __name__ == "__main__":
    print(count_weights(FamilyShape(**json.loads(sys.argv[1]))))
