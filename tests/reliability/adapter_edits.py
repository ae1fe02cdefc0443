"""Every field and tensor of a sound pair of adapters under every edit, with what is expected.

An edit is of the trained adapter alone, or of both. `ANY` leaves open whether it is harmless: what
passes then has to be shown to be.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]
TensorEdit = Callable[[Tensors, str, Tensors], None]
ANY = "any"
DAMAGED = "damaged"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapters.safetensors"


@dataclass(frozen=True)
class Case:
    """A pair of adapter folders to make: `make` edits copies of sound ones, initial and trained."""

    name: str
    make: Callable[[Path, Path], None]
    expected: tuple[str, ...]


def filled(value: float) -> TensorEdit:
    """The whole tensor at one value."""

    def edit(tensors: Tensors, name: str, _: Tensors) -> None:
        tensors[name] = np.full_like(tensors[name], value)

    return edit


def one_value(value: float) -> TensorEdit:
    """One element at a value."""

    def edit(tensors: Tensors, name: str, _: Tensors) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[tensors[name].size // 2] = value

    return edit


def cast(dtype: str) -> TensorEdit:
    """The same values in another dtype."""

    def edit(tensors: Tensors, name: str, _: Tensors) -> None:
        tensors[name] = tensors[name].astype(dtype)

    return edit


def reshaped(change: Callable[[np.ndarray], np.ndarray]) -> TensorEdit:
    """Another array in its place."""

    def edit(tensors: Tensors, name: str, _: Tensors) -> None:
        tensors[name] = np.ascontiguousarray(change(tensors[name]))

    return edit


def missing(tensors: Tensors, name: str, _: Tensors) -> None:
    del tensors[name]


def renamed(tensors: Tensors, name: str, _: Tensors) -> None:
    tensors[name.replace("layers.", "layers.1")] = tensors.pop(name)


def repeated_elsewhere(tensors: Tensors, name: str, _: Tensors) -> None:
    tensors[name.replace("q_proj", "other_proj")] = tensors[name]


def left_as_it_was(tensors: Tensors, name: str, initial: Tensors) -> None:
    tensors[name] = initial[name]


TENSOR_EDITS: dict[str, tuple[TensorEdit, tuple[str, ...]]] = {
    "all NaN": (filled(math.nan), ("non_finite",)),
    "one NaN": (one_value(math.nan), ("non_finite",)),
    "one inf": (one_value(math.inf), ("non_finite",)),
    "one -inf": (one_value(-math.inf), ("non_finite",)),
    "all 3e38": (filled(3e38), ("non_finite",)),
    "all -3e38": (filled(-3e38), ("non_finite",)),
    "one 3e38": (one_value(3e38), (ANY,)),
    "all 1e20": (filled(1e20), (ANY,)),
    "all zero": (filled(0.0), ("no_effect",)),
    "all -0.0": (filled(-0.0), ("no_effect",)),
    "all denormal": (filled(1e-40), (ANY,)),
    "one denormal": (one_value(1e-40), (ANY,)),
    "transposed": (reshaped(lambda t: t.T), ("shape_mismatch",)),
    "flattened": (reshaped(lambda t: t.reshape(-1)), ("shape_mismatch",)),
    "truncated": (reshaped(lambda t: t[:-1]), ("shape_mismatch",)),
    "a row too many": (reshaped(lambda t: np.concatenate([t, t[:1]])), ("shape_mismatch",)),
    "empty": (reshaped(lambda t: t[:0]), ("shape_mismatch",)),
    "scalar": (reshaped(lambda t: t.reshape(-1)[:1].reshape(())), ("shape_mismatch",)),
    "float16": (cast("f2"), ("dtype_mismatch",)),
    "float64": (cast("f8"), ("dtype_mismatch",)),
    "integers": (reshaped(lambda t: t.view("u4")), ("dtype_mismatch",)),
    "missing": (missing, ("tensor_missing",)),
    "renamed": (renamed, ("tensor_missing", "tensor_unexpected")),
    "repeated elsewhere": (repeated_elsewhere, ("tensor_unexpected",)),
    "negated": (reshaped(lambda t: -t), (ANY,)),
    "rows reversed": (reshaped(lambda t: t[::-1]), (ANY,)),
    "left as it was": (left_as_it_was, (ANY,)),
}
REMOVED = object()
VALUES: list[Any] = [REMOVED, None, True, False, 0, -1, 1, 3, 2.5, 1e9, 1e-30, 10**400, "", "x"]
VALUES += ["8", [], ["x"], {}, {"x": 1}, [None], "lora", "dora", "full", "\x1b[2J", "a" * 10_000]


def cases(initial: Path, trained: Path) -> Iterator[Case]:
    """All edits of a pair, the same in the same order every time."""
    names = sorted(load_file(trained / WEIGHTS_NAME))
    for label, (edit, expected) in TENSOR_EDITS.items():
        for name in names:
            yield Case(f"{name}: {label}", _tensor_edit(name, edit), expected)
    config = json.loads((trained / CONFIG_NAME).read_bytes())
    paths: list[tuple[str, ...]] = [(key,) for key in config]
    paths += [("lora_parameters", key) for key in config["lora_parameters"]]
    for path in paths:
        for value in VALUES:
            for is_both in (False, True):
                side = "both" if is_both else "trained"
                label = "removed" if value is REMOVED else repr(value)[:20]
                name = f"{'.'.join(path)} of {side}: {label}"
                yield Case(name, _config_edit(path, value, is_both=is_both), (ANY,))
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        for label, change in BYTES.items():
            yield Case(f"{name}: {label}", _byte_edit(name, change), (DAMAGED,))


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content.rstrip()[:-1],
    "zeros": lambda content: bytes(len(content)),
    "twice": lambda content: content + content,
}


def _tensor_edit(name: str, edit: TensorEdit) -> Callable[[Path, Path], None]:
    def make(initial: Path, trained: Path) -> None:
        tensors = load_file(trained / WEIGHTS_NAME)
        edit(tensors, name, load_file(initial / WEIGHTS_NAME))
        save_file(tensors, trained / WEIGHTS_NAME)

    return make


def _config_edit(
    path: tuple[str, ...], value: Any, *, is_both: bool
) -> Callable[[Path, Path], None]:
    def make(initial: Path, trained: Path) -> None:
        for folder in (initial, trained) if is_both else (trained,):
            config = json.loads((folder / CONFIG_NAME).read_bytes())
            owner = config
            for key in path[:-1]:
                owner = owner[key]
            if value is REMOVED:
                owner.pop(path[-1], None)
            else:
                owner[path[-1]] = value
            (folder / CONFIG_NAME).write_text(json.dumps(config))

    return make


def _byte_edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def make(initial: Path, trained: Path) -> None:
        path = trained / name
        path.write_bytes(change(path.read_bytes()))

    return make


def copied(case: Case, initial: Path, trained: Path, folder: Path) -> tuple[Path, Path]:
    """The pair of a case, below `folder`."""
    pair = folder / "initial", folder / "trained"
    for source, target in zip((initial, trained), pair, strict=True):
        shutil.copytree(source, target)
    case.make(*pair)
    return pair
