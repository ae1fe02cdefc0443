"""The failure that the project began with, run side by side with what works; docs included."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_map_with_path, tree_unflatten

from nested_core.errors import UpdateNotApplied
from nested_core.optim.named_updates import apply_flat_updates_to_nested, flatten, verify_updates

PAGE = Path(__file__).resolve().parents[3] / "docs" / "silent-updates.md"
Updates = dict[str, mx.array]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_a = mx.random.normal((4, 2))
        self.lora_b = mx.zeros((2, 4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [Layer(), Layer()]


def joined_path(model: nn.Module, updates: Updates) -> None:
    def choose(path: str, old: mx.array) -> mx.array:
        return updates.get(".".join(path), old)

    model.update(tree_map_with_path(choose, model.parameters()))


def path_as_it_is(model: nn.Module, updates: Updates) -> None:
    def choose(path: str, old: mx.array) -> mx.array:
        return updates.get(path, old)

    model.update(tree_map_with_path(choose, model.parameters()))


def unflattened(model: nn.Module, updates: Updates) -> None:
    model.update(tree_unflatten(list(updates.items())))


def walked_deepcopy(model: nn.Module, updates: Updates) -> None:
    tree: Any = copy.deepcopy(model.parameters())
    for name, new in updates.items():
        _, index, leaf = name.split(".")
        tree["layers"][int(index)][leaf] = new
    model.update(tree)


@pytest.mark.parametrize(
    ("write", "arrived"),
    [
        (joined_path, 0),
        (path_as_it_is, 4),
        (unflattened, 4),
        (walked_deepcopy, 4),
        (apply_flat_updates_to_nested, 4),
    ],
)
def test_how_many_of_four_updates_arrive_by_each_way_of_writing_them(write, arrived) -> None:
    model = Model()
    before = flatten(model)
    updates = {name: old + 1 for name, old in before.items()}
    write(model, updates)
    report = verify_updates(before, updates, model)
    assert (report.checked, len(report.not_applied), len(report.unmoved)) == (
        4,
        4 - arrived,
        4 - arrived,
    )


def test_one_update_leaves_the_other_parameters_alone() -> None:
    for write in (unflattened, apply_flat_updates_to_nested):
        model = Model()
        before = flatten(model)
        write(model, {"layers.1.lora_b": mx.ones((2, 4))})
        changed = [name for name, leaf in flatten(model).items() if leaf is not before[name]]
        assert changed == ["layers.1.lora_b"]


def test_the_joined_name_is_an_error_for_us() -> None:
    with pytest.raises(UpdateNotApplied, match="the tree has no such name"):
        apply_flat_updates_to_nested(Model(), {".".join("layers.0.lora_a"): mx.zeros((4, 2))})


def test_every_code_block_of_the_page_prints_what_stands_below_it() -> None:
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("```python") == 2
    namespace: dict[str, Any] = {}
    for source, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, str(PAGE), "exec"), namespace)  # noqa: S102 -- our own page
        assert printed.getvalue() == expected
