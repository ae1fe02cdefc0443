"""The base whose weights lie on no grid computes what it did, with its adapter too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load

from benchmarks.real_model import off_grid
from tests.rooms.export.small_bases import make_base, train_adapter


@pytest.mark.slow("trains an adapter")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_channels_leave_the_logits_and_move_each_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    base = make_base(tmp_path / "base", family, dtype=mx.float32)
    adapter = train_adapter(base, tmp_path / "adapter", steps=40)
    new = (tmp_path / "new-base", tmp_path / "new-adapter")
    monkeypatch.setattr(sys, "argv", ["off_grid", *map(str, (base, adapter, *new))])
    off_grid.main()
    tokens = mx.array([[5, 9, 40, 77, 3, 120]])
    for adapters in ((None, None), (str(adapter), str(new[1]))):
        one, other = (
            load(str(folder), adapter_path=path)[0](tokens)
            for folder, path in zip((base, new[0]), adapters, strict=True)
        )
        assert mx.abs(one - other).max() < 1e-4 * mx.abs(one).max()
    before: Any = mx.load(str(base / "model.safetensors"))
    after: Any = mx.load(str(new[0] / "model.safetensors"))
    moved = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert {name for name in before if "_proj.weight" in name} <= moved
