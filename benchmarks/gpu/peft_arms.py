"""One measurement with PEFT and PyTorch, in a process of its own: `peft-eager` or `peft-compile`.

bfloat16 base, float32 LoRA under autocast, SDPA attention, fused Adam. Options `+batch=4`,
`+length=512`, `+mixed`, `+chats` and `+even` are those of mlx_arms: rows of unlike lengths are
sorted by length into batches, which come in random order, padded to a multiple of 8 and without an
attention mask, for padding at the end needs none under a causal one.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.gpu.shapes import (
    MIXED_WARM,
    MIXED_WINDOWS,
    RANK,
    RATE,
    SCALE,
    SHAPES,
    WINDOW,
    Lengths,
    Shape,
    measure,
    row,
    rows_of,
)

WIDTH_MULTIPLE = 8  # as PEFT's users set pad_to_multiple_of
NOT_LEARNT = -100  # a label that transformers' loss ignores


def main(size: str, arm: str) -> None:
    """Measure one arm at one size and print its row."""
    import torch

    name, *words = arm.split("+")
    options = dict(word.partition("=")[::2] for word in words)
    shape = replace(
        SHAPES[size], **{key: int(options[key]) for key in ("batch", "length") if key in options}
    )
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = build(shape)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE, fused=True)
    forward = torch.compile(model) if name == "peft-compile" else model
    rows = rows_of(options, shape.length)
    if rows is None:
        size = (16, shape.batch, shape.length)
        batches = list(torch.randint(0, shape.vocabulary, size, device="cuda"))
        labels, real = batches, [shape.tokens] * len(batches)
    else:
        batches, labels, real = batches_of_rows(shape, rows)
    step = 0
    counted: list[int] = []
    torch.cuda.reset_peak_memory_stats()

    def window() -> None:
        nonlocal step
        total: Any = 0.0
        counted.append(0)
        for _ in range(WINDOW):
            at, step = step % len(batches), step + 1
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = forward(input_ids=batches[at], labels=labels[at]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total, counted[-1] = total + loss.detach(), counted[-1] + real[at]
        float(total)

    if rows is None:
        found = measure(window)
    else:
        found = measure(window, MIXED_WARM, MIXED_WINDOWS) | {"real_tokens": counted[MIXED_WARM:]}
    print(row(size, arm, shape, found, torch.cuda.max_memory_allocated()), flush=True)


def batches_of_rows(
    shape: Shape, rows: tuple[Lengths, Lengths]
) -> tuple[list[Any], list[Any], list[int]]:
    """Tokens and labels of each batch, and its tokens without padding."""
    import torch

    lengths, learnt = rows
    order = lengths.argsort()[::-1]
    starts = np.random.default_rng(1).permutation(np.arange(0, len(order), shape.batch))
    tokens: list[Any] = []
    labels: list[Any] = []
    real: list[int] = []
    for start in starts[: WINDOW * (MIXED_WARM + MIXED_WINDOWS)]:
        chosen = order[start : start + shape.batch]
        width = -(-int(lengths[chosen].max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        drawn = torch.randint(0, shape.vocabulary, (len(chosen), width), device="cuda")
        columns, ends = torch.arange(width), torch.tensor(lengths[chosen])[:, None]
        is_learnt = (columns < ends) & (columns >= ends - torch.tensor(learnt[chosen])[:, None])
        tokens.append(drawn)
        labels.append(torch.where(is_learnt.cuda(), drawn, NOT_LEARNT))
        real.append(int(ends.sum()) - len(chosen))
    return tokens, labels, real


def build(shape: Shape) -> Any:
    """The same Llama in transformers, with LoRA on every linear layer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=shape.hidden,
                num_hidden_layers=shape.layers,
                intermediate_size=shape.intermediate,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                vocab_size=shape.vocabulary,
                tie_word_embeddings=True,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
        torch.set_default_dtype(torch.float32)
    settings = LoraConfig(
        r=RANK, lora_alpha=int(RANK * SCALE), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
