"""Data sets of the hub as mlx-lm reads them, tried on local folders: nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
import json
import socket
import sys
import time
import types
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import polars as pl
import pytest
from mlx_lm.tuner import datasets as theirs

from nested_core.config.loading import parse_config
from nested_core.config.sections import HubDataset
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError
from nested_core.records.dataset import DatasetReport
from nested_core.rooms.hub.hub_datasets import open_dataset_by_name
from tests.builders.data_sets import chat, write_lines

pytestmark = pytest.mark.slow("imports datasets, and reads its files")

has_library = importlib.util.find_spec("datasets") is not None
needs_library = pytest.mark.skipif(not has_library, reason="the extra `hub` is not installed")
ROWS = [{"question": f"Where is {n}?", "response": f"In {n}land.", "id": n} for n in range(20)]
CHATS = [{"chosen": chat(f"Which one is {n}?", f"The {n}th.")["messages"]} for n in range(10)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    pl.DataFrame(rows).write_parquet(folder / "train.parquet")
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "questions" / "train.jsonl", ROWS).parent


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "chats", CHATS)


def settings_of(entries: Any, **more: Any) -> DataSettings:
    return DataSettings.from_config(parse_config({"hf_dataset": entries, **more}, source="test"))


def judge(entries: Any, **more: Any) -> DatasetReport:
    return load_dataset(settings_of(entries, **more), None)[0]


def entry(path: Path, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "config": {"cache_dir": str(path / ".cache")}, **more}


FIELDS = {"prompt_feature": "question", "completion_feature": "response"}


@needs_library
def test_a_mapping_reads_the_splits_and_columns_it_names(questions: Path) -> None:
    report = judge(entry(questions, **FIELDS, test_split="train[80%:90%]"))
    assert report.errors == ()
    rows = {split: (stats.file, stats.rows) for split, stats in report.splits.items()}
    assert rows == {
        "train": (f"{questions}:train[:80%]", 16),
        "valid": (f"{questions}:train[-10%:]", 2),
        "test": (f"{questions}:train[80%:90%]", 2),
    }
    assert [f.message for f in report.warnings][0].startswith("ignored: id")


@needs_library
def test_a_bad_row_is_named_by_its_number(tmp_path: Path) -> None:
    rows = [*ROWS[:5], {"question": " ", "response": "b", "id": 0}, *ROWS[5:]]
    folder = write_parquet(tmp_path / "bad", rows)
    report = judge(entry(folder, **FIELDS, train_split="train[:80%]"))
    found = [(f.file, f.line, f.check) for f in report.errors]
    assert found == [(f"{folder}:train[:80%]", 6, "blank-field")]


@needs_library
def test_a_list_is_read_one_after_the_other_in_one_format(questions: Path, chats: Path) -> None:
    entries = [entry(questions, **FIELDS), entry(chats, chat_feature="chosen")]
    report = judge(entries)
    assert report.errors == ()
    train = report.splits["train"]
    assert (train.format, train.rows) == ("chat", 16 + 8)
    assert train.file == f"{questions}:train[:80%] + {chats}:train[:80%]"


@needs_library
def test_tokens_are_those_of_mlx_lm(questions, chats, tokenizer) -> None:
    entries = [entry(questions, **FIELDS), entry(chats, chat_feature="chosen")]
    arguments = types.SimpleNamespace(
        hf_dataset=json.loads(json.dumps(entries)), train=True, test=False, mask_prompt=True
    )
    train, valid, _ = theirs.load_dataset(arguments, tokenizer.load())
    _, ours = load_dataset(settings_of(entries, mask_prompt=True), tokenizer)
    for expected, split in ((train, ours["train"]), (valid, ours["valid"])):
        assert len(split) == len(expected)
        for index in range(len(expected)):
            tokens, _ = expected.process(expected[index])
            assert split.example(index).tolist() == list(tokens)


@needs_library
def test_one_column_named_for_two_fields_is_the_one_that_mlx_lm_takes_it_for(
    tmp_path: Path, tokenizer: TokenizerSource
) -> None:
    """mlx-lm's example has `prompt_feature: text`, and text_feature is `text` by default."""
    bills = [{"text": f"A bill of {n} lines", "summary": f"Bill {n}", "title": n} for n in range(9)]
    folder = write_parquet(tmp_path / "bills", bills)
    bill = entry(folder, prompt_feature="text", completion_feature="summary")
    arguments = types.SimpleNamespace(hf_dataset=dict(bill), train=True, test=False)
    expected, _, _ = theirs.load_dataset(arguments, tokenizer.load())
    report, splits = load_dataset(settings_of(bill), tokenizer)
    assert report.splits["train"].format == "completion"
    for index in range(len(expected)):
        tokens, _ = expected.process(expected[index])
        assert splits["train"].example(index).tolist() == list(tokens)


