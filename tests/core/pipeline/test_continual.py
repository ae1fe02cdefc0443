"""Runs that go on from the champion: their start, what they record, and when they are skipped."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.loading import parse_config
from nested_core.config.schema import FineTuneConfig
from nested_core.data.example_digests import TrainedRows
from nested_core.errors import ConfigError, DamagedError
from nested_core.measure.losses.left_out_examples import read_run_rows
from nested_core.pipeline import continual, steps
from nested_core.pipeline.continual import (
    champion_or_none,
    describe_starting_adapter,
    find_reason_to_skip,
)
from nested_core.pipeline.publishing import (
    read_run_examples,
    register_and_promote_run,
    register_run,
)
from nested_core.records.dataset import read_dataset_record
from nested_core.records.judged_run import read_judged_run
from nested_core.records.loss_conclusion import Conclusion
from nested_core.records.verdict import ChampionLoss, JudgedAdapter, TaskResult, Validation, Verdict
from nested_core.registry import list_versions, read_champion
from nested_core.registry.data_store import read_lineage, read_stored_data
from nested_core.report.outcome import find_kept_champion
from nested_core.storage.adapter import read_adapter
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays, save_arrays
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.example import DATA, MODEL, example_config, prepare, train
from tests.left_out import slow_except
from tests.registry_care import collect_garbage
from tests.runs import not_registered

pytestmark = pytest.mark.slow("trains on from champions")

ANOTHER_NIGHT = pytest.mark.slow("prepares another night")
NAME = "capitals"
TEMPLATE = json.loads((MODEL / "tokenizer_config.json").read_text())["chat_template"]
SECONDS_FOR_A_CHANGE = 0.25  # it takes some milliseconds, and all of this where it has to wait
Configure = Callable[..., FineTuneConfig]


def write_data(folder: Path, lines: slice) -> Path:
    """A data set with some of the example's training lines, and its validation set."""
    folder.mkdir()
    train_lines = (DATA / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(train_lines[lines]))
    (folder / "valid.jsonl").write_text((DATA / "valid.jsonl").read_text())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Monday's data, and Tuesday's."""
    folder = tmp_path_factory.mktemp("continual")
    write_data(folder / "monday", slice(0, 20))
    write_data(folder / "tuesday", slice(10, 30))
    return folder


def configure(folder: Path, data: str, **changes: Any) -> FineTuneConfig:
    target = {"path": str(folder / "registry"), "name": NAME, "promote": "always"}
    settings = {"registry": target, "continual": {"from": "champion"}, "val_batches": 1}
    return example_config(data=str(folder / data), iters=4, **settings | changes)


def generation(
    folder: Path, data: str, suffix: str = "", **changes: Any
) -> tuple[RunDirectory, str]:
    """Train, judge, register and promote a run on a day's data."""
    config = configure(folder, data, **changes)
    finished = train(config, prepare(config, folder / f"run-{data}{suffix}"))
    champion = champion_or_none(folder / "registry", NAME)
    steps.judge(config, finished.run)
    return finished.run, register_run(config, read_judged_run(finished.run.path), champion).version


@pytest.fixture(scope="module")
def monday(folder: Path) -> tuple[RunDirectory, str]:
    return generation(folder, "monday")


@pytest.fixture(scope="module")
def tuesday(folder: Path, monday: tuple[RunDirectory, str]) -> tuple[RunDirectory, str]:
    return generation(folder, "tuesday")


def provenance_of(folder: Path, version: str) -> dict[str, Any]:
    path = folder / "registry" / NAME / "versions" / version / "provenance.json"
    return dict(json.loads(path.read_bytes()))


def test_a_version_keeps_the_examples_that_it_was_trained_and_judged_on(
    folder: Path, monday: tuple[RunDirectory, str], tuesday: tuple[RunDirectory, str]
) -> None:
    registry = folder / "registry"
    assert read_lineage(registry, NAME, tuesday[1]) == [tuesday[1], monday[1]]
    for day, (_, version) in (("monday", monday), ("tuesday", tuesday)):
        kept = read_stored_data(registry, NAME, version)
        assert kept is not None
        for split, rows in (("train", kept.train), ("valid", kept.held_out)):
            lines = (folder / day / f"{split}.jsonl").read_text().splitlines()
            assert [row.row for row in rows] == [json.loads(line) for line in dict.fromkeys(lines)]


