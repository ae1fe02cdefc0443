"""One measurement with PEFT and PyTorch, in a process of its own: `peft-eager` or `peft-compile`.

bfloat16 base, float32 LoRA under autocast, SDPA attention, fused Adam.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.gpu.shapes import RANK, RATE, SCALE, SHAPES, WINDOW, Shape, measure, row


def main(size: str, arm: str) -> None:
    """Measure one arm at one size and print its row."""
    import torch

    shape = SHAPES[size]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = build(shape)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE, fused=True)
    forward = torch.compile(model) if arm == "peft-compile" else model
    batches = torch.randint(0, shape.vocabulary, (16, shape.batch, shape.length), device="cuda")
    step = 0
    torch.cuda.reset_peak_memory_stats()

    def window() -> None:
        nonlocal step
        total: Any = 0.0
        for _ in range(WINDOW):
            tokens = batches[step % len(batches)]
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = forward(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total, step = total + loss.detach(), step + 1
        float(total)

    found = measure(window)
    print(row(size, arm, shape, found, torch.cuda.max_memory_allocated()), flush=True)


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
