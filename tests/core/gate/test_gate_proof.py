"""The proof from a fresh process: what plain mlx_lm.load makes of base and adapter."""

from __future__ import annotations

import ast
import copy
import json
import shutil
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError, NestedTuneError
from nested_core.gate import fresh_process_check, judge_run, verify_adapters
from nested_core.gate.fresh_process_check import ProofRequest, compute_logits_in_fresh_process
from nested_core.models.session import Session
from nested_core.process import child
from nested_core.process.child import Child
from nested_core.records.verdict import Reason, Verdict
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays, save_arrays
from tests.core.gate.conftest import Rewrite
from tests.core.gate.pairs import codes, judge_pair, learned, trained_tensors
from tests.example import MODEL, train_example

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
    tree = ast.parse(fresh_process_check.FRESH_PROCESS_PROGRAM.read_text())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    mlx_lm = {"mlx_lm", "mlx_lm.generate"}
    assert imported == {"gc", "json", "sys", "typing", "mlx.core", "mlx.utils"} | mlx_lm


@pytest.mark.claim("The adapter works in a process that has only the files")
def test_a_run_is_proven_against_what_its_trainer_computed(
    new_process: None, config: FineTuneConfig, run: RunDirectory
) -> None:
    verdict = judge_run(config, run)
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
def test_every_kind_of_fine_tune_is_proven(
    tmp_path: Path, changes: dict[str, Any], tolerance: float
) -> None:
    done = train_example(tmp_path / "run", **changes)
    verdict = judge_run(done.config, done.run)
    assert codes(verdict) == []
    assert verdict.proof is not None
    assert proven_figure(verdict, "relative_distance_from_trainer") <= verdict.proof["tolerance"]
    assert verdict.proof["tolerance"] == tolerance


def halved(state: dict[str, Any]) -> None:
    """As if the trainer had computed with half the scale that the configuration says."""
    rows = np.array(state["logits"]["values"])
    state["logits"]["values"] = (rows / 2).tolist()


def not_finite(state: dict[str, Any]) -> None:
    state["logits"]["values"][0][0] = None


def shorter(state: dict[str, Any]) -> None:
    state["logits"]["values"].pop()


@pytest.mark.parametrize("change", [halved, not_finite, shorter])
def test_other_logits_than_the_trainers_are_rejected(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite, change: Any
) -> None:
    rewrite(change_state=change)
    verdict = judge_run(config, run)
    assert codes(verdict) == ["config_mismatch"]
    assert "are not those that the trainer computed" in verdict.reasons[0].message
    assert "tolerance 0.001" in verdict.reasons[0].message


def test_an_effect_too_small_for_any_logit_is_no_effect(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite
) -> None:
    initial = load_arrays(run.initial / "adapters.safetensors")

    def barely(tensors: dict[str, mx.array]) -> None:
        values = np.random.default_rng(1)
        for name, value in initial.items():
            moved = 1e-30 * values.normal(size=value.shape)
            tensors[name] = value + mx.array(moved.astype("f4")) if name.endswith("b") else value

    rewrite(change_adapter=barely)
    before, after = run.initial, run.adapter
    assert codes(verify_adapters(before, after)) == ["no_effect"]
    assert "the logits on every prompt" in verify_adapters(before, after).reasons[0].message
    mostly = [r for r in judge_run(config, run).reasons if r.code != "updates_missing"]
    assert mostly == []  # lora_a stayed although it had gradients: found before any process starts


@pytest.mark.claim("The adapter works in a process that has only the files")
def test_an_adapter_that_plain_mlx_lm_cannot_load_is_unreadable(
    new_process: None, run: RunDirectory, tmp_path: Path
) -> None:
    for side in (run.initial, run.adapter):
        folder = Path(shutil.copytree(side, tmp_path / side.name))
        config = json.loads((folder / "adapter_config.json").read_bytes())
        del config["num_layers"]
        (folder / "adapter_config.json").write_text(json.dumps(config))
    verdict = verify_adapters(tmp_path / "initial", tmp_path / "adapter")
    assert codes(verdict) == ["unreadable"]
    assert "mlx_lm.load in a new process could not use" in verdict.reasons[0].message
    assert "num_layers" in verdict.reasons[0].message


