"""The proof from a fresh process: what plain mlx_lm.load makes of base and adapter."""

from __future__ import annotations

import ast
import copy
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest

from nested_core.errors import ConfigError, NestedTuneError
from nested_core.gate.judge import verify_adapters
from nested_core.gate.proof import fresh_process_check
from nested_core.gate.proof.fresh_process_check import (
    FreshProcessLogits,
    ProofRequest,
    compute_logits_in_fresh_process,
    prove_effect_in_fresh_process,
    relative_distance,
)
from nested_core.measure.fresh_process.starting import MLX_LM_PROGRAM, QUESTIONS_PROGRAM
from nested_core.models.session import Session
from nested_core.process import child
from nested_core.process.child import Child
from nested_core.records.verdict import Reason, Verdict
from tests.builders.adapter_folders import Arrays, base_copy, change_config, change_tensors
from tests.builders.candidates import Candidate, train_candidate
from tests.core.gate.pairs import codes, judge_pair, learned, trained_tensors
from tests.example import MODEL
from tests.left_out import slow_except

Figure = Literal["max_abs_difference_from_initial", "relative_distance_from_trainer"]


def proven_figure(verdict: Verdict, name: Figure) -> float:
    """A figure of the proof, which is finite."""
    assert verdict.proof is not None
    figure = verdict.proof[name]
    assert figure is not None
    return figure


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate starts its process as for a user; in all other tests it is forked (conftest.py)."""
    monkeypatch.setattr(child, "subprocess", subprocess)


def test_the_program_knows_of_models_only_what_mlx_lm_tells() -> None:
    imported = imports_of(MLX_LM_PROGRAM) | imports_of(QUESTIONS_PROGRAM)
    mlx_lm = {"mlx_lm", "mlx_lm.generate", "mlx_lm.models.cache", "mlx_lm.tuner.utils"}
    mlx_lm |= {"mlx.core", "mlx.utils", "numpy"}
    assert {
        name for name in imported if name.split(".")[0] not in sys.stdlib_module_names
    } == mlx_lm


def imports_of(program: Path) -> set[str]:
    tree = ast.parse(program.read_text())
    return {
        ((node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }


@pytest.mark.claim("The adapter works in a process that has only the files")
def test_a_run_is_proven_against_what_its_trainer_computed(new_process, candidate) -> None:
    verdict = candidate.verdict()
    assert verdict.has_passed
    assert verdict.proof is not None
    assert verdict.proof["model"] == str(MODEL)
    assert verdict.proof["prompts"] == 4
    assert proven_figure(verdict, "max_abs_difference_from_initial") > 0.1
    assert proven_figure(verdict, "relative_distance_from_trainer") <= 1e-4
    assert verdict.proof["tolerance"] == 1e-3


@pytest.mark.slow("trains and judges a run of its own")
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"fine_tune_type": "dora"}, 1e-3),
        ({"fine_tune_type": "full", "learning_rate": 1e-4}, 1e-3),
        ({"training": {"precision": "bfloat16"}}, 5e-2),
    ],
    ids=["dora", "full", "bfloat16"],
)
def test_every_kind_of_fine_tune_is_proven(tmp_path, changes, tolerance) -> None:
    verdict = train_candidate(tmp_path / "run", **changes).verdict()
    assert codes(verdict) == []
    assert verdict.proof is not None
    assert proven_figure(verdict, "relative_distance_from_trainer") <= verdict.proof["tolerance"]
    assert verdict.proof["tolerance"] == tolerance


@pytest.mark.slow("trains and judges a run of its own in bfloat16")
def test_an_adapter_that_moved_far_in_bfloat16_is_proven_and_with_another_scale_refused(
    tmp_path: Path,
) -> None:
    changes: dict[str, Any] = {"training": {"precision": "bfloat16"}, "num_layers": -1}
    changes |= {"learning_rate": 6e-3, "iters": 16}
    candidate = train_candidate(tmp_path / "run", **changes)
    verdict = candidate.verdict()
    assert "config_mismatch" not in codes(verdict)
    assert proven_figure(verdict, "max_abs_difference_from_initial") > 10

    def enlarge(tensors: Arrays) -> None:
        tensors.update({n: 1.25 * v for n, v in tensors.items() if n.endswith("lora_b")})

    candidate.rewrite(change_adapter=enlarge, keeps_logits=True)
    verdict = candidate.verdict()
    assert "config_mismatch" in codes(verdict)
    assert proven_figure(verdict, "relative_distance_from_trainer") > 0.05


def halved(state: dict[str, Any]) -> None:
    """As if the trainer had computed with half the scale that the configuration says."""
    rows = np.array(state["logits"]["values"])
    state["logits"]["values"] = (rows / 2).tolist()


def not_finite(state: dict[str, Any]) -> None:
    state["logits"]["values"][0][0] = None


def shorter(state: dict[str, Any]) -> None:
    state["logits"]["values"].pop()


@pytest.mark.parametrize(
    "change", slow_except([halved, not_finite, shorter], halved, reason="another verdict")
)
def test_other_logits_than_the_trainers_are_rejected(candidate: Candidate, change: Any) -> None:
    candidate.rewrite(change_state=change)
    verdict = candidate.verdict()
    assert codes(verdict) == ["config_mismatch"]
    assert "are not those that the trainer computed" in verdict.reasons[0].message
    assert "tolerance 0.001" in verdict.reasons[0].message


@pytest.mark.slow("three processes of mlx_lm")
@pytest.mark.parametrize(("is_sound", "expected_codes"), [(True, []), (False, ["config_mismatch"])])
def test_logits_as_far_from_float32_as_rounding_moves_them_are_no_mismatch(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch, is_sound: bool, expected_codes: list[str]
) -> None:
    """As bfloat16 did with SmolLM2-135M: 0.092 between a trainer and a process, both sound."""
    initial, trained = candidate.sides
    columns = tuple(range(64))
    request = ProofRequest(MODEL, initial, trained, columns=columns, is_float32=True)
    exact = compute_logits_in_fresh_process(request)
    assert isinstance(exact, FreshProcessLogits)
    request = replace(request, is_float32=False)
    narrow = compute_logits_in_fresh_process(request)
    assert isinstance(narrow, FreshProcessLogits)
    rounding = relative_distance(narrow.trained, exact.trained)
    assert 0 < rounding < 0.05
    monkeypatch.setattr(fresh_process_check, "TOLERANCE_NARROW_DTYPES", rounding / 10)
    logits = exact.trained if is_sound else exact.trained / 2
    proof = prove_effect_in_fresh_process(replace(request, expected=logits.tolist()))
    assert [reason.code for reason in proof.reasons] == expected_codes
    assert proof.evidence["rounding"] == pytest.approx(rounding, rel=1e-3)
    away = proof.evidence["relative_distance_from_float32"]
    assert away is not None
    assert away < 1e-6 if is_sound else away > 0.5


def test_an_effect_too_small_for_any_logit_is_no_effect(candidate: Candidate) -> None:
    initial = candidate.initial

    def barely(tensors: Arrays) -> None:
        values = np.random.default_rng(1)
        for name, value in initial.items():
            moved = 1e-30 * values.normal(size=value.shape)
            tensors[name] = value + mx.array(moved.astype("f4")) if name.endswith("b") else value

    candidate.rewrite(change_adapter=barely)
    before, after = candidate.run.initial, candidate.run.adapter
    assert codes(verify_adapters(before, after)) == ["no_effect"]
    assert "the logits on every prompt" in verify_adapters(before, after).reasons[0].message
    mostly = [r for r in candidate.verdict().reasons if r.code != "updates_missing"]
    assert mostly == []  # lora_a stayed although it had gradients: found before any process starts


@pytest.mark.claim("The adapter works in a process that has only the files")
def test_an_adapter_that_plain_mlx_lm_cannot_load_is_unreadable(new_process, candidate) -> None:
    for side in candidate.sides:
        change_config(side, lambda config: config.pop("num_layers"))
    verdict = verify_adapters(*candidate.sides)
    assert codes(verdict) == ["unreadable"]
    assert "mlx_lm.load in a new process could not use" in verdict.reasons[0].message
    assert "num_layers" in verdict.reasons[0].message


def test_a_base_that_was_exchanged_is_a_mismatch(candidate: Candidate, tmp_path: Path) -> None:
    def change_one(weights: Arrays) -> None:
        weights[min(weights)] *= 1.5

    base = base_copy(tmp_path / "base", change_one)
    verdict = candidate.configured(model=str(base)).verdict()
    assert codes(verdict) == ["base_mismatch"]
    assert "made for the base" in verdict.reasons[0].message
    for side in candidate.sides:
        change_config(side, lambda config: config.update(model=str(base)))
    assert codes(verify_adapters(*candidate.sides)) == ["base_mismatch"]


def test_verify_says_that_nothing_was_loaded_where_the_base_is_not_at_hand(tmp_path: Path) -> None:
    after = trained_tensors()
    learned(after)
    verdict = judge_pair(tmp_path, trained_tensors(), after)
    assert verdict.has_passed
    assert verdict.to_json()["proof"] == {
        "skipped": "the base model base is not a folder here: nothing was loaded"
    }


def test_verify_loads_both_adapters_where_the_base_is_at_hand(candidate: Candidate) -> None:
    verdict = verify_adapters(*candidate.sides)
    assert verdict.has_passed
    assert verdict.proof is not None
    assert proven_figure(verdict, "max_abs_difference_from_initial") > 0.1
    assert "tolerance" not in verdict.proof


def test_a_killed_process_says_nothing_about_the_adapter(
    new_process: None, candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "killed.py"
    program.write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(fresh_process_check, "MLX_LM_PROGRAM", program)
    with pytest.raises(NestedTuneError, match="ended by SIGKILL") as error:
        verify_adapters(*candidate.sides)
    assert error.value.exit_code == 1


def test_the_distance_is_relative_to_how_the_expected_logits_vary() -> None:
    expected = np.array([[101.0, 99.0], [99.0, 101.0]])
    assert fresh_process_check.relative_distance(expected, expected) == 0
    assert fresh_process_check.relative_distance(expected + 1, expected) == pytest.approx(1.0)
    found = copy.copy(expected)
    found[0, 0] = np.nan
    assert not fresh_process_check.relative_distance(found, expected) <= 1e9
    assert fresh_process_check.relative_distance(expected[:1], expected) == float("inf")


def test_a_base_that_brings_code_is_a_configuration_error_and_its_code_is_not_run(
    candidate: Candidate, tmp_path: Path
) -> None:
    base = base_copy(tmp_path / "base", model_file="own.py")
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="could not be loaded: .* No code that a model brings"):
        compute_logits_in_fresh_process(ProofRequest(base, *candidate.sides))
    assert not (tmp_path / "ran").exists()


def test_a_process_that_was_started_before_computes_the_next_proof(candidate: Candidate) -> None:
    with Session() as session:
        session.keep_proof_process(fresh_process_check.start_proof_process)
        waiting = session.take_proof_process()
        assert waiting is not None
        assert session.take_proof_process() is None
        request = ProofRequest(MODEL, *candidate.sides)
        with closing(fresh_process_check.RunningProof(request, waiting)) as proof:
            assert not isinstance(proof.wait_for_logits(), Reason)
        assert waiting.process.returncode is not None


def test_a_base_that_was_loaded_before_gives_the_same_logits(candidate: Candidate) -> None:
    request = ProofRequest(MODEL, *candidate.sides)
    found = []
    for base in (None, MODEL):
        process = fresh_process_check.start_proof_process(base)
        with closing(fresh_process_check.RunningProof(request, process)) as proof:
            found.append(proof.wait_for_logits())
    anew, ahead = found
    assert isinstance(anew, FreshProcessLogits)
    assert isinstance(ahead, FreshProcessLogits)
    assert anew.factors == ahead.factors
    for name in ("initial", "trained"):
        np.testing.assert_array_equal(getattr(anew, name), getattr(ahead, name))


def test_a_base_that_cannot_be_loaded_before_is_refused_when_it_is_asked_for(
    candidate: Candidate, tmp_path: Path
) -> None:
    base = base_copy(tmp_path / "base", model_type="nothing-that-exists")
    process = fresh_process_check.start_proof_process(base)
    request = ProofRequest(base, *candidate.sides)
    with (
        closing(fresh_process_check.RunningProof(request, process)) as proof,
        pytest.raises(ConfigError, match="could not be loaded"),
    ):
        proof.wait_for_logits()


def test_an_adapter_that_a_base_loaded_before_does_not_take_is_refused(candidate) -> None:
    change_config(candidate.sides[1], lambda config: config.pop("num_layers"))
    process = fresh_process_check.start_proof_process(MODEL)
    request = ProofRequest(MODEL, *candidate.sides)
    with closing(fresh_process_check.RunningProof(request, process)) as proof:
        refused = proof.wait_for_logits()
    assert isinstance(refused, Reason)
    assert "could not use the trained adapter" in refused.message


def test_a_process_that_gets_no_request_is_ended() -> None:
    started: list[Child] = []

    def start() -> Child:
        started.append(fresh_process_check.start_proof_process())
        return started[-1]

    with Session() as session:
        session.keep_proof_process(start)
        session.keep_proof_process(start)
    (process,) = started
    assert process.process.returncode is not None


def widen(tensors: Arrays) -> None:
    for name, array in tensors.items():
        width = [(0, 0), (0, 2)] if name.endswith("lora_a") else [(0, 2), (0, 0)]
        tensors[name] = mx.pad(array, width)


@pytest.mark.parametrize(
    "differ", slow_except(["scale", "shape"], "shape", reason="two more processes of mlx_lm")
)
def test_an_initial_adapter_of_other_layers_is_loaded_by_itself(
    candidate: Candidate, tmp_path: Path, differ: str
) -> None:
    request = ProofRequest(MODEL, *candidate.sides)
    expected = compute_logits_in_fresh_process(request)
    other = Path(shutil.copytree(candidate.run.initial, tmp_path / "initial"))
    lora = dict(candidate.config.lora_parameters)
    if differ == "scale":
        lora["scale"] *= 2  # lora_b is zero: the logits stay
    else:
        lora["rank"] += 2
        change_tensors(other, widen)
    change_config(other, lambda config: config["lora_parameters"].update(lora))
    found = compute_logits_in_fresh_process(ProofRequest(MODEL, other, candidate.run.adapter))
    assert not isinstance(expected, Reason)
    assert not isinstance(found, Reason)
    np.testing.assert_allclose(found.initial, expected.initial, atol=1e-3)
    np.testing.assert_array_equal(found.trained, expected.trained)
