"""Greedy answers to prompts, by plain mlx_lm.load and mlx_lm.generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def generate_answers(
    model: str, prompts: Sequence[str], *, adapter: Path | None = None, max_tokens: int = 32
) -> list[str]:
    """One greedy answer a prompt, sent as a user's message in the model's chat template."""
    from mlx_lm import generate, load

    loaded, tokenizer = load(model, adapter_path=None if adapter is None else str(adapter))[:2]
    answers = []
    for prompt in prompts:
        message = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(message, add_generation_prompt=True)
        text = generate(loaded, tokenizer, prompt=tokens, max_tokens=max_tokens, verbose=False)
        answers.append(text.strip())
    return answers
