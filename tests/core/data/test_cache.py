"""A judged data set comes from the cache only where nothing that it depends on has changed."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from nested_core.config.sections import DataPolicy
from nested_core.data import dataset_loading
from nested_core.data import dataset_loading as caching
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import dataset_cache, load_dataset
from nested_core.data.tokens import tokenized_split
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError, DatasetError
from nested_core.records.dataset import DatasetReport
from nested_core.storage.user_cache import UserCache
from tests.builders.data_sets import write_lines
from tests.core.data.conftest import WriteData
from tests.left_out import slow_except

pytestmark = pytest.mark.slow("validates anew for each thing that changed")

TRAIN = [{"text": f"{n} is the river of {n}land."} for n in range(9)]


@dataclass(frozen=True)
class CachedLoads:
    """A data set of ten rows, a tokenizer, and a cache that loads go through."""

    settings: DataSettings
    tokenizer: TokenizerSource
    cache: UserCache

    def load(
        self, tokenizer: TokenizerSource | None = None, **changes: Any
    ) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
        """Load it, with other settings or another tokenizer perhaps."""
        settings = replace(self.settings, **changes)
        return load_dataset(settings, tokenizer or self.tokenizer, cache=self.cache)

    def entries(self) -> list[Path]:
        """The folders of the cache."""
        return sorted(self.cache.folder.iterdir())


@pytest.fixture
def cached(write_data: WriteData, tokenizer: TokenizerSource, tmp_path: Path) -> CachedLoads:
    folder = write_data(train=[*TRAIN, TRAIN[0]], valid=[{"text": "held out"}])
    settings = DataSettings(str(folder))
    return CachedLoads(settings, tokenizer, dataset_cache(tmp_path / "cache"))


def test_the_second_load_gives_the_same_report_and_the_same_tokens_without_judging(
    cached: CachedLoads, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, tokens = cached.load()
    monkeypatch.setattr(caching, "_read_and_judge", Mock(side_effect=AssertionError))
    second, again = cached.load()
    assert second == first
    assert again["train"].tokens.tolist() == tokens["train"].tokens.tolist()
    assert again["train"].lines.tolist() == list(range(1, 11))
    assert len(cached.entries()) == 1


@pytest.mark.parametrize(
    "change",
    slow_except(
        [
            {"max_seq_length": 16},
            {"batch_size": 2},
            {"text_feature": "words"},
            {"policy": DataPolicy(duplicates="drop")},
        ],
        {"max_seq_length": 16},
        reason="loads a data set three times",
    ),
)
def test_another_setting_is_another_entry(cached, change) -> None:
    cached.load()
    report, _ = cached.load(**change)
    assert report == load_dataset(replace(cached.settings, **change), cached.tokenizer)[0]
    assert len(cached.entries()) == 2


def test_changed_content_is_judged_anew(cached: CachedLoads) -> None:
    cached.load()
    path = Path(cached.settings.data, "train.jsonl")
    path.write_bytes(path.read_bytes() + b"{\n")
    report, _ = cached.load()
    assert [(f.line, f.check) for f in report.errors] == [(11, "bad-json")]


def test_a_report_that_names_a_folder_is_that_folders(cached, tmp_path, monkeypatch) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name / "data"
        write_lines(folder / "train.jsonl", TRAIN)
        monkeypatch.chdir(folder.parent)
        report, _ = cached.load(data="data")
        (missing,) = [f for f in report.findings if f.check == "no-validation-set"]
        assert f"there is none in {folder}, which holds train.jsonl" in missing.message
    (folder / "notes.txt").touch()
    report, _ = cached.load(data="data")
    (missing,) = [f for f in report.findings if f.check == "no-validation-set"]
    assert "which holds notes.txt, train.jsonl" in missing.message


def test_another_template_is_another_entry(cached: CachedLoads, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cached.tokenizer.folder, tmp_path / "model"))
    cached.load(TokenizerSource(str(copy)))
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    cached.load(TokenizerSource(str(copy)))
    assert len(cached.entries()) == 2


@pytest.mark.slow("loads a data set three times")
def test_an_additional_template_is_another_entry(cached: CachedLoads, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cached.tokenizer.folder, tmp_path / "model"))
    source = TokenizerSource(str(copy))
    cached.load(source)
    template = copy / "additional_chat_templates" / "tool_use.jinja"
    template.parent.mkdir()
    for number, content in enumerate(["{{ messages }}", "{{ messages | tojson }}"], start=2):
        template.write_text(content)
        cached.load(source)
        assert len(cached.entries()) == number


def test_other_rules_are_another_entry(cached, monkeypatch) -> None:
    cached.load()
    monkeypatch.setattr(caching, "_hash_data_code", lambda: "the next release")
    cached.load()
    assert len(cached.entries()) == 2


@pytest.mark.parametrize("name", ["train.tokens", "report.json", "MANIFEST.json"])
def test_a_damaged_entry_is_told_and_made_again(cached, caplog, name) -> None:
    first, _ = cached.load()
    path = cached.entries()[0] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    tokenized_split._verify_manifest_once.cache_clear()  # as in another process
    with caplog.at_level(logging.WARNING):
        second, tokens = cached.load()
    assert second == first
    assert "is damaged and is made again" in caplog.text
    assert len(tokens["train"]) == 10


def test_a_folder_that_others_can_write_to_is_refused(cached: CachedLoads) -> None:
    cached.cache.folder.mkdir()
    cached.cache.folder.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by others, who could pass any data set"):
        cached.load()


def test_of_two_that_make_the_same_entry_at_once_the_first_stays_and_both_have_their_tokens(
    cached: CachedLoads, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = dataset_loading._read_and_judge
    found: list[tuple[DatasetReport, dict[str, TokenizedSplit]]] = []
    places: list[int] = []

    def meanwhile(*arguments: Any, **options: Any) -> DatasetReport:
        monkeypatch.undo()
        found.append(cached.load())
        places.extend(path.stat().st_ino for path in cached.entries() if path.name[0] != ".")
        return judge(*arguments, **options)

    monkeypatch.setattr(dataset_loading, "_read_and_judge", meanwhile)
    report, tokens = cached.load()
    assert report == found[0][0]
    assert tokens["train"].tokens.tolist() == found[0][1]["train"].tokens.tolist()
    assert [path.stat().st_ino for path in cached.entries()] == places


def test_an_entry_that_goes_while_it_is_read_is_made_again_without_a_warning(
    cached: CachedLoads, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process has found it damaged, or unused for a month."""
    first, _ = cached.load()

    def taken_away(folder: Path) -> Any:
        monkeypatch.undo()
        shutil.rmtree(folder)
        return tokenized_split.open_tokens(folder)

    monkeypatch.setattr(caching, "open_tokens", taken_away)
    with caplog.at_level(logging.WARNING):
        assert cached.load()[0] == first
    assert len(cached.entries()) == 1
    assert caplog.text == ""


