"""A judged data set comes from the cache only where nothing that it depends on has changed."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from nested_core.config.sections import DataPolicy
from nested_core.data import dataset_loading
from nested_core.data import dataset_loading as caching
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import (
    dataset_cache,
    load_dataset,
)
from nested_core.data.tokens import tokenized_split
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError, DatasetError
from nested_core.records.dataset import DatasetReport
from nested_core.storage.user_cache import UserCache
from tests.core.data.conftest import WriteData

TRAIN = [{"text": f"{n} is the river of {n}land."} for n in range(9)]


@pytest.fixture
def settings(write_data: WriteData) -> DataSettings:
    return DataSettings(str(write_data(train=[*TRAIN, TRAIN[0]], valid=[{"text": "held out"}])))


@pytest.fixture
def cache(tmp_path: Path) -> UserCache:
    return dataset_cache(tmp_path / "cache")


def entries(cache: UserCache) -> list[Path]:
    return sorted(cache.folder.iterdir())


def test_the_second_load_gives_the_same_report_and_the_same_tokens_without_judging(
    settings: DataSettings,
    tokenizer: TokenizerSource,
    cache: UserCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, tokens = load_dataset(settings, tokenizer, cache=cache)
    monkeypatch.setattr("nested_core.data.dataset_loading._read_and_judge", None)
    second, again = load_dataset(settings, tokenizer, cache=cache)
    assert second == first
    assert again["train"].tokens.tolist() == tokens["train"].tokens.tolist()
    assert again["train"].lines.tolist() == list(range(1, 11))
    assert len(entries(cache)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"max_seq_length": 16},
        {"batch_size": 2},
        {"text_feature": "words"},
        {"policy": DataPolicy(duplicates="drop")},
    ],
)
def test_another_setting_is_another_entry(
    settings: DataSettings,
    tokenizer: TokenizerSource,
    cache: UserCache,
    change: dict[str, Any],
) -> None:
    load_dataset(settings, tokenizer, cache=cache)
    changed = replace(settings, **change)
    report, _ = load_dataset(changed, tokenizer, cache=cache)
    assert report == load_dataset(changed, tokenizer)[0]
    assert len(entries(cache)) == 2


def test_changed_content_is_judged_anew(
    settings: DataSettings, tokenizer: TokenizerSource, cache: UserCache
) -> None:
    load_dataset(settings, tokenizer, cache=cache)
    path = Path(settings.data, "train.jsonl")
    path.write_bytes(path.read_bytes() + b"{\n")
    report, _ = load_dataset(settings, tokenizer, cache=cache)
    assert [(f.line, f.check) for f in report.errors] == [(11, "bad-json")]


def test_a_report_that_names_a_folder_is_that_folders(
    tokenizer: TokenizerSource,
    cache: UserCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRAIN))
        monkeypatch.chdir(folder.parent)
        report, _ = load_dataset(DataSettings("data"), tokenizer, cache=cache)
        (missing,) = [f for f in report.findings if f.check == "no-validation-set"]
        assert f"there is none in {folder}, which holds train.jsonl" in missing.message
    (folder / "notes.txt").touch()
    report, _ = load_dataset(DataSettings("data"), tokenizer, cache=cache)
    (missing,) = [f for f in report.findings if f.check == "no-validation-set"]
    assert "which holds notes.txt, train.jsonl" in missing.message


def test_another_template_is_another_entry(
    settings: DataSettings, tokenizer: TokenizerSource, cache: UserCache, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tokenizer.folder, tmp_path / "model"))
    load_dataset(settings, TokenizerSource(str(copy)), cache=cache)
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    load_dataset(settings, TokenizerSource(str(copy)), cache=cache)
    assert len(entries(cache)) == 2


def test_an_additional_template_is_another_entry(
    settings: DataSettings, tokenizer: TokenizerSource, cache: UserCache, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tokenizer.folder, tmp_path / "model"))
    source = TokenizerSource(str(copy))
    load_dataset(settings, source, cache=cache)
    template = copy / "additional_chat_templates" / "tool_use.jinja"
    template.parent.mkdir()
    for number, content in enumerate(["{{ messages }}", "{{ messages | tojson }}"], start=2):
        template.write_text(content)
        load_dataset(settings, source, cache=cache)
        assert len(entries(cache)) == number


def test_other_rules_are_another_entry(
    settings: DataSettings,
    tokenizer: TokenizerSource,
    cache: UserCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_dataset(settings, tokenizer, cache=cache)
    monkeypatch.setattr(caching, "_hash_data_code", lambda: "the next release")
    load_dataset(settings, tokenizer, cache=cache)
    assert len(entries(cache)) == 2


@pytest.mark.parametrize("name", ["train.tokens", "report.json", "MANIFEST.json"])
def test_a_damaged_entry_is_told_and_made_again(
    settings: DataSettings,
    tokenizer: TokenizerSource,
    cache: UserCache,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    first, _ = load_dataset(settings, tokenizer, cache=cache)
    path = entries(cache)[0] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    tokenized_split._verify_manifest_once.cache_clear()  # as in another process
    with caplog.at_level(logging.WARNING):
        second, tokens = load_dataset(settings, tokenizer, cache=cache)
    assert second == first
    assert "is damaged and is made again" in caplog.text
    assert len(tokens["train"]) == 10


def test_a_folder_that_others_can_write_to_is_refused(
    settings: DataSettings, tokenizer: TokenizerSource, cache: UserCache
) -> None:
    cache.folder.mkdir()
    cache.folder.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by others, who could pass any data set"):
        load_dataset(settings, tokenizer, cache=cache)


def test_of_two_that_make_the_same_entry_at_once_the_first_stays_and_both_have_their_tokens(
    settings: DataSettings,
    tokenizer: TokenizerSource,
    cache: UserCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge = dataset_loading._read_and_judge
    found: list[tuple[DatasetReport, dict[str, TokenizedSplit]]] = []
    places: list[int] = []

    def meanwhile(*arguments: Any, **options: Any) -> DatasetReport:
        monkeypatch.undo()
        found.append(load_dataset(settings, tokenizer, cache=cache))
        places.extend(path.stat().st_ino for path in entries(cache) if path.name[0] != ".")
        return judge(*arguments, **options)

    monkeypatch.setattr(dataset_loading, "_read_and_judge", meanwhile)
    report, tokens = load_dataset(settings, tokenizer, cache=cache)
    assert report == found[0][0]
    assert tokens["train"].tokens.tolist() == found[0][1]["train"].tokens.tolist()
    assert [path.stat().st_ino for path in entries(cache)] == places


def test_an_entry_that_goes_while_it_is_read_is_made_again_without_a_warning(
    settings: DataSettings,
    tokenizer: TokenizerSource,
    cache: UserCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another process has found it damaged, or unused for a month."""
    first, _ = load_dataset(settings, tokenizer, cache=cache)

    def taken_away(folder: Path) -> Any:
        monkeypatch.undo()
        shutil.rmtree(folder)
        return tokenized_split.open_tokens(folder)

    monkeypatch.setattr(caching, "open_tokens", taken_away)
    with caplog.at_level(logging.WARNING):
        assert load_dataset(settings, tokenizer, cache=cache)[0] == first
    assert len(entries(cache)) == 1
    assert caplog.text == ""


