"""The champion at the gate: judged on the candidate's own held-out examples, whatever its data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from nested_core.config.loading import render_config
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.data.example_digests import (
    decode_digests,
    digest_examples,
    encode_digests,
)
from nested_core.errors import GateRejected
from nested_core.gate.answers.answer_bounds import judge_answers
from nested_core.gate.answers.suite_answers import EncodedSuite
from nested_core.gate.example_losses import read_example_losses
from nested_core.gate.held_out_loss import (
    LoadedBase,
    choose_held_out_examples,
    read_nonempty_splits,
)
from nested_core.gate.judge import make_checks_of_run
from nested_core.pipeline import steps
from nested_core.pipeline.publishing import confirm_recorded_verdict, register_run
from nested_core.records.answers import read_answers
from nested_core.records.verdict import JudgedAdapter, Verdict
from nested_core.records.verdict_file import read_verdict, write_verdict
from nested_core.registry import promote, register
from nested_core.registry.policy import set_policy
from nested_core.registry.promotion_policy import promote_by_policy
from nested_core.report.verdict_page import describe_verdict
from nested_core.storage.adapter import ADAPTER_FILES, read_adapter, write_adapter
from nested_core.storage.manifest import describe_file
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from tests.core.gate.conftest import Rewrite
from tests.core.gate.test_gate_tasks import write_suite
from tests.gate_files import read_gate

NAME = "capitals"
Champion = Callable[..., str]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def config(config: FineTuneConfig, run: RunDirectory, registry: Path) -> FineTuneConfig:
    """The finished run's configuration, with a registry that promotes what is better."""
    section = {"path": str(registry), "name": NAME, "promote": "better"}
    changed = config.model_dump(mode="json") | {"registry": section}
    made = FineTuneConfig.model_validate(changed)
    run.config.write_bytes(render_config(made))
    return made


@pytest.fixture
def make_champion(run: RunDirectory, tmp_path: Path, registry: Path) -> Champion:
    """Make the champion an adapter that the run's own tensors are changed into, by hand."""

    def make(
        change: Callable[[mx.array], mx.array], settings: dict[str, Any] | None = None, **said: Any
    ) -> str:
        folder = tmp_path / "champion"
        adapter = folder / "adapter"
        tensors = load_arrays(run.adapter / "adapters.safetensors")
        described = json.loads((run.adapter / "adapter_config.json").read_text())
        adapter.mkdir(parents=True)
        changed = {name: change(tensor) for name, tensor in tensors.items()}
        write_adapter(adapter, changed, described | (settings or {}))
        digest = read_adapter(adapter).digest()
        initial, trained = JudgedAdapter("initial", "0" * 64), JudgedAdapter("adapter", digest)
        verdict = Verdict((), 8, initial, trained, ())
        files = {f"adapter/{name}": describe_file(adapter / name) for name in ADAPTER_FILES}
        write_verdict(folder, verdict, files)
        version = register(folder, registry, NAME, said)
        promote(registry, NAME, version, by="ann")
        return version

    return make


def halve(tensor: mx.array) -> mx.array:
    return tensor * 0.5


def decide(config: FineTuneConfig, run: RunDirectory, champion: str) -> str:
    version = register_run(config, run, champion)
    done = promote_by_policy(config.registry, version, champion)
    return done.sentence


def test_a_candidate_better_than_a_champion_of_other_data_is_promoted(
    config: FineTuneConfig, run: RunDirectory, make_champion: Champion
) -> None:
    champion = make_champion(halve)
    verdict = steps.judge(config, run)
    assert verdict.champion is not None
    assert (verdict.champion.version, verdict.champion.left_out) == (champion, 0)
    low, high = verdict.champion.interval or (0.0, 0.0)
    assert low < verdict.champion.difference < high < 0  # type: ignore[operator]
    losses = read_example_losses(run.gate_losses)
    assert losses.champion is not None
    assert losses.mean(losses.champion) == pytest.approx(verdict.champion.loss)
    assert read_gate(run.gate)["champion"]["interval"] == [low, high]
    assert read_verdict(run.gate).champion == verdict.champion
    confirm_recorded_verdict(config, run)
    assert decide(config, run, champion) == "promoted"