def test_data_that_changed_before_its_run_was_registered_is_not_kept_and_said(
    folder: Path, monday: tuple[RunDirectory, str], tmp_path: Path
) -> None:
    changed = shutil.copytree(folder / "monday", tmp_path / "changed")
    config = configure(tmp_path, "changed")
    assert read_run_examples(config, not_registered(monday[0])) is not None
    with (changed / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "New?", "completion": "Yes."}) + "\n")
    with pytest.warns(UserWarning, match="keeps no examples .* the train set of .* has changed"):
        left = read_run_examples(config, not_registered(monday[0]))
    rows = sum(split.rows for split in read_dataset_record(monday[0].dataset).splits.values())
    assert left is not None
    assert (left.listed.all(), left.listed.dropped) == (set(), rows)
    kept_off = configure(
        tmp_path, "changed", registry={"path": "r", "name": NAME, "keep_data": False}
    )
    assert read_run_examples(kept_off, not_registered(monday[0])) is None


@pytest.mark.slow("trains and judges a run of its own")
def test_without_a_champion_the_first_run_starts_fresh_and_says_so(folder, monday) -> None:
    run, version = monday
    note = describe_starting_adapter(configure(folder, "monday"), run)
    assert note == "capitals had no champion when the run began: starting from a fresh adapter"
    assert provenance_of(folder, version)["parent"] is None


def test_the_next_run_starts_from_the_champion_and_is_judged_against_it(
    folder: Path, monday: tuple[RunDirectory, str], tuesday: tuple[RunDirectory, str]
) -> None:
    run, version = tuesday
    parent = monday[1]
    assert read_adapter(run.initial).digest() == parent
    assert read_adapter(run.initial).tensors == read_adapter(monday[0].adapter).tensors
    gate = json.loads(run.gate.read_bytes())
    assert (gate["verdict"], gate["initial"]["digest"]) == ("passed", parent)
    before = json.loads(monday[0].gate.read_bytes())["validation"]["loss_after"]
    assert gate["validation"]["loss_before"] == pytest.approx(before, rel=1e-6)
    recorded = provenance_of(folder, version)
    assert (recorded["parent"], recorded["champion_at_gate"]) == (parent, parent)
    assert champion_or_none(folder / "registry", NAME) == version
    note = describe_starting_adapter(configure(folder, "tuesday"), run)
    assert note == f"starting from version {parent[:12]} of capitals"


def test_another_registry_gets_all_rows_of_a_nights_ancestors_and_no_version_of_the_first(
    tuesday: tuple[RunDirectory, str], tmp_path: Path
) -> None:
    run = RunDirectory(shutil.copytree(tuesday[0].path, tmp_path / "run"))
    register_and_promote_run(run, tmp_path / "live" / "registry", NAME, by="ann")
    recorded = provenance_of(tmp_path / "live", tuesday[1])
    rows = TrainedRows.from_json(recorded, "it")
    assert (rows.digests.size, rows.unknown) == (30, None)  # Monday's 20 and Tuesday's 20, 10 twice
    assert (recorded["parent"], recorded["champion_at_gate"]) == (None, None)


def test_a_run_knows_from_its_beginning_what_the_runs_adapter_that_it_goes_on_from_learnt(
    folder: Path, monday: tuple[RunDirectory, str], tmp_path: Path
) -> None:
    file = str(monday[0].adapter / "adapters.safetensors")
    config = example_config(data=str(folder / "tuesday"), iters=4, resume_adapter_file=file)
    rows = read_run_rows(prepare(config, tmp_path / "run"))
    assert (rows.digests.size, rows.unknown) == (30, None)


def test_a_night_from_a_champion_of_another_chat_template_warns_and_knows_its_rows(
    folder: Path, tuesday: tuple[RunDirectory, str], tmp_path: Path
) -> None:
    base = shutil.copytree(MODEL, tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] += " "
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    config = configure(folder, "monday", model=str(base), max_seq_length=14)
    with pytest.warns(UserWarning, match="champion .* trained with another chat template"):
        run = prepare(config, tmp_path / "run")
    assert read_run_rows(run).digests.size == 30


def unchanged(folder: Path, path: Path, data: str, **changes: Any) -> str | None:
    config, run = configure(folder, data, **changes), RunDirectory(path)
    path.mkdir()
    steps.write_run_config(config, run, resume=False)
    steps.validate(config, run)
    skip = find_reason_to_skip(config, run)
    return None if skip is None else skip.version


