"""The champion at the gate: judged on the candidate's own held-out examples, whatever its data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import numpy as np
import pytest

from nested_core.config.loading import render_config
from nested_core.config.schema import FineTuneConfig
from nested_core.data.example_digests import TrainedRows, decode_digests
from nested_core.gate.judge import run_gate_checks
from nested_core.measure.answers.answer_bounds import judge_answers
from nested_core.measure.losses.held_out_loss import LoadedBase, read_nonempty_splits
from nested_core.measure.losses.left_out_examples import read_run_rows
from nested_core.pipeline.publishing import register_run
from nested_core.records.answers import read_answers
from nested_core.records.judged_run import read_judged_run
from nested_core.records.losses import read_example_losses
from nested_core.records.verdict import ChampionLoss
from nested_core.records.verdict_file import read_verdict
from nested_core.records.verdict_table import check_table
from nested_core.registry.policy import set_policy
from nested_core.storage.adapter import write_adapter
from nested_core.storage.atomic import write_json
from tests.builders.candidates import Candidate, shifted
from tests.builders.judged_adapters import pass_by_hand
from tests.builders.registering import promote, register
from tests.builders.suites import note_who_is_asked, task, write_suite

NAME = "capitals"


@dataclass(frozen=True)
class Challenger(Candidate):
    """A candidate for a registry, in which champions are made of its own tensors, by hand."""

    registry: Path

    def meet(
        self, change: Callable[[mx.array], mx.array], settings: Any = None, **provenance: Any
    ) -> str:
        """Make the champion an adapter of tensors that are changed so; its version."""
        adapter = self.registry.parent / "champion" / "adapter"
        described = json.loads((self.run.adapter / "adapter_config.json").read_text())
        shutil.rmtree(adapter.parent, ignore_errors=True)
        adapter.mkdir(parents=True)
        changed = {name: change(tensor) for name, tensor in self.trained.items()}
        write_adapter(adapter, changed, described | (settings or {}))
        known = TrainedRows().to_json() | provenance
        version = register(pass_by_hand(adapter.parent), self.registry, NAME, known)
        promote(self.registry, NAME, version, by="ann")
        return version

    def meet_wider(self) -> str:
        """Make the champion one of twice the rank that means the same."""
        lora = self.config.lora_parameters

        def widen(tensor: mx.array) -> mx.array:
            axis = tensor.shape.index(lora.rank)
            return mx.concatenate([tensor, mx.zeros_like(tensor)], axis=axis)

        said = lora.model_dump(exclude_none=True) | {"rank": 2 * lora.rank}
        return self.meet(widen, {"lora_parameters": said})

    def compare(self) -> ChampionLoss:
        """Judge, and say how the champion compares."""
        compared = self.judge().champion
        assert compared is not None
        return compared

    def decide(self, champion: str | None, **section: Any) -> str:
        """Register, and say what the policy makes of it."""
        policy = self.config.registry.model_copy(update=section)
        config = self.config.model_copy(update={"registry": policy})
        return register_run(config, read_judged_run(self.run.path), champion).sentence

    def with_suite(self, **bounds: Any) -> Self:
        """The same with a suite of capitals that the base model knows."""
        suite = write_suite(self.registry.parent / "suite.jsonl")
        return self.resumed(tasks=[task(suite, **bounds)])


@pytest.fixture
def challenger(candidate: Candidate, tmp_path: Path) -> Challenger:
    """The finished run, with a registry that promotes what is better."""
    section = {"path": str(tmp_path / "registry"), "name": NAME, "promote": "better"}
    changed = candidate.config.model_dump(mode="json") | {"registry": section}
    config = FineTuneConfig.model_validate(changed)
    candidate.run.config.write_bytes(render_config(config))
    return Challenger(config, candidate.run, tmp_path / "registry")


def halve(tensor: mx.array) -> mx.array:
    return tensor * 0.5


@pytest.mark.slow("trains and judges a night of its own")
def test_a_candidate_better_than_a_champion_of_other_data_is_promoted(challenger) -> None:
    champion = challenger.meet(halve)
    found = challenger.compare()
    assert (found.version, found.left_out) == (champion, 0)
    low, high = found.interval or (0.0, 0.0)
    assert low < found.difference < high < 0
    losses = read_example_losses(challenger.run.gate_losses)
    assert losses.champion is not None
    assert losses.mean(losses.champion) == pytest.approx(found.loss)
    assert challenger.gate["champion"]["interval"] == [low, high]
    assert read_verdict(challenger.run.gate).champion == found
    challenger.confirm()
    assert challenger.decide(champion) == "promoted"


@pytest.mark.slow("judges three times against two versions")
def test_the_policys_reference_is_judged_on_the_same_examples(challenger: Challenger) -> None:
    reference = challenger.meet(lambda tensor: tensor * 0.25)
    champion = challenger.meet(halve)
    assert challenger.judge().reference is None
    set_policy(challenger.registry, NAME, by="ann", changes={"reference": champion})
    verdict = challenger.judge()
    assert verdict.reference == verdict.champion
    assert read_example_losses(challenger.run.gate_losses).reference is None
    challenger.confirm()
    set_policy(challenger.registry, NAME, by="ann", changes={"reference": "nights:2"})
    found = challenger.judge().reference
    assert found is not None
    assert (found.version, found.conclusion) == (reference, "better")
    losses = read_example_losses(challenger.run.gate_losses)
    assert losses.reference is not None
    assert losses.mean(losses.reference) == pytest.approx(found.loss)
    challenger.confirm()
    assert challenger.decide(champion, promote="always") == "promoted"


def test_a_candidate_that_is_not_better_beyond_noise_says_by_how_much(challenger) -> None:
    key = mx.random.key(0)
    champion = challenger.meet(lambda own: own + 1e-4 * mx.random.normal(own.shape, key=key))
    challenger.judge()
    refused = challenger.decide(champion)
    assert "is not better by more than 0.005 than the champion's" in refused
    assert ", or not significantly (valid.jsonl, " in refused
    assert "these examples reliably detect changes of" in refused


@pytest.mark.slow("judges a night of its own")
def test_the_improvement_that_is_asked_for_is_held_against_the_difference_itself(
    challenger: Challenger,
) -> None:
    champion = challenger.meet(halve)
    difference = challenger.compare().difference
    assert difference is not None
    for share, outcome in ((1.01, "is not better by more than"), (0.99, "promoted")):
        assert outcome in challenger.decide(champion, min_improvement=-difference * share)


@pytest.mark.slow("trains and judges a night of its own")
def test_a_champion_of_another_rank_is_judged_with_its_own(challenger: Challenger) -> None:
    challenger.meet_wider()
    found = challenger.compare()
    assert found.not_compared is None
    own = challenger.gate["validation"]["loss_after"]
    assert found.loss == pytest.approx(own, rel=1e-5)


def test_a_champion_of_another_base_is_not_compared_and_not_replaced_by_itself(challenger) -> None:
    champion = challenger.meet(halve, {"base_fingerprint": "sha256:" + "0" * 64})
    assert "made for the base" in str(challenger.compare().not_compared)
    challenger.confirm()
    assert "does not fit: made for the base" in challenger.decide(champion)


def test_examples_that_the_champion_was_trained_on_are_left_out_and_counted(challenger) -> None:
    held_out = challenger.held_out()
    champion = challenger.meet(halve, **TrainedRows(held_out.digests[:3]).to_json())
    found = challenger.compare()
    assert (found.left_out, found.examples) == (3, len(held_out.split) - 3)
    losses = read_example_losses(challenger.run.gate_losses)
    assert losses.champion is not None
    assert np.isnan(losses.champion).nonzero()[0].tolist() == [0, 1, 2]
    assert not np.isnan(losses.after).any()
    challenger.confirm()
    assert challenger.decide(champion) == "promoted"


def test_where_the_champion_was_trained_on_every_example_nothing_is_promoted(challenger) -> None:
    champion = challenger.meet(halve, **TrainedRows(challenger.held_out().digests).to_json())
    challenger.judge()
    challenger.confirm()
    assert "nothing is left to compare by" in challenger.decide(champion)


def test_where_what_the_champion_was_trained_on_is_not_known_a_person_decides(challenger) -> None:
    champion = challenger.meet(halve, example_identity=None)  # digests of tokens, as they once were
    found = challenger.compare()
    assert (found.left_out, found.difference) == (None, None)
    assert f"which rows version {champion[:12]} was trained on" in str(found.not_compared)
    challenger.confirm()
    assert challenger.decide(champion, promote="always").endswith("a person decides")


def test_a_run_that_goes_on_from_an_unknown_adapter_says_so_and_promotes_nothing(challenger):
    own = read_run_rows(challenger.run)
    write_json(challenger.run.training_examples, (own | TrainedRows(unknown="it")).to_json())
    validation = challenger.judge().validation
    assert validation.left_out is None
    assert "what an adapter before it was trained on is not known" in " ".join(validation.doubts())
    challenger.confirm()
    assert challenger.decide(None, promote="always").endswith("a person decides")


@pytest.mark.slow("judges a night of its own")
def test_provenance_holds_a_digest_of_every_training_example(challenger: Challenger) -> None:
    challenger.judge()
    version = register_run(challenger.config, read_judged_run(challenger.run.path), None).version
    path = challenger.registry / NAME / "versions" / version / "provenance.json"
    recorded = decode_digests(json.loads(path.read_text())["training_examples"])
    own = read_nonempty_splits(challenger.config, challenger.run)["train"].contents
    np.testing.assert_array_equal(recorded, np.unique(own))


def test_a_champion_that_changed_after_the_gate_supersedes(challenger: Challenger) -> None:
    champion = challenger.meet(halve)
    assert challenger.compare().version == champion
    assert challenger.decide(None) == "superseded"


@pytest.mark.slow("trains and judges a night of its own")
def test_a_candidate_that_a_link_by_hand_made_the_champion_replaced_nobody(challenger) -> None:
    challenger.judge()
    version = register(challenger.run.path, challenger.registry, NAME, TrainedRows().to_json())
    (challenger.registry / NAME / "champion").symlink_to(f"versions/{version}")
    assert challenger.judge().champion is None


def test_a_champion_that_training_began_with_has_the_losses_from_before(
    challenger: Challenger, tmp_path: Path
) -> None:
    shutil.copytree(challenger.run.initial, tmp_path / "champion" / "adapter")
    known = TrainedRows().to_json()
    version = register(pass_by_hand(tmp_path / "champion"), challenger.registry, NAME, known)
    promote(challenger.registry, NAME, version, by="ann")
    verdict = challenger.judge()
    assert verdict.champion is not None
    assert verdict.validation is not None
    assert verdict.champion.loss == verdict.validation.loss_before
    assert verdict.champion.difference == verdict.validation.difference
    challenger.confirm()


@pytest.mark.slow("trains and judges")
def test_the_champion_costs_one_pass(challenger, monkeypatch) -> None:
    passes: list[int] = []
    compare = LoadedBase.compare_predictions

    def count(self: LoadedBase, adapters: Any, *arguments: Any) -> Any:
        passes.append(len(adapters))
        return compare(self, adapters, *arguments)

    monkeypatch.setattr(LoadedBase, "compare_predictions", count)
    challenger.judge()
    challenger.meet(halve)
    challenger.judge()
    assert passes == [2, 2, 1]


def test_a_candidate_whose_loss_is_not_finite_is_compared_with_nobody(challenger) -> None:
    challenger.meet(halve)
    challenger.rewrite(change_adapter=shifted(1e17))
    challenger.require_rejected("non_finite")
    assert challenger.gate["validation"]["loss_after"] is None
    assert challenger.gate["champion"]["not_compared"] == "the candidate's loss is not finite"
    assert "not compared" in str(check_table(read_verdict(challenger.run.gate)))


@pytest.mark.slow("judges a run with a suite and a champion three times")
def test_the_champion_answers_the_suites_too_and_only_once(
    challenger: Challenger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    challenger.meet(halve)
    challenger = challenger.with_suite()
    asked = note_who_is_asked(tmp_path, monkeypatch)
    for _ in range(2):
        (result,) = challenger.judge().tasks
    assert len(asked) == 4  # base, champion and candidate; then the candidate alone
    assert result.champion is not None
    assert result.champion_difference == pytest.approx(result.candidate - result.champion)
    assert result.champion_interval is not None
    roles = [record.model for record in read_answers(challenger.run.answers)]
    assert roles == [role for role in ("base", "champion", "candidate") for _ in range(20)]
    assert f"champion {result.champion * 20:g} of 20" in result.describe()
    challenger.confirm()
    version = register_run(challenger.config, read_judged_run(challenger.run.path), None).version
    promote(challenger.registry, NAME, version, by="ann")
    challenger.judge()
    assert len(asked) == 5  # the champion said the same when it was the candidate


def test_a_candidate_that_answers_worse_than_the_champion_is_refused(challenger) -> None:
    challenger.meet_wider()
    gate = challenger.with_suite().config.gate
    records = run_gate_checks(challenger.with_suite().config, challenger.run).answers
    assert {record.model for record in records} == {"base", "champion", "candidate"}
    right = {"base": 0.0, "champion": 1.0, "candidate": 0.0}
    planted = [replace(record, score=right[record.model]) for record in records]
    (result,), (reason,) = judge_answers(gate, planted)
    assert (reason.code, result.verdict) == ("task_regressed", "failed")
    assert "its max_drop against the champion is 0; 20 lost: " in reason.message
    assert (result.difference, result.champion_difference) == (0.0, -1.0)
    assert judge_answers(challenger.with_suite(max_drop=1.0).config.gate, planted)[1] == []
    champions = [record for record in planted if record.model == "champion"]
    as_parent = [replace(record, model="parent") for record in champions]
    assert len(judge_answers(gate, planted + as_parent)[1]) == 1