def test_a_maker_that_fails_leaves_nothing(
    settings: DataSettings,
    tokenizer: TokenizerSource,
    cache: UserCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        dataset_loading,
        "write_report_beside_tokens",
        Mock(side_effect=OSError(28, "No space left")),
    )
    with pytest.raises(OSError, match="No space left"):
        load_dataset(settings, tokenizer, cache=cache)
    assert entries(cache) == []


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Two processes, which import everything once for all tests that use them."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        processes.submit(os.getpid).result()  # the first call starts its threads
        yield processes


@pytest.mark.slow("starts processes that import transformers")
@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_load_one_data_set_at_once_all_get_it(
    settings: DataSettings,
    tokenizer: TokenizerSource,
    cache: UserCache,
    pool: ProcessPoolExecutor,
    damaged: bool,
) -> None:
    expected = load_dataset(settings, tokenizer, cache=cache)[0].to_json()
    for _ in range(3):
        (entry,) = entries(cache)
        if damaged:
            (entry / "train.tokens").write_bytes(b"")
        else:
            shutil.rmtree(entry)
        loads = [pool.submit(report_of, settings, tokenizer, cache) for _ in range(8)]
        assert [load.result() for load in loads] == [expected] * 8


def report_of(settings: DataSettings, tokenizer: TokenizerSource, cache: UserCache) -> Any:
    report, tokens = load_dataset(settings, tokenizer, cache=cache)
    assert len(tokens["train"]) == 10
    return report.to_json()


