"""Configurations that differ, and adapters that mean nothing: compared by meaning, or damage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.errors import DamagedError
from tests.core.gate.pairs import CONFIG, A, B, Tensors, codes, judge_pair, learned, trained_tensors


def configured(**changes: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    config["lora_parameters"] |= changes.pop("lora_parameters", {})
    return {key: value for key, value in (config | changes).items() if value is not None}


OTHER_BASE = "sha256:" + "0dd" * 21 + "0"
CONFIGS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({}, {"lora_parameters": {"rank": 8}}, ["config_mismatch"]),
    ({}, {"lora_parameters": {"scale": 10.0}}, ["config_mismatch"]),
    ({}, {"lora_parameters": {"keys": ["self_attn.q_proj"]}}, ["config_mismatch"]),
    ({}, {"num_layers": 1}, ["config_mismatch"]),
    ({}, {"fine_tune_type": "dora"}, ["config_mismatch"]),
    ({}, {"base_fingerprint": OTHER_BASE}, ["base_mismatch"]),
    ({}, {"num_layers": 1, "base_fingerprint": OTHER_BASE}, ["config_mismatch", "base_mismatch"]),
    ({"base_fingerprint": None}, {"base_fingerprint": None, "model": "other"}, ["base_mismatch"]),
    ({"base_fingerprint": None}, {"model": "other"}, ["base_mismatch"]),
    ({"base_fingerprint": None}, {}, []),
    ({}, {"base_fingerprint": "md5:ba5e"}, ["base_mismatch"]),
    ({}, {"model": "moved/elsewhere"}, []),
    ({}, {"lora_parameters": {"dropout": 0.3}, "seed": 5}, []),
    ({}, {"batch_size": 64, "iters": 3}, []),
]


@pytest.mark.parametrize(("before", "after", "expected"), CONFIGS, ids=str)
def test_configurations_are_compared_in_what_they_mean(tmp_path, before, after, expected) -> None:
    tensors = trained_tensors()
    learned(tensors)
    configs = configured(**before), configured(**after)
    assert codes(judge_pair(tmp_path, trained_tensors(), tensors, configs)) == expected


def test_another_base_does_not_hide_that_nothing_changed(tmp_path: Path) -> None:
    configs = CONFIG, configured(base_fingerprint=OTHER_BASE)
    verdict = judge_pair(tmp_path, trained_tensors(), trained_tensors(), configs)
    assert codes(verdict) == ["base_mismatch", "unchanged"]


MALFORMED: dict[str, Tensors] = {
    "factors that do not multiply": {A: np.ones((12, 4), "f4"), B: np.ones((3, 16), "f4")},
    "factors of one dimension": {A: np.ones(12, "f4"), B: np.ones(16, "f4")},
    "scalars": {A: np.array(1.0, "f4"), B: np.array(1.0, "f4")},
    "integers": {A: np.ones((12, 4), "u4"), B: np.ones((4, 16), "u4")},
    "factors of different experts": {A: np.ones((2, 4, 12), "f4"), B: np.ones((3, 16, 4), "f4")},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_tensors_that_are_no_low_rank_factors_are_damage(tmp_path: Path, case: str) -> None:
    after = {name: value * 2 for name, value in MALFORMED[case].items()}
    with pytest.raises(DamagedError, match="q_proj"):
        judge_pair(tmp_path, MALFORMED[case], after)