def test_the_policys_reference_is_judged_on_the_same_examples(
    config: FineTuneConfig, run: RunDirectory, make_champion: Champion, tmp_path: Path
) -> None:
    reference = make_champion(lambda tensor: tensor * 0.25)
    shutil.rmtree(tmp_path / "champion")
    champion = make_champion(halve)
    registry = Path(str(config.registry.path))
    assert steps.judge(config, run).reference is None
    set_policy(registry, NAME, by="ann", changes={"reference": champion})
    verdict = steps.judge(config, run)
    assert verdict.reference == verdict.champion
    assert read_example_losses(run.gate_losses).reference is None
    confirm_recorded_verdict(config, run)
    set_policy(registry, NAME, by="ann", changes={"reference": "nights:2"})
    verdict = steps.judge(config, run)
    assert verdict.reference is not None
    assert (verdict.reference.version, verdict.reference.conclusion) == (reference, "better")
    losses = read_example_losses(run.gate_losses)
    assert losses.reference is not None
    assert losses.mean(losses.reference) == pytest.approx(verdict.reference.loss)
    confirm_recorded_verdict(config, run)
    always = config.registry.model_copy(update={"promote": "always"})
    version = register_run(config, run, champion)
    assert promote_by_policy(always, version, champion).outcome == "promoted"


def test_a_candidate_that_is_not_better_beyond_noise_says_by_how_much(
    config: FineTuneConfig, run: RunDirectory, make_champion: Champion
) -> None:
    key = mx.random.key(0)
    champion = make_champion(lambda tensor: tensor + 1e-4 * mx.random.normal(tensor.shape, key=key))
    verdict = steps.judge(config, run)
    assert verdict.has_passed
    refused = decide(config, run, champion)
    assert "is not better by more than 0.005 than the champion's" in refused
    assert "beyond noise (valid.jsonl, " in refused
    assert "these examples see differences of about" in refused


def test_the_improvement_that_is_asked_for_is_held_against_the_difference_itself(
    config: FineTuneConfig, run: RunDirectory, make_champion: Champion
) -> None:
    champion = make_champion(halve)
    verdict = steps.judge(config, run)
    assert verdict.champion is not None
    assert verdict.champion.difference is not None
    version = register_run(config, run, champion)
    for share, outcome in ((1.01, "is not better by more than"), (0.99, "promoted")):
        wanted = -verdict.champion.difference * share
        section = config.registry.model_copy(update={"min_improvement": wanted})
        done = promote_by_policy(section, version, champion)
        assert outcome in (done.sentence)


def test_a_champion_of_another_rank_is_judged_with_its_own(
    config: FineTuneConfig, run: RunDirectory, make_champion: Champion
) -> None:
    rank = config.lora_parameters.rank
    settings = {
        "lora_parameters": config.lora_parameters.model_dump(exclude_none=True) | {"rank": 2 * rank}
    }

    def widen(tensor: mx.array) -> mx.array:
        axis = tensor.shape.index(rank)
        return mx.concatenate([tensor, mx.zeros_like(tensor)], axis=axis)

    make_champion(widen, settings)
    verdict = steps.judge(config, run)
    assert verdict.champion is not None
    assert verdict.validation is not None
    assert verdict.champion.not_compared is None
    assert verdict.champion.loss == pytest.approx(verdict.validation.loss_after, rel=1e-5)


def test_a_champion_of_another_base_is_not_compared_and_not_replaced_by_itself(
    config: FineTuneConfig, run: RunDirectory, make_champion: Champion
) -> None:
    champion = make_champion(halve, {"base_fingerprint": "sha256:" + "0" * 64})
    verdict = steps.judge(config, run)
    assert verdict.has_passed
    assert verdict.champion is not None
    assert "made for the base" in str(verdict.champion.not_compared)
    confirm_recorded_verdict(config, run)
    assert "does not fit: made for the base" in decide(config, run, champion)