def test_a_maker_that_fails_leaves_nothing(cached, monkeypatch) -> None:
    monkeypatch.setattr(
        dataset_loading, "write_json", Mock(side_effect=OSError(28, "No space left"))
    )
    with pytest.raises(OSError, match="No space left"):
        cached.load()
    assert cached.entries() == []


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Two processes, which import everything once for all tests that use them."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        for call in [processes.submit(os.getpid) for _ in range(2)]:  # starts both
            call.result()
        yield processes


@pytest.mark.slow("starts processes that import transformers")
@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_load_one_data_set_at_once_all_get_it(cached, pool, damaged) -> None:
    expected = cached.load()[0].to_json()
    for _ in range(3):
        (entry,) = cached.entries()
        if damaged:
            (entry / "train.tokens").write_bytes(b"")
        else:
            shutil.rmtree(entry)
        loads = [pool.submit(report_of, cached) for _ in range(8)]
        assert [load.result() for load in loads] == [expected] * 8


def report_of(cached: CachedLoads) -> Any:
    report, tokens = cached.load()
    assert len(tokens["train"]) == 10
    return report.to_json()


def test_an_entry_is_out_of_sight_before_it_is_removed(cached, monkeypatch) -> None:
    cached.load()
    (old,) = cached.entries()
    os.utime(old, (1, 1))
    remove, in_its_place = shutil.rmtree, []

    def watched(path: Any, **options: Any) -> None:
        in_its_place.append(old.exists())
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    cached.load(batch_size=2)
    assert set(in_its_place) == {False}


def test_an_entry_of_which_half_is_removed_while_it_is_mapped_is_made_again_whole(
    cached: CachedLoads, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = cached.load()

    def half_removed(folder: Path, *arguments: Any) -> Any:
        monkeypatch.undo()
        for path in folder.glob("train.*"):
            path.unlink()
        return tokenized_split._memory_map_splits(folder, *arguments)

    monkeypatch.setattr(tokenized_split, "_memory_map_splits", half_removed)
    again, splits = cached.load()
    assert again == first
    assert {split: len(tokens) for split, tokens in splits.items()} == {"train": 10, "valid": 1}


def test_an_entry_that_came_and_went_while_another_was_made_is_no_error(
    cached: CachedLoads, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Mock(side_effect=OSError(errno.ENOTEMPTY, "Directory not empty"))
    monkeypatch.setattr(Path, "rename", there)
    _, splits = cached.load()
    assert len(splits["train"]) == 10
    assert cached.entries() == []


def test_data_that_changes_while_it_is_judged_is_not_kept_as_what_it_was(
    cached: CachedLoads, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, path = dataset_loading._read_and_judge, Path(cached.settings.data, "train.jsonl")
    before = path.read_bytes()

    def changed(*arguments: Any, **options: Any) -> DatasetReport:
        path.write_bytes(before + b'{"text": "more of it"}\n')
        return judge(*arguments, **options)

    monkeypatch.setattr(dataset_loading, "_read_and_judge", changed)
    with pytest.raises(DatasetError, match="changed while it was checked"):
        cached.load()
    monkeypatch.undo()
    path.write_bytes(before)
    assert len(cached.load()[1]["train"]) == 10


def test_an_entry_in_use_stays(cached: CachedLoads) -> None:
    cached.load()
    (entry,) = cached.entries()
    os.utime(entry, (1, 1))
    cached.load()
    assert entry.stat().st_mtime > time.time() - 60
