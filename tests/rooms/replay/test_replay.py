"""Replay: what is chosen of earlier data, what is said of it, and that a resumed run needs none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.data.dataset_loading import load_run_data
from nested_core.data.earlier_examples import find_earlier_examples
from nested_core.data.example_digests import decode_digests
from nested_core.errors import ConfigError, DamagedError, DatasetError, TrainingStopped
from nested_core.pipeline import steps
from nested_core.pipeline.continual import settings_digest
from nested_core.pipeline.preflight import check_before_start
from nested_core.pipeline.publishing import make_provenance
from nested_core.records.dataset import DatasetReport, read_dataset_record
from nested_core.records.judged_run import read_judged_run
from nested_core.report.run_report import read_report
from nested_core.rooms.replay.replay_record import read_replay
from nested_core.rooms.replay.replayed_examples import key_rows, read_new_data
from nested_core.rooms.replay.replayed_run import ReplayOfRun
from nested_core.storage.run_directory import RunDirectory
from tests.example import (
    DATA,
    SPEEDS,
    Finished,
    example_config,
    prepare,
    require_refused,
    stop_after,
    train,
)
from tests.left_out import leave_out_room, needs_rooms
from tests.registry_care import forget
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

LINES = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()


def configure(folder: Path, *sources: str, fraction: float = 0.3, **changes: Any) -> FineTuneConfig:
    replay = changes.pop("replay", {})
    named = [str(folder / source) for source in sources]
    section = {"replay": {"fraction": fraction, "sources": named} | replay}
    settings = {"data": str(folder / "new"), "continual": section, "val_batches": 2, "iters": 8}
    return example_config(**settings | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """New data of ten rows, and an earlier file of ten others."""
    write_split(tmp_path / "new", train=LINES[:10], valid=LINES[10:14])
    (tmp_path / "old.jsonl").write_text("\n".join(LINES[20:30]))
    return tmp_path


def test_rows_that_newer_data_repeats_corrects_or_holds_out_are_not_replayed(tmp_path) -> None:
    write_split(
        tmp_path / "new",
        train=[row("a?", "1"), row("What is  B?", "new"), row("k?", "1"), row("l?", "1")],
        valid=[row("held now?", "1"), row("held answer?", "yes")],
    )
    write_split(
        tmp_path / "newer",
        train=[row("A?", "1"), row("c?", "1"), row("held then?", "1"), row("d?", "2")],
        valid=[row("held by newer?", "1"), row("k?", "1")],
    )
    old = [row("what is b?", "old"), row("c?", "0"), row("d?", "2"), row("e?", "1")]
    old += [row("Held now?", "1"), row("held answer?", "no"), row("held by newer?", "1")]
    write_split(tmp_path / "old", train=old, valid=[row("held then?", "1")])
    run, record = choose(configure(tmp_path, "newer", "old", iters=40), tmp_path / "run")
    assert replayed_prompts(run) == ["c?", "d?", "e?"]
    newer, older = record.sources
    assert (newer.rows, newer.repeated, newer.held_out, newer.examples) == (4, 1, 1, 2)
    assert (older.rows, older.repeated, older.superseded, older.held_out) == (7, 1, 3, 2)
    assert list(record.describe()) == [
        f"replay: 0.3 of the rows, from 2 of 4 examples of {newer.file} (1 newer data has too, "
        f"1 held out); 1 of 7 examples of {older.file} (1 newer data has too, 3 superseded, "
        f"2 held out)"
    ]
    assert "3 superseded" in read_report(run.path).to_html()
    report, splits = load_run_data(configure(tmp_path, "newer", "old"), run)
    assert report.splits["train"].dropped == {"held-out-before": (3,)}
    assert report.splits["train"].rows == len(splits["train"]) == 3
    assert "dropped-held-out-before" in report.describe_warnings()


@pytest.mark.parametrize(
    ("learnt", "replayed", "dropped"),
    [
        ({"training": {"supervise": "all"}}, ["5"], [2]),
        ({"mask_prompt": False}, ["5"], [2]),
        ({}, ["4", "5"], []),
    ],
)
def test_a_chat_whose_learnt_beginning_is_held_out_is_not_trained_on(
    tmp_path, learnt, replayed, dropped
) -> None:
    def chat(*turns: str) -> str:
        roles = ("user", "assistant") * len(turns)
        pairs = zip(roles, turns, strict=False)
        return json.dumps({"messages": [{"role": role, "content": text} for role, text in pairs]})

    tonight = [chat("a?", "1"), chat("held then?", "2", "and?", "3"), chat("b?", "1")]
    write_split(tmp_path / "new", train=tonight, valid=[chat("held now?", "1")])
    earlier = [chat("HELD now?", "1", "longer?", "4"), chat("held now?", "9", "other?", "5")]
    write_split(tmp_path / "old", train=earlier, valid=[chat("held then?", "2")])
    config = configure(tmp_path, "old", iters=40, **learnt)
    run, record = choose(config, tmp_path / "run")
    (old,) = record.sources
    lines = map(json.loads, run.replayed_rows.read_text().splitlines())
    assert sorted(line["messages"][3]["content"] for line in lines) == replayed
    assert (old.held_out, old.examples) == (2 - len(replayed), len(replayed))
    report, _ = load_run_data(config, run)
    assert [*report.splits["train"].dropped.get("held-out-before", ())] == dropped


def test_a_row_that_is_held_out_under_another_system_text_is_not_trained_on(tmp_path) -> None:
    def under(system: str, question: str) -> str:
        roles = {"system": system, "user": question, "assistant": "1"}
        return json.dumps({"messages": [{"role": n, "content": text} for n, text in roles.items()]})

    tonight = [under("Be kind.", each) for each in ("held then?", "a?", "b?")]
    write_split(tmp_path / "new", train=tonight, valid=[under("Be kind.", "held now?")])
    earlier = [under("Be brief.", each) for each in ("held now?", "c?", "a?")]
    write_split(tmp_path / "old", train=earlier, valid=[under("Be brief.", "held then?")])
    config = configure(tmp_path, "old", iters=40)
    run, record = choose(config, tmp_path / "run")
    (old,) = record.sources
    assert (old.held_out, old.repeated, old.superseded, old.examples) == (1, 1, 0, 1)
    judged = read_new_data(config, held_out_is_judged=True)
    rows = key_rows(map(json.loads, earlier))
    assert [judged.find_reason(*keyed) for keyed in rows] == ["held_out", None, "repeated"]
    report, _ = load_run_data(config, run)
    assert report.splits["train"].dropped == {"held-out-before": (1,)}


def test_a_chat_that_an_ancestor_held_out_is_judged_by_though_its_beginning_is_too(
    tmp_path,
) -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
    begun = json.dumps({"messages": turns[:2]})
    write_split(tmp_path / "new", train=[row("a?", "1")], valid=[begun])
    config = configure(tmp_path, "old", training={"supervise": "all"})
    judged = read_new_data(config, held_out_is_judged=True)
    long, short = key_rows([{"messages": turns}, {"messages": turns[:2]}])
    assert judged.find_reason(*long) is None
    assert judged.find_reason(*short) == "held_out"
    assert read_new_data(config).find_reason(*long) == "held_out"


@needs_rooms("preferences")
def test_a_later_export_of_the_same_chats_with_other_ids_is_known(tmp_path) -> None:
    def export(night: str, *texts: str) -> list[str]:
        answer = {"role": "assistant", "content": "1", "created": night}
        asked = [{"role": "user", "content": text, "id": f"{night}{text}"} for text in texts]
        return [json.dumps({"messages": [turn, answer]}) for turn in asked]

    write_split(tmp_path / "new", train=export("b", "a?", "b?"), valid=export("b", "held?"))
    write_split(tmp_path / "old", train=export("a", "c?", "b?", "held?"))
    run, record = choose(configure(tmp_path, "old", iters=40), tmp_path / "run")
    (old,) = record.sources
    assert (old.rows, old.repeated, old.superseded, old.held_out) == (3, 1, 0, 1)
    assert replayed_prompts(run) == ["c?"]


def test_pairs_are_superseded_by_the_opposite_pair_alone(tmp_path) -> None:
    def pair(prompt: str, chosen: str, rejected: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        return json.dumps({"prompt": turns, "chosen": chosen, "rejected": rejected})

    tonight = [pair("a?", "1", "2"), pair("b?", "3", "1"), pair("c?", "2", "1")]
    write_split(tmp_path / "new", train=tonight, valid=[pair("d?", "1", "2")])
    earlier = [pair("A?", "1", "2"), pair("b?", "1", "2"), pair("C?", "1", "2")]
    write_split(tmp_path / "old", train=[*earlier, pair("d?", "2", "1")])
    config = configure(tmp_path, "old", iters=40, training={"loss": "dpo"})
    run, record = choose(config, tmp_path / "run")
    (old,) = record.sources
    assert (old.repeated, old.superseded, old.examples) == (1, 2, 1)
    assert json.loads(run.replayed_rows.read_text())["prompt"][0]["content"] == "b?"


def test_generations_beyond_the_bound_hold_out_what_they_held_out(folder: Path) -> None:
    write_split(folder / "older", train=LINES[30:34], valid=[LINES[20], LINES[0]])
    config = configure(folder, "old.jsonl", "older", replay={"max_generations": 1}, iters=40)
    run, record = choose(config, folder / "run")
    assert [source.examples for source in record.sources] == [9, 0]
    assert json.loads(LINES[20])["messages"][0]["content"] not in replayed_prompts(run)
    assert len(load_run_data(config, run)[1]["train"]) == 9


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_a_source_that_is_gone_is_said_and_the_run_goes_on_with_the_rest(folder, what) -> None:
    if what == "empty":
        write_split(folder / "gone", valid=LINES[14:16])
    config = configure(folder, "gone", "old.jsonl")
    run, record = choose(config, folder / "run")
    assert [source.examples for source in record.sources] == [0, 4]
    expected = {"missing": "gone: there is no such file or folder", "empty": "no training example"}
    assert expected[what] in ReplayOfRun(config, run).describe()[-1]
    refused = configure(folder, "gone", "old.jsonl", replay={"missing": "error"})
    with pytest.raises(ConfigError, match="replay.missing is error:\n .*gone: .*\nBring it back"):
        choose(refused, folder / "refused")


@pytest.mark.slow("several nights of their own")
def test_as_many_examples_are_kept_as_the_run_can_use(folder: Path) -> None:
    # 8 batches of 2 at 0.3: 4 rows; 3 epochs of 10 rows are 21 batches: 12 rows, and there are 10
    short, long = configure(folder, "old.jsonl"), {"epochs": 3.0}
    assert choose(short, folder / "short")[1].examples == 4
    epochs = configure(folder, "old.jsonl", training=long)
    assert choose(epochs, folder / "long")[1].examples == 10


@needs_rooms("planning")
@pytest.mark.slow("explains a run")
def test_explain_says_what_would_be_replayed(folder: Path) -> None:
    from nested_core.rooms.planning.run_explanation import explain_run

    explained = explain_run(configure(folder, "old.jsonl"), measures_speed=False)
    assert f"replay: 0.3 of the rows, from 4 of 10 examples of {folder}/old.jsonl" in ". ".join(
        explained.replay
    )
    assert explained.epochs == pytest.approx(8 / 7)  # an epoch is 14 rows, 4 of them replayed


def test_the_same_data_and_seed_choose_the_same_rows(folder: Path) -> None:
    config = configure(folder, "old.jsonl")
    (folder / "again.jsonl").write_text("\n".join(reversed(LINES[20:30])))
    first, again = choose(config, folder / "1"), choose(config, folder / "2")
    moved = choose(configure(folder, "again.jsonl"), folder / "3")
    other = choose(configure(folder, "old.jsonl", seed=7), folder / "4")
    rows = [each[0].replayed_rows.read_bytes() for each in (first, again, moved, other)]
    assert rows[0] == rows[1] == rows[2] != rows[3]
    assert first[1].content_digest == moved[1].content_digest != other[1].content_digest


def test_the_data_of_the_champion_and_its_ancestors_is_replayed(tmp_path: Path) -> None:
    parent = FRESH
    versions = [parent := add_version(tmp_path, parent, night(tmp_path, n)) for n in range(3)]
    new = [row("fresh 1?", "1"), row("held 0?", "1"), row("fresh 2?", "1")]
    new += [row("Tested  1?", "1"), row("tested 2?", " 1")]  # folded, they are held out
    write_split(tmp_path / "new", train=new, valid=[row("own 1 0?", "1")])
    shutil.rmtree(tmp_path / "night-0")  # what became of the files does not matter
    (tmp_path / "night-1" / "train.jsonl").write_text(row("altered?", "1"))
    (tmp_path / "night-2").rename(tmp_path / "moved")
    shutil.move(tmp_path / "registry", tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "registry", symlinks=True)
    run, record = choose(from_champion(tmp_path), tmp_path / "run")
    assert (record.start, record.removed, record.problems()) == (versions[-1], None, [])
    assert [source.version for source in record.sources] == versions[::-1]
    assert [source.superseded for source in record.sources] == [0, 1, 1]
    expected = ["own 0 0?", "own 0 1?", "own 1 1?", "own 2 0?", "own 2 1?", "today?"]
    assert replayed_prompts(run) == expected
    assert '{"prompt": "today?", "completion": "2"}' in run.replayed_rows.read_text()
    report, splits = load_run_data(from_champion(tmp_path), run)
    assert report.splits["train"].dropped == {"held-out-before": (2, 4, 5)}
    assert len(splits["replay"]) == 6
    held_out = [row(f"held {number}?", "1") for number in range(3)] + [row("own 1 0?", "1")]
    write_split(tmp_path / "held", train=held_out)
    names = ("train", "replay")
    trained_on = np.concatenate([splits[name].contents for name in names])
    others = load_run_data(example_config(data=str(tmp_path / "held")))[1]["train"]
    assert not np.isin(others.contents, trained_on).any()


def test_an_ancestor_whose_rows_were_not_kept_is_said_and_not_replayed(tmp_path: Path) -> None:
    first = add_version(tmp_path, FRESH, night(tmp_path, 0), keeps=False)
    add_version(tmp_path, first, night(tmp_path, 1))
    write_split(tmp_path / "new", train=[row("fresh?", "1"), row("f?", "1")])
    run, record = choose(from_champion(tmp_path), tmp_path / "run")
    assert not any(prompt.startswith("own 0") for prompt in replayed_prompts(run))
    (problem,) = record.problems()
    assert problem.startswith(f"version {first[:12]}: the registry keeps no data of it")
    with pytest.raises(ConfigError, match="replay.missing is error"):
        choose(from_champion(tmp_path, replay={"missing": "error"}), tmp_path / "refused")


def test_a_lineage_that_gc_cut_short_is_said_and_is_no_error(tmp_path: Path) -> None:
    first = add_version(tmp_path, FRESH, night(tmp_path, 0))
    second = add_version(tmp_path, first, night(tmp_path, 1))
    shutil.rmtree(tmp_path / "registry" / NAME / "versions" / first)
    forget(tmp_path / "registry", NAME, first, by="ann", reason="A disk was lost.")
    write_split(tmp_path / "new", train=[row("fresh?", "1"), row("f?", "1")])
    config = from_champion(tmp_path, replay={"missing": "error"})
    run, record = choose(config, tmp_path / "run")
    assert (record.start, record.removed, len(record.sources)) == (second, first, 1)
    assert ReplayOfRun(config, run).describe()[-1] == (
        f"replay: version {first[:12]} was removed from the registry: what it and its ancestors "
        f"were trained on is not replayed"
    )


def test_an_ancestor_that_never_was_in_this_registry_is_not_called_removed(tmp_path: Path) -> None:
    elsewhere = "e" * 64
    add_version(tmp_path, elsewhere, night(tmp_path, 0))
    write_split(tmp_path / "new", train=[row("fresh?", "1"), row("f?", "1")])
    config = from_champion(tmp_path)
    run, record = choose(config, tmp_path / "run")
    assert (record.removed, record.removal_is_recorded) == (elsewhere, False)
    assert ReplayOfRun(config, run).describe()[-1] == (
        "replay: version eeeeeeeeeeee is not in this registry: what it and its ancestors were "
        "trained on is not replayed"
    )


def test_before_the_first_champion_nothing_is_replayed_and_it_is_said(folder: Path) -> None:
    config = from_champion(folder, iters=4)
    run = prepare(config, folder / "run")
    assert ReplayOfRun(config, run).describe() == ["replay: there is no earlier data to replay"]
    plain = from_champion(folder, iters=4, replay={"fraction": 0.0})
    dataset = read_dataset_record(run.dataset)
    digests = {settings_digest(each, "base", run, dataset) for each in (config, plain)}
    assert len(digests) == 1, "a champion made without replay is no reason to train again"
    done = train(config, run)
    assert not any("replayed_tokens" in each for each in done.metrics())


def test_a_rebuilt_night_is_another_one_though_nothing_is_replayed(folder: Path) -> None:
    digests = set()
    for policy in ("continue", "rebuild"):
        continual = {"policy": policy}
        config = from_champion(folder, training={"epochs": 1}, continual=continual)
        run = RunDirectory(folder / policy)
        run.path.mkdir()
        ReplayOfRun(config, run).choose()
        dataset = DatasetReport("data", "0", {}, (), tokenizer="tokenizer")
        digests.add(settings_digest(config, "base", run, dataset))
    assert len(digests) == 2


def test_another_champion_than_replay_was_chosen_for_is_refused(folder: Path) -> None:
    config = from_champion(folder)
    run, _ = choose(config, folder / "run")
    version = add_version(folder, FRESH, night(folder, 0))
    with pytest.raises(ConfigError, match=f"none before, version {version[:12]} now.*--resume"):
        ReplayOfRun(config, run).require_same_start(version)
    steps.validate(config, run)  # as --resume does
    ReplayOfRun(config, run).require_same_start(version)


def test_what_cannot_go_together_is_refused_before_a_run() -> None:
    lineage = {"replay": {"fraction": 0.1}}
    require_refused(
        "lineage is that of the champion, and needs .*from: champion", continual=lineage
    )
    mixed = {"replay": {"fraction": 0.1, "sources": ["lineage", "a.jsonl"]}}
    require_refused("lineage stands alone", continual=mixed)
    files = {"replay": {"fraction": 0.1, "sources": ["a.jsonl"]}}
    reference = {"reference": "mlx_lm"}
    require_refused("knows nothing of .*continual.replay", continual=files, training=reference)


def test_a_run_that_follows_a_champion_replays_half_of_each_batch_unless_it_says_otherwise(
    tmp_path: Path,
) -> None:
    add_version(tmp_path, FRESH, night(tmp_path, 0))
    write_split(tmp_path / "new", train=[row("fresh?", "1"), row("f?", "1")])
    config = from_champion(tmp_path, replay={"fraction": None})
    run, record = choose(config, tmp_path / "run")
    said = (
        f"replay: 0.5 of the rows (the default), from 3 of 3 examples of {record.sources[0].name}"
    )
    assert steps.describe_earlier_examples(config, run) == [said]
    assert said[1:] in read_report(run.path).to_html()
    same, _ = choose(from_champion(tmp_path, replay={"fraction": 0.5}), tmp_path / "same")
    assert same.replayed_rows.read_bytes() == run.replayed_rows.read_bytes()
    none = from_champion(tmp_path, replay={"fraction": 0.0})
    assert (none.replay_fraction, find_earlier_examples(none, run)) == (0.0, None)


def test_a_run_that_cannot_replay_has_no_fraction_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follows = from_champion(tmp_path, replay={"fraction": None})
    assert follows.replay_fraction == 0.5
    reference, plain = {"reference": "mlx_lm", "max_grad_norm": 0}, {"frequencies": [1]}
    cannot = [
        example_config(),
        from_champion(tmp_path, replay={"fraction": None}, training=reference, nested=plain),
        from_champion(tmp_path, replay={"fraction": None}, training={"minutes": 5.0}),
    ]
    assert [config.replay_fraction for config in cannot] == [0.0] * 3
    leave_out_room("replay", monkeypatch)
    assert follows.replay_fraction == 0.0


@pytest.mark.parametrize("split", ["train", "valid"])
def test_rows_that_arrive_after_the_choice_end_the_run_before_anything_is_learnt(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split(tmp_path / "new", train=LINES[:10], valid=LINES[10:14])
    (tmp_path / "old.jsonl").write_text("\n".join(LINES[20:30]))
    config = configure(tmp_path, "old.jsonl")

    def write_and_load(*arguments: Any) -> Any:
        with (tmp_path / "new" / f"{split}.jsonl").open("a") as file:
            file.write(f"{LINES[30]}\n")
        return load_run_data(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "load_run_data", write_and_load)
        with pytest.raises(DatasetError, match=f"{split}.jsonl changed while it was read"):
            prepare(config, tmp_path / "run")
    prepare(config, tmp_path / "again")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run with replay that nobody stops."""
    folder = tmp_path_factory.mktemp("replay")
    write_split(folder / "new", train=LINES[:10], valid=LINES[10:14])
    (folder / "old.jsonl").write_text("\n".join(LINES[20:30]))
    config = configure(folder, "old.jsonl", steps_per_report=1, save_every=4)
    return train(config, prepare(config, folder / "run"))