def test_an_entry_is_out_of_sight_before_it_is_removed(
    settings: DataSettings,
    tokenizer: TokenizerSource,
    cache: UserCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_dataset(settings, tokenizer, cache=cache)
    (old,) = entries(cache)
    os.utime(old, (1, 1))
    remove, in_its_place = shutil.rmtree, []

    def watched(path: Any, **options: Any) -> None:
        in_its_place.append(old.exists())
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    load_dataset(replace(settings, batch_size=2), tokenizer, cache=cache)
    assert set(in_its_place) == {False}


def test_an_entry_of_which_half_is_removed_while_it_is_mapped_is_made_again_whole(
    settings: DataSettings,
    tokenizer: TokenizerSource,
    cache: UserCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, _ = load_dataset(settings, tokenizer, cache=cache)

    def half_removed(folder: Path, *arguments: Any) -> Any:
        monkeypatch.undo()
        for path in folder.glob("train.*"):
            path.unlink()
        return tokenized_split._memory_map_splits(folder, *arguments)

    monkeypatch.setattr(tokenized_split, "_memory_map_splits", half_removed)
    again, splits = load_dataset(settings, tokenizer, cache=cache)
    assert again == first
    assert {split: len(tokens) for split, tokens in splits.items()} == {"train": 10, "valid": 1}


def test_an_entry_that_came_and_went_while_another_was_made_is_no_error(
    settings: DataSettings,
    tokenizer: TokenizerSource,
    cache: UserCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = Mock(side_effect=OSError(errno.ENOTEMPTY, "Directory not empty"))
    monkeypatch.setattr(Path, "rename", there)
    _, splits = load_dataset(settings, tokenizer, cache=cache)
    assert len(splits["train"]) == 10
    assert entries(cache) == []


def test_data_that_changes_while_it_is_judged_is_not_kept_as_what_it_was(
    settings: DataSettings,
    tokenizer: TokenizerSource,
    cache: UserCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge, path = dataset_loading._read_and_judge, Path(settings.data, "train.jsonl")
    before = path.read_bytes()

    def changed(*arguments: Any, **options: Any) -> DatasetReport:
        path.write_bytes(before + b'{"text": "more of it"}\n')
        return judge(*arguments, **options)

    monkeypatch.setattr(dataset_loading, "_read_and_judge", changed)
    with pytest.raises(DatasetError, match="changed while it was judged"):
        load_dataset(settings, tokenizer, cache=cache)
    monkeypatch.undo()
    path.write_bytes(before)
    assert len(load_dataset(settings, tokenizer, cache=cache)[1]["train"]) == 10


def test_an_entry_in_use_stays(
    settings: DataSettings, tokenizer: TokenizerSource, cache: UserCache
) -> None:
    load_dataset(settings, tokenizer, cache=cache)
    (entry,) = entries(cache)
    os.utime(entry, (1, 1))
    load_dataset(settings, tokenizer, cache=cache)
    assert entry.stat().st_mtime > time.time() - 60
