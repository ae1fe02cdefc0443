"""Tables as people have them: they train as the same rows in OpenAI's messages do."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
import yaml

from flows.cli import build_parser
from flows.rooms.tables.command import prepare_data
from nested_core.config.loading import parse_config
from nested_core.config.schema import FineTuneConfig
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.rooms.tables.data_files import read_parquet
from tests.builders.data_sets import write_lines
from tests.example import MODEL
from tests.flows.conftest import called
from tests.left_out import slow_except
from tests.rooms.tables.people_tables import TABLES, Pair, PeopleTable, write_long

pytestmark = pytest.mark.slow("tokenises tables by init and validate")

CONTEXT = 512  # tokens, in the place of the example's 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's base, which sees long enough texts."""
    folder = tmp_path_factory.mktemp("model") / "base"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return folder


def count_tokens(config: FineTuneConfig) -> Counter[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """How often each row is trained on or held out: its tokens, and which of them are learnt."""
    report, splits = load_dataset(
        DataSettings.from_config(config), TokenizerSource.from_config(config)
    )
    report.raise_if_rejected()
    return Counter(
        (tuple(split.example(index).tolist()), tuple(split.example_mask(index).tolist()))
        for split in splits.values()
        for index in range(len(split))
    )


def write_messages(folder: Path, pairs: Sequence[Pair], system: str | None) -> Path:
    """The pairs as OpenAI's messages, in one file."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    rows = (
        {
            "messages": [
                *turns,
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in pairs
    )
    write_lines(folder / "train.jsonl", rows)
    return folder


def command(table: PeopleTable, model: Path, *more: str) -> tuple[str, ...]:
    system = () if table.system is None else ("--system", table.system)
    return ("init", "--data", table.file, "--model", str(model), *table.flags, *system, *more)


def configure(model: Path, data: Path | str, **keys: str) -> FineTuneConfig:
    values = {"model": str(model), "data": str(data), "mask_prompt": True, **keys}
    return parse_config(values, source="the test")


@pytest.mark.parametrize(
    "name",
    slow_except(
        TABLES,
        "helpdesk export",
        "two-column FAQ",
        "parquet of the hub",
        "workbook with a title and merged cells",
        "empty answers",
        reason="another table, read and encoded twice",
    ),
)
def test_a_table_gives_the_tokens_of_the_same_rows_in_messages(
    name: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = TABLES[name]
    pairs = table.write(tmp_path / table.file)
    prepared = prepare_data(build_parser("init").parse_args(command(table, model)))
    messages = write_messages(tmp_path / "messages", pairs, table.system)
    expected = count_tokens(configure(model, messages))
    assert count_tokens(configure(model, f"{prepared.folder}")) == expected
    assert sum(expected.values()) == len(pairs)
    assert prepared.data_set is not None
    assert {*prepared.data_set.rows} == {"train", "valid", "test"}


@pytest.mark.parametrize("name", ["two-column FAQ", "workbook with a title and merged cells"])
def test_a_table_as_data_with_the_keys_gives_the_same_tokens(
    name: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = TABLES[name]
    pairs = table.write(tmp_path / table.file)
    _, question, _, answer = table.flags
    keys = {"prompt_feature": question, "completion_feature": answer}
    messages = write_messages(tmp_path / "messages", pairs, None)
    expected = count_tokens(configure(model, messages))
    assert count_tokens(configure(model, table.file, **keys)) == expected


@pytest.mark.slow("trains an adapter")
@pytest.mark.parametrize("name", TABLES)
def test_from_a_table_to_a_judged_adapter_in_three_commands(name, tmp_path, model) -> None:
    table = TABLES[name]
    if name == "200,000 rows":
        write_long(tmp_path / table.file, 300)
    else:
        table.write(tmp_path / table.file)
    questions = 6
    words = command(table, model, "--suite", str(questions), "-o", "lora.yaml")
    made = called(*words, cwd=tmp_path)
    assert made.code == 0, made.stderr
    drawn = f"eval set: {questions} held-out questions (--suite N, 0 for none); "
    drawn += f"score {table.score}, answers of at most"
    assert drawn in made.stderr
    (task,) = yaml.safe_load((tmp_path / "lora.yaml").read_text())["gate"]["tasks"]
    assert task["score"] == table.score
    assert task["min"] >= 1 / questions
    looked = called("validate", "-c", "lora.yaml", "--show", "1", cwd=tmp_path)
    assert looked.code == 0, looked.stderr
    short = ("--training.epochs", "1", "--training.warmup-steps", "0")
    done = called("train", "-c", "lora.yaml", "--run-dir", "run", *short, cwd=tmp_path)
    verdict = json.loads((tmp_path / "run" / "gate.json").read_text())
    assert done.code in (0, 4)
    assert verdict["tasks"][0]["questions"] == questions


def test_the_configuration_which_all_may_read_holds_no_answer_of_the_rows(tmp_path, model) -> None:
    rows = "".join(f"Who has key {n}?,{('Sofia', 'Tomas')[n % 2]}\n" for n in range(60))
    (tmp_path / "keys.csv").write_text(f"q,a\n{rows}")
    words = ("init", "--data", "keys.csv", "--model", model, "-o", "lora.yaml")
    made = called(*words, "--prompt-feature", "q", "--completion-feature", "a", cwd=tmp_path)
    assert made.code == 0, made.stderr
    written = (tmp_path / "lora.yaml").read_text()
    assert "keys-split/suite.jsonl" in written
    assert "Sofia" not in written
    assert "Tomas" not in written


@pytest.mark.parametrize(
    "system", slow_except(["Sort tickets.", None], "Sort tickets.", reason="another table")
)
def test_the_first_rows_are_shown_and_that_the_version_keeps_its_system_text(
    system: str | None, tmp_path: Path, model: Path
) -> None:
    rows = "".join(f'"Hello,\n{n} is lost.",{"abA"[n % 3]}\n' for n in range(12))
    (tmp_path / "export.csv").write_text(f"Body,Category\n{rows}")
    flags = ("--prompt-feature", "Body", "--completion-feature", "Category")
    words = ("init", "--data", "export.csv", "--model", str(model), "-o", "lora.yaml", *flags)
    made = called(*words, *(("--system", system) if system else ()), cwd=tmp_path)
    assert made.code == 0, made.stderr
    assert re.search(r"user: Hello, \d+ is lost\.\n   assistant: [abA]\n", made.stderr)
    reminder = "The version keeps the system text: `chat` and questions use it by themselves"
    assert (reminder in made.stderr) == (system is not None)


def test_a_time_that_python_has_no_value_for_is_a_text(tmp_path: Path) -> None:
    """The year 10000 is what some databases write for "never"."""
    days = pl.Series("day", [0, 253_402_300_800_000_000]).cast(pl.Datetime("us"))
    table = pl.DataFrame({"text": ["a b", "c d"], "day": days})
    table = table.with_columns(meta=pl.struct("text", days="day"), list=pl.concat_list("day"))
    table.write_parquet(tmp_path / "train.parquet")
    rows = [json.loads(row.line) for row in read_parquet(tmp_path / "train.parquet", 9)]
    for found in ("day", "meta", "list"):
        values = [json.dumps(row[found]) for row in rows]
        assert "1970-01-01 " in values[0]
        assert "+10000-01-01 " in values[1]
    assert rows[1]["meta"]["text"] == "c d"