def test_examples_that_the_champion_was_trained_on_are_left_out_and_counted(
    config: FineTuneConfig, run: RunDirectory, make_champion: Champion
) -> None:
    held_out = choose_held_out_examples(read_nonempty_splits(config, run))
    assert held_out is not None
    seen = held_out.digests[:3]
    champion = make_champion(halve, training_examples=encode_digests(seen))
    verdict = steps.judge(config, run)
    count = len(held_out.split)
    assert verdict.champion is not None
    assert (verdict.champion.left_out, verdict.champion.examples) == (3, count - 3)
    losses = read_example_losses(run.gate_losses)
    assert losses.champion is not None
    assert np.isnan(losses.champion).nonzero()[0].tolist() == [0, 1, 2]
    assert not np.isnan(losses.after).any()
    confirm_recorded_verdict(config, run)
    assert decide(config, run, champion) == "promoted"


def test_where_the_champion_was_trained_on_every_example_nothing_is_promoted(
    config: FineTuneConfig, run: RunDirectory, make_champion: Champion
) -> None:
    held_out = choose_held_out_examples(read_nonempty_splits(config, run))
    assert held_out is not None
    champion = make_champion(halve, training_examples=encode_digests(held_out.digests))
    verdict = steps.judge(config, run)
    assert verdict.has_passed
    confirm_recorded_verdict(config, run)
    assert "nothing is left to compare by" in decide(config, run, champion)


def test_provenance_holds_a_digest_of_every_training_example(
    config: FineTuneConfig, run: RunDirectory, registry: Path
) -> None:
    steps.judge(config, run)
    version = register_run(config, run, None)
    path = registry / NAME / "versions" / version / "provenance.json"
    recorded = decode_digests(json.loads(path.read_text())["training_examples"])
    own = digest_examples(read_nonempty_splits(config, run)["train"])
    np.testing.assert_array_equal(recorded, np.unique(own))


def test_a_champion_that_changed_after_the_gate_supersedes(
    config: FineTuneConfig, run: RunDirectory, make_champion: Champion, registry: Path
) -> None:
    champion = make_champion(halve)
    steps.judge(config, run)
    version = register_run(config, run, champion)
    gate = read_gate(run.gate)
    assert gate["champion"]["version"] == champion
    done = promote_by_policy(config.registry, version, None)
    assert done.outcome == "superseded"


def test_a_champion_that_training_began_with_has_the_losses_from_before(
    config: FineTuneConfig, run: RunDirectory, registry: Path, tmp_path: Path
) -> None:
    digest = read_adapter(run.initial).digest()
    folder = tmp_path / "champion"
    shutil.copytree(run.initial, folder / "adapter")
    initial, trained = JudgedAdapter("initial", "0" * 64), JudgedAdapter("adapter", digest)
    made = Verdict((), 8, initial, trained, ())
    files = {f"adapter/{n}": describe_file(folder / "adapter" / n) for n in ADAPTER_FILES}
    write_verdict(folder, made, files)
    promote(registry, NAME, register(folder, registry, NAME, {}), by="ann")
    verdict = steps.judge(config, run)
    assert verdict.champion is not None
    assert verdict.validation is not None
    assert verdict.champion.loss == verdict.validation.loss_before
    assert verdict.champion.difference == verdict.validation.difference
    confirm_recorded_verdict(config, run)


