"""`init --split`: a random split of a data set that has only train."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from nested_core import ConfigError, DatasetError
from nested_core.rooms.tables.data_set import describe_chat
from nested_core.rooms.tables.dataset_split import split_dataset
from nested_core.rooms.tables.eval_set import draw_eval_set
from nested_core.seams import load_all
from tests.builders.data_sets import chat, write_lines
from tests.flows.conftest import called
from tests.left_out import needs_rooms

WORDS = [
    a + b
    for a in ("ba", "do", "ki", "lu", "me", "no")
    for b in ("ra", "se", "ti", "vo", "wu", "xa", "ya")
]


def write_train(folder: Path, rows: int, *, file: str = "train.jsonl") -> Path:
    lines = ({"prompt": f"What is {n}?", "completion": f"{n}."} for n in range(rows))
    return write_lines(folder / file, lines).parent


def read_split(folder: Path, split: str) -> list[str]:
    return (folder / f"{split}.jsonl").read_text().splitlines()


def test_each_row_goes_to_one_split_and_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    data = write_train(tmp_path / "data", 40)
    before = (data / "train.jsonl").read_bytes()
    counts = split_dataset(str(data), 0.1, tmp_path / "one")
    assert counts == {"train": 32, "valid": 4, "test": 4}
    rows = [row for split in counts for row in read_split(tmp_path / "one", split)]
    assert sorted(rows) == sorted(before.decode().splitlines())
    assert rows != before.decode().splitlines()  # shuffled: data often lies in some order
    split_dataset(str(data), 0.1, tmp_path / "two")
    assert all(
        read_split(tmp_path / "one", split) == read_split(tmp_path / "two", split)
        for split in counts
    )
    assert [path.name for path in data.iterdir()] == ["train.jsonl"]
    assert (data / "train.jsonl").read_bytes() == before


def test_equal_rows_stay_together(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [f'{{"prompt": "Q{n % 5}", "completion": "A"}}' for n in range(50)]
    rows[7] = '{"completion": "a", "prompt":  "q2"}'  # another order, case and white space
    (data / "train.jsonl").write_text("\n".join(rows) + "\n")
    counts = split_dataset(str(data), 0.2, tmp_path / "split")
    prompts = [
        {json.loads(row)["prompt"].lower() for row in read_split(tmp_path / "split", split)}
        for split in counts
    ]
    assert counts == {"train": 30, "valid": 10, "test": 10}
    assert not set.intersection(*prompts)
    assert sum(map(len, prompts)) == 5


@needs_rooms("near_duplicates")
def test_rows_that_nearly_are_one_another_stay_together(tmp_path: Path) -> None:
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=14)) for _ in range(60)]
    rows = [chat(f"{text} {tail}", "yes") for text in texts[:20] for tail in ("please", "now!", "")]
    rows += [chat(text, "no") for text in texts[20:]]
    write_lines(tmp_path / "data" / "train.jsonl", rows)
    counts = split_dataset(str(tmp_path / "data"), 0.2, tmp_path / "split")
    assert counts == {"train": 60, "valid": 20, "test": 20}
    split_of = {
        json.loads(row)["messages"][0]["content"]: split
        for split in counts
        for row in read_split(tmp_path / "split", split)
    }
    assert len(split_of) == 100
    for text in texts[:20]:
        assert len({split_of[f"{text} {tail}"] for tail in ("please", "now!", "")}) == 1
    assert {split_of[f"{text} now!"] for text in texts[:20]} == {*counts}
    warned = called("validate", "--data", "split", "--no-tokenize", cwd=tmp_path)
    assert "near-duplicate" not in warned.stdout + warned.stderr


@needs_rooms("near_duplicates")
def test_where_all_rows_nearly_are_one_another_the_asked_share_is_held_out(tmp_path: Path) -> None:
    words = [f"{WORDS[n % 40]}{WORDS[n // 40]}" for n in range(412)]
    texts = [" ".join(words[4 * n : 4 * n + 12]) for n in range(100)]  # each and the next
    assert [len(near.group(texts)) for near in load_all("near_duplicates")] == [1]
    write_lines(tmp_path / "data" / "train.jsonl", (chat(text, "yes") for text in texts))
    counts = split_dataset(str(tmp_path / "data"), 0.1, tmp_path / "split")
    assert counts == {"train": 80, "valid": 10, "test": 10}


def test_rows_of_another_format_become_json_lines(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = "".join(f"Where is {n}?,Here.\n" for n in range(10))
    (data / "train.csv").write_text(f"prompt,completion\n{rows}")
    assert split_dataset(str(data), 0.1, tmp_path / "split")["train"] == 8
    assert json.loads(read_split(tmp_path / "split", "valid")[0])["completion"] == "Here."


@pytest.mark.parametrize(
    ("rows", "files", "share", "said"),
    [
        (40, ("valid.jsonl",), 0.1, "has valid.jsonl already"),
        (40, (), 0.5, "above 0 and below 0.5"),
        (2, (), 0.1, "has 2 rows, 0 of them left for train"),
    ],
)
def test_what_cannot_be_split_is_refused_and_leaves_nothing(
    tmp_path: Path, rows: int, files: tuple[str, ...], share: float, said: str
) -> None:
    data = write_train(tmp_path / "data", rows)
    for file in files:
        (data / file).write_text((data / "train.jsonl").read_text())
    with pytest.raises(ConfigError, match=said):
        split_dataset(str(data), share, tmp_path / "split")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_rows_that_cannot_be_read_are_not_left_out_of_a_split(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = "".join(f"Where, {n}?,Here.\n" if n % 2 else f"Is {n}?,Yes.\n" for n in range(40))
    (data / "train.csv").write_text(f"prompt,completion\n{rows}")
    with pytest.raises(DatasetError) as refused:
        split_dataset(str(data), 0.1, tmp_path / "split")
    assert "train.csv:3: cell-count: expected 2 cells" in str(refused.value)
    assert "(and 19 more)" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_data_set_without_train_is_refused(tmp_path: Path) -> None:
    data = write_train(tmp_path / "data", 3, file="training.jsonl")
    with pytest.raises(ConfigError, match=r"has no train\.jsonl"):
        split_dataset(str(data), 0.1, tmp_path / "split")


def test_each_split_has_each_label_about_as_often_as_all_rows(tmp_path: Path) -> None:
    labels = ["billing"] * 60 + ["technical"] * 30 + ["shipping"] * 10 + ["other"] * 2
    rows = (chat(f"What of {n}?", label) for n, label in enumerate(labels))
    write_lines(tmp_path / "data" / "train.jsonl", rows)
    split_dataset(str(tmp_path / "data"), 0.1, tmp_path / "parts")
    counts = {}
    for split in ("train", "valid", "test"):
        counts[split] = Counter(
            json.loads(row)["messages"][-1]["content"]
            for row in read_split(tmp_path / "parts", split)
        )
    assert counts["valid"] == {"billing": 6, "technical": 3, "shipping": 1}
    assert counts["test"] == {"billing": 6, "technical": 3, "shipping": 1}
    assert counts["train"]["other"] == 2  # too rare to be taken out


def test_the_longest_label_says_how_many_tokens_an_answer_may_have() -> None:
    lines = [json.dumps(chat(f"{n}?", "yes" if n % 3 else "perhaps")).encode() for n in range(30)]
    drawn = draw_eval_set(lines[:20], lines[20:], 5)
    assert (drawn.score, drawn.max_tokens) == ("exact", len("perhaps") + 2)
    texts = [json.dumps(chat(f"{n}?", f"In town {n}.")).encode() for n in range(30)]
    drawn = draw_eval_set(texts[:20], texts[20:], 5)
    assert (drawn.score, drawn.max_tokens) == ("contains", len("In town 22.") + 16)


def test_a_shown_chat_has_its_line_ends_as_lines() -> None:
    line = json.dumps(chat("Hello,\n\nwhere to?", "Oslo")).encode()
    indent = 3 * " "
    assert describe_chat(line) == [f"user: Hello,\n{indent}\n{indent}where to?", "assistant: Oslo"]
