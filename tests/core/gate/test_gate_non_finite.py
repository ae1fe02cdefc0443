"""Numbers that overflow: told as such wherever the gate computes, and of whose adapter they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from nested_core.config.sections import GateSection
from nested_core.gate.judge import verify_adapters
from nested_core.gate.proof import fresh_process_check
from nested_core.gate.proof.fresh_process_check import FreshProcessLogits
from nested_core.measure.losses.loss_figures import general_loss_reasons, non_finite_loss_reasons
from nested_core.records.verdict import GeneralLoss, Validation
from tests.builders.adapter_folders import base_copy, change_tensors, name_base
from tests.builders.candidates import Candidate
from tests.core.gate.pairs import A2, CONFIG, A, B, Tensors, codes, judge_pair, trained_tensors
from tests.example import MODEL

NAN, INF = math.nan, math.inf
Arrays = dict[str, mx.array]


def keep(tensors: Arrays) -> None:
    pass


@pytest.fixture
def pair(candidate: Candidate) -> Callable[..., tuple[Path, Path]]:
    """The run's two adapters, either changed by a function, and for another base model."""

    def make(
        trained: Callable[[Arrays], None] = keep,
        initial: Callable[[Arrays], None] = keep,
        model: Path = MODEL,
    ) -> tuple[Path, Path]:
        for folder, change in ((candidate.run.initial, initial), (candidate.run.adapter, trained)):
            name_base(change_tensors(folder, change), model)
        return candidate.sides

    return make


def to(leaf: str, value: float) -> Callable[[Arrays], None]:
    """Every tensor of a leaf at one value."""

    def change(tensors: Arrays) -> None:
        for name, tensor in tensors.items():
            if name.endswith(leaf):
                tensors[name] = mx.full(tensor.shape, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to("lora_b", 3e38), "scale * lora_a @ lora_b overflows float32"),
        (to("lora_a", 3e38), "logits with the trained adapter are not finite"),
        (to("lora_b", 1e36), "logits with the trained adapter are not finite"),
        (to("down_proj.lora_b", 1e21), "every logit with the trained adapter is the same"),
    ],
)
def test_weights_under_which_no_logit_is_finite_do_not_pass_verify(pair, change, message) -> None:
    verdict = verify_adapters(*pair(change))
    assert codes(verdict) == ["non_finite"]
    assert message in verdict.reasons[0].message


def test_a_base_that_is_not_finite_is_told_as_such(pair, tmp_path) -> None:
    def spoil(weights: Arrays) -> None:
        weights[next(name for name in sorted(weights) if "norm" in name)] *= NAN

    folder = base_copy(tmp_path / "base", spoil)
    (reason,) = verify_adapters(*pair(model=folder)).reasons
    assert reason.code == "non_finite"
    assert "of the base model alone are not finite" in reason.message
    assert "the adapter is not to blame" in reason.message


def test_an_initial_adapter_that_is_not_finite_is_told_as_such(pair) -> None:
    (reason,) = verify_adapters(*pair(initial=to("lora_b", 1e36))).reasons
    assert reason.code == "non_finite"
    assert "with the initial adapter are not finite already" in reason.message


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_tensors_of_the_initial_adapter_that_are_not_finite_are_told_apart(tmp_path, value) -> None:
    before, after = trained_tensors(), trained_tensors()
    before[A][0, 0] = after[A][0, 0] = value
    after[A2][1, 1] = value
    verdict = judge_pair(tmp_path, before, after)
    assert codes(verdict) == ["non_finite", "non_finite"]
    assert [reason.tensors for reason in verdict.reasons] == [(A,), (A2,)]
    assert (
        "1 tensor with NaN or infinity in the initial adapter already" in verdict.reasons[0].message
    )


def filled(a: float, b: float) -> Tensors:
    tensors = trained_tensors()
    tensors[A][:], tensors[B][:] = a, b
    return tensors


@pytest.mark.parametrize(
    ("a", "b", "overflows"),
    [
        (1e20, 1e20, True),
        (3e38, 2e-2, True),  # 4 of them times 20: 4.8e38
        (2e18, 2e18, False),  # 3.2e38
        (2e18, 2.2e18, True),
        (3e38, 1e-30, False),
        (1e19, -1e19, True),
    ],
)
def test_a_product_beyond_float32_is_not_finite_without_a_model(tmp_path, a, b, overflows) -> None:
    config = CONFIG | {"model": "none"}
    verdict = judge_pair(tmp_path, trained_tensors(), filled(a, b), (config, config))
    assert ("non_finite" in codes(verdict)) is overflows
    if overflows:
        assert verdict.reasons[0].tensors == (A, B)
        assert "the trained adapter's scale * lora_a @ lora_b" in verdict.reasons[0].message


def test_a_product_that_overflowed_before_training_is_the_initial_adapters(tmp_path: Path) -> None:
    after = filled(1e20, 1e20)
    after[A2] += 1
    verdict = judge_pair(tmp_path, filled(1e20, 1e20), after)
    assert codes(verdict) == ["non_finite"]
    assert "the initial adapter's scale" in verdict.reasons[0].message


def rows(*values: float) -> np.ndarray:
    return np.array([values, values])


@pytest.mark.parametrize(
    ("initial", "trained", "base", "message"),
    [
        (rows(1, 2, 3), rows(1, 2, NAN), None, "2 of 6 logits with the trained adapter"),
        (rows(1, 2, 3), rows(1, 2, INF), None, "2 of 6 logits with the trained adapter"),
        (rows(1, 2, 3), rows(1, 2, -INF), None, "2 of 6 logits with the trained adapter"),
        (rows(1, 2, -INF), rows(2, 2.5, -INF), rows(1, 2, -INF), None),  # a masked vocabulary
        (rows(1, 2, -INF), rows(2, NAN, -INF), rows(1, 2, -INF), "2 of 6 logits with the trained"),
        (rows(1, 2, NAN), rows(2, 2.5, 3), rows(1, 2, 3), "2 logits with the initial adapter"),
        (rows(1, 2, NAN), rows(2, 2.5, NAN), rows(1, 2, NAN), "2 logits of the base model alone"),
        (rows(-INF, -INF), rows(1, 2), rows(-INF, -INF), "4 logits of the base model alone"),
        (rows(1, 2, 3), rows(5, 5, 5), None, "every logit with the trained adapter is the same"),
        (rows(1, 1, 1), rows(5, 5, 5), None, None),  # as before training
    ],
)
def test_whose_logits_are_not_finite(initial, trained, base, message) -> None:
    reason = fresh_process_check.non_finite_reason(
        FreshProcessLogits(initial, trained, base, set())
    )
    assert (reason is None) is (message is None)
    if reason is not None:
        assert reason.code == "non_finite"
        assert str(message) in reason.message


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (2.0, None, "2 -> not finite with the trained adapter"),
        (None, 2.0, "with the initial adapter is not finite already"),
        (None, None, "with the initial adapter is not finite already"),
    ],
)
def test_losses_that_are_not_finite_are_no_regression(before, after, message) -> None:
    validation = Validation(before, after, selected_on_same_data=True)
    (reason,) = non_finite_loss_reasons(validation, "loss")
    general = GeneralLoss(before, after, "general.jsonl", "0" * 64)
    (of_general,) = general_loss_reasons(general, GateSection())
    assert (reason.code, of_general.code) == ("non_finite", "non_finite")
    assert message in reason.message
    assert message in of_general.message
    assert "general text" in of_general.message