def test_the_champion_costs_one_pass(
    config: FineTuneConfig,
    run: RunDirectory,
    make_champion: Champion,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[int] = []
    compare = LoadedBase.compare_predictions

    def count(self: LoadedBase, adapters: Any, *arguments: Any) -> Any:
        passes.append(len(adapters))
        return compare(self, adapters, *arguments)

    monkeypatch.setattr(LoadedBase, "compare_predictions", count)
    steps.judge(config, run)
    make_champion(halve)
    steps.judge(config, run)
    assert passes == [2, 2, 1]


def test_a_candidate_whose_loss_is_not_finite_is_compared_with_nobody(
    config: FineTuneConfig, run: RunDirectory, make_champion: Champion, rewrite: Rewrite
) -> None:
    make_champion(halve)
    rewrite(change_adapter=lambda t: t.update({name: v + 1e17 for name, v in t.items()}))
    with pytest.raises(GateRejected, match="non_finite"):
        steps.judge(config, run)
    gate = read_gate(run.gate)
    assert gate["champion"]["not_compared"] == "the candidate's loss is not finite"
    assert "not compared" in str(vars(describe_verdict(read_verdict(run.gate))))


def with_suite(config: FineTuneConfig, path: Path, **bounds: Any) -> FineTuneConfig:
    """The configuration with a suite of capitals that the base model knows."""
    task = {"name": "capitals", "file": str(write_suite(path)), "score": "contains"}
    task |= {"max_tokens": 6} | bounds
    gate = GateSection.model_validate({"tasks": [task]})
    return config.model_copy(update={"gate": gate})


@pytest.mark.slow("judges a run with a suite and a champion three times")
def test_the_champion_answers_the_suites_too_and_only_once(
    config: FineTuneConfig,
    run: RunDirectory,
    make_champion: Champion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = with_suite(config, tmp_path / "suite.jsonl")
    make_champion(halve)
    asked: list[str] = []
    answer = EncodedSuite.answer

    def count_and_answer(self: EncodedSuite, *arguments: Any) -> Any:
        asked.append(self.suite.name)
        return answer(self, *arguments)

    monkeypatch.setenv("NESTED_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(EncodedSuite, "answer", count_and_answer)
    steps.write_run_config(config, run, resume=True)
    for _ in range(2):
        (result,) = steps.judge(config, run).tasks
    assert len(asked) == 4  # base, champion and candidate; then the candidate alone
    assert result.champion is not None
    assert result.champion_difference == pytest.approx(result.candidate - result.champion)
    assert result.champion_interval is not None
    roles = [record.model for record in read_answers(run.answers)]
    assert roles == [role for role in ("base", "champion", "candidate") for _ in range(20)]
    assert f"champion {result.champion * 20:g} of 20" in result.describe()
    confirm_recorded_verdict(config, run)
    promote(Path(str(config.registry.path)), NAME, register_run(config, run, None), by="ann")
    steps.judge(config, run)
    assert len(asked) == 5  # the champion said the same when it was the candidate


def test_a_candidate_that_answers_worse_than_the_champion_is_refused(
    config: FineTuneConfig, run: RunDirectory, make_champion: Champion, tmp_path: Path
) -> None:
    config = with_suite(config, tmp_path / "suite.jsonl")
    rank = config.lora_parameters.rank
    settings = {"lora_parameters": config.lora_parameters.model_dump() | {"rank": 2 * rank}}

    def widen(tensor: mx.array) -> mx.array:
        return mx.concatenate([tensor, mx.zeros_like(tensor)], axis=tensor.shape.index(rank))

    make_champion(widen, settings)
    records = make_checks_of_run(config, run).answers
    assert {record.model for record in records} == {"base", "champion", "candidate"}
    right = {"base": 0.0, "champion": 1.0, "candidate": 0.0}
    planted = [replace(record, score=right[record.model]) for record in records]
    (result,), (reason,) = judge_answers(config.gate, planted)
    assert (reason.code, result.verdict) == ("task_regressed", "failed")
    assert "its max_drop against the champion is 0; 20 lost: " in reason.message
    assert (result.difference, result.champion_difference) == (0.0, -1.0)
    allowed = with_suite(config, tmp_path / "suite.jsonl", max_drop=1.0)
    assert judge_answers(allowed.gate, planted)[1] == []
    as_parent = [replace(record, score=right[record.model]) for record in records] + [
        replace(record, model="parent", score=1.0)
        for record in records
        if record.model == "champion"
    ]
    assert len(judge_answers(config.gate, as_parent)[1]) == 1
