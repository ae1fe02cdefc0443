"""`init` on rows of other programs: what it found, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from nested_core import load_config
from tests.example import MODEL
from tests.flows.conftest import called
from tests.left_out import needs_rooms

pytestmark = pytest.mark.slow("tokenises what init wrote")


def write_alpaca(path: Path, rows: int, **more: str) -> None:
    lines = [
        json.dumps({"instruction": f"Where is {n}?", "output": "Here.", "input": f"{n} km"} | more)
        for n in range(rows)
    ]
    path.write_text("\n".join(lines))


@needs_rooms("tables")
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


def write_chats(path: Path, rows: int, answers: int = 2) -> None:
    lines = []
    for n in range(rows):
        turns = [
            {"role": role, "content": f"{path.stem} {role} {n} {answer}."}
            for answer in range(answers)
            for role in ("user", "assistant")
        ]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines))


def test_init_learns_every_answer_of_chats_and_validate_tells_of_those_left_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    write_chats(tmp_path / "data" / "train.jsonl", 6)
    write_chats(tmp_path / "data" / "valid.jsonl", 4)
    done = called("init", "--data", "data", "--model", str(MODEL), "-o", "lora.yaml", cwd=tmp_path)
    assert load_config(tmp_path / "lora.yaml").training.supervise == "all"
    (tokens,) = re.findall(r"train.jsonl: (\d+) of \1 answer tokens are trained on", done.stderr)
    assert "4 rows of valid.jsonl judge the run: fewer than 5 independent examples" in done.stderr
    last = called("validate", "-c", "lora.yaml", "--training.supervise", "last", cwd=tmp_path)
    assert "train.jsonl: earlier-answers: 6 of 12 answers are not trained on" in last.stdout
    (learnt,) = re.findall(rf"warning: (\d+) of {tokens} answer tokens are trained on", last.stdout)
    assert 0 < int(learnt) < int(tokens)
    every = called("validate", "-c", "lora.yaml", cwd=tmp_path)
    assert "earlier-answers" not in every.stdout


def test_init_warns_of_answers_that_a_template_keeps_from_being_learnt(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split, rows in (("train", 8), ("valid", 6)):
        write_chats(tmp_path / "data" / f"{split}.jsonl", rows)
    shutil.copytree(MODEL, tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for turn in messages %}{{ turn.role }}: {% if turn.role == 'assistant' and loop.last %}"
        "(last) {% endif %}{{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    done = called("init", "--data", "data", "--model", "base", "-o", "lora.yaml", cwd=tmp_path)
    assert done.code == 0, done.message()
    assert load_config(tmp_path / "lora.yaml").training.supervise == "last"
    assert "warning: train.jsonl: earlier-answers: 8 of 16 answers are not trained" in done.stderr
    assert (
        "where their changes spread by 0.2 nats/token, they reliably detect changes of 0.23"
        in done.stderr
    )


def test_init_writes_a_batch_for_the_fewest_rows(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_chats(tmp_path / "data" / "train.jsonl", 3, answers=1)
    done = called("init", "--data", "data", "--model", str(MODEL), "-o", "lora.yaml", cwd=tmp_path)
    assert done.code == 0, done.message()
    assert load_config(tmp_path / "lora.yaml").batch_size == 2
