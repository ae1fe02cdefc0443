"""Replace a function of mlx-lm's, or the call of one module, while a block runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.nn as nn


@contextmanager
def replacing_function(
    model: nn.Module, name: str, original: Any, function: Callable[..., Any]
) -> Iterator[None]:
    """Have `name` mean `function` in each module of code of the model where it means `original`.

    Code that a model brings along (`model_file`) is in no imported module, and keeps the original.
    """
    users = _modules_of_code(model, name, original)
    try:
        for user in users:
            setattr(user, name, function)
        yield
    finally:
        for user in users:
            setattr(user, name, original)


def is_used_by(model: nn.Module, name: str, original: Any) -> bool:
    """Whether `name` means `original` in any module of code of the model."""
    return bool(_modules_of_code(model, name, original))


def _modules_of_code(model: nn.Module, name: str, original: Any) -> list[Any]:
    names = {type(module).__module__ for _, module in model.named_modules()}
    users: list[Any] = [sys.modules[each] for each in sorted(names & sys.modules.keys())]
    return [user for user in users if getattr(user, name, None) is original]


@contextmanager
def replacing_call(
    module: nn.Module, call: Callable[..., Any], method: str = "__call__"
) -> Iterator[None]:
    """Have `call` compute what this one module's own call does, or another of its methods."""
    original = type(module)
    members = {
        method: lambda self, *args, **kwargs: call(*args, **kwargs),
        "__module__": original.__module__,  # where the model's code is looked for
    }
    replacement = type(original.__name__, (original,), members)
    module.__class__ = replacement
    try:
        yield
    finally:
        module.__class__ = original
        delattr(replacement, method)  # the class, and all that `call` holds, awaits the collector


@contextmanager
def replacing_calls(calls: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """`replacing_call` for several modules, each with the call that replaces its own."""
    with ExitStack() as stack:
        for module, call in calls:
            stack.enter_context(replacing_call(module, call))
        yield
