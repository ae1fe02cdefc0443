"""How an adapter answers rows that it was not trained on, whoever trained it: one computation.

A greedy answer is the expected one exactly where each of its tokens, its end included, is the
likeliest after the prompt and the tokens before it. So one pass over prompt and answer says it
without generating; tests compare it with answers that are generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load

from benchmarks.learning.tasks import Row

ANSWER_TOKENS_AT_ONCE = 2048  # logits of 49,152 words in float32 are 0.4 GB then
TOKENS_AT_ONCE = 8192  # of prompts and answers: several workers judge on one GPU at the same time
WIDTH_MULTIPLE = 8
FEW_ANSWERS = 0.5  # different ones, of the rows: then they are names of classes


@dataclass(frozen=True)
class Judged:
    """What one adapter does on a list of rows.

    right: of each row, whether its greedy answer is the expected one.
    loss: mean loss of the answers' tokens, in nats.
    kl: KL(adapter || base) a token of the answers, in nats.
    general_loss: mean loss a token of text like the base's that nobody trained on, in nats; None
        without such text.
    kept: the share of tokens of the base's own answers to general instructions that are still the
        likeliest; None without such instructions.
    like_task: the share of general instructions that are answered by an answer of the task, by JSON
        where it has that, or with the first word of one where most differ; None where not asked.
    """

    right: np.ndarray[Any, np.dtype[np.bool_]]
    loss: float
    kl: float
    general_loss: float | None
    kept: float | None = None
    like_task: float | None = None


@lru_cache(1)
def read_base(folder: Path) -> tuple[nn.Module, Any]:
    """The base model and its tokenizer, once for all that judge by it."""
    model, tokenizer, *_ = load(str(folder))
    return model, tokenizer


class Judge:
    """A base model in memory, rows as tokens, and general text; it judges adapters on disk.

    `instructions` are pairs of an instruction and the base's own answer, both as tokens.
    """

    def __init__(
        self,
        base: Path,
        rows: Sequence[Row],
        general: Sequence[Sequence[int]],
        instructions: Sequence[tuple[list[int], list[int]]] = (),
    ) -> None:
        self.folder = base
        self.base, self.tokenizer = read_base(base)
        self.answers = {row.answer for row in rows}
        self.has_few = len(self.answers) < FEW_ANSWERS * len(rows)
        self.rows = [encode(self.tokenizer, row) for row in rows]
        self.general = [(list(tokens), 1) for tokens in general]
        self.instructions = instructions

    def judge(self, adapter: Path | None, *, asks: bool = False) -> Judged:
        """Judge an adapter's folder, as mlx_lm loads it; None is the base alone.

        `asks`: let it answer the general instructions too, which takes some seconds.
        """
        model = self.base
        if adapter is not None:
            model, *_ = load(str(self.folder), adapter_path=str(adapter))
        right, losses, divergences = [], [], []
        for tokens, owners, positions in batches(self.rows):
            log_p = log_probabilities(model, tokens, positions)
            targets = mx.array(tokens[:, 1:].reshape(-1)[positions])
            hits = np.array(log_p.argmax(axis=-1) == targets)
            right.append(np.bincount(owners, ~hits) == 0)
            losses.append(-np.array(mx.take_along_axis(log_p, targets[:, None], -1)))
            of_base = log_probabilities(self.base, tokens, positions)
            divergences.append(np.array((mx.exp(log_p) * (log_p - of_base)).sum(axis=-1)))
        return Judged(
            right=np.concatenate(right),
            loss=float(np.concatenate(losses).mean(dtype=np.float64)),
            kl=float(np.concatenate(divergences).mean(dtype=np.float64)),
            general_loss=mean_loss(model, self.general) if self.general else None,
            kept=share_kept(model, self.instructions) if self.instructions else None,
            like_task=self._share_like_task(model) if asks and self.instructions else None,
        )

    def right_share(self, adapter: Path) -> float:
        """The share of rows that an adapter's folder answers as expected, and nothing else."""
        model, *_ = load(str(self.folder), adapter_path=str(adapter))
        right = []
        for tokens, owners, positions in batches(self.rows):
            log_p = log_probabilities(model, tokens, positions)
            targets = mx.array(tokens[:, 1:].reshape(-1)[positions])
            right.append(np.bincount(owners, np.array(log_p.argmax(axis=-1) != targets)) == 0)
        return float(np.concatenate(right).mean())

    def _share_like_task(self, model: nn.Module) -> float:
        from benchmarks.learning.general import answer

        answers = answer(model, self.tokenizer, [prompt for prompt, _ in self.instructions])
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
        return sum(map(self.is_like_task, texts)) / len(texts)

    def is_like_task(self, text: str) -> bool:
        """Whether an answer to something else is one of the task's, as `like_task` counts it."""
        if all(answer.startswith("{") for answer in self.answers):
            return text.startswith("{")
        if self.has_few:
            return text.strip() in self.answers
        return text.split()[:1] in [answer.split()[:1] for answer in self.answers]


