"""The data store of a name keeps the examples of its versions, once each, and gives them back."""

from __future__ import annotations

import json
import shutil
import stat
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from nested_core.data.data_settings import DataSettings
from nested_core.data.example_rows import RowKeys, read_split_rows
from nested_core.errors import DamagedError
from nested_core.registry import data_store, history, registration
from nested_core.registry.data_store import (
    MAX_BYTES_IN_MEMORY,
    RunExamples,
    StoredData,
    drop_rows,
    find_rows,
    read_digest_list,
    read_lineage,
    read_stored_data,
    remove_unneeded_rows,
    store_examples,
)
from nested_core.registry.link_and_views import writing_folder
from nested_core.registry.queries import parent_version_of
from nested_core.text.digest_format import shorten_digest
from tests.builders.registering import promote, register
from tests.core.registry.conftest import digest_row, write_run
from tests.core.registry.states import NAME, assert_settled
from tests.example import example_config
from tests.left_out import needs_rooms
from tests.registry_care import audit, collect_garbage, forget_rows, module_of

Row = dict[str, Any]


def question(number: int, answer: str = "yes") -> Row:
    return {"prompt": f"Is {number} a number?", "completion": answer}


def add_night(
    tmp_path: Path,
    seed: int,
    train: list[Row],
    held_out: list[Row],
    max_bytes: int | None = None,
    kept_out: Sequence[Row] = (),
) -> str:
    run = write_run(tmp_path / f"run-{seed}", seed)
    examples = RunExamples(train, held_out, max_bytes, kept_out)
    return register(run, tmp_path / "registry", NAME, {}, examples=examples)


def rows_of(registry: Path, version: str) -> tuple[list[Row], list[Row]]:
    data = read_stored_data(registry, NAME, version)
    assert data is not None
    return [row.row for row in data.train], [row.row for row in data.held_out]


def test_a_version_keeps_its_examples_and_rows_of_two_versions_are_kept_once(tmp_path):
    registry = tmp_path / "registry"
    first = add_night(tmp_path, 1, [question(1), question(2), question(1)], [question(3)])
    second = add_night(tmp_path, 2, [question(2), question(4)], [question(3)])
    assert rows_of(registry, first) == ([question(1), question(2)], [question(3)])
    assert rows_of(registry, second) == ([question(2), question(4)], [question(3)])
    packs = (registry / NAME / "data").glob("*.jsonl")
    lines = [line for pack in packs for line in pack.read_bytes().splitlines()]
    assert len(lines) == len({*lines}) == 4
    data = read_stored_data(registry, NAME, first)
    assert data is not None
    assert data.train[0].digest == digest_row(question(1))


@needs_rooms("housekeeping")
@pytest.mark.usefixtures("no_time_to_decide")
def test_rows_that_are_only_kept_out_stay_with_their_version_and_can_be_forgotten(tmp_path) -> None:
    registry = tmp_path / "registry"
    version = add_night(
        tmp_path, 1, [question(1)], [question(2)], kept_out=[question(3), question(4)]
    )
    promote(registry, NAME, version, by="ann")
    assert collect_garbage(registry, NAME, by="ann", keep=0).rows == 0
    data = read_stored_data(registry, NAME, version)
    assert data is not None
    assert [row.row for row in data.kept_out] == [question(3), question(4)]
    listed = tmp_path / "listed.jsonl"
    listed.write_text(json.dumps(question(4)))
    assert main(["gc", NAME, "--registry", str(registry), "--forget", str(listed)]) == 0
    data = read_stored_data(registry, NAME, version)
    assert data is not None
    assert [row.row for row in data.kept_out] == [question(3)]
    assert all_stored(registry) == {*map(digest_row, map(question, (1, 2, 3)))}


