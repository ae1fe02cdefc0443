"""Replace a function of mlx-lm, or the call of one module, during a block."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import mlx.nn as nn


@contextmanager
def replacing_function(
    model: nn.Module, name: str, original: object, function: Callable[..., object]
) -> Iterator[None]:
    """Replace a function in the model's Python modules during the block.

    name: the global name that is set to `function` wherever it refers to `original`.

    Code that a model brings along (`model_file`) is in no imported module and is not changed.
    """
    users = modules_of_code(model, name, original)
    try:
        for user in users:
            setattr(user, name, function)
        yield
    finally:
        for user in users:
            setattr(user, name, original)


def modules_of_code(model: nn.Module, name: str, original: object) -> list[object]:
    """Return the Python modules of the model's layers in which `name` refers to `original`."""
    names = {type(module).__module__ for _, module in model.named_modules()}
    users: list[object] = [sys.modules[each] for each in sorted(names & sys.modules.keys())]
    return [user for user in users if getattr(user, name, None) is original]


@contextmanager
def replacing_call(
    module: nn.Module, call: Callable[..., object], method: str = "__call__"
) -> Iterator[None]:
    """Replace the call of one module, or another of its methods, during the block.

    Python looks up __call__ on the class. So the module gets a subclass of its own for that time,
    and other modules of the class are not affected.

    call: called without the module itself.
    """
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
def replacing_calls(calls: Iterable[tuple[nn.Module, Callable[..., object]]]) -> Iterator[None]:
    """Replace the calls of several modules, each with its own function, during the block."""
    with ExitStack() as stack:
        for module, call in calls:
            stack.enter_context(replacing_call(module, call))
        yield
