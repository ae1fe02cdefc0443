"""Nights whose outcome is known: nothing is trained, and the history says which, when and why."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import GateRejected
from nested_core.models.base_model import fingerprint_base_model
from nested_core.pipeline import continual, steps
from nested_core.pipeline.continual import conditions_digest, find_reason_to_skip
from nested_core.pipeline.finetune import FinetuneResult, finetune
from nested_core.pipeline.hooks import Steps
from nested_core.records.dataset import read_dataset_record
from nested_core.records.outcome_names import Outcome
from nested_core.records.run_status import Run
from nested_core.records.skip import Skip, read_skip
from nested_core.records.verdict import Reason
from nested_core.records.verdict_file import read_verdict
from nested_core.registry import history, list_names, list_versions, read_champion, rollback
from nested_core.registry.judgements import read_verdicts, write_judgement
from nested_core.registry.ledger import read_ledger
from nested_core.registry.link_and_views import writing
from nested_core.registry.policy import set_policy
from nested_core.report.outcome import describe_end, describe_outcome, find_outcome
from nested_core.seams import load
from nested_core.storage.run_directory import RunDirectory, open_run
from tests.builders.suites import write_suite
from tests.example import DATA, MODEL, example_config
from tests.left_out import needs_rooms
from tests.registry_care import forget_rows

pytestmark = pytest.mark.slow("trains and judges nights")

FOLLOWING = {"from": "champion", "allow_high_rate": True}
NAME = "capitals"
# What training itself does not see, and what then becomes of the adapter rests on.
ANOTHER_NIGHT = pytest.mark.slow("prepares another night")
RUINOUS = {"learning_rate": 0.05}
UNBEATEN = RUINOUS | {"gate": {"max_val_loss_increase": 1e3, "max_harmed_share": 1.0}}
HARDLY_BETTER = {"learning_rate": 1e-7}


def configure(folder: Path, **changes: Any) -> FineTuneConfig:
    registry = {"path": str(folder / "registry"), "name": NAME, "promote": "better"}
    settings = {"registry": registry, "continual": FOLLOWING, "val_batches": 1}
    return example_config(**{"data": str(folder / "data"), "iters": 4} | settings | changes)


class Watched(Steps):
    """Notes whether anything was trained."""

    has_trained = False

    def train(self, *arguments: Any) -> Any:
        """Train, and note it."""
        self.has_trained = True
        return super().train(*arguments)


def night(folder: Path, name: str, **changes: Any) -> tuple[FinetuneResult | Outcome, bool]:
    """A night: its result, or the outcome of a rejection; and whether anything was trained."""
    config, run, watched = configure(folder, **changes), open_run(folder / name), Watched()
    result: FinetuneResult | Outcome
    try:
        result = finetune(config, run, watched)
    except GateRejected:
        result = read_verdict(run.gate).outcome
    return result, watched.has_trained


def skip_of(folder: Path, name: str, **changes: Any) -> Skip:
    """Why a night trained nothing."""
    result, has_trained = night(folder, name, **changes)
    assert not has_trained
    assert isinstance(result, FinetuneResult)
    assert result.skipped is not None
    assert not (folder / name / "metrics.jsonl").exists()
    return result.skipped


def trial_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in history(folder / "registry", NAME) if line["action"] == "tried"]


def write_data(folder: Path) -> None:
    """The first lines of the example's training set, and its validation set."""
    folder.mkdir(parents=True)
    lines = (DATA / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:24]))
    shutil.copyfile(DATA / "valid.jsonl", folder / "valid.jsonl")


def conditions_of(config: FineTuneConfig, run: RunDirectory, champion: str | None) -> str | None:
    """The digest of all that decides about a run whose dataset.json was written."""
    dataset = read_dataset_record(run.dataset)
    settings = continual.settings_digest(config, fingerprint_base_model(MODEL), run, dataset)
    return conditions_digest(config, dataset, settings, champion)