@pytest.mark.parametrize(
    "changes",
    [{}, {"steps_per_report": 3}, {"save_every": 2}, {"gate": {"max_val_loss_increase": 0.5}}],
)
def test_a_run_on_the_data_that_the_champion_was_trained_on_is_skipped(
    folder: Path, tuesday: tuple[RunDirectory, str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert unchanged(folder, tmp_path / "run", "tuesday", **changes) == tuesday[1]


@pytest.mark.slow("two nights more")
def test_a_run_from_the_base_is_no_repetition_of_a_champion_that_went_on(
    folder, tuesday, tmp_path
) -> None:
    nights = shutil.copytree(folder, tmp_path / "nights", symlinks=True)
    write_data(nights / "week", slice(0, 30))  # with all rows of the nights before
    length: dict[str, Any] = {"training": {"epochs": 1}, "gate": {"max_val_loss_increase": 10.0}}
    rebuild = {"from": "champion", "policy": "rebuild"}
    _, champion = generation(nights, "week", **length)
    assert unchanged(nights, tmp_path / "same", "week", **length) == champion
    assert unchanged(nights, tmp_path / "base", "week", **length, continual=rebuild) is None
    _, rebuilt = generation(nights, "week", "again", **length, continual=rebuild)
    assert rebuilt != champion
    assert unchanged(nights, tmp_path / "rest", "week", **length, continual=rebuild) == rebuilt


def test_the_same_lines_in_another_folder_are_the_same_data(folder, tuesday, tmp_path) -> None:
    copy = write_data(tmp_path / "copy", slice(10, 30))
    assert unchanged(folder, tmp_path / "run", str(copy)) == tuesday[1]


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        ("monday", {}),
        ("tuesday", {"learning_rate": 1e-3}),
        pytest.param("tuesday", {"seed": 5}, marks=ANOTHER_NIGHT),
        pytest.param("tuesday", {"nested": {"frequencies": [1, 2, 2]}}, marks=ANOTHER_NIGHT),
        ("tuesday", {"continual": {"from": "champion", "skip_unchanged": False}}),
        ("tuesday", {"continual": {}}),
    ],
)
def test_other_data_or_settings_are_a_reason_to_train(
    folder, tuesday, tmp_path, data, changes
) -> None:
    assert unchanged(folder, tmp_path / "run", data, **changes) is None


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


OTHER_BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "template": ("tokenizer_config.json", {"chat_template": TEMPLATE + " "}),
    "first token": ("tokenizer_config.json", {"bos_token": None}),
    "normalizer": ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
    "ends": ("generation_config.json", {"eos_token_id": [0, 5]}),
}


@pytest.mark.parametrize("other", slow_except(OTHER_BASES, "template", reason="prepares two runs"))
def test_another_tokenizer_or_end_of_answers_is_a_reason_to_train(
    folder: Path, tuesday: tuple[RunDirectory, str], tmp_path: Path, other: str
) -> None:
    file, changes = OTHER_BASES[other]
    base = shutil.copytree(MODEL, tmp_path / "base")
    assert unchanged(folder, tmp_path / "same", "tuesday", model=str(base)) == tuesday[1]
    edit_json(base / file, **changes)
    assert unchanged(folder, tmp_path / "run", "tuesday", model=str(base)) is None


@pytest.mark.slow("prepares five runs")
def test_other_held_out_rows_are_a_reason_to_train(folder, tuesday, tmp_path) -> None:
    data = shutil.copytree(folder / "tuesday", tmp_path / "data")
    rows = (data / "valid.jsonl").read_text().splitlines(keepends=True)
    (data / "valid.jsonl").write_text("".join(rows[:6]))
    assert unchanged(folder, tmp_path / "fewer", str(data)) is None
    shutil.copyfile(folder / "tuesday" / "valid.jsonl", data / "valid.jsonl")
    assert unchanged(folder, tmp_path / "as-before", str(data)) == tuesday[1]
    (data / "test.jsonl").write_text((DATA / "train.jsonl").read_text().splitlines()[-1])
    assert unchanged(folder, tmp_path / "tested", str(data)) is None
    gate = {"held_out": str(data / "test.jsonl")}
    assert unchanged(folder, tmp_path / "outside", "tuesday", gate=gate) is None


def test_a_run_that_has_begun_to_train_is_not_skipped_when_resumed(folder, tuesday) -> None:
    assert find_reason_to_skip(configure(folder, "tuesday"), tuesday[0]) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_parameters": {"rank": 4}}, "rank: 8, now 4"),
        pytest.param(
            {"lora_parameters": {"scale": 3.0}}, "scale: 2.0, now 3.0", marks=ANOTHER_NIGHT
        ),
        pytest.param(
            {"lora_parameters": {"keys": ["self_attn.q_proj"]}},
            "keys: None, now",
            marks=ANOTHER_NIGHT,
        ),
        ({"num_layers": 2}, "num_layers: 3, now 2"),
        ({"fine_tune_type": "dora"}, "fine_tune_type: lora, now dora"),
    ],
)
def test_a_champion_of_other_settings_is_refused_with_what_differs(
    folder, tuesday, tmp_path, changes, named
) -> None:
    with pytest.raises(ConfigError, match="was trained with other settings") as caught:
        prepare(configure(folder, "monday", **changes), tmp_path / "run")
    assert named in str(caught.value)
    assert not (tmp_path / "run" / "initial").exists()


