"""Pairs of adapters made by hand to get past the gate, and honest ones that must pass it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nested_core.config.sections import GateSection
from nested_core.gate.judge import verify_adapters
from tests.core.gate.pairs import (
    A2,
    B2,
    A,
    B,
    Change,
    Tensors,
    codes,
    judge_pair,
    learned,
    trained_tensors,
    write,
)

ROTATION = np.linalg.qr(np.random.default_rng(9).normal(size=(4, 4)))[0]


def nothing(t: Tensors) -> None:
    pass


def not_a_number(t: Tensors) -> None:
    learned(t)
    t[A][0, 0] = np.nan


def infinite(t: Tensors) -> None:
    learned(t)
    t[B2][3, 3] = -np.inf


def missing(t: Tensors) -> None:
    learned(t)
    del t[B2]


def extra(t: Tensors) -> None:
    learned(t)
    t["model.layers.2.self_attn.q_proj.lora_a"] = np.ones((12, 4), np.float32)


def renamed(t: Tensors) -> None:
    learned(t)
    t[A.replace("q_proj", "Q_proj")] = t.pop(A)


def transposed(t: Tensors) -> None:
    learned(t)
    t[A] = t[A].T


def flattened(t: Tensors) -> None:
    learned(t)
    t[B] = t[B].reshape(-1)


def narrowed(t: Tensors) -> None:
    learned(t)
    t[A] = t[A].astype(np.float16)


def widened(t: Tensors) -> None:
    t[A] = t[A].astype(np.float64)


def rescaled_by_2(t: Tensors) -> None:
    for a, b in ((A, B), (A2, B2)):
        t[a], t[b] = t[a] * 2, t[b] / 2


def rescaled_by_3(t: Tensors) -> None:
    for a, b in ((A, B), (A2, B2)):
        t[a], t[b] = t[a] * np.float32(3), t[b] / np.float32(3)


def rescaled_a_column_each(t: Tensors) -> None:
    factors = np.array([1e-3, 0.7, 13, 1e3], np.float32)
    for a, b in ((A, B), (A2, B2)):
        t[a], t[b] = t[a] * factors, t[b] / factors[:, None]


def both_signs_flipped(t: Tensors) -> None:
    for name in t:
        t[name] = -t[name]


def rank_permuted(t: Tensors) -> None:
    order = [2, 0, 3, 1]
    for a, b in ((A, B), (A2, B2)):
        t[a], t[b] = t[a][:, order], t[b][order]


def rank_rotated(t: Tensors) -> None:
    for a, b in ((A, B), (A2, B2)):
        t[a] = (t[a].astype("f8") @ ROTATION).astype("f4")
        t[b] = (ROTATION.T @ t[b].astype("f8")).astype("f4")


def last_bit_flipped(t: Tensors) -> None:
    for name in (A, A2):
        t[name].view(np.uint32)[0, 0] ^= 1


def one_module_left_out(t: Tensors) -> None:
    kept = {name: t[name].copy() for name in (A2, B2)}
    learned(t)
    t.update(kept)


def one_module_rescaled(t: Tensors) -> None:
    kept = {A2: t[A2] * 2, B2: t[B2] / 2}
    learned(t)
    t.update(kept)


TRAINED: list[tuple[Change, list[str], list[str]]] = [
    (nothing, ["unchanged"], [A, B, A2, B2]),
    (not_a_number, ["non_finite"], [A]),
    (infinite, ["non_finite"], [B2]),
    (missing, ["tensor_missing"], [B2]),
    (extra, ["tensor_unexpected"], ["model.layers.2.self_attn.q_proj.lora_a"]),
    (renamed, ["tensor_missing", "tensor_unexpected"], [A]),
    (transposed, ["shape_mismatch"], [A]),
    (flattened, ["shape_mismatch"], [B]),
    (narrowed, ["dtype_mismatch"], [A]),
    (widened, ["dtype_mismatch"], [A]),
    (rescaled_by_2, ["no_effect"], [A, B, A2, B2]),
    (rescaled_by_3, ["no_effect"], [A, B, A2, B2]),
    (rescaled_a_column_each, ["no_effect"], [A, B, A2, B2]),
    (both_signs_flipped, ["no_effect"], [A, B, A2, B2]),
    (rank_permuted, ["no_effect"], [A, B, A2, B2]),
    (rank_rotated, ["no_effect"], [A, B, A2, B2]),
    (last_bit_flipped, ["no_effect"], [A, B, A2, B2]),
    (one_module_left_out, ["no_effect"], [A2, B2]),
    (one_module_rescaled, ["no_effect"], [A2, B2]),
    (learned, [], []),
]


@pytest.mark.parametrize(
    ("change", "expected", "tensors"), TRAINED, ids=[change.__name__ for change, _, _ in TRAINED]
)
def test_a_trained_adapter_is_judged(tmp_path, change, expected, tensors) -> None:
    after = trained_tensors()
    change(after)
    verdict = judge_pair(tmp_path, trained_tensors(), after)
    assert codes(verdict) == expected
    assert verdict.has_passed is (not expected)
    assert list(verdict.reasons[0].tensors if expected else ()) == tensors


@pytest.mark.parametrize(("bound", "expected"), [(0.02, ["unchanged"]), (0.005, [])])
def test_a_change_below_min_relative_change_counts_as_none(tmp_path, bound, expected) -> None:
    after = trained_tensors()
    learned(after)  # by 1 % of the norm
    section = GateSection(min_relative_change=bound)
    verdict = judge_pair(tmp_path, trained_tensors(), after, bounds=section)
    assert codes(verdict) == expected
    assert 0.005 < max(t.relative_delta or 0 for t in verdict.tensors) < 0.02


def test_nan_that_was_there_before_is_not_finite_either(tmp_path: Path) -> None:
    before, after = trained_tensors(), trained_tensors()
    learned(after)
    before[A][0, 0] = np.nan
    verdict = judge_pair(tmp_path, before, after)
    assert codes(verdict) == ["non_finite"]
    (broken,) = [tensor for tensor in verdict.tensors if not tensor.finite]
    assert (broken.name, broken.max_abs_delta, broken.relative_delta) == (A, None, None)


def test_two_empty_adapters_are_unchanged(tmp_path: Path) -> None:
    assert codes(judge_pair(tmp_path, {}, {})) == ["unchanged"]


def test_a_verdict_measures_each_tensor(tmp_path: Path) -> None:
    after = trained_tensors()
    after[A][2, 1] += np.float32(0.5)
    verdict = judge_pair(tmp_path, trained_tensors(), after)
    by_name = {tensor.name: tensor for tensor in verdict.tensors}
    assert by_name[A].changed
    assert by_name[A].max_abs_delta == pytest.approx(0.5, rel=1e-6)
    norm = max(np.linalg.norm(after[A]), np.linalg.norm(trained_tensors()[A]))
    assert by_name[A].relative_delta == pytest.approx(0.5 / norm, rel=1e-5)
    assert (by_name[B].changed, by_name[B].max_abs_delta) == (False, 0.0)


def test_the_same_folder_on_both_sides_is_unchanged(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", trained_tensors())
    verdict = verify_adapters(folder, folder)
    assert codes(verdict) == ["unchanged"]
    assert verdict.initial == verdict.trained
    assert verdict.to_json()["verdict"] == "failed"
    assert verdict.to_json()["tiers"] == ()