def test_replayed_tokens_are_counted_apart(whole: Finished) -> None:
    reports = [each for each in whole.metrics() if "loss" in each]
    _, splits = load_run_data(whole.config, whole.run)
    supervised = splits["replay"].count_supervised()
    counts = [each["replayed_tokens"] for each in reports]
    assert counts == sorted(counts)
    assert counts[6] == supervised.sum()  # 7 batches of 2 have 10 new rows and 4 others, each once
    assert reports[-1]["trained_tokens"] > reports[-1]["replayed_tokens"]


@pytest.mark.slow("trains twice")
def test_a_resumed_run_equals_the_whole_one_without_its_sources(whole, tmp_path) -> None:
    data = Path(whole.config.data).parent
    shutil.copytree(data / "new", tmp_path / "new")
    shutil.copy(data / "old.jsonl", tmp_path)
    config = configure(tmp_path, "old.jsonl", steps_per_report=1, save_every=4)
    run = prepare(config, tmp_path / "run")
    with pytest.raises(TrainingStopped):
        train(config, run, on_start=stop_after(5))
    (tmp_path / "old.jsonl").unlink()
    steps.write_run_config(config, run, resume=True)
    steps.validate(config, run)
    done = train(config, run)
    assert done.metrics(without=SPEEDS) == whole.metrics(without=SPEEDS)
    files = [each.run.adapter / "adapters.safetensors" for each in (done, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow("judges a run")
def test_the_gate_knows_that_replayed_rows_were_trained_on(whole: Finished) -> None:
    steps.judge(whole.config, whole.run)
    recorded = json.loads(whole.run.training_examples.read_bytes())["training_examples"]
    replayed = load_run_data(whole.config, whole.run)[1]["replay"]
    assert np.isin(replayed.contents, decode_digests(recorded)).all()
    listed = json.loads(whole.run.manifest.read_bytes())["files"]
    assert {"replay.json", "replay.jsonl"} <= listed.keys()
    recorded = make_provenance(whole.config, read_judged_run(whole.run.path), None)
    replay = recorded["replay"]
    tokens = whole.metrics()[-1]["replayed_tokens"]
    assert (replay["fraction"], replay["examples"], replay["tokens"]) == (0.3, 4, tokens)
    (source,) = replay["sources"]
    assert (source["version"], source["examples"]) == (None, 4)
    assert source["digest"] == read_replay(whole.run.replay).sources[0].digest


@pytest.mark.parametrize("name", ["replay.json", "replay.jsonl"])
def test_altered_replay_files_end_a_run_and_have_no_verdict(whole, tmp_path, name) -> None:
    run = RunDirectory(shutil.copytree(whole.run.path, tmp_path / "run"))
    path = run.path / name
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(DamagedError, match=r"replay\.json"):
        steps.judge(whole.config, run)
    longer = whole.config.model_copy(update={"iters": 12})
    with pytest.raises(DamagedError, match=r"replay\.json"):
        train(longer, run)


def test_without_replay_nothing_of_it_is_in_a_run(folder: Path) -> None:
    config = configure(folder, fraction=0.0, replay={"sources": ["lineage"]})
    run = prepare(config, folder / "run")
    assert not run.replay.exists()
    assert set(load_run_data(config, run)[1]) == {"train", "valid"}
    assert steps.describe_earlier_examples(config, run) == []


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        (
            "continual.replay",
            {"continual": {"replay": {"fraction": 0.3, "sources": ["old.jsonl"]}}},
        ),
        ("gate.max_ancestor_loss_increase", {"gate": {"max_ancestor_loss_increase": 0.1}}),
    ],
)
def test_without_the_room_a_key_of_it_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, changes: dict[str, Any]
) -> None:
    leave_out_room("replay", monkeypatch)
    run = RunDirectory(tmp_path / "run")
    refusal = f"`{key}` belongs to the room replay, which is not installed here"
    with pytest.raises(ConfigError, match=refusal):
        check_before_start(example_config(**changes), run)
    assert not run.path.exists()