def test_a_champion_of_another_base_is_refused(folder, tuesday, tmp_path) -> None:
    other = Path(shutil.copytree(MODEL, tmp_path / "base"))
    weights = load_arrays(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_arrays(other / "model.safetensors", weights)
    with pytest.raises(ConfigError, match="was trained with other settings") as caught:
        prepare(configure(folder, "monday", model=str(other)), tmp_path / "run")
    assert "base_fingerprint: " in str(caught.value)


def test_a_champion_that_was_changed_on_disk_is_not_started_from(folder, tuesday, tmp_path) -> None:
    path = folder / "registry" / NAME / "versions" / tuesday[1] / "gate.json"
    sound = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(sound + b" ")
    try:
        with pytest.raises(DamagedError, match=r"gate\.json: has changed"):
            prepare(configure(folder, "monday"), tmp_path / "run")
    finally:
        path.write_bytes(sound)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"parent": NaN}', "[" * 100_000, None])
def test_a_champion_whose_provenance_is_damaged_is_no_reason_to_skip_or_to_train(
    folder: Path, tuesday: tuple[RunDirectory, str], tmp_path: Path, content: str | None
) -> None:
    path = folder / "registry" / NAME / "versions" / tuesday[1] / "provenance.json"
    sound = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_text(content)
    try:
        with pytest.raises(DamagedError, match=r"provenance\.json .*Restore ") as caught:
            unchanged(folder, tmp_path / "run", "tuesday")
    finally:
        path.write_bytes(sound)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", ["verify", "read_adapter", "read_provenance"])
def test_a_champion_is_not_collected_while_a_run_reads_it(
    folder, tuesday, tmp_path, monkeypatch, step
) -> None:
    registry = tmp_path / "registry"
    shutil.copytree(folder / "registry", registry, symlinks=True)
    others = [register(write_run(tmp_path / str(n), n), registry, NAME, {}) for n in range(2)]
    config = configure(folder, "tuesday", registry={"path": str(registry), "name": NAME})
    taken = getattr(continual, step)

    def change() -> None:
        for version in others:
            promote(registry, NAME, version, by="ann")
        collect_garbage(registry, NAME, by="gc", keep=0)

    other_process = threading.Thread(target=change)

    def after(*arguments: Any) -> Any:
        monkeypatch.undo()
        other_process.start()
        other_process.join(SECONDS_FOR_A_CHANGE)
        return taken(*arguments)

    monkeypatch.setattr(continual, step, after)
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    steps.write_run_config(config, run, resume=False)
    steps.validate(config, run)
    if step == "read_provenance":
        skip = find_reason_to_skip(config, run)
        assert (skip is not None, skip and skip.version) == (True, tuesday[1])
    else:
        steps.write_initial_adapter_and_tiers(config, run)
        assert read_adapter(run.initial).digest() == tuesday[1]
    other_process.join()
    assert sorted(list_versions(registry, NAME)) == sorted(others)
    assert read_champion(registry, NAME) == others[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"continual": {"from": "champion"}}, "continual.from: champion needs a registry"),
        ({"continual": {"from": "yesterday"}}, "continual.from: Input should be 'champion'"),
        (
            {
                "continual": {"from": "champion"},
                "registry": {"path": "r", "name": "n"},
                "resume_adapter_file": "a.safetensors",
            },
            "continual.from and resume_adapter_file: give only one",
        ),
    ],
)
def test_sections_that_contradict_one_another_are_refused(values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(values, source="a test")


@pytest.mark.parametrize(
    ("after", "conclusion", "policy", "is_kept"),
    [
        (1.001, None, "better", True),
        (1.001, "no_worse", "better", True),
        (1.001, "better", "better", False),
        (0.999, None, "better", False),
        (1.001, None, "always", False),
    ],
)
def test_a_start_that_is_not_beaten_and_has_to_be_is_kept_unless_answers_got_better(
    tmp_path: Path, after: float, conclusion: Conclusion | None, policy: str, is_kept: bool
) -> None:
    champion = "c" * 64
    task = TaskResult(
        name="capitals",
        questions=40,
        base=0.0,
        parent=0.25,
        champion=0.25,
        candidate=1.0,
        difference=0.75,
        interval=(0.1, 0.9),
        conclusion=conclusion,
        smallest_visible=0.1,
        verdict="passed",
        seconds={},
        odd={},
    )
    verdict = Verdict(
        reasons=(),
        adapter_step=4,
        initial=JudgedAdapter("initial", champion),
        trained=JudgedAdapter("adapter", "t" * 64),
        tensors=(),
        validation=Validation(1.0, after, selected_on_same_data=False),
        champion=ChampionLoss(champion),
        tasks=(task,),
    )
    registry = {"path": str(tmp_path / "registry"), "name": NAME, "promote": policy}
    config = configure(tmp_path, "x", registry=registry)
    found = find_kept_champion(config, RunDirectory(tmp_path), verdict)
    assert found == (champion if is_kept else None)