@needs_library
def test_a_prompt_without_a_completion_is_said_to_lack_it(questions: Path, chats: Path) -> None:
    half = entry(questions, prompt_feature="question")
    (first, *_) = judge([half, entry(chats, chat_feature="chosen")]).errors
    assert (first.line, first.check) == (1, "missing-field")
    assert first.message.startswith("completion is missing")


@needs_library
def test_a_name_in_data_reads_train_valid_and_test(questions, monkeypatch) -> None:
    """A folder of files is read by ourselves; what is not a folder goes to the library."""
    datasets = importlib.import_module("datasets")
    found = datasets.load_dataset(str(questions), cache_dir=str(questions / ".cache"))
    asked: list[Any] = []

    def answer(*positional: Any, **named: Any) -> Any:
        asked.append((positional, named))
        return found

    monkeypatch.setattr(datasets, "load_dataset", answer)
    settings = DataSettings("org/name", prompt_feature="question", completion_feature="response")
    report, _ = load_dataset(settings, None)
    assert asked == [(("org/name",), {})]
    assert {s: (stats.file, stats.rows) for s, stats in report.splits.items()} == {
        "train": ("org/name:train", 20)
    }


@needs_library
def test_what_cannot_be_loaded_is_one_paragraph(questions: Path) -> None:
    with pytest.raises(ConfigError, match="could not be loaded from the .*no_such_split") as caught:
        judge(entry(questions, train_split="no_such_split"))
    assert "\n" not in str(caught.value)


@needs_library
def test_no_network_is_asked_for_when_offline(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    refusal = "data: 'org/no-such-name' is not a folder here, and the data set"
    with pytest.raises(ConfigError, match=refusal):
        load_dataset(DataSettings("org/no-such-name"), None)


@pytest.mark.claim(
    "Data, adapters and model folders can run nothing here, but code that your file trusts"
)
def test_code_of_a_data_set_needs_trust(questions: Path) -> None:
    asking = {"path": "org/name", "config": {"trust_remote_code": True}}
    with pytest.raises(ConfigError, match=r"asks to run code of the data set|nested-tune\[hub\]"):
        judge(asking)


def test_without_the_library_one_paragraph_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for settings in (DataSettings("org/name"), settings_of({"path": "org/name"})):
        with pytest.raises(ConfigError, match=r"pip install 'nested-tune\[hub\]'"):
            load_dataset(settings, None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"paht": "a"}, r"hf_dataset\.0\.paht: unknown key; did you mean path\?"),
        ({"path": "a", "name": "b"}, r"chosen by config: \{name: b\}"),
        ({"path": "a", "config": {"split": "train"}}, "have keys of their own"),
        ({"train_split": "train"}, r"hf_dataset\.0\.path"),
        ("billsum", "hf_dataset"),
    ],
)
def test_a_wrong_key_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"hf_dataset": value}, source="test")


def test_one_mapping_is_a_list_of_one() -> None:
    one = settings_of({"path": "a"})
    assert one.hf_dataset == (HubDataset(path="a"),) == settings_of([{"path": "a"}]).hf_dataset
    assert settings_of([]).hf_dataset == ()
    assert one.describe_source == "a"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes an address the hub, for the libraries that read their environment once."""
    library = importlib.import_module("datasets")
    constants = importlib.import_module("huggingface_hub.constants")

    def use(address: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(library.config, "HF_ENDPOINT", address)

    return use


class HubWithoutSets(BaseHTTPRequestHandler):
    """A hub that has no data set, and counts who asks."""

    questions: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.questions.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        """Nothing on standard error."""


@needs_library
def test_a_name_that_the_hub_does_not_have_is_asked_for_once(online, monkeypatch) -> None:
    monkeypatch.setattr(HubWithoutSets, "questions", [])
    with HTTPServer(("127.0.0.1", 0), HubWithoutSets) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        online(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ConfigError, match="could not be loaded from the hub.*NotFound"):
            open_dataset_by_name("nobody/mistyped", trust_remote_code=False)
        server.shutdown()
    assert HubWithoutSets.questions == ["/api/datasets/nobody/mistyped"]


@needs_library
def test_a_hub_that_cannot_be_reached_is_no_wait(online, monkeypatch) -> None:
    online("http://127.0.0.1:9")  # the port to discard: nobody listens
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(ConfigError, match="could not be loaded from the hub"):
        open_dataset_by_name("nobody/mistyped", trust_remote_code=False)
    assert slept == []  # the library alone sleeps for 23 seconds and longer between its tries
    assert importlib.import_module("datasets").config.HF_HUB_OFFLINE is False
