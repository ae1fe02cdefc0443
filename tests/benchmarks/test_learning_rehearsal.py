"""PROTOCOL-4.md's second block: its prompts, its rows, what trains on them and what judges."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm import load

from benchmarks.learning import arms, rehearsal, shares
from benchmarks.learning.apart import runs_of
from benchmarks.learning.judge import Judge
from benchmarks.learning.rehearsal import REHEARSAL_NAME, answered, prompts, write_rehearsal
from benchmarks.learning.study import APART, REHEARSAL, REHEARSED, Cell, read_rows
from benchmarks.learning.tasks import GEOGRAPHY, Row
from nested_core.errors import ConfigError
from nested_core.models.generation import Sampling, answer_prompts, encode_prompt
from nested_core.pipeline import hooks
from tests.benchmarks.page_figures import require_figures

BASE = GEOGRAPHY.with_name("geography-base")
LEARNING = Path(__file__).resolve().parents[2] / "benchmarks" / "learning"
PAGE = (LEARNING / "RESULTS-4.md").read_text()
ROWS = read_rows(LEARNING / "rows-4-rehearsal.jsonl")
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
@pytest.mark.slow("trains a run of its own")
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


def of(arm: str, key: str, task: str | None = None) -> float:
    """The mean over tasks, or of one, of the mean over seeds."""
    tasks = REHEARSAL.tasks if task is None else (task,)
    return statistics.fmean(
        statistics.fmean(r[key] for r in ROWS if (r["arm"], r["task"]) == (arm, each))
        for each in tasks
    )


def rise(arm: str) -> float:
    return of(arm, "general_loss") - of("base", "general_loss")


def less(arm: str) -> list[float]:
    """Points of right answers less than without, of common seeds, and both ends at 95 %."""
    from scipy import stats  # it takes a second, and all tests are collected each time

    def answers(one: str, task: str) -> dict[int, Any]:
        rows = [r for r in ROWS if (r["arm"], r["task"]) == (one, task)]
        return {
            r["seed"]: np.unpackbits(np.frombuffer(bytes.fromhex(r["right"]), "u1")) for r in rows
        }

    pairs = []
    for task in REHEARSAL.tasks:
        mine, without = answers(arm, task), answers("c", task)
        both = sorted(mine.keys() & without.keys())
        pairs.append(100 * np.array([1.0 * mine[s][:1000] - without[s][:1000] for s in both]))
    seeds = [each.mean(axis=1) for each in pairs]
    freedom = sum(len(each) - 1 for each in seeds)
    pooled = sum(float(((each - each.mean()) ** 2).sum()) for each in seeds) / freedom
    variance = sum(pooled / len(each) for each in seeds)
    variance += sum(float(each.mean(axis=0).var(ddof=1)) / 1000 for each in pairs)
    mean, error = statistics.fmean(float(each.mean()) for each in seeds), math.sqrt(variance) / 3
    half = float(stats.t.ppf(0.975, freedom)) * error
    return [mean, mean - half, mean + half]


@pytest.mark.parametrize(
    ("name", "arm"),
    [("base", "base"), ("0 %", "c"), *zip(("10 %", "30 %"), REHEARSED, strict=True)],
)
def test_the_table_of_shares_is_that_of_the_rows(name: str, arm: str) -> None:
    (line,) = re.findall(rf"^\| {name} \|(.*)\|$", PAGE, re.MULTILINE)
    cells = [cell.strip() for cell in line.split("|")]
    told = [float(cell) for cell in cells[:3]]
    told += [float(each) for each in re.findall(r"[\d.]+", cells[4])]
    figures = [
        100 * of(arm, key, t) for key in ("right_share", "like_task") for t in REHEARSAL.tasks
    ]
    assert told == pytest.approx([*figures, 100 * of(arm, "like_task")], abs=0.0501)
    intervals = [float(each) for each in re.findall(r"[+-][\d.]+", cells[3])]
    assert intervals == (pytest.approx(less(arm), abs=0.0501) if arm in REHEARSED else [])
    assert float(cells[5]) == pytest.approx(100 * of(arm, "kept"), abs=0.0501)
    assert float(cells[6]) == pytest.approx(of(arm, "general_loss"), abs=0.00501)
    assert int(cells[7]) == sum(row["arm"] == arm for row in ROWS)
    assert any(line.replace(" ", "") in each.replace(" ", "") for each in shares.describe(ROWS))


def test_neither_share_meets_a_condition_and_the_page_says_so() -> None:
    runs, ten, thirty = runs_of(ROWS), *REHEARSED
    for arm in REHEARSED:
        assert shares.conditions(runs, arm) == (False, False, False)
        assert less(arm)[1] < -1
        assert of(arm, "like_task") >= 0.05
        assert rise(arm) > 0.5 * rise("c")
        above = [task for task in REHEARSAL.tasks if of(arm, "like_task", task) >= 0.05]
        assert above == ["restaurant8k"]
    text = " ".join(PAGE.split())
    expected = {
        r"Right answers: (\S+) points fewer, the lower ends below -1": [-less(ten)[0]],
        r"Like the task: (\S+) and (\S+) %": [100 * of(arm, "like_task") for arm in REHEARSED],
        r"the base, (\S+) nats at 0 %, is (\S+) and (\S+) times that": [
            rise("c"),
            *(rise(arm) / rise("c") for arm in REHEARSED),
        ],
        r"Peak memory: (\S+) GB at 0 %, (\S+) and (\S+)\.": [
            of(arm, "peak_gb") for arm in ("c", ten, thirty)
        ],
    }
    require_figures(text, expected)
    assert round(-less(thirty)[0], 1) == round(-less(ten)[0], 1)


def test_a_share_that_meets_all_conditions_holds() -> None:
    better = [dict(row) for row in ROWS]
    for row in better:
        if row["arm"] in REHEARSED:
            (like,) = (r for r in ROWS if r["arm"] == "c" and same_run(r, row))
            row |= {"right": like["right"], "like_task": 0.01, "general_loss": 3.9}
    assert [shares.conditions(runs_of(better), arm) for arm in REHEARSED] == [
        (True, True, True)
    ] * 2


def same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of one task and one seed."""
    return (one["task"], one["seed"]) == (other["task"], other["seed"])


def test_the_rows_of_shares_are_of_one_commit_and_one_is_missing() -> None:
    known = {(row["arm"], row["task"], row["seed"]) for row in ROWS}
    planned = {(cell.arm, cell.task, cell.seed) for cell in REHEARSAL.cells([])}
    assert planned - known == {("c-rehearsed-30", "banking77", 1)}
    assert len(ROWS) == len(known) == 29
    assert {(row["commit"], row["workers"], row["rows"]) for row in ROWS} == {
        ("d99bd361", 12, 1000)
    }
    assert "banking77 at 30 % under seed 1" in PAGE
    assert "| 2 | rows-4-rehearsal.jsonl | 29 | 30 | d99bd361 | 12 |" in PAGE
    longest = rehearsal.REHEARSAL_LENGTH
    assert f"`max_seq_length` of {longest} or more" in " ".join(PAGE.split())
    assert "1/0.9 and 1/0.7 times the steps" in PAGE
    assert [1 - share for share in REHEARSED.values()] == pytest.approx([0.9, 0.7])
    assert f"of {len(prompts())} to an end" in PAGE
