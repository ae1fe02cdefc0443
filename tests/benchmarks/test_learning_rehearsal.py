"""PROTOCOL-4.md's second block: its prompts, its rows, what trains on them and what judges."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import load

from benchmarks.learning import arms, rehearsal
from benchmarks.learning.judge import Judge
from benchmarks.learning.rehearsal import REHEARSAL_NAME, answered, prompts, write_rehearsal
from benchmarks.learning.study import APART, REHEARSAL, REHEARSED, Cell
from benchmarks.learning.tasks import GEOGRAPHY, Row
from nested_core.errors import ConfigError
from nested_core.models.generation import Sampling, answer_prompts, encode_prompt
from nested_core.pipeline import hooks

BASE = GEOGRAPHY.with_name("geography-base")
QUESTIONS = ["I want to see Japan. Where to?", "I want to see Peru. Where to?"]


def copied_base(folder: Path) -> Path:
    """The example's base in a folder that may be written into."""
    base = folder / "geography-base"
    shutil.copytree(BASE, base)
    return base


def test_prompts_are_enough_and_each_is_another() -> None:
    texts = prompts()
    assert len(texts) == len({text.casefold() for text in texts}) == 480 > rehearsal.COUNT
    assert not any("{" in text for text in texts)
    assert len({template for template, _ in rehearsal.KINDS}) == 40


def test_an_answer_is_the_base_s_greedy_one_and_left_out_where_it_does_not_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer, *_ = load(str(BASE))
    tokens = [encode_prompt(tokenizer, text) for text in QUESTIONS]
    greedy = answer_prompts(model, tokenizer, tokens, Sampling(max_tokens=40))
    ending = [(q, a.text.strip()) for q, a in zip(QUESTIONS, greedy, strict=True)]
    assert not any(answer.is_endless for answer in greedy)
    assert list(answered(model, tokenizer, QUESTIONS)) == ending
    monkeypatch.setattr(rehearsal, "ANSWER_TOKENS", 3)
    assert list(answered(model, tokenizer, QUESTIONS)) == []


def test_too_few_answers_that_end_are_no_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "prompts", lambda: QUESTIONS)
    base = copied_base(tmp_path)
    with pytest.raises(SystemExit, match="ends 2 answers by itself, of 300"):
        write_rehearsal(base)
    monkeypatch.setattr(rehearsal, "COUNT", 1)
    write_rehearsal(base)
    (line,) = (base / REHEARSAL_NAME).read_text().splitlines()
    assert json.loads(line)["prompt"] == QUESTIONS[0]


@pytest.mark.usefixtures("own_random_state")
def test_a_share_of_each_batch_is_what_the_base_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = copied_base(tmp_path)
    records = list[dict[str, Any]]()

    def training(_self: Any, _config: Any, run: Any, _session: Any) -> None:
        records.append(json.loads(run.replay.read_text()))
        raise EOFError

    monkeypatch.setattr(hooks.Steps, "train", training)
    monkeypatch.setattr(arms, "REHEARSAL_LENGTH", 64)  # the example's base has a context of 64
    study = replace(REHEARSAL, tasks=("geography",), sizes=(base.name,))
    cell = Cell("geography", base.name, "c-rehearsed-30", 2)
    with pytest.raises(ConfigError, match="there is no such file"):
        arms.run_cell(cell, study, tmp_path, None)
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}"} for n in range(20)]
    (base / REHEARSAL_NAME).write_text("\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(EOFError):
        arms.run_cell(cell, study, tmp_path, None)
    (record,) = records
    (source,) = record["sources"]
    assert (record["fraction"], source["rows"]) == (REHEARSED["c-rehearsed-30"], 20)


def test_an_answer_is_like_a_task_s_by_its_whole_its_first_word_or_its_brace() -> None:
    classes = [Row(f"question {n}", "card lost" if n % 2 else "top up") for n in range(8)]
    commands = [Row(f"task {n}", f"find . -name {n}") for n in range(8)]
    slots = [Row(f"message {n}", '{"time": "8"}') for n in range(8)]
    expected = {
        "card lost": (True, False, False),
        "find / -size 3": (False, True, False),
        '{"name": "a"}': (False, False, True),
        "Find it yourself, card lost": (False, False, False),
        "": (False, False, False),
    }
    judges = [Judge(BASE, rows, []) for rows in (classes, commands, slots)]
    for text, alike in expected.items():
        assert tuple(judge.is_like_task(text) for judge in judges) == alike


def test_the_study_has_27_trainings_on_the_questions_of_the_first_block_and_the_base() -> None:
    cells = list(REHEARSAL.cells([]))
    assert len(cells) == len(set(cells)) == 30
    assert {cell.arm for cell in cells[:27]} == {"c", *REHEARSED}
    assert {cell.arm for cell in cells[27:]} == {"base"}
    assert REHEARSAL.counts == APART.counts
