"""Pre-training of a small Llama from nothing, with MLX on whatever device it has.

It refuses nothing and writes nothing: rows of tokens go in, a trained model comes out.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import mean
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx import nn
from mlx_lm.models.llama import Model, ModelArgs

from nested_core.backend import to_float

STEPS_PER_REPORT = 100
LOSS_WINDOW = 50

LossAndGradients = Callable[[Model, mx.array], tuple[mx.array, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """How the base model is trained; `tokens` of them are seen in all."""

    steps: int = 2000
    """Optimizer steps."""
    rows: int = 16
    """Rows in a batch."""
    row_length: int = 64
    """Tokens in a row, all of them predicted."""
    learning_rate: float = 5e-3
    """The highest, reached after the warm-up and followed by a cosine to 0."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """Decoupled, on every parameter."""
    max_grad_norm: float = 1.0
    """Global norm that gradients are clipped to."""
    seed: int = 7
    """Of the initial weights and of the order of the corpus."""

    @property
    def tokens(self) -> int:
        """Tokens predicted over the whole training."""
        return self.steps * self.rows * self.row_length


def build_model(architecture: dict[str, Any], seed: int) -> Model:
    """A Llama with random float32 weights."""
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(architecture))
    mx.eval(model.parameters())
    return model


def build_optimizer(config: PretrainingConfig) -> optim.Optimizer:
    """AdamW under a linear warm-up and a cosine to 0."""
    warmup = optim.linear_schedule(
        config.learning_rate / config.warmup_steps, config.learning_rate, config.warmup_steps
    )
    cosine = optim.cosine_decay(config.learning_rate, config.steps - config.warmup_steps)
    return optim.AdamW(
        learning_rate=optim.join_schedules([warmup, cosine], [config.warmup_steps]),
        betas=[0.9, 0.98],
        weight_decay=config.weight_decay,
        bias_correction=True,
    )


def next_token_loss(model: Model, tokens: mx.array) -> mx.array:
    """Mean cross entropy of each token given those before it; `tokens` is [rows, length + 1]."""
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def pretrain(model: Model, rows: Iterator[list[int]], config: PretrainingConfig) -> float:
    """Train `model` in place on rows of `row_length + 1` tokens; return the last mean loss."""
    optimizer = build_optimizer(config)
    optimizer.init(model.trainable_parameters())
    loss_and_gradients: LossAndGradients = nn.value_and_grad(model, next_token_loss)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def train_step(tokens: mx.array) -> mx.array:
        loss, gradients = loss_and_gradients(model, tokens)
        clipped, _ = optim.clip_grad_norm(gradients, config.max_grad_norm)
        optimizer.update(model, clipped)
        return loss

    started = time.perf_counter()
    recent: deque[float] = deque(maxlen=LOSS_WINDOW)
    for step in range(1, config.steps + 1):
        loss = train_step(mx.array(list(islice(rows, config.rows))))
        mx.eval(state, loss)
        recent.append(to_float(loss))
        if step % STEPS_PER_REPORT == 0:
            seconds = time.perf_counter() - started
            print(f"step {step}: loss {mean(recent):.3f}, {seconds:.0f} s", file=sys.stderr)
    return mean(recent)
