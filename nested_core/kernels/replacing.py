"""A function of mlx-lm's replaced in the code of one model's modules, while a block runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@contextmanager
def in_code_of(
    model: nn.Module, name: str, original: Any, function: Callable[..., mx.array]
) -> Iterator[None]:
    """Have `name` mean `function` wherever the model's code has mlx-lm's `original` under it."""
    homes = {type(module).__module__ for _, module in model.named_modules()}
    users: list[Any] = [sys.modules[home] for home in sorted(homes)]
    users = [user for user in users if getattr(user, name, None) is original]
    try:
        for user in users:
            setattr(user, name, function)
        yield
    finally:
        for user in users:
            setattr(user, name, original)