@pytest.fixture(scope="module")
def first_night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a registry with the champion of a first night."""
    folder = tmp_path_factory.mktemp("nights")
    write_data(folder / "data")
    result, _ = night(folder, "first", iters=16)
    assert isinstance(result, FinetuneResult)
    assert result.promotion == "promoted"
    return folder


@pytest.fixture(scope="module")
def rejected_once(first_night: Path) -> Path:
    """The same after a night that was rejected."""
    assert night(first_night, "rejected", **RUINOUS) == (Outcome.WORSE, True)
    return first_night


@pytest.fixture
def folder(rejected_once: Path, tmp_path: Path) -> Path:
    """A copy of it, for a test that changes it."""
    shutil.copytree(rejected_once / "registry", tmp_path / "registry", symlinks=True)
    shutil.copytree(rejected_once / "data", tmp_path / "data")
    return tmp_path


def test_a_rejected_night_is_one_line_of_the_history_with_what_decided_it(rejected_once) -> None:
    (line,) = trial_lines(rejected_once)
    dataset = json.loads((rejected_once / "rejected" / "dataset.json").read_bytes())
    (promotion,) = history(rejected_once / "registry", NAME)[:1]
    assert (line["version"], line["previous"]) == (None, promotion["version"])
    assert (line["outcome"], line["run"]) == ("Rejected: worse", "rejected")
    assert line["reason"].startswith("loss_regressed, examples_harmed; validation loss ")
    assert line["dataset_digest"] == dataset["digest"]
    assert line["settings_digest"] == continual.settings_digest(
        configure(rejected_once, **RUINOUS),
        fingerprint_base_model(MODEL),
        RunDirectory(rejected_once / "rejected"),
        read_dataset_record(rejected_once / "rejected" / "dataset.json"),
    )


def test_the_next_night_trains_nothing_and_says_which_when_and_why(folder: Path) -> None:
    ledger = (folder / "registry" / NAME / "history.jsonl").read_bytes()
    (line,) = trial_lines(folder)
    for number in range(3):
        skip = skip_of(folder, f"again-{number}", **RUINOUS)
        assert skip.outcome == Outcome.SKIPPED_HOPELESS
        assert skip.reason.startswith("rejected as worse on ")
        assert skip.details == (
            f"with this data, these settings and this champion (run rejected): {line['reason']}"
        )
        assert "continual.skip_unchanged: false" in skip.describe()
    assert (folder / "registry" / NAME / "history.jsonl").read_bytes() == ledger


def test_the_folder_of_a_skipped_night_says_so_on_every_screen(folder: Path) -> None:
    skip = skip_of(folder, "again", **RUINOUS)
    run = Run(RunDirectory(folder / "again"))
    assert read_skip(run.folder.skipped) == skip
    assert find_outcome(run) == Outcome.SKIPPED_HOPELESS
    assert describe_outcome(run) == f"Skipped: hopeless: {skip.reason}"
    assert describe_end(run) == f"Nothing was trained: {skip.describe()}."
    assert skip.reason in run.folder.report.read_text()


@pytest.mark.slow("trains and judges")
def test_who_insists_trains_and_adds_no_second_line(folder: Path) -> None:
    insisting = {"continual": FOLLOWING | {"skip_unchanged": False}}
    assert night(folder, "insisting", **RUINOUS, **insisting) == (Outcome.WORSE, True)
    assert len(trial_lines(folder)) == 1
    assert skip_of(folder, "after", **RUINOUS).outcome == Outcome.SKIPPED_HOPELESS


@pytest.mark.slow("trains and judges")
def test_a_skipped_night_that_is_resumed_with_insistence_trains(folder: Path) -> None:
    skip_of(folder, "again", **RUINOUS)
    config = configure(folder, **RUINOUS, continual=FOLLOWING | {"skip_unchanged": False})
    run = open_run(folder / "again", resume=True)
    with pytest.raises(GateRejected):
        finetune(config, run, Steps(), resume=True)
    assert not run.skipped.exists()
    assert find_outcome(Run(run)) == Outcome.WORSE


def reason_to_skip(folder: Path, **changes: Any) -> Skip | None:
    """What a night would find after its data was validated; nothing is trained."""
    config, run = configure(folder, **RUINOUS | changes), RunDirectory(folder / "asked")
    run.path.mkdir()
    steps.write_run_config(config, run, resume=False)
    steps.validate(config, run)
    return find_reason_to_skip(config, run)


def test_the_same_night_in_another_folder_is_the_same(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder / "data", elsewhere)
    assert reason_to_skip(folder, data=str(elsewhere), save_every=2, test=False) is not None


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"learning_rate": 0.04}, marks=ANOTHER_NIGHT),
        {"seed": 3},
        {"gate": {"max_val_loss_increase": 0.5}},
        pytest.param({"gate": {"noise": "none"}}, marks=ANOTHER_NIGHT),
        pytest.param({"continual": {}}, marks=ANOTHER_NIGHT),
        pytest.param({"continual": FOLLOWING | {"policy": "rebuild"}}, marks=needs_rooms("replay")),
    ],
    ids=str,
)
def test_a_night_that_may_come_to_something_else_trains(folder: Path, changes: Any) -> None:
    assert reason_to_skip(folder, **changes) is None


def add_line(file: Path) -> None:
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[0].replace("?", "??", 1)]))


def change_policy(folder: Path) -> None:
    set_policy(folder / "registry", NAME, by="ann", changes={"promote": "approve"})


def change_champion(folder: Path) -> None:
    """Another version becomes champion."""
    result, _ = night(folder, "better", iters=8, seed=7, registry=always(folder))
    assert isinstance(result, FinetuneResult)
    assert result.promotion == "promoted"


def always(folder: Path) -> dict[str, str]:
    return {"path": str(folder / "registry"), "name": NAME, "promote": "always"}


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: add_line(folder / "data" / "train.jsonl"),
        lambda folder: add_line(folder / "data" / "valid.jsonl"),
        pytest.param(change_policy, marks=needs_rooms("approval")),
        pytest.param(change_champion, marks=pytest.mark.slow("trains and judges")),
    ],
    ids=["training data", "held-out data", "policy", "champion"],
)
def test_what_decides_and_has_changed_is_a_reason_to_train(folder, change) -> None:
    change(folder)
    assert reason_to_skip(folder) is None


def test_the_conditions_are_those_of_contents_and_not_of_paths(folder: Path) -> None:
    """Each thing that the gate reads is told from another by its bytes."""
    suite, text = write_suite(folder / "suite.jsonl"), folder / "text.jsonl"
    text.write_text('{"text": "once"}\n')
    held_out = shutil.copyfile(folder / "data" / "valid.jsonl", folder / "held-out.jsonl")
    gate = {
        "tasks": [{"name": "t", "file": str(suite), "score": "exact"}],
        "general_data": str(text),
        "max_general_loss_increase": 1.0,
        "held_out": str(held_out),
    }
    reason_to_skip(folder)  # writes dataset.json
    run = RunDirectory(folder / "asked")

    def digest(gate: dict[str, Any]) -> str | None:
        return conditions_of(configure(folder, gate=gate), run, None)

    before = digest(gate)
    moved = shutil.copyfile(text, folder / "moved.jsonl")
    assert digest(gate | {"general_data": str(moved)}) == before
    for file in (suite, text, held_out):
        content = file.read_bytes()
        file.write_bytes(content + content)
        assert digest(gate) != before, file
        file.write_bytes(content)
    assert digest(gate) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_night_with_another_tokenizer_or_end_of_answers_trains(folder, tmp_path, name) -> None:
    base = shutil.copytree(MODEL, tmp_path / "base")
    file = base / name
    file.write_text(file.read_text() + " ")
    assert reason_to_skip(folder, model=str(base)) is None


@needs_rooms("replay")
def test_the_conditions_hold_the_ancestors_examples_the_device_and_the_packages(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason_to_skip(folder)  # writes dataset.json
    run, champion = RunDirectory(folder / "asked"), read_champion(folder / "registry", NAME)
    config = configure(folder, gate={"max_ancestor_loss_increase": 0.1})
    before = conditions_of(config, run, champion)
    assert conditions_of(config, run, champion) == before
    with monkeypatch.context() as patch:
        patch.setattr("nested_core.backend.device_name", lambda: "gpu of another machine")
        assert conditions_of(config, run, champion) != before
    with monkeypatch.context() as patch:
        patch.setattr(continual, "installed_version", lambda name: f"another {name}")
        assert conditions_of(config, run, champion) != before
    is_judged = configure(folder, gate={})
    as_before = conditions_of(is_judged, run, champion)
    row = json.loads((folder / "data" / "valid.jsonl").read_text().splitlines()[0])
    forget_rows(folder / "registry", NAME, lambda stored: stored == row, by="ann")
    assert conditions_of(config, run, champion) != before
    assert conditions_of(is_judged, run, champion) == as_before  # no ancestor judges there


def test_what_a_function_scores_is_never_known(folder: Path) -> None:
    reason_to_skip(folder)
    task = {"name": "t", "file": "s.jsonl", "score": "python", "function": "os.path:join"}
    gate = {"tasks": [task], "allow_python_scorers": True}
    run = RunDirectory(folder / "asked")
    assert conditions_of(configure(folder, gate=gate), run, None) is None


@pytest.mark.slow("trains and judges")
def test_a_night_that_kept_the_champion_is_not_trained_again(folder: Path) -> None:
    result, has_trained = night(folder, "kept", **UNBEATEN)
    assert has_trained
    assert isinstance(result, FinetuneResult)
    assert result.kept_champion is not None
    skip = skip_of(folder, "after", **UNBEATEN)
    assert skip.outcome == Outcome.SKIPPED_HOPELESS
    assert skip.reason.startswith("no better than the champion on ")


@pytest.mark.slow("trains and judges")
def test_a_version_that_the_rule_of_promotion_blocks_is_made_once(folder: Path) -> None:
    result, _ = night(folder, "blocked", **HARDLY_BETTER)
    assert isinstance(result, FinetuneResult)
    assert result.version in list_versions(folder / "registry", NAME)
    skip = skip_of(folder, "after", **HARDLY_BETTER)
    assert (skip.outcome, skip.version) == (Outcome.SKIPPED_HOPELESS, result.version)
    assert skip.reason.startswith("not promoted on ")
    assert skip.details == f"({skip.version:.12}, on the same data): {result.promotion}"


@pytest.mark.slow("trains and judges")
def test_a_first_night_that_was_rejected_is_not_trained_again(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    ruin = {"learning_rate": 1e3}
    result, has_trained = night(tmp_path, "first", **ruin)
    assert has_trained
    assert isinstance(result, Outcome)
    assert list_names(tmp_path / "registry") == [NAME]
    assert list_versions(tmp_path / "registry", NAME) == []
    skip = skip_of(tmp_path, "second", **ruin)
    assert "these settings and no champion (run first): " in str(skip.details)


@pytest.fixture(scope="module")
def asked(first_night: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry in which a better version waits for a person."""
    folder = tmp_path_factory.mktemp("asked")
    shutil.copytree(first_night / "registry", folder / "registry", symlinks=True)
    shutil.copytree(first_night / "data", folder / "data")
    set_policy(folder / "registry", NAME, by="ann", changes={"promote": "approve"})
    result, _ = night(folder, "waiting", iters=24, learning_rate=3e-4)
    assert isinstance(result, FinetuneResult)
    assert result.decision is not None
    assert result.decision.outcome == "waiting"
    return folder


