"""`validate`: every bad line by file, line and reason; exit 3; only the cache is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from nested_core.data import dataset_loading
from nested_core.data.dataset_loading import load_run_data
from nested_core.records.dataset import DatasetReport
from nested_core.storage.user_cache import CACHE_VARIABLE
from tests.example import DATA, example_config, write_config
from tests.flows.conftest import Ended, called

BAD = {2: "{not json", 4: '{"messages": []}', 5: '{"messages": [{"role": "user"}]}'}
VALIDATE = ("validate", "-c", "config.yaml")
COMMANDS = {
    "json": (*VALIDATE, "--json"),
    "no tokenizer": (*VALIDATE, "--json", "--no-tokenize"),
    "table": VALIDATE,
    "sound": (*VALIDATE, "--json"),
}


@dataclass(frozen=True)
class Validated:
    """What each command ended with, and its folder before and after."""

    folder: Path
    before: dict[str, dict[str, tuple[int, int]]]
    after: dict[str, dict[str, tuple[int, int]]]
    ended: dict[str, Ended]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with its size and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def write_bad_data(folder: Path) -> None:
    """A train.jsonl with three bad lines among good ones, beside a sound valid.jsonl."""
    folder.mkdir(parents=True)
    good = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    lines = [BAD.get(number, line) for number, line in enumerate(good, start=1)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "valid.jsonl").write_bytes((DATA / "valid.jsonl").read_bytes())


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Validated:
    """Each command in a folder of its own, all but one on bad data."""
    folder = tmp_path_factory.mktemp("validated")
    for name in COMMANDS:
        write_bad_data(folder / name / "data")
        data = str(DATA) if name == "sound" else "data"
        write_config(folder / name / "config.yaml", data=data)
    before = {name: listing(folder / name) for name in COMMANDS}
    outcomes = {name: called(*COMMANDS[name], cwd=folder / name) for name in COMMANDS}
    return Validated(folder, before, {name: listing(folder / name) for name in COMMANDS}, outcomes)


@pytest.mark.parametrize("name", ["json", "no tokenizer"])
def test_every_bad_line_is_named_with_file_line_and_reason(validated: Validated, name: str) -> None:
    done = validated.ended[name]
    assert done.code == 3
    errors = [f for f in done.document["findings"] if f["severity"] == "error"]
    assert {(f["file"], f["line"]) for f in errors} == {("train.jsonl", n) for n in BAD}
    assert all(set(f) == {"file", "line", "severity", "check", "message"} for f in errors)
    assert all(len(f["message"]) > 10 for f in errors)


def test_a_person_reads_the_same_in_a_table(validated: Validated) -> None:
    done = validated.ended["table"]
    assert done.code == 3
    for number in BAD:
        assert f"error: train.jsonl:{number}: " in done.stdout
    lines = done.stdout.splitlines()
    (columns,) = [line for line in lines if "┃ train.jsonl" in line]
    assert "┃ valid.jsonl" in columns
    assert any("│ rows" in line and "3 chat rows in 6 lines, 3 rejected" in line for line in lines)
    assert "Traceback" not in done.stderr


def test_sound_data_are_counted_and_accepted(validated: Validated) -> None:
    done = validated.ended["sound"]
    assert done.code == 0
    assert done.document["counts"]["error"] == 0
    assert done.document["splits"]["train"]["rows"] == 40
    assert "examples" not in done.document
    assert done.document["splits"]["train"]["tokens"]["supervised"] > 40


@pytest.mark.parametrize("name", ["json", "no tokenizer", "table", "sound"])
def test_validating_writes_nothing_beside_the_data(validated: Validated, name: str) -> None:
    assert validated.after[name] == validated.before[name]


@pytest.mark.parametrize("first", ["validate", "train"])
def test_what_was_judged_is_not_judged_again(tmp_path, monkeypatch, capfd, first) -> None:
    """By `validate`, or what `train` loads; that, and hashes of the model, is all it writes."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    config = write_config(tmp_path / "config.yaml")
    judged = []
    judge = dataset_loading._read_and_judge

    def count(*args: Any, **kwargs: Any) -> DatasetReport:
        judged.append(args)
        return judge(*args, **kwargs)

    monkeypatch.setattr(dataset_loading, "_read_and_judge", count)
    if first == "train":
        load_run_data(example_config())
    for _ in range(2):
        capfd.readouterr()
        assert main(["validate", "-c", str(config), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document == load_run_data(example_config())[0].to_json()
    assert len(judged) == 1
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"datasets", "hashes"}
    assert len([*(tmp_path / "cache/datasets").iterdir()]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "config.yaml"}