@needs_rooms("housekeeping")
def test_a_forgotten_row_is_forgotten_with_an_end_text_too(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    ended = question(1) | {"completion": f"{question(1)['completion']}<|im_end|>"}
    version = add_night(tmp_path, 1, [ended, question(2)], [question(3)])
    listed = tmp_path / "listed.jsonl"
    listed.write_text(json.dumps(question(1)))
    assert main(["gc", NAME, "--registry", str(registry), "--forget", str(listed)]) == 0
    assert rows_of(registry, version) == ([question(2)], [question(3)])


def test_a_version_without_examples_has_no_stored_data(tmp_path):
    registry = tmp_path / "registry"
    version = register(write_run(tmp_path / "run", 1), registry, NAME, {})
    assert read_stored_data(registry, NAME, version) is None
    assert not (registry / NAME / "data").exists()


def add_champions(tmp_path: Path) -> list[str]:
    """Three nights with a row of their own each, and one that all have; each was champion."""
    versions = []
    for seed in range(1, 4):
        versions.append(add_night(tmp_path, seed, [question(0), question(seed)], [question(-seed)]))
        promote(tmp_path / "registry", NAME, versions[-1], by="ann")
    return versions


@pytest.mark.usefixtures("no_time_to_decide")
def test_gc_removes_rows_with_their_last_version(tmp_path):
    registry = tmp_path / "registry"
    first, second, third = add_champions(tmp_path)
    assert collect_garbage(registry, NAME, by="ann", keep=0, dry_run=True).rows == 2
    done = collect_garbage(registry, NAME, by="ann", keep=0)
    assert (done.collected, done.rows) == ((first,), 2)
    assert read_stored_data(registry, NAME, first) is None
    assert rows_of(registry, second) == ([question(0), question(2)], [question(-2)])
    assert rows_of(registry, third) == ([question(0), question(3)], [question(-3)])
    assert all_stored(registry) == {*map(digest_row, map(question, (0, 2, 3, -2, -3)))}
    assert collect_garbage(registry, NAME, by="ann", keep=0).rows == 0
    assert_settled(registry)


def all_stored(registry: Path) -> set[str]:
    return find_rows(registry / NAME, lambda row: True)


@needs_rooms("housekeeping")
def test_forgotten_rows_and_prompts_leave_the_store_and_the_history_names_the_versions(
    tmp_path, capfd
):
    registry = tmp_path / "registry"
    first, second, _ = add_champions(tmp_path)
    listed = tmp_path / "listed.jsonl"
    prompt = question(-2)["prompt"].upper()
    other = question(3, "no")  # another answer: not this row
    listed.write_text("\n".join(map(json.dumps, [question(1), {"prompt": prompt}, other])))
    command = ["gc", NAME, "--registry", str(registry), "--forget", str(listed)]
    before = (registry / NAME / "history.jsonl").read_bytes()
    assert main([*command, "--dry-run"]) == 0
    assert f"{shorten_digest(first)} would lose 1 stored examples" in capfd.readouterr().out
    assert (registry / NAME / "history.jsonl").read_bytes() == before
    assert main([*command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["versions"] == {first: 1, second: 1}
    assert rows_of(registry, first) == ([question(0)], [question(-1)])
    assert rows_of(registry, second) == ([question(0), question(2)], [])
    assert not all_stored(registry) & {digest_row(question(1)), digest_row(question(-2))}
    lines = [line for line in history(registry, NAME) if line["action"] == "rows_forgotten"]
    assert [(line["version"], line["reason"]) for line in lines] == [
        (first, "1 row to be taken out of the data store"),
        (second, "1 row to be taken out of the data store"),
    ]
    assert b"number" not in (registry / NAME / "history.jsonl").read_bytes()
    assert_settled(registry)
    assert main(command) == 0
    assert "no version has any of these rows" in capfd.readouterr().out


@needs_rooms("housekeeping")
def test_rows_whose_removal_is_cut_short_are_recorded_first_and_never_come_back(
    tmp_path, monkeypatch
) -> None:
    registry = tmp_path / "registry"
    first, *_ = add_champions(tmp_path)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for step in ("drop_rows", "remove_unneeded_rows"):
        with monkeypatch.context() as patch:
            patch.setattr(module_of("garbage_collection"), step, stop)
            with pytest.raises(KeyboardInterrupt):
                forget_rows(registry, NAME, lambda row: row == question(1), by="ann")
        lines = [line for line in history(registry, NAME) if line["action"] == "rows_forgotten"]
        assert {line["reason"] for line in lines} == {"1 row to be taken out of the data store"}
        assert digest_row(question(1)) in all_stored(registry)
    assert first in {line["version"] for line in lines}
    (registry / NAME / "data" / f"{first}.json").unlink()  # lost; its run is registered again
    register(tmp_path / "run-1", registry, NAME, {}, examples=RunExamples([question(1)], []))
    forget_rows(registry, NAME, lambda row: row == question(1), by="ann")
    assert digest_row(question(1)) not in all_stored(registry)
    assert_settled(registry)


@needs_rooms("housekeeping")
def test_rows_of_a_damaged_pack_are_not_said_to_be_forgotten(tmp_path) -> None:
    registry = tmp_path / "registry"
    add_champions(tmp_path)
    pack = next((registry / NAME / "data").glob("*.jsonl"))
    pack.chmod(0o600)
    pack.write_bytes(pack.read_bytes()[:-9])
    before = (registry / NAME / "history.jsonl").read_bytes()
    with pytest.raises(DamagedError, match=f"{pack.name} has a line that is no row.*audit"):
        forget_rows(registry, NAME, lambda row: row == question(1), by="ann")
    assert (registry / NAME / "history.jsonl").read_bytes() == before


def test_a_row_that_is_too_large_leaves_room_for_those_that_fit() -> None:
    long = {"prompt": "x" * 1000, "completion": "y"}
    for held_out in ([long, question(1)], [question(1), long]):
        examples = RunExamples([question(2)], held_out, max_bytes=200)
        assert examples.choose() == {digest_row(question(1)), digest_row(question(2))}
        size = sum(len(line) for _, line in examples.lines())
        examples.max_bytes = size
        assert examples.choose() is examples.rows  # nothing more of each is kept in memory
        examples.max_bytes = size - 1
        assert len(examples.choose()) == 2


def test_a_removal_that_was_cut_short_is_finished_without_losing_a_row(tmp_path):
    """Whether the smaller file, which was written already, comes before the larger one or after."""

    class Stopped(Exception):
        pass

    def stop_at_second() -> None:
        if next(calls) == 1:  # the smaller file is there, the larger one is not removed
            raise Stopped

    (tmp_path / "versions").mkdir()
    orders = set()
    for number in range(2, 12):
        place = tmp_path / "data"
        examples = RunExamples([question(1), question(number)], [])
        store_examples(tmp_path, "one", examples, forgot=False, confirm=lambda: None)
        (larger,) = place.glob("*.jsonl")
        drop_rows(tmp_path, "one", {digest_row(question(number))}, confirm=lambda: None)
        calls = count()
        with pytest.raises(Stopped):
            remove_unneeded_rows(tmp_path, ["one"], confirm=stop_at_second)
        (smaller,) = {*place.glob("*.jsonl")} - {larger}
        orders.add(smaller < larger)
        remove_unneeded_rows(tmp_path, ["one"], confirm=lambda: None)
        assert find_rows(tmp_path, lambda row: True) == {digest_row(question(1))}
        assert [*place.glob("*.jsonl")] == [smaller]
        shutil.rmtree(place)
    assert orders == {True, False}


def test_a_file_with_a_line_too_many_is_written_again_under_its_own_name(tmp_path):
    (tmp_path / "versions").mkdir()
    examples = RunExamples([question(1)], [])
    store_examples(tmp_path, "one", examples, forgot=False, confirm=lambda: None)
    (pack,) = (tmp_path / "data").glob("*.jsonl")
    content = pack.read_bytes()
    pack.write_bytes(content + b"{}\n")
    remove_unneeded_rows(tmp_path, ["one"], confirm=lambda: None)
    assert pack.read_bytes() == content


def test_a_bounded_store_keeps_the_newest_versions_and_of_one_alone_what_fits(
    tmp_path, no_time_to_decide
):
    registry = tmp_path / "registry"
    first, second = (
        add_night(tmp_path, seed, [question(10 + seed)], [question(20 + seed)], max_bytes=250)
        for seed in (1, 2)
    )
    third = add_night(tmp_path, 3, [question(13)], [question(23)], max_bytes=250)
    assert read_stored_data(registry, NAME, first) == StoredData((), (), (), missing=2)
    assert rows_of(registry, second) == ([question(12)], [question(22)])
    rows = [question(number) for number in range(30, 60)]
    fourth = add_night(tmp_path, 4, rows, [question(24)], max_bytes=250)
    train, held_out = rows_of(registry, fourth)
    assert held_out == [question(24)]
    assert 0 < len(train) < 6
    assert [row for row in rows if row in train] == train
    assert read_stored_data(registry, NAME, third) == StoredData((), (), (), missing=2)
    assert sum(path.stat().st_size for path in (registry / NAME / "data").glob("*.jsonl")) <= 250
    assert_settled(registry)


def test_over_its_bound_the_store_drops_what_is_not_of_the_champions_lineage_first(
    tmp_path, no_time_to_decide
):
    registry = tmp_path / "registry"
    nights: list[str] = []
    for seed in range(1, 5):  # 2 goes on from 1; 3 and 4 go on from nobody, and are not promoted
        run = write_run(tmp_path / f"run-{seed}", seed, initial=(nights or ["1" * 64])[0])
        rows = [question(10 * seed + each) for each in range(3)]
        examples = RunExamples(rows[:2], rows[2:], 500)
        facts = {"parent": nights[0]} if seed == 2 else {}
        nights.append(register(run, registry, NAME, facts, examples=examples))
        if seed < 3:
            promote(registry, NAME, nights[-1], by="ann")
    assert read_stored_data(registry, NAME, nights[2]) == StoredData((), (), (), missing=3)
    assert [len(rows_of(registry, night)[0]) for night in nights[:2]] == [2, 2]
    add_night(tmp_path, 5, [question(50)], [question(51)], max_bytes=200)
    assert read_stored_data(registry, NAME, nights[3]) == StoredData((), (), (), missing=3)
    oldest = read_stored_data(registry, NAME, nights[0])
    assert oldest is not None
    assert (len(oldest.train), len(oldest.held_out), oldest.missing) == (0, 1, 2)
    assert_settled(registry)


def test_over_its_bound_the_store_keeps_a_version_that_may_be_promoted_before_older_ones(tmp_path):
    registry = tmp_path / "registry"
    first = add_night(tmp_path, 1, [question(1), question(2)], [question(3)], max_bytes=250)
    promote(registry, NAME, first, by="ann")
    second = add_night(tmp_path, 2, [question(4), question(5)], [question(6)], max_bytes=250)
    assert rows_of(registry, second) == ([question(4), question(5)], [question(6)])
    assert rows_of(registry, first) == ([], [question(3)])


def test_what_was_dropped_is_missing_and_nothing_forgotten_returns_with_it(
    tmp_path, no_time_to_decide
):
    registry = tmp_path / "registry"
    rows = [question(1), question(2), question(3)]
    first = add_night(tmp_path, 1, rows, [question(4)], max_bytes=150)
    forget_rows(registry, NAME, lambda row: row == question(4), by="ann")
    left = read_stored_data(registry, NAME, first)
    assert left is not None
    assert (len(left.train), left.held_out, left.missing) == (2, (), 1)
    add_night(tmp_path, 2, rows[:0], [question(5)], max_bytes=60)
    assert read_stored_data(registry, NAME, first) == StoredData((), (), (), missing=3)
    examples = RunExamples(rows, [question(4)])
    register(tmp_path / "run-1", registry, NAME, {}, examples=examples)
    data = read_stored_data(registry, NAME, first)
    assert data is not None
    assert (data.train, data.held_out) == ((), ())
    assert_settled(registry)


def test_a_forgotten_row_does_not_return_with_a_version_whose_list_was_emptied(tmp_path):
    registry = tmp_path / "registry"
    rows = [question(1), question(2)]
    first = add_night(tmp_path, 1, rows, [])
    add_night(tmp_path, 2, rows[:1], [], max_bytes=60)  # no room for the first one's
    forget_rows(registry, NAME, lambda row: row == question(1), by="ann")
    register(tmp_path / "run-1", registry, NAME, {}, examples=RunExamples(rows, []))
    assert read_stored_data(registry, NAME, first) == StoredData((), (), (), missing=2)
    assert not find_rows(registry / NAME, lambda row: row == question(1))


def test_an_audit_names_lost_rows_and_what_does_not_belong_to_the_store(tmp_path):
    registry = tmp_path / "registry"
    version = add_night(tmp_path, 1, [question(1), question(2)], [question(3)])
    assert audit(registry, NAME).is_sound
    data = registry / NAME / "data"
    (pack,) = data.glob("*.jsonl")
    pack.write_bytes(pack.read_bytes().replace(b"Is 2", b"Is 5"))
    (data / "notes.txt").write_text("mine")
    findings = {finding.file.name: finding.message for finding in audit(registry, NAME).findings}
    assert findings == {
        f"{version}.json": "1 of 3 examples that it names were altered, or are lost",
        "notes.txt": "does not belong to the data store",
    }


def test_a_copy_of_a_registry_keeps_the_store_to_its_owner(tmp_path):
    version = add_night(tmp_path, 1, [question(1)], [question(2)])
    copy = shutil.copytree(tmp_path / "registry", tmp_path / "copy", symlinks=True)
    assert rows_of(copy, version) == ([question(1)], [question(2)])
    assert audit(copy, NAME).is_sound
    assert stat.S_IMODE((copy / NAME / "data").stat().st_mode) == 0o700


def test_only_the_owner_reads_the_store(tmp_path):
    add_night(tmp_path, 1, [question(1)], [])
    assert stat.S_IMODE((tmp_path / "registry" / NAME / "data").stat().st_mode) == 0o700


def test_registering_many_rows_holds_their_digests_and_no_row(tmp_path: Path) -> None:
    """Rows of 10 kB each: a list of them, or of their lines, is far above the limit."""
    run, text, count = write_run(tmp_path / "run", 1), "word " * 2_000, 4_000
    rows = ({"text": f"{number} {text}"} for number in range(count))
    tracemalloc.start()
    try:
        examples = RunExamples(rows, [])
        version = register(run, tmp_path / "registry", NAME, {}, examples=examples)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (pack,) = (tmp_path / "registry" / NAME / "data").glob("*.jsonl")
    assert pack.stat().st_size > count * len(text) > 2 * MAX_BYTES_IN_MEMORY
    assert peak < MAX_BYTES_IN_MEMORY * 1.25 + 1_000 * count
    listed = read_digest_list(tmp_path / "registry" / NAME, version)
    assert listed is not None
    assert len(listed.train) == count


def test_rows_are_read_and_packs_compared_before_the_name_is_locked(tmp_path, monkeypatch) -> None:
    """Under the lock only if packs came or went; a row that went with one is written again."""
    registry = tmp_path / "registry"
    first = add_night(tmp_path, 1, [question(1), question(2)], [])
    (old,) = (registry / NAME / "data").glob("*.jsonl")
    read: list[tuple[str, bool]] = []
    is_locked = False

    def read_pack(path: Path) -> Iterator[tuple[str, bytes]]:
        read.append((path.name, is_locked))
        return whole_pack(path)

    @contextmanager
    def lock(folder: Path) -> Iterator[Any]:
        nonlocal is_locked
        meanwhile()
        with writing_folder(folder) as locked:
            is_locked = True
            yield locked
        is_locked = False

    def forget_a_row() -> None:
        with monkeypatch.context() as original:
            original.setattr(registration, "writing_folder", writing_folder)
            forget_rows(registry, NAME, lambda row: row == question(1), by="ann")
        read.clear()

    whole_pack = data_store._read_pack
    monkeypatch.setattr(data_store, "_read_pack", read_pack)
    monkeypatch.setattr(registration, "writing_folder", lock)
    meanwhile: Callable[[], object] = int
    add_night(tmp_path, 2, [question(1), question(3)], [])
    assert read == [(old.name, False)]
    meanwhile = forget_a_row
    third = add_night(tmp_path, 3, [question(1), question(2), question(4)], [])
    assert rows_of(registry, third)[0] == [question(1), question(2), question(4)]
    assert rows_of(registry, first)[0] == [question(2)]
    assert audit(registry, NAME).is_sound


def test_an_altered_row_is_missing_and_a_list_that_is_none_is_damage(tmp_path):
    registry = tmp_path / "registry"
    version = add_night(tmp_path, 1, [question(1), question(2)], [question(3)])
    (pack,) = (registry / NAME / "data").glob("*.jsonl")
    pack.write_bytes(pack.read_bytes().replace(b"Is 2", b"Is 5"))
    data = read_stored_data(registry, NAME, version)
    assert data is not None
    assert [row.row for row in data.train] == [question(1)]
    assert data.missing == 1
    (registry / NAME / "data" / f"{version}.json").write_text('{"train": 3}')
    with pytest.raises(DamagedError, match=f"{version}.json: .*Restore it.*echo"):
        read_stored_data(registry, NAME, version)


def test_the_lineage_follows_what_training_began_with_and_ends_at_a_fresh_adapter(tmp_path):
    registry = tmp_path / "registry"
    first, second = (
        register(write_run(tmp_path / name, seed), registry, NAME, {"parent": "0" * 64})
        for seed, name in enumerate(("before", "fresh"))
    )
    run = write_run(tmp_path / "third", 3, initial=second)
    third = register(run, registry, NAME, {"parent": second})
    followed = write_run(tmp_path / "fourth", 4, initial="1" * 64)
    fourth = register(followed, registry, NAME, {"parent": third})
    assert read_lineage(registry, NAME, first) == [first, "0" * 64]  # it was collected
    assert read_lineage(registry, NAME, third) == [third, second, "0" * 64]
    assert read_lineage(registry, NAME, fourth) == [fourth]


@pytest.mark.parametrize(
    "keys",
    [{"resume_adapter_file": "any.safetensors"}, {"continual": {"from": "champion"}}],
    ids=["adapter file", "champion"],
)
def test_whatever_names_the_first_adapter_its_version_is_the_parent(tmp_path: Path, keys) -> None:
    registry = {"path": str(tmp_path / "registry"), "name": NAME}
    config = example_config(registry=registry, **keys)
    assert parent_version_of(config, "0" * 64) is None
    version = add_night(tmp_path, 1, [question(1)], [])
    assert parent_version_of(config, version) == version
    assert parent_version_of(config, "0" * 64) is None


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (
            {"instruction": "Name it.", "input": "A cat.", "output": "cat"},
            {
                "messages": [
                    {"role": "user", "content": "Name it.\nA cat."},
                    {"role": "assistant", "content": "cat"},
                ]
            },
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Ho"},
                ]
            },
        ),
        ({"prompt": "Hi", "completion": "Ho"}, {"prompt": "Hi", "completion": "Ho"}),
        ({"text": "Hi Ho"}, {"text": "Hi Ho"}),
    ],
)
def test_rows_of_other_formats_become_rows_that_are_read_again_as_they_are(tmp_path, line, row):
    (tmp_path / "train.jsonl").write_text(f"{json.dumps({'text': 'no'})}\n{json.dumps(line)}\n")
    settings = DataSettings(str(tmp_path))
    first = read_split_rows(settings, "train")
    assert first is not None
    assert first.rows == [{"text": "no"}, row]
    (tmp_path / "train.jsonl").write_text(
        f"{json.dumps({'text': 'no'})}\nnot JSON\n{json.dumps(row)}\n"
    )
    assert read_split_rows(settings, "train") == first
    assert read_split_rows(settings, "valid") is None


def test_prompts_are_compared_without_case_white_space_and_system_texts():
    turns = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "acat"}]
    keys, others = (
        RowKeys.of({"prompt": "What is\nIT?", "completion": "A Cat"}),
        RowKeys.of({"messages": turns}),
    )
    system = [{"role": "system", "content": text} for text in ("Be brief.", "Be brief, please.")]
    asked = [RowKeys.of({"messages": [one, *turns]}) for one in system]
    assert {one.questions for one in asked} == {keys.questions}
    assert len({one.folded for one in asked}) == 2
    assert RowKeys.of({"messages": [*turns, *turns]}).questions != keys.questions
    assert (keys.questions, keys.folded) == (others.questions, others.folded)
    assert keys.content != others.content
    tools = [{"type": "function", "function": {"name": "look"}}]
    asked.append(RowKeys.of({"messages": turns, "tools": tools, "loss_mask": [0, 1]}))
    assert {one.bare for one in asked} == {keys.bare} == {keys.folded}
    alone = [RowKeys.of({"messages": [one, turns[1]]}) for one in system]
    assert alone[0].bare != alone[1].bare
    assert RowKeys.of({"text": "A Cat"}).questions == ()
