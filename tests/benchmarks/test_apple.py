"""The benchmark that a Mac's owner runs: what is left out, what is written, and how it is sent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from benchmarks import apple
from benchmarks.gpu.shapes import FAMILIES
from nested_core import backend
from tests.left_out import needs_rooms

pytestmark = pytest.mark.usefixtures("own_random_state")  # models are drawn from a fixed seed


def run(monkeypatch: pytest.MonkeyPatch, file: Path) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["apple", str(file), "--tiny"])
    apple.main()
    document: dict[str, Any] = json.loads(file.read_text())
    return document


@needs_rooms("memory")
def test_rows_that_would_not_fit_are_left_out_with_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "device_memory_bytes", lambda: 1)
    document = run(monkeypatch, tmp_path / "apple.json")
    assert document["rows"] == []
    assert [row["size"] for row in document["left_out"]] == [size for size, _ in apple.TINY_ROWS]
    assert min(row["needs_gib"] for row in document["left_out"]) > 0
    assert {"processor", "mlx", "mlx-lm", "nested-tune"} <= document["machine"].keys()
    assert "attach it to an issue" in capsys.readouterr().out


@needs_rooms("memory")
@pytest.mark.slow("two processes that import MLX and train")
def test_both_sides_of_a_row_are_measured_once(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(apple, "TINY_ROWS", (("tiny-hybrid", "+batch=1"),))
    monkeypatch.setattr(apple, "FEW_WINDOWS", "+windows=1")
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    for _ in range(2):  # what is in the file is not measured again
        document = run(monkeypatch, tmp_path / "apple.json")
        assert [row["arm"].partition("+")[0] for row in document["rows"]] == ["mlx_lm", "ours"]
    ours = document["rows"][1]
    assert ours["tokens_per_second"] > 0
    assert ours["forecast_gib"] > 0
    assert " x mlx_lm" in capsys.readouterr().out


@needs_rooms("memory")
def test_a_forecast_of_a_row_computes_no_weights() -> None:
    before = mx.get_active_memory()
    needed = apple.forecast_bytes("8B", "+batch=1")
    assert mx.get_active_memory() - before < 2**20
    assert needed > 2 * 7 * 10**9  # its weights in bfloat16


@pytest.mark.slow("two processes that count the weights of a model")
def test_the_attention_model_has_as_many_weights_as_the_hybrid() -> None:
    hybrid, attention = FAMILIES["hybrid"].weights, FAMILIES["attention"].weights
    assert attention == pytest.approx(hybrid, rel=0.004)