@pytest.fixture
def other_base(tmp_path: Path) -> Path:
    """The example's base with one weight changed."""
    folder = Path(shutil.copytree(MODEL, tmp_path / "base"))
    weights = load_arrays(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] * 1.5
    save_arrays(folder / "model.safetensors", weights)
    return folder


def test_a_base_that_was_exchanged_is_a_mismatch(
    config: FineTuneConfig, run: RunDirectory, other_base: Path, tmp_path: Path
) -> None:
    moved = config.model_copy(update={"model": str(other_base)})
    verdict = judge_run(moved, run)
    assert codes(verdict) == ["base_mismatch"]
    assert "made for the base" in verdict.reasons[0].message
    for side in (run.initial, run.adapter):
        folder = Path(shutil.copytree(side, tmp_path / side.name))
        meant = json.loads((folder / "adapter_config.json").read_bytes())
        meant["model"] = str(other_base)
        (folder / "adapter_config.json").write_text(json.dumps(meant))
    assert codes(verify_adapters(tmp_path / "initial", tmp_path / "adapter")) == ["base_mismatch"]


def test_verify_says_that_nothing_was_loaded_where_the_base_is_not_at_hand(tmp_path: Path) -> None:
    after = trained_tensors()
    learned(after)
    verdict = judge_pair(tmp_path, trained_tensors(), after)
    assert verdict.has_passed
    assert verdict.to_json()["proof"] == {
        "skipped": "the base model base is not a folder here: nothing was loaded"
    }


def test_verify_loads_both_adapters_where_the_base_is_at_hand(run: RunDirectory) -> None:
    verdict = verify_adapters(run.initial, run.adapter)
    assert verdict.has_passed
    assert verdict.proof is not None
    assert proven_figure(verdict, "max_abs_difference_from_initial") > 0.1
    assert "tolerance" not in verdict.proof


def test_a_killed_process_says_nothing_about_the_adapter(
    new_process: None, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "killed.py"
    program.write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(fresh_process_check, "FRESH_PROCESS_PROGRAM", program)
    with pytest.raises(NestedTuneError, match="ended by SIGKILL") as error:
        verify_adapters(run.initial, run.adapter)
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
    run: RunDirectory, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(MODEL, base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"model_file": "own.py"}))
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="could not be loaded: .* No code that a model brings"):
        compute_logits_in_fresh_process(ProofRequest(base, run.initial, run.adapter))
    assert not (tmp_path / "ran").exists()


def test_a_process_that_was_started_before_computes_the_next_proof(run: RunDirectory) -> None:
    with Session() as session:
        session.keep_proof_process(fresh_process_check.start_proof_process)
        waiting = session.take_proof_process()
        assert waiting is not None
        assert session.take_proof_process() is None
        request = ProofRequest(MODEL, run.initial, run.adapter)
        with closing(fresh_process_check.RunningProof(request, waiting)) as proof:
            assert not isinstance(proof.wait_for_logits(), Reason)
        assert waiting.process.returncode is not None


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


@pytest.mark.parametrize("differ", ["scale", "shape"])
def test_an_initial_adapter_of_other_layers_is_loaded_by_itself(
    run: RunDirectory, tmp_path: Path, differ: str
) -> None:
    request = ProofRequest(MODEL, run.initial, run.adapter)
    expected = compute_logits_in_fresh_process(request)
    other = tmp_path / "initial"
    shutil.copytree(run.initial, other)
    config = json.loads((other / "adapter_config.json").read_text())
    tensors = load_arrays(other / "adapters.safetensors")
    if differ == "scale":
        config["lora_parameters"]["scale"] *= 2  # lora_b is zero: the logits stay
    else:
        rank = config["lora_parameters"]["rank"]
        config["lora_parameters"]["rank"] = rank + 2
        tensors = {
            name: mx.pad(array, [(0, 0), (0, 2)] if name.endswith("lora_a") else [(0, 2), (0, 0)])
            for name, array in tensors.items()
        }
    (other / "adapter_config.json").write_text(json.dumps(config))
    save_arrays(other / "adapters.safetensors", tensors)
    found = compute_logits_in_fresh_process(ProofRequest(MODEL, other, run.adapter))
    assert not isinstance(expected, Reason)
    assert not isinstance(found, Reason)
    np.testing.assert_allclose(found.initial, expected.initial, atol=1e-3)
    np.testing.assert_array_equal(found.trained, expected.trained)
