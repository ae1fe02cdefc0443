"""An exported model compared in other programs, and the documents' figures of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.commands import read_rows
from benchmarks.real_model import other_readers
from benchmarks.real_model.other_readers import Answers, MlxLm, compare, describe
from tests.builders.adapter_folders import random_adapter
from tests.example import DATA, MODEL

pytestmark = pytest.mark.slow("reads exports with other programs")

ROOT = Path(__file__).resolve().parents[3]
ROWS = ROOT / "benchmarks" / "real_model" / "other_readers.jsonl"
EXPORTS = [row["export"] for row in read_rows(ROWS)]
QUESTIONS = [json.loads(line) for line in (DATA / "held_out.jsonl").read_text().splitlines()[:4]]
TEXTS = ["Oslo is the capital of Norway.", "x  y\n"]


class Spaced(MlxLm):
    """A program that puts a space before each text."""

    def encode(self, text: str) -> list[int]:
        """The tokens of another text."""
        return super().encode(f" {text}")


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlxLm:
    """The example's base with a random adapter; the texts to encode are two."""
    program = MlxLm(str(MODEL), str(random_adapter(tmp_path / "adapter")))
    texts = [{"text": text, "ids": program.encode(text)} for text in TEXTS]
    (tmp_path / "reference.json").write_text(json.dumps({"texts": texts}))
    monkeypatch.setattr(other_readers, "REFERENCE", tmp_path / "reference.json")
    return program


def test_the_same_model_has_the_same_tokens_and_answers(ours: MlxLm) -> None:
    row = compare(ours, ours, QUESTIONS)
    assert (row["texts"], row["unequal_texts"]) == (len(TEXTS) + len(QUESTIONS), [])
    assert (row["questions"], row["equal"], row["partings"]) == (len(QUESTIONS), len(QUESTIONS), [])
    assert row["answer_tokens"] >= len(QUESTIONS)
    assert row["largest_rounding"] < 1e-4  # one token at a time, and all at once


@pytest.mark.slow("answers with two readers")
def test_another_adapter_parts_the_answers_and_is_no_tie(ours: MlxLm, tmp_path: Path) -> None:
    other = MlxLm(str(MODEL), str(random_adapter(tmp_path / "other", scale=40.0)))
    row = compare(ours, other, QUESTIONS)
    assert row["equal"] == 0
    assert len(row["partings"]) == len(QUESTIONS)
    for parting in row["partings"]:
        assert parting["our_margin"] > 0
        assert parting["their_margin"] > 0
        assert parting["ours"] != parting["theirs"]
        assert not parting["is_tie"]


def test_a_text_that_another_program_encodes_otherwise_is_named(ours: MlxLm) -> None:
    theirs = Spaced.__new__(Spaced)
    vars(theirs).update(vars(ours))
    row = compare(ours, theirs, [])
    assert row["unequal_texts"] == TEXTS


def test_answers_that_part_within_rounding_are_a_tie(ours: MlxLm, tmp_path: Path) -> None:
    other = MlxLm(str(MODEL), str(random_adapter(tmp_path / "other", scale=40.0)))
    prompt = ours.encode(ours.render(QUESTIONS[0]["messages"]))
    answers = Answers("?", prompt, ours.answer(prompt), other.answer(prompt))
    margin = describe(ours, other, answers, rounding=0.0).our_margin
    assert describe(ours, other, answers, rounding=margin + 1e-5).is_tie
    assert not describe(ours, other, answers, rounding=margin - 1e-5).is_tie


def measured(export: str) -> dict[str, Any]:
    """The committed row of an export."""
    (row,) = (row for row in read_rows(ROWS) if row["export"] == export)
    return row


@pytest.mark.parametrize("export", EXPORTS)
def test_nothing_but_ties_differed_on_the_real_model(export: str) -> None:
    row = measured(export)
    assert (row["texts"], row["unequal_texts"], row["questions"]) == (300, [], 100)
    assert row["equal"] + len(row["partings"]) == row["questions"]
    assert all(parting["is_tie"] for parting in row["partings"])


@pytest.mark.parametrize("export", EXPORTS)
def test_the_table_of_other_readers_is_that_of_the_rows(export: str) -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    row = measured(export)
    (line,) = re.findall(rf"^\| `export --{export}` \|(.*)\|$", page, re.MULTILINE)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells == [
        row["program"],
        f"{row['texts'] - len(row['unequal_texts'])} of {row['texts']}",
        f"{row['equal']} of {row['questions']}",
        str(row["right_of_export"]),
        str(row["answer_tokens"]),
        str(row["median_rounding"]),
        str(row["largest_rounding"]),
    ]
    assert f"the adapter in mlx_lm answers {row['right']} of {row['questions']}" in " ".join(
        page.split()
    )


def test_the_page_on_exports_names_the_equal_answers_of_the_rows() -> None:
    page = " ".join((ROOT / "docs" / "export.md").read_text().split())
    gguf, peft = measured("gguf"), measured("peft")
    assert (gguf["equal"], gguf["questions"]) == (peft["equal"], peft["questions"])
    assert (
        "llama.cpp and transformers with PEFT gave mlx_lm's answers to "
        f"{gguf['equal']} of {gguf['questions']} questions"
    ) in page
