"""Forged adapters by the hundred: each verdict right, refused, or harmless and shown to be."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load

from nested_core.errors import ConfigError, DamagedError
from nested_core.gate.judge import verify_adapters
from nested_core.storage.run_directory import RunDirectory
from tests.example import MODEL, SMALL, train_example
from tests.reliability.adapter_edits import ANY, DAMAGED, Case, cases, copied

PROMPTS = ([1, 2, 3, 4], [9, 8, 7, 6])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Eight steps of a small adapter, which has moved in every module."""
    changes = {"lora_parameters": SMALL, "learning_rate": 0.02, "nested": {"frequencies": [1]}}
    return train_example(tmp_path_factory.mktemp("edits") / "run", **changes).run


def logits(adapter: Path | None) -> np.ndarray:
    """What the base says with an adapter, by mlx_lm alone, in float32."""
    model = load(str(MODEL), adapter_path=None if adapter is None else str(adapter))[0]
    model.set_dtype(mx.float32)
    return np.array([np.array(model(mx.array([prompt]))[0, -1]) for prompt in PROMPTS])


def judged(case: Case, pair: tuple[Path, Path]) -> str:
    """The outcome of `verify`: a code, "passed" or "damaged"; any other error is a crash."""
    try:
        verdict = verify_adapters(*pair)
    except DamagedError:
        return DAMAGED
    except ConfigError as error:
        pytest.fail(f"{case.name}: {error}")
    if verdict.has_passed:
        return "passed"
    codes = [reason.code for reason in verdict.reasons]
    if case.expected != (ANY,):
        assert set(codes) == set(case.expected), (case.name, codes)
    return codes[0]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.reliability)])
def test_no_edit_of_an_adapter_passes_unless_it_is_harmless(run, tmp_path, every) -> None:
    outcomes: Counter[str] = Counter()
    for case in list(cases(run.initial, run.adapter))[::every]:
        pair = copied(case, run.initial, run.adapter, tmp_path / "pair")
        outcome = judged(case, pair)
        if outcome == "passed":
            assert case.expected == (ANY,), case.name
            with_it, before = logits(pair[1]), logits(pair[0])
            assert np.isfinite(with_it).all(), case.name
            assert np.abs(with_it - before).max() > 0, case.name
        elif case.expected == (DAMAGED,):
            assert outcome == DAMAGED, (case.name, outcome)
        outcomes[outcome] += 1
        shutil.rmtree(tmp_path / "pair")
    print(sum(outcomes.values()), dict(outcomes))
    assert outcomes["passed"] < sum(outcomes.values()) / 2
    assert {"non_finite", "shape_mismatch", DAMAGED} <= outcomes.keys()