def copied(folder: Path, to: Path) -> Path:
    for name in ("registry", "data"):
        shutil.copytree(folder / name, to / name, symlinks=True)
    return to


@needs_rooms("approval")
@pytest.mark.slow("trains and judges two runs")
def test_a_version_that_waits_for_a_person_is_not_trained_again(asked: Path, tmp_path) -> None:
    folder = copied(asked, tmp_path)
    skip = skip_of(folder, "again", iters=24, learning_rate=3e-4)
    assert skip.outcome == Outcome.SKIPPED_UNCHANGED
    assert skip.version in list_versions(folder / "registry", NAME)
    assert skip.reason.endswith(", on the same data, waits for approval")


@needs_rooms("approval")
@pytest.mark.slow("trains and judges two runs")
def test_a_version_that_was_rejected_while_it_waited_is_trained_again(asked: Path, tmp_path):
    folder = copied(asked, tmp_path)
    path, ledger = folder / "registry" / NAME, read_ledger(folder / "registry" / NAME)
    version = skip_of(folder, "again", iters=24, learning_rate=3e-4).version
    newest = read_verdicts(path, str(version), ledger)[-1]
    rejecting = replace(newest.verdict, reasons=(Reason("task_below", "worse"),))
    stricter = newest.facts.model_copy(update={"conditions_digest": "5e" * 32})
    with writing(path.parent, NAME) as held:
        judgement = replace(newest, verdict=rejecting, facts=stricter)
        digest = write_judgement(path, judgement, confirm=held.confirm)
        held.record("judged", version, "ann", judgement=digest)
    find = load("nested_core.rooms.approval.answers:find_refusal_of_question")
    assert "rejected" in str(find(path.parent, NAME, version)), "nobody is asked"
    _, has_trained = night(folder, "once more", iters=24, learning_rate=3e-4)
    assert has_trained