def encode(tokenizer: Any, row: Row) -> tuple[list[int], int]:
    """Prompt and answer in tokens, and where the answer begins.

    The answer ends with the token that ends it: what a template puts behind it, such as a line
    break, is never generated.
    """
    turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.answer}]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    ends = [n for n in range(len(prompt), len(whole)) if whole[n] in tokenizer.eos_token_ids]
    return list(whole)[: ends[0] + 1 if ends else None], len(prompt)


Batch = tuple[Any, Any, Any]


def batches(rows: Sequence[tuple[list[int], int]]) -> Iterator[Batch]:
    """Tokens (rows, width), and of each answer's token its row and its place among the logits.

    All have one width: MLX compiles and plans for each shape.
    """
    longest = max(len(tokens) for tokens, _ in rows)
    width = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    answer_tokens = sum(len(tokens) - start for tokens, start in rows) / len(rows)
    most = min(TOKENS_AT_ONCE / width, ANSWER_TOKENS_AT_ONCE / max(1, answer_tokens))
    count = max(1, int(most))
    for first in range(0, len(rows), count):
        some = rows[first : first + count]
        tokens = np.zeros((len(some), width + 1), np.int32)
        answers = np.zeros((len(some), width), np.bool_)
        for number, (row, start) in enumerate(some):
            tokens[number, : len(row)] = row
            answers[number, start - 1 : len(row) - 1] = True
        owners, places = np.nonzero(answers)
        yield tokens, owners, owners * width + places


def log_probabilities(model: nn.Module, tokens: Any, positions: Any) -> mx.array:
    """Log-probabilities (positions, vocabulary) of what comes next, float32."""
    inner: Any = model
    hidden = inner.model(mx.array(tokens[:, :-1]))
    chosen = hidden.reshape(-1, hidden.shape[-1])[mx.array(positions)]
    head = inner.lm_head if "lm_head" in inner else inner.model.embed_tokens.as_linear
    logits = head(chosen).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def mean_loss(model: nn.Module, rows: Sequence[tuple[list[int], int]]) -> float:
    """Mean loss a token in nats."""
    total, count = 0.0, 0
    for tokens, _, positions in batches(rows):
        targets = mx.array(tokens[:, 1:].reshape(-1)[positions])
        log_p = log_probabilities(model, tokens, positions)
        total -= float(mx.take_along_axis(log_p, targets[:, None], -1).sum().item())
        count += len(positions)
    return total / count


def share_kept(model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]]) -> float:
    """The share of tokens of given answers that are the likeliest after what comes before them."""
    rows = [(prompt + answer, len(prompt)) for prompt, answer in pairs]
    hits, count = 0, 0
    for tokens, _, positions in batches(rows):
        targets = mx.array(tokens[:, 1:].reshape(-1)[positions])
        log_p = log_probabilities(model, tokens, positions)
        hits += int((log_p.argmax(axis=-1) == targets).sum().item())
        count += len(positions)
    return hits / count
