"""`init` on rows of other programs: what it found, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

from nested_core import load_config
from tests.example import MODEL
from tests.flows.conftest import called


def write_alpaca(path: Path, rows: int, **more: str) -> None:
    lines = [
        json.dumps({"instruction": f"Where is {n}?", "output": "Here.", "input": f"{n} km"} | more)
        for n in range(rows)
    ]
    path.write_text("\n".join(lines))


def test_init_finds_the_columns_and_the_delimiter_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = "".join(f"Wo, {n}?;Hier, am Markt;Anna\r\n" for n in range(6))
    (tmp_path / "data" / "train.csv").write_text("Question;Answer;Agent\r\n" + rows)
    done = called("init", "--data", "data", "--model", str(MODEL), "-o", "lora.yaml", cwd=tmp_path)
    assert done.code == 0
    assert "train.csv: completions, 6 of 6 rows, separated by semicolons" in done.stderr
    config = load_config(tmp_path / "lora.yaml")
    names = (config.prompt_feature, config.completion_feature, config.data_format)
    assert names == ("Question", "Answer", "completions")


def test_init_leaves_a_field_out_only_where_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_alpaca(tmp_path / "data" / "train.jsonl", 4, notes="Say it kindly.")
    arguments = ("init", "--data", "data", "--model", str(MODEL), "-o", "lora.yaml")
    refused = called(*arguments, cwd=tmp_path)
    assert refused.code == 3
    assert "train.jsonl:1: unread-field: training would leave out what is in notes;" in (
        refused.stderr
    )
    assert called(*arguments, "--drop-fields", "notes", cwd=tmp_path).code == 0
    assert load_config(tmp_path / "lora.yaml").drop_fields == ("notes",)
