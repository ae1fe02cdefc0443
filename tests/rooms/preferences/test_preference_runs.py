"""Runs on preferences: what they learn, what the gate says, resuming, and five planted failures.

Each failure is planted where nothing else would notice it, and its twin, which is not complained
of, is the same without it: `learnt` where no other is named. A chosen answer that would
be cut and a beta of 0 are in test_answer_rows.py, with their twins.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from benchmarks.silent_failures.broken.broken_preferences import count_prompts, read_trained
from nested_core import seams
from nested_core.config.loading import parse_config
from nested_core.config.schema import FineTuneConfig
from nested_core.data import parallel_jobs
from nested_core.data.lines import example_parsing
from nested_core.errors import ConfigError, DamagedError, DatasetError, TrainingStopped
from nested_core.gate.judge import run_gate_checks
from nested_core.pipeline import steps
from nested_core.records.run_status import Run
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import parse_verdict
from nested_core.records.verdict_table import check_table, list_checks
from nested_core.report.run_report import describe_run
from nested_core.rooms.preferences import answer_rows, reference_likelihoods
from nested_core.rooms.preferences.answer_rows import PAIRS
from nested_core.rooms.preferences.gate_check import PreferenceVerdict, find_fall
from nested_core.rooms.preferences.reference_likelihoods import (
    LIKELIHOODS_FILE,
    find_likelihoods_file,
    read_likelihoods,
)
from nested_core.storage.adapter import WEIGHTS_NAME, read_adapter, write_adapter
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from nested_core.storage.untrusted_files import regular_sha256
from tests.example import Finished, prepare, stop_after, train
from tests.left_out import needs_rooms, needs_steady_kernels
from tests.rooms.preferences.pair_data import (
    list_pairs,
    list_pairs_of_own_answers,
    list_swapped_pairs,
    make_values,
    write_pairs,
    write_rows,
)

pytestmark = pytest.mark.slow("trains on pairs, and judges what came of it")

SIZE = {
    "iters": 6,
    "steps_per_eval": 3,
    "save_every": 2,
    "learning_rate": 3e-4,
    "nested": {"frequencies": [1, 2]},
}


def make_config(data: Path, loss: str, **changes: Any) -> FineTuneConfig:
    return parse_config(make_values(data, loss, **(SIZE | changes)), source="test.yaml")


@dataclass(frozen=True)
class Judged:
    """A run that was trained, and the verdict on it."""

    finished: Finished
    verdict: Verdict

    @property
    def block(self) -> dict[str, Any]:
        block: dict[str, Any] = self.verdict.blocks["preferences"]
        return block

    @property
    def codes(self) -> list[str]:
        return [reason.code for reason in self.verdict.reasons]


def run_and_judge(config: FineTuneConfig, path: Path) -> Judged:
    finished = train(config, prepare(config, path))
    return Judged(finished, run_gate_checks(config, finished.run).verdict)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """A sound run of dpo: the twin of the planted failures."""
    folder = tmp_path_factory.mktemp("learnt")
    return run_and_judge(make_config(write_pairs(folder / "data"), "dpo"), folder / "run")


def test_dpo_begins_at_ln_2_and_the_gate_shows_that_the_preference_was_learnt(learnt) -> None:
    first, *_, last = learnt.finished.metrics()
    assert first["val_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert last["val_loss"] < 0.6
    assert learnt.codes == []
    block = learnt.block
    assert (block["loss"], block["reference"], block["examples"]) == ("dpo", "initial", 10)
    assert block["conclusion"] == "better"
    assert block["margin_growth"] > block["margin_interval"][0] > 0
    grown = block["margin_after"] - block["margin_before"]
    assert block["margin_growth"] == pytest.approx(grown)
    assert block["kl_initial"] > 0
    assert block["reference_error"] < 1e-4
    losses: Any = learnt.verdict.validation
    assert losses.loss_before == pytest.approx(math.log(2), abs=1e-6)
    assert losses.conclusion == "better"


def test_the_block_is_in_gate_json_and_in_the_table_of_checks(learnt) -> None:
    document = json.loads(json.dumps(learnt.verdict.to_json()))
    assert document["preferences"]["margin_growth"] == learnt.block["margin_growth"]
    read = parse_verdict(document, Path("gate.json"))
    assert read.blocks == {"preferences": document["preferences"]}
    names = [check.name for check in list_checks(read)]
    assert "preference (dpo), 10 examples: margin" in names
    assert "chosen answers likelier than rejected ones" in names


def test_losses_are_in_nats_an_example_wherever_they_are_shown(learnt) -> None:
    run = Run(learnt.finished.run)
    assert run.loss_unit == "nats/example"
    assert run.to_json()["loss_unit"] == "nats/example"
    losses: Any = learnt.verdict.validation
    assert losses.unit == "nats/example"
    assert "; 10 held-out examples reliably detect changes of" in learnt.verdict.summary()
    assert "nats/example or more (80 % power)" in learnt.verdict.summary()
    shown = check_table(learnt.verdict)
    assert shown.caption.startswith("What was checked. Losses are in nats/example (nats/token: ")
    assert "examples that lost more than 1.0 nats/example" in str(shown)
    assert "nats/example (logarithmic) by step" in describe_run(run).to_html()


def test_the_units_are_known_without_the_room_that_computes_the_loss() -> None:
    assert seams.unit_of_loss(None) == "nats/token"
    assert {name: seams.unit_of_loss(name) for name in ("dpo", "orpo", "simpo")} == {
        "dpo": "nats/example",
        "orpo": "nats/example",
        "simpo": "nats/example",
    }


@needs_rooms("planning")
def test_no_rate_is_held_against_those_that_were_best_for_the_cross_entropy(tmp_path: Path) -> None:
    from nested_core.rooms.planning.learning_rate_rule import warn_of_learning_rate
    from nested_core.rooms.planning.run_explanation import explain_run

    config = make_config(write_pairs(tmp_path / "data"), "dpo", learning_rate=1e-6)
    assert warn_of_learning_rate(config) == []
    explained = explain_run(config, measures_speed=False)
    said = explained.describe()
    assert said["learning rate"] == "1e-06."
    assert "within 2.00% or 0.01 nats/example, whichever is more" in said["gate"]
    assert "may rise by more than 1.0 nats/example while" in said["gate"]
    cross_entropy = config.training.model_copy(update={"loss": None})
    plain = config.model_copy(update={"training": cross_entropy})
    assert "rank x scale x rate is" in "".join(warn_of_learning_rate(plain))


def test_a_fall_of_chosen_answers_is_told(learnt) -> None:
    fallen = learnt.block | {"chosen_fell": True, "chosen_before": -9.0, "chosen_after": -12.5}
    verdict = replace(learnt.verdict, blocks={"preferences": fallen})
    (note,) = (note for note in verdict.notes() if "less likely themselves" in note)
    assert "-9 -> -12.5" in note
    assert "grew" not in note  # a rejected one's margin may have shrunk
    assert not any("less likely" in note for note in learnt.verdict.notes())


def test_the_reference_is_computed_once_and_kept_with_its_adapter(learnt) -> None:
    run = learnt.finished.run
    kept = read_likelihoods(find_likelihoods_file(run))
    assert kept is not None
    assert kept.digest == read_adapter(run.initial).digest()
    assert len(kept.by_conversation) == 2 * 50
    assert all(value < 0 for value in kept.by_conversation.values())
    assert run.is_own_file(find_likelihoods_file(run).relative_to(run.path).as_posix())


@needs_rooms("planning")
def test_who_asks_what_a_run_would_need_computes_no_reference(learnt, monkeypatch) -> None:
    from nested_core.rooms.planning.run_explanation import explain_run

    monkeypatch.delattr(reference_likelihoods, "_compute_likelihoods")
    explained = explain_run(learnt.finished.config, measures_speed=False)
    assert explained.steps == learnt.finished.result.step


@pytest.mark.slow("judges twice")
def test_the_reference_is_checked_on_pairs_that_were_trained_on(tmp_path, learnt: Judged) -> None:
    run = RunDirectory(copytree(learnt.finished.run.path, tmp_path / "run"))
    other = write_rows(tmp_path / "other", {"held": list_pairs("valid")})
    config = learnt.finished.config
    gate = config.gate.model_copy(update={"held_out": str(other / "held.jsonl")})
    config = config.model_copy(update={"gate": gate})
    path = find_likelihoods_file(run)
    kept = LIKELIHOODS_FILE.read(path)
    values = {digest: value - 3.0 for digest, value in kept.by_conversation.items()}
    LIKELIHOODS_FILE.write(path, replace(kept, by_conversation=values))
    (wrong,) = run_gate_checks(config, run).verdict.reasons
    assert "was not the initial adapter: its kept log-likelihoods differ by" in wrong.message
    path.unlink()
    verdict = run_gate_checks(config, run).verdict
    (unknown,) = verdict.reasons
    assert unknown.code == "preference_not_learnt"
    assert "the reference that training compared with cannot be told" in unknown.message
    assert verdict.blocks["preferences"]["reference_error"] is None


@pytest.mark.slow("loads a model and computes a reference")
def test_a_reference_without_finite_likelihoods_is_refused_and_not_kept(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", {"train": list_pairs("train")[:8]})
    config = make_config(data, "dpo")
    run = prepare(config, tmp_path / "run")
    values = load_arrays(run.initial / WEIGHTS_NAME)
    config_of_adapter = read_adapter(run.initial).config
    write_adapter(run.initial, {n: v * float("nan") for n, v in values.items()}, config_of_adapter)
    with pytest.raises(ConfigError, match="gives answers no finite likelihood"):
        train(config, run)
    assert not find_likelihoods_file(run).exists()


@pytest.mark.slow("trains three times")
def test_kept_likelihoods_of_another_adapter_or_reference_are_computed_anew(
    tmp_path: Path, learnt: Judged
) -> None:
    whole = learnt.finished
    own = find_likelihoods_file(whole.run).read_text()
    kept = read_likelihoods(find_likelihoods_file(whole.run))
    assert kept is not None
    wrong = dict.fromkeys(kept.by_conversation, -1.0)
    others = [
        replace(kept, digest="0" * 64, by_conversation=wrong),
        replace(kept, reference="base", by_conversation=wrong),
    ]
    for number, other in enumerate(others):
        run = prepare(whole.config, tmp_path / str(number))
        path = find_likelihoods_file(run)
        path.parent.mkdir(parents=True)
        LIKELIHOODS_FILE.write(path, other)
        trained = train(whole.config, run)
        assert path.read_text() == own
        assert read_adapter(run.adapter).digest() == read_adapter(whole.run.adapter).digest()
        assert trained.result.step == 6


def test_a_torn_file_of_kept_likelihoods_is_refused(tmp_path: Path, learnt: Judged) -> None:
    config = learnt.finished.config
    run = prepare(config, tmp_path / "run")
    path = find_likelihoods_file(run)
    path.parent.mkdir(parents=True)
    whole = find_likelihoods_file(learnt.finished.run).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedError, match=r"reference-likelihoods\.json is not valid JSON"):
        train(config, run)


@needs_steady_kernels
@pytest.mark.slow("trains, stops and resumes")
def test_a_run_that_is_stopped_goes_on_bit_for_bit(tmp_path, learnt, monkeypatch) -> None:
    whole, config = learnt.finished, learnt.finished.config
    run = prepare(config, tmp_path / "run")
    with pytest.raises(TrainingStopped):
        train(config, run, on_start=stop_after(3))
    kept = regular_sha256(find_likelihoods_file(run))
    monkeypatch.delattr(reference_likelihoods, "_compute_likelihoods")  # they are computed once
    steps.write_run_config(config, run, resume=True)
    resumed = train(config, run)
    assert resumed.result.step == 6
    assert regular_sha256(find_likelihoods_file(run)) == kept
    assert read_adapter(run.adapter).digest() == read_adapter(whole.run.adapter).digest()
    assert [one["val_loss"] for one in resumed.metrics() if "val_loss" in one] == [
        one["val_loss"] for one in whole.metrics() if "val_loss" in one
    ]


@pytest.mark.slow("trains and judges")
@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_the_other_losses_learn_too(tmp_path: Path, loss: str) -> None:
    judged = run_and_judge(make_config(write_pairs(tmp_path / "data"), loss), tmp_path / "run")
    assert judged.codes == []
    block = judged.block
    assert (block["loss"], block["conclusion"]) == (loss, "better")
    assert (block["reference"], block["reference_error"]) == (None, None)


def test_a_margin_that_grew_while_answers_turned_to_nonsense_is_refused(tmp_path, learnt) -> None:
    config = make_config(write_pairs(tmp_path / "data"), "dpo", learning_rate=3e-3)
    assert config.gate_bounds.max_kl == learnt.finished.config.gate_bounds.max_kl == 4.0
    judged = run_and_judge(config, tmp_path / "run")
    assert judged.block["conclusion"] == "better"
    assert judged.block["kl_initial"] > 4 > learnt.block["kl_initial"]
    assert "drift" in judged.codes
    message = next(reason.message for reason in judged.verdict.reasons if reason.code == "drift")
    assert "gate.max_kl is 4" in message
    assert "drift" not in learnt.codes


def judge_own_answers(path: Path, learning_rate: float) -> Judged:
    """A run on pairs of two answers of which the base gives either: both can only fall."""
    splits = {split: list_pairs_of_own_answers(split) for split in ("train", "valid")}
    data = write_rows(path / "data", splits)
    values = make_values(data, "dpo", learning_rate=learning_rate)
    return run_and_judge(parse_config(values, source="test.yaml"), path / "run")


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """A run that answers "Ask Tina." to nearly everything, with a divergence below its bound."""
    return judge_own_answers(tmp_path_factory.mktemp("collapsed"), 3e-4)


def test_a_margin_that_grew_while_chosen_answers_became_unlikely_is_refused(
    tmp_path: Path, collapsed: Judged
) -> None:
    assert collapsed.codes == ["preference_not_learnt"]
    (reason,) = collapsed.verdict.reasons
    assert "chosen answers became less likely themselves, -3.1" in reason.message
    assert "gate.max_chosen_fall is 1" in reason.message
    block = collapsed.block
    assert block["conclusion"] == "better"
    assert block["kl_initial"] < 4
    assert block["chosen_change"] < block["chosen_change_interval"][1] < -1
    (row,) = (row for row in list_checks(collapsed.verdict) if row.bound == "falls by at most 1")
    assert row.has_failed
    sound = judge_own_answers(tmp_path, 3e-5)
    assert sound.codes == []
    assert sound.block["conclusion"] == "better"
    assert -0.1 < sound.block["chosen_change"] <= 0


@pytest.mark.slow("trains and judges")
def test_without_a_held_out_pair_the_verdict_says_that_nothing_was_measured(tmp_path) -> None:
    data = write_rows(tmp_path / "data", {"train": list_pairs("train")[:16]})
    judged = run_and_judge(make_config(data, "dpo"), tmp_path / "run")
    assert judged.block == {"loss": "dpo", "examples": 0}
    said = "whether the preference was learnt was not measured: there is no held-out pair"
    assert any(said in note for note in judged.verdict.notes())
    assert not any("preference" in check.name for check in list_checks(judged.verdict))


def test_how_far_chosen_answers_may_fall_is_a_key_of_the_gate(collapsed: Judged) -> None:
    config, run = collapsed.finished.config, collapsed.finished.run
    gate = config.gate.model_copy(update={"max_chosen_fall": None})
    verdict = run_gate_checks(config.model_copy(update={"gate": gate}), run).verdict
    assert verdict.reasons == ()
    assert any("chosen answers became less likely themselves" in note for note in verdict.notes())


def test_a_fall_that_chance_explains_is_no_reason(learnt: Judged) -> None:
    def find(change: float, interval: tuple[float, float] | None, bound: float | None) -> int:
        fields = {"chosen_change": change, "chosen_change_interval": interval}
        verdict = PreferenceVerdict(**learnt.block | fields)
        return len(list(find_fall(verdict, bound)))

    assert find(-1.5, (-2.0, -1.1), 1.0) == 1
    assert find(-1.5, (-2.0, -0.9), 1.0) == 0
    assert find(-1.5, (-2.0, -1.1), 2.0) == 0
    assert find(-1.5, (-2.0, -1.1), None) == 0
    # The mean decides where too few pairs give an interval
    assert find(-1.5, None, 1.0) == 1
    assert find(-0.5, None, 1.0) == 0


def test_the_bound_of_the_divergence_is_that_of_the_file_where_it_has_one(tmp_path) -> None:
    data = write_pairs(tmp_path / "data")
    assert make_config(data, "dpo", gate={"max_kl": 9.0}).gate_bounds.max_kl == 9.0
    without = make_config(data, "dpo", gate={"max_kl": None, "drift": True})
    assert (without.gate.max_kl, without.gate_bounds.max_kl) == (None, 4.0)
    assert make_config(data, "dpo", training={}).gate_bounds.max_kl is None


def test_held_out_pairs_are_required_by_the_bound_of_the_file_and_not_by_that_of_the_loss(
    tmp_path,
) -> None:
    data = write_rows(tmp_path / "data", {"train": list_pairs("train")})
    config = make_config(data, "dpo")
    run = prepare(config, tmp_path / "run")
    steps.require_held_out_examples(config, run)
    asked = make_config(data, "dpo", gate={"max_kl": 4.0})
    with pytest.raises(ConfigError, match=r"gate\.max_kl: .* neither test\.jsonl nor valid"):
        steps.require_held_out_examples(asked, run)


def test_planted_pairs_of_train_are_swapped(tmp_path: Path, learnt: Judged) -> None:
    splits = {"train": list_swapped_pairs("train"), "valid": list_pairs("valid")}
    data = write_rows(tmp_path / "data", splits)
    judged = run_and_judge(make_config(data, "dpo"), tmp_path / "run")
    assert "preference_not_learnt" in judged.codes
    assert "preference_not_learnt" not in learnt.codes
    assert (judged.block["conclusion"], learnt.block["conclusion"]) == ("worse", "better")
    assert judged.verdict.outcome.startswith("Rejected: ")


@pytest.mark.slow("trains and judges")
def test_planted_reference_is_the_trained_model(tmp_path, learnt, monkeypatch) -> None:
    monkeypatch.setenv("TRAINED_ADAPTER", str(learnt.finished.run.adapter))
    monkeypatch.setattr(reference_likelihoods, "read_adapter", read_adapter)  # put back afterwards
    read_trained(reference_likelihoods)
    config = learnt.finished.config
    judged = run_and_judge(config, tmp_path / "run")
    assert "preference_not_learnt" in judged.codes
    message = next(r.message for r in judged.verdict.reasons if r.code == "preference_not_learnt")
    assert "was not the initial adapter" in message
    assert judged.block["reference_error"] > 0.02 > learnt.block["reference_error"]
    assert "preference_not_learnt" not in learnt.codes


@pytest.mark.slow("trains and judges")
def test_planted_mask_counts_the_prompt(tmp_path: Path, monkeypatch) -> None:
    pairs = list_pairs("train")[:9]  # by content of its own, so that no cache has it
    data = write_rows(tmp_path / "data", {"train": pairs})
    config = make_config(data, "dpo")
    with monkeypatch.context() as planted:
        planted.setitem(PAIRS, "pair", PAIRS["pair"])  # put back afterwards
        count_prompts(answer_rows)
        uncached = example_parsing.formats_of_loss.__wrapped__
        planted.setattr(example_parsing, "formats_of_loss", uncached)
        planted.setattr(parallel_jobs, "ask_kept_cell", parallel_jobs.run_job)  # has no plant
        run = prepare(config, tmp_path / "run")
        with pytest.raises(DatasetError, match="the loss would count prompts too"):
            train(config, run)
    twin = write_rows(tmp_path / "twin", {"train": list_pairs("train")[:10]})
    config = make_config(twin, "dpo")
    assert train(config, prepare(config, tmp_path / "twin-run")).result.step == 6
