"""A function of mlx-lm's, or the call of one module, replaced while a block runs."""

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
    """Have `name` mean `function` wherever the model's code has mlx-lm's `original` under it.

    Code that a model brings along (`model_file`) is in no imported module, and keeps the original.
    """
    homes = {type(module).__module__ for _, module in model.named_modules()}
    users: list[Any] = [sys.modules[home] for home in sorted(homes & sys.modules.keys())]
    users = [user for user in users if getattr(user, name, None) is original]
    try:
        for user in users:
            setattr(user, name, function)
        yield
    finally:
        for user in users:
            setattr(user, name, original)


@contextmanager
def standing_in(
    module: nn.Module, call: Callable[..., Any], name: str = "__call__"
) -> Iterator[None]:
    """Have a call of this one module, or of its method, answered by `call` while the block runs."""
    kind = type(module)
    members = {
        name: lambda self, *args, **kwargs: call(*args, **kwargs),
        "__module__": kind.__module__,  # where the model's code is looked for
    }
    stand_in = type(kind.__name__, (kind,), members)
    module.__class__ = stand_in
    try:
        yield
    finally:
        module.__class__ = kind
        delattr(stand_in, name)  # a class lives until garbage is collected, with what `call` holds
