"""Put updates into a nested tree by flat dotted names, and verify that they arrived.

Trees are dicts, lists and MLX modules, changed in place; nothing is copied, renamed or cast.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple, TypeVar, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from nested_core.errors import UpdateNotApplied, list_first

Tree = TypeVar("Tree", bound=dict[str, Any] | list[Any])

MAX_LISTED_PROBLEMS = 10  # problems written out in one message
# By bytes an element
UNSIGNED_DTYPE_BY_BYTES = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


class LeafRef(NamedTuple):
    """A reference to one leaf of a tree: the dict or list that contains it, and its key."""

    container: Any
    key: str | int


@dataclass(frozen=True)
class UpdateReport:
    """Which updates arrived in a model; a name may be in both lists.

    checked: how many parameters were compared.
    not_applied: parameters that do not have the expected value, bit for bit.
    unmoved: parameters that still have their old value, bit for bit.
    """

    checked: int
    not_applied: tuple[str, ...]
    unmoved: tuple[str, ...]

    def require_applied(self) -> None:
        """Raise UpdateNotApplied, naming the parameters, unless every update arrived."""
        if self.not_applied:
            count = len(self.not_applied)
            names = ", ".join(list_first(self.not_applied, MAX_LISTED_PROBLEMS))
            raise UpdateNotApplied(
                f"{count} of {self.checked} updates were computed and are not in the "
                f"model: {names}. What the model holds is not what the optimizer computed: look at "
                "how the updates are written to the model."
            )


def flatten(tree: Mapping[str, object] | Sequence[object]) -> dict[str, mx.array]:
    """Return the arrays of a tree by dotted name, such as "layers.0.weight".

    tree: nested dicts and lists of arrays, or a module, whose parameters are returned. The arrays
        are not copied, so writing to one in place (`a[:] = b`) changes both.

    Raises ValueError if two leaves have one name ("a.b" beside "a" with "b" in it).
    """
    pairs = _named_arrays(tree)
    flat = dict(pairs)
    if len(flat) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        names = ", ".join(list_first(twice, MAX_LISTED_PROBLEMS))
        raise ValueError(f"two leaves of the tree have one name: {names}")
    return flat


def _named_arrays(tree: Mapping[str, object] | Sequence[object]) -> list[tuple[str, mx.array]]:
    """Return dotted name and array of every leaf of a tree that is an array."""
    leaves = tree_flatten(tree.parameters() if isinstance(tree, nn.Module) else tree)
    return [
        (name, leaf)
        for name, leaf in cast(list[tuple[str, object]], leaves)
        if isinstance(leaf, mx.array)
    ]


def apply_flat_updates_to_nested(nested: Tree, flat: Mapping[str, mx.array]) -> Tree:
    """Write new arrays into a nested tree in place, by their dotted names; return the tree.

    nested: nested dicts and lists of arrays, or an MLX module.
    flat: new arrays by dotted name, such as "layers.0.weight"; each has the shape and dtype of the
        array it replaces. Every other leaf and every container stays the same object.

    Raises UpdateNotApplied, listing every unknown name and every different shape or dtype; nothing
    is changed then.
    """
    refs = {name: _find_leaf(nested, name) for name in flat}
    problems = {name: _why_not_assignable(refs[name], new) for name, new in flat.items()}
    if any(problems.values()):
        raise UpdateNotApplied(_join_problems(problems, nested))
    for name, ref in refs.items():
        if ref is not None:
            ref.container[ref.key] = flat[name]
    return nested


def verify_updates(
    before: Mapping[str, mx.array],
    expected: Mapping[str, mx.array],
    nested: Mapping[str, object] | Sequence[object],
) -> UpdateReport:
    """Compare the arrays in a tree with their expected new and their old values, bit for bit.

    Returns which differ from the new value (not applied), and which equal the old one (unmoved).

    before, expected: old and new arrays by dotted name, of the shapes in `nested`. NaN equals
        itself and 0.0 differs from -0.0. It takes one evaluation on the device.

    Raises ValueError if `before` lacks a name.
    """
    if missing := [name for name in expected if name not in before]:
        names = ", ".join(list_first(missing, MAX_LISTED_PROBLEMS))
        raise ValueError(f"no value before the update is known for: {names}")
    leaves = [_read_leaf(nested, name) for name in expected]
    old = [before[name] for name in expected]
    equal = _have_equal_bits([*leaves, *leaves], [*expected.values(), *old])
    is_new, is_old = equal[: len(leaves)], equal[len(leaves) :]
    return UpdateReport(
        checked=len(expected),
        not_applied=tuple(name for name, same in zip(expected, is_new, strict=True) if not same),
        unmoved=tuple(compress(expected, is_old)),
    )


def find_not_applied(
    expected: Mapping[str, mx.array], nested: Mapping[str, object] | Sequence[object]
) -> tuple[str, ...]:
    """Return the names in `expected` whose arrays in the tree differ, bit for bit.

    Arrays that are the same object are not compared on the device.
    """
    leaves = [_read_leaf(nested, name) for name in expected]
    equal = _have_equal_bits(leaves, list(expected.values()))
    return tuple(name for name, same in zip(expected, equal, strict=True) if not same)


def _read_leaf(tree: object, name: str) -> object:
    """Return the leaf with this dotted name; None if the tree does not have it."""
    ref = _find_leaf(tree, name)
    return None if ref is None else ref.container[ref.key]


def _find_leaf(tree: Any, name: str) -> LeafRef | None:
    """Find the leaf with this dotted name; None if the tree does not have it.

    Keys of a flat dict may have dots in them.
    """
    node, rest = tree, name
    while True:
        if isinstance(node, nn.Module) and rest.startswith("_"):
            return None  # MLX keeps what is no parameter under such names
        if isinstance(node, dict) and rest in node:
            return LeafRef(node, rest)
        word, dot, rest = rest.partition(".")
        key = _parse_key(node, word)
        if key is None:
            return None
        if not dot:
            return LeafRef(node, key)
        node = node[key]


def _parse_key(node: object, word: str) -> str | int | None:
    """Return the key or index in `node` for one part of a dotted name; None for an unknown name."""
    if isinstance(node, dict):
        return word if word in node else None
    if isinstance(node, list) and word.isdecimal() and len(word) < 10 and str(int(word)) == word:
        return int(word) if int(word) < len(node) else None
    return None


def _why_not_assignable(ref: LeafRef | None, new: object) -> str | None:
    """Return why an array cannot replace the leaf; None if it can."""
    if ref is None:
        return "the tree has no such name"
    old = ref.container[ref.key]
    if not isinstance(old, mx.array):
        return f"found {type(old).__name__} in the tree, expected an MLX array"
    if not isinstance(new, mx.array):
        return f"found {type(new).__name__} as the update, expected an MLX array"
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        found = _describe_dtype_and_shape(new)
        return f"found {found} as the update, expected {_describe_dtype_and_shape(old)}"
    return None


def _describe_dtype_and_shape(array: mx.array) -> str:
    """Format dtype and shape, such as "float32 (8, 64)"."""
    return f"{str(array.dtype).removeprefix('mlx.core.')} {array.shape}"


def _join_problems(problems: Mapping[str, str | None], tree: Any) -> str:
    """Build one message for all problems; an unknown name is shown with the nearest known one."""
    faults = {name: fault for name, fault in problems.items() if fault}
    known = [name for name, _ in _named_arrays(tree)]
    lines = []
    for number, (name, fault) in enumerate(faults.items()):
        is_shown = number < MAX_LISTED_PROBLEMS
        nearest = (
            difflib.get_close_matches(name, known, n=1) if is_shown and name not in known else []
        )
        lines.append(f"{name}: {fault}" + "".join(f"; the nearest is {near}" for near in nearest))
    return (
        f"{len(faults)} of {len(problems)} updates do not fit the tree, so none was applied:\n  "
        + "\n  ".join(list_first(lines, MAX_LISTED_PROBLEMS))
    )


def _have_equal_bits(leaves: Sequence[object], arrays: Sequence[mx.array]) -> list[bool]:
    """Return whether each leaf is an array of the same shape, dtype and bits, in one evaluation.

    leaves: values found in a tree; None for a missing one. arrays: what each is compared with.
    """
    pairs = list(zip(leaves, arrays, strict=True))
    flags = [_has_equal_bits(leaf, array) for leaf, array in pairs if leaf is not array]
    equal = iter(cast("list[bool]", mx.stack(flags).tolist()) if flags else [])
    return [leaf is array or next(equal) for leaf, array in pairs]


def _has_equal_bits(left: object, right: mx.array) -> mx.array:
    """Return a flag on the device: whether both are arrays of the same shape, dtype and bits."""
    if not isinstance(left, mx.array) or (left.shape, left.dtype) != (right.shape, right.dtype):
        return mx.array(False)
    unsigned = UNSIGNED_DTYPE_BY_BYTES[right.dtype.size]
    return mx.array_equal(left.view(unsigned), right.view(unsigned))
