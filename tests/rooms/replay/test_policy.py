"""How a run follows the champion: rebuilt, going on, or what fits into the window."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.finetune import _describe_choice
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError, DamagedError, DatasetError, GateRejected
from nested_core.pipeline import steps
from nested_core.pipeline.continual import describe_starting_adapter, settings_digest
from nested_core.pipeline.finetune import finetune
from nested_core.pipeline.preflight import estimate_iterations
from nested_core.records.dataset import read_dataset_record
from nested_core.records.run_status import read_run
from nested_core.records.start import START_FILE
from nested_core.records.verdict_file import read_verdict
from nested_core.registry.data_store import read_lineage
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.report.outcome import find_kept_champion
from nested_core.rooms.minutes.forecast import MeasuredRun
from nested_core.rooms.replay import replayed_run
from nested_core.rooms.replay.page import describe_replay
from nested_core.rooms.replay.replayed_run import decide_by_forecast
from nested_core.storage.adapter import read_adapter
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.document import Text
from tests.example import DATA, example_config, prepare, require_refused, train
from tests.left_out import leave_out_room, needs_rooms, slow_except
from tests.registry_care import forget_rows
from tests.rooms.replay.nights import (
    FRESH,
    NAME,
    add_version,
    choose,
    from_champion,
    night,
    replayed_prompts,
    row,
    write_split,
)

pytestmark = pytest.mark.slow("trains night after night")


def measured(seconds: float, training: float) -> MeasuredRun:
    """A forecast: so many seconds in all, so many of them for the steps."""
    return MeasuredRun(
        seconds_a_step=1.0, training_seconds=training, seconds=seconds, tokens_per_second=1.0
    )


@pytest.mark.parametrize(
    ("window", "expected", "said"),
    [
        # 1,000 rows take 1,000 s, and evaluations and verdict 100 s.
        ("1100s", "rebuild", "all 1,000 rows fit into the window of 1100s"),
        ("1099s", "continue", "all 1,000 rows do not fit into the window of 1099s"),
        ("150s", "continue", "all 1,000 rows do not fit into the window of 150s"),
    ],
)
def test_auto_rebuilds_while_all_rows_fit_into_the_window_and_goes_on_when_they_do_not(
    window: str, expected: str, said: str
) -> None:
    continual = {"from": "champion", "policy": "auto", "window": window}
    registry = {"path": "registry", "name": NAME}
    given: dict[str, Any] = {"registry": registry, "training": {"epochs": 1}}
    given["continual"] = continual | {"replay": {"fraction": 0.5}}
    choice = decide_by_forecast(example_config(**given), 100, 900, measured(1100, 1000))
    assert (choice.policy, choice.reason) == (expected, said)
    assert choice.seconds == {"rebuild": 1100, "continue": 300}  # 200 rows, and 100 s
    by_iterations = example_config(**given | {"training": {}}, iters=40)
    choice = decide_by_forecast(by_iterations, 100, 900, measured(1100, 1000))
    assert choice.seconds == {"rebuild": 1100, "continue": 140}  # 40 steps, and 100 s


def test_a_rebuilt_run_has_the_newest_answer_of_each_prompt_and_no_held_out_row(tmp_path) -> None:
    parent = FRESH
    versions = [parent := add_version(tmp_path, parent, night(tmp_path, n)) for n in range(3)]
    write_split(
        tmp_path / "new",
        train=[row("fresh?", "1"), row("own 2 0?", "other"), row("held 0?", "1")],
        valid=[row("own 0 0?", "1")],
    )
    config = from_champion(tmp_path, continual={"policy": "rebuild"})
    run, record = choose(config, tmp_path / "run")
    expected = ["own 0 1?", "own 1 0?", "own 1 1?", "own 2 1?", "today?"]
    assert replayed_prompts(run) == expected
    assert '{"prompt": "today?", "completion": "2"}' in run.replayed_rows.read_text()
    assert record.is_rebuilt
    assert [source.version for source in record.sources] == versions[::-1]
    assert len(record.dropped) == 1
    # 40 batches are for tonight's three rows where no provenance tells of the first night's
    assert estimate_iterations(config, run) == round(40 * 7 / 3)
    assert steps.describe_earlier_examples(config, run)[0] == (
        "rebuilding from the base: continual.policy is rebuild"
    )


@pytest.mark.parametrize(
    ("length", "batches"),
    [
        ({"iters": 16}, 16 * 9 / 6),  # the first night's length, over nine rows in place of six
        ({"iters": 32}, 32 * 9 / 6),
        ({"training": {"epochs": 3}}, 3 * 5),
    ],
)
def test_a_rebuilt_night_has_the_passes_of_the_first_however_few_rows_are_new(
    tmp_path: Path, length: dict[str, Any], batches: float
) -> None:
    # Six rows in batches of two: 16 iterations are 16/3 passes, of which half were trained
    trained = {"steps": 8, "planned_steps": 16, "epochs": 16 / 3 / 2, "file": "train.jsonl"}
    first_rows = [row(f"{n}?", "1") for n in range(6)]
    first = write_split(tmp_path / "first", train=first_rows, valid=[row("v?", "1")])
    version = add_version(tmp_path, FRESH, first, trained=trained, changes={"iters": 16})
    rebuilt = trained | {"steps": 19, "planned_steps": 19, "epochs": 19 / 3.5}  # of seven rows
    second = write_split(tmp_path / "second", train=[row("s?", "1")], valid=[row("v?", "1")])
    add_version(tmp_path, version, second, trained=rebuilt)
    write_split(tmp_path / "new", train=[row("a?", "1"), row("b?", "1")], valid=[row("w?", "1")])
    config = from_champion(tmp_path, continual={"policy": "rebuild"}, **length)
    run, _ = choose(config, tmp_path / "run")
    assert estimate_iterations(config, run) == round(batches)


def test_many_passes_of_a_rebuilt_night_are_told(tmp_path: Path) -> None:
    add_version(tmp_path, FRESH, night(tmp_path, 0))
    write_split(tmp_path / "new", train=[row("a?", "1"), row("b?", "1")], valid=[row("w?", "1")])
    config = from_champion(tmp_path, continual={"policy": "rebuild"}, training={"epochs": 21})
    run, _ = choose(config, tmp_path / "run")
    told = steps.describe_earlier_examples(config, run)[-1]
    assert told == "rebuilding: 21 passes over all rows; more than 20 hardly help"


def test_what_the_store_has_lost_is_said_and_what_was_forgotten_is_not_trained_on(tmp_path) -> None:
    first = add_version(tmp_path, FRESH, night(tmp_path, 0))
    add_version(tmp_path, first, night(tmp_path, 1))
    write_split(
        tmp_path / "new", train=[row("fresh 1?", "1"), row("fresh 2?", "1")], valid=[row("v?", "1")]
    )
    rebuild = {"policy": "rebuild"}
    forget_rows(tmp_path / "registry", NAME, lambda r: r.get("prompt") == "own 0 1?", by="ann")
    config = from_champion(tmp_path, continual=rebuild)
    run, record = choose(config, tmp_path / "forgotten")
    assert "own 0 1?" not in replayed_prompts(run)
    assert record.problems() == []
    shutil.move(tmp_path / "registry", tmp_path / "another-machine")
    moved = {"path": str(tmp_path / "another-machine"), "name": NAME}
    again, _ = choose(
        from_champion(tmp_path, continual=rebuild, registry=moved), tmp_path / "moved"
    )
    assert again.replayed_rows.read_bytes() == run.replayed_rows.read_bytes()
    for list_of_rows in (tmp_path / "another-machine" / NAME / "data").glob(f"{first}*"):
        list_of_rows.unlink()
    shutil.rmtree(tmp_path / "night-0")
    lost = from_champion(tmp_path, continual=rebuild, registry=moved)
    run, record = choose(lost, tmp_path / "lost")
    assert replayed_prompts(run) == ["own 1 0?", "own 1 1?", "today?"]
    (problem,) = record.problems()
    assert f"version {first[:12]}: the registry keeps no data of it" in problem
    assert record.choice.reason == (
        f"continual.policy is rebuild; not all is there of version {first[:12]}"
    )
    insisting = from_champion(
        tmp_path, continual=rebuild, registry=moved, replay={"missing": "error"}
    )
    with pytest.raises(ConfigError, match="not all earlier data is there"):
        choose(insisting, tmp_path / "insisting")


@pytest.mark.parametrize("chosen", ["rebuild", "auto"])
def test_rebuilding_without_what_it_needs_is_refused(chosen: str) -> None:
    continual = {"from": "champion", "policy": chosen}
    registry = {"path": "registry", "name": NAME}
    require_refused("needs a registry path and name", continual=continual)
    require_refused("needs from: champion", continual={"policy": chosen})
    require_refused(
        "registry.keep_data is false", continual=continual, registry=registry | {"keep_data": False}
    )
    files = {"replay": {"sources": ["old.jsonl"]}}
    require_refused("leave replay.sources out", continual=continual | files, registry=registry)
    require_refused(
        "mlx_lm.lora knows nothing of .*continual.policy",
        continual=continual,
        registry=registry,
        training={"reference": "mlx_lm"},
    )


@pytest.mark.slow("tries a few steps")
def test_auto_tries_a_few_steps_of_a_rebuilt_run_and_keeps_nothing_of_them(tmp_path: Path) -> None:
    add_version(tmp_path, FRESH, night(tmp_path, 0))
    new = [row("fresh 1?", "1"), row("fresh 2?", "1")]
    write_split(tmp_path / "new", train=new, valid=[row("v?", "1")])
    config = from_champion(tmp_path, continual={"policy": "auto"})
    run, record = choose(config, tmp_path / "run")
    assert record.choice.policy == "rebuild"
    assert record.choice.reason == "all 5 rows fit into the window of 2h"
    assert record.choice.seconds["rebuild"] > record.choice.seconds["continue"] > 0
    assert not run.initial.exists()
    assert not run.checkpoints.exists()


@pytest.mark.parametrize(
    "chosen", slow_except(["continue", "rebuild", "auto"], "continue", reason="another night")
)
def test_a_file_that_is_cut_is_told_with_its_line_whatever_the_policy(tmp_path, chosen) -> None:
    add_version(tmp_path, FRESH, night(tmp_path, 0))
    lines = [row("fresh 1?", "1"), row("fresh 2?", "1"), row("fresh 3?", "1")[:-12]]
    write_split(tmp_path / "new", train=lines, valid=[row("v?", "1")])
    config = from_champion(tmp_path, continual={"policy": chosen})
    with pytest.raises(DatasetError, match=r"train\.jsonl:3: bad-json"):
        choose(config, tmp_path / "run")
    (finding,) = read_dataset_record(tmp_path / "run" / "dataset.json").errors
    assert (finding.check, finding.line) == ("bad-json", 3)


def test_auto_without_the_room_that_measures_is_refused(tmp_path, monkeypatch) -> None:
    add_version(tmp_path, FRESH, night(tmp_path, 0))
    write_split(
        tmp_path / "new", train=[row("fresh 1?", "1"), row("fresh 2?", "1")], valid=[row("v?", "1")]
    )
    config = from_champion(tmp_path, continual={"policy": "auto"})
    leave_out_room("minutes", monkeypatch)
    with pytest.raises(ConfigError, match="`continual.policy: auto` belongs to the room minutes"):
        choose(config, tmp_path / "run")


LINES = (DATA / "train.jsonl").read_text().splitlines()


def data_of(folder: Path, number: int) -> Path:
    """Eight facts of a night, and what all nights are judged by."""
    held_out = (DATA / "valid.jsonl").read_text().splitlines()
    rows = LINES[8 * number : 8 * number + 8]
    return write_split(folder / f"data-{number}", train=rows, valid=held_out)


def configure(folder: Path, number: int, **continual: Any) -> FineTuneConfig:
    registry = {"path": str(folder / "registry"), "name": NAME, "promote": "always"}
    return example_config(
        data=str(data_of(folder, number)),
        registry=registry,
        continual={"from": "champion", "rate": 0.3} | continual,
        iters=4,
        steps_per_report=1,
        samples=[],
    )


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four nights under `auto`, of which the third has no time: what each began from."""
    folder = tmp_path_factory.mktemp("nights")
    seen: dict[str, Any] = {"folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replayed_run, "measure_rebuilding", lambda config: measured(100, 90))
        for number, window in enumerate(("2h", "2h", "1s", "2h")):
            run = RunDirectory(folder / f"run-{number}")
            config = configure(
                folder, number, policy="auto", window=window, replay={"fraction": 0.5}
            )
            result = finetune(config, run, progress=False)
            seen[f"run-{number}"] = (config, run, result.version)
    return seen


def test_a_night_changes_from_rebuilding_to_going_on_and_back(nights: dict[str, Any]) -> None:
    folder = nights["folder"]
    versions = [nights[f"run-{n}"][2] for n in range(4)]
    assert read_lineage(folder / "registry", NAME, versions[-1]) == versions[::-1]
    starts = [START_FILE.read(nights[f"run-{n}"][1].start) for n in range(4)]
    assert [(s.champion, s.choice.policy, s.rate_share) for s in starts] == [
        (None, "rebuild", 1.0),
        (versions[0], "rebuild", 1.0),
        (versions[1], "continue", 0.3),
        (versions[2], "rebuild", 1.0),
    ]
    initial = [read_adapter(nights[f"run-{n}"][1].initial).digest() for n in range(4)]
    assert initial[0] == initial[1] == initial[3]  # fresh, by the seed
    assert initial[2] == versions[1]
    for version, start in zip(versions, starts, strict=True):
        recorded = read_provenance(version_folder(folder / "registry", NAME, version))["start"]
        assert recorded["policy"] == start.choice.policy
        assert recorded["reason"] == start.choice.reason
        assert recorded["forecast_seconds"] == start.choice.seconds
    config, run, _ = nights["run-2"]
    assert describe_starting_adapter(config, run) == (
        f"starting from version {versions[1][:12]} of capitals at 0.3 of the learning rate: "
        "all 24 rows do not fit into the window of 1s (forecast: rebuild 2 min, continue 14 s)"
    )


def test_each_row_of_a_rebuilt_run_is_used_as_often_as_tonight_s_alone(nights) -> None:
    lengths = []
    rates = []
    for number in range(4):
        lines = nights[f"run-{number}"][1].metrics.read_text().splitlines()
        reports = [json.loads(line) for line in lines]
        lengths.append(reports[-1]["iteration"])
        rates.append(max(report.get("learning_rate") or 0 for report in reports))
    assert lengths == [4, 8, 4, 16]  # 8 rows, 16, 8 with replay, 32
    assert rates[1] == rates[0]
    assert rates[2] == pytest.approx(0.3 * rates[0], rel=1e-6)
    assert rates[3] == rates[0]
    replayed = json.loads(nights["run-3"][1].metrics.read_text().splitlines()[-1])
    assert 0 < replayed["replayed_tokens"] < replayed["trained_tokens"]


@pytest.mark.slow("trains a night and judges it")
def test_a_rebuilt_run_that_is_worse_than_the_champion_is_refused(nights, tmp_path) -> None:
    folder = shutil.copytree(nights["folder"], tmp_path / "nights", symlinks=True)
    champion = nights["run-3"][2]
    strict = {"max_val_loss_increase": 0.0, "noise": "none"}
    config = configure(folder, 3, policy="rebuild", skip_unchanged=False)
    weak = config.model_copy(
        update={
            "learning_rate": 1e-7,
            "steps_per_report": 100,  # a loss that stays flat is warned of
            "gate": config.gate.model_copy(update=strict),
        }
    )
    run = RunDirectory(tmp_path / "weak")
    with pytest.raises(GateRejected, match="against the champion, loss"):
        finetune(weak, run, progress=False)
    verdict = read_verdict(run.gate)
    assert [reason.code for reason in verdict.reasons] == ["loss_regressed"]
    assert verdict.rival == champion
    section = weak.registry.model_copy(update={"promote": "better"})
    must_be_better = weak.model_copy(update={"registry": section})
    assert find_kept_champion(must_be_better, run, verdict) == champion


def test_a_start_that_is_lost_is_damage_and_no_other_rate(nights, tmp_path) -> None:
    config, run, _ = nights["run-2"]
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "run"))
    copy.start.unlink()
    with pytest.raises(DamagedError, match=r"start\.json"):
        train(config.model_copy(update={"iters": 8}), copy)