@needs_rooms("approval")
@pytest.mark.slow("trains and judges two runs")
def test_a_declined_night_names_who_said_no_and_why(asked: Path, tmp_path: Path) -> None:
    folder = copied(asked, tmp_path)
    (version,) = {line.version for line in read_ledger(folder / "registry" / NAME).entries} - {
        None,
        history(folder / "registry", NAME)[0]["version"],
    }
    decline = load("nested_core.rooms.approval.answers:decline")
    decline(folder / "registry", NAME, str(version), by="bob", reason="too curt")
    skip = skip_of(folder, "again", iters=24, learning_rate=3e-4)
    assert (skip.outcome, skip.version) == (Outcome.SKIPPED_HOPELESS, version)
    assert skip.reason.startswith("declined already, on ")
    assert " by bob: too curt. Nobody is asked again until data or settings" in skip.reason


@pytest.mark.slow("trains and judges")
def test_a_night_whose_version_a_person_rolled_back_is_not_trained_again(folder: Path) -> None:
    change_champion(folder)
    rollback(folder / "registry", NAME, by="bob", reason="rude")
    skip = skip_of(folder, "again", iters=8, seed=7, registry=always(folder))
    assert skip.outcome == Outcome.SKIPPED_HOPELESS
    assert skip.reason.startswith("rolled back on ")
    assert skip.reason.endswith(" by bob: rude")


@pytest.mark.slow("trains and judges")
def test_a_version_that_its_policy_leaves_alone_is_made_once(folder: Path) -> None:
    never = always(folder) | {"promote": "never"}
    result, _ = night(folder, "alone", iters=8, seed=7, registry=never)
    assert isinstance(result, FinetuneResult)
    skip = skip_of(folder, "again", iters=8, seed=7, registry=never)
    assert (skip.outcome, skip.version) == (Outcome.SKIPPED_UNCHANGED, result.version)
    assert skip.details == "and registry.promote is never"
