"""gate.check_fused: what fusing leaves of an adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import convert

from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.rooms.fused.fused import judge_fused_change
from tests.builders.candidates import Candidate, train_candidate
from tests.core.gate.pairs import codes
from tests.example import MODEL

pytestmark = pytest.mark.slow("fuses whole models")

TRAINS_ANOTHER = pytest.mark.slow("trains another run on a quantised base, and judges it twice")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's base in 4 bits."""
    folder = tmp_path_factory.mktemp("quantised") / "model"
    convert(str(MODEL), str(folder), quantize=True, q_group_size=32, q_bits=4)
    return folder


@pytest.mark.slow("trains and fuses")
@pytest.mark.parametrize(
    ("rate", "kind", "expected"),
    [
        (1e-4, "lora", ["no_effect"]),
        pytest.param(2e-3, "lora", [], marks=TRAINS_ANOTHER),
        pytest.param(1e-4, "dora", ["no_effect"], marks=TRAINS_ANOTHER),
    ],
)
def test_a_change_that_fusing_into_a_quantised_base_erases_is_no_effect(
    quantised: Path, tmp_path: Path, rate: float, kind: str, expected: list[str]
) -> None:
    changes: dict[str, Any] = {"model": str(quantised), "learning_rate": rate}
    changes |= {"fine_tune_type": kind, "gate": {"check_fused": True}}
    done = train_candidate(tmp_path / "run", **changes)
    verdict = done.verdict()
    assert codes(verdict) == expected
    assert verdict.fused is not None
    assert verdict.fused.modules == 21
    assert (verdict.fused.carried_share > 0.5) is (not expected)
    if expected:
        assert "fused into the base" in verdict.reasons[0].message
        lost = verdict.fused.erased_modules
        assert {name.rpartition(".")[0] for name in verdict.reasons[0].tensors} == set(lost)
    assert done.bounded().verdict().has_passed


@pytest.mark.slow("trains and judges a run of its own")
def test_the_same_change_survives_in_a_base_that_is_not_quantised(candidate: Candidate) -> None:
    verdict = candidate.bounded(check_fused=True).verdict()
    assert verdict.has_passed
    assert verdict.fused is not None
    assert verdict.fused.carried_share == pytest.approx(1, abs=0.01)
    assert verdict.fused.erased_modules == ()


@pytest.mark.parametrize("is_initial", [True, False])
def test_fused_weights_that_overflow_are_not_finite(candidate: Candidate, is_initial: bool) -> None:
    before = candidate.initial
    after = candidate.trained
    name = next(name for name in after if name.endswith("lora_b"))
    for tensors in (before, after) if is_initial else (after,):
        tensors[name] = mx.full(tensors[name].shape, 3e38)
    evidence, reasons = judge_fused_change(
        LoadedBase.load(candidate.config, as_stored=True).model, before, after
    )
    assert [reason.code for reason in reasons] == ["non_finite"]
    assert f"with the {'initial' if is_initial else 'trained'} adapter" in reasons[0].message
    assert name in reasons[0].tensors
    assert math.isfinite(evidence.carried_share)  # JSON has no word for what is not


def test_a_fused_change_whose_square_overflows_is_measured(candidate: Candidate) -> None:
    before = candidate.initial
    after = {name: value * 1e10 for name, value in before.items()}
    after |= {n: mx.full(v.shape, 1e15) for n, v in after.items() if n.endswith("lora_b")}
    evidence, reasons = judge_fused_change(
        LoadedBase.load(candidate.config, as_stored=True).model, before, after
    )
    assert reasons == []
    assert evidence.carried_share == pytest.approx(1, abs=1e-2)