def test_another_policy_or_rate_is_a_reason_to_train(nights: dict[str, Any]) -> None:
    (config, run, _), (_, going_on, _) = nights["run-1"], nights["run-2"]
    dataset = read_dataset_record(run.dataset)

    def digest(run: RunDirectory, **continual: Any) -> str:
        """That of the second night's data with another run's choice, or other keys."""
        changed = config.continual.model_copy(update=continual)
        other = config.model_copy(update={"continual": changed})
        return settings_digest(other, "base", run, dataset)

    digests = [digest(run), digest(run, rate=0.1), digest(going_on), digest(run, window="3h")]
    assert len({*digests[:3]}) == 3
    assert digests[3] == digests[0]


@pytest.mark.parametrize(
    "chosen", slow_except(["continue", "rebuild"], "rebuild", reason="another night")
)
def test_what_is_not_there_is_said_in_state_provenance_and_page(nights, tmp_path, chosen) -> None:
    folder = shutil.copytree(nights["folder"], tmp_path / "nights", symlinks=True)
    lost = nights["run-1"][2]
    (folder / "registry" / NAME / "data" / f"{lost}.json").unlink()
    nights["folder"].joinpath("data-1").rename(tmp_path / "gone")
    try:
        config = configure(folder, 4, policy=chosen, replay={"fraction": 0.5})
        run = prepare(config, tmp_path / "run")
    finally:
        (tmp_path / "gone").rename(nights["folder"] / "data-1")
    said = f"continual.policy is {chosen}; not all is there of version {lost[:12]}"
    start = START_FILE.read(run.start)
    assert start.to_provenance()["reason"] == start.choice.reason == said
    assert _describe_choice(config, run).endswith(said)
    blocks = describe_replay(read_run(run))
    page = "".join(block.text for block in blocks if isinstance(block, Text))
    assert said in page
    assert f"version {lost[:12]}: the registry keeps no data of it" in page


@needs_rooms("planning")
def test_going_on_above_the_usable_rates_is_refused_unless_it_is_allowed(nights, tmp_path) -> None:
    folder = shutil.copytree(nights["folder"], tmp_path / "nights", symlinks=True)
    fast = configure(folder, 3, rate=1.0).model_copy(update={"learning_rate": 0.1})
    with pytest.raises(ConfigError, match="continual.rate: going on .* rank x scale x rate is"):
        prepare(fast, tmp_path / "refused")
    allowed = fast.continual.model_copy(update={"allow_high_rate": True})
    run = prepare(fast.model_copy(update={"continual": allowed}), tmp_path / "allowed")
    assert START_FILE.read(run.start).rate_share == 1.0
    rebuilt = fast.continual.model_copy(update={"policy": "rebuild"})
    prepare(fast.model_copy(update={"continual": rebuilt}), tmp_path / "rebuilt")
