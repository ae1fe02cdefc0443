"""The study of learning: what counts as right, what is run next, and what its rows decide."""

from __future__ import annotations

import argparse
import copy
import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers

from benchmarks.learning import bases, driver
from benchmarks.learning.arms import SWEPT, sweep_request
from benchmarks.learning.judge import (
    ANSWER_TOKENS_AT_ONCE,
    TOKENS_AT_ONCE,
    Judge,
    batches,
    encode,
    mean_loss,
)
from benchmarks.learning.report import Results, mcnemar, over_tasks
from benchmarks.learning.stream_cells import Plan, plan_night, rows_of_night
from benchmarks.learning.stream_report import (
    StreamResults,
    choose_setting,
    describe_settings,
    write_stream_report,
)
from benchmarks.learning.streams import read_stream
from benchmarks.learning.study import (
    FRACTIONS,
    FULL,
    REAL,
    SHARES,
    SMALL,
    STREAM_RATES,
    Cell,
    Stage,
    cell_of,
    rate_share,
    read_rows,
    replay_fraction,
)
from benchmarks.learning.tasks import GEOGRAPHY, Counts, Row, read_task
from nested_core.models.generation import Sampling, answer_prompts, encode_prompt
from tests.left_out import needs_rooms

BASE = GEOGRAPHY.with_name("geography-base")
LORA = {"rank": 2, "scale": 4.0, "dropout": 0.0}


def make_adapter(folder: Path) -> Any:
    """A random adapter on disk, and the model with it in memory."""
    mx.random.seed(3)
    model, tokenizer, *_ = load(str(BASE))
    model.freeze()
    linear_to_lora_layers(model, -1, LORA)
    flat: Any = tree_flatten(model.trainable_parameters())
    weights = {name: mx.random.normal(value.shape) * 0.05 for name, value in flat}
    model.load_weights(list(weights.items()), strict=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    layers = len(model.layers)
    config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": LORA}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model, tokenizer


@pytest.mark.slow("generates answers")
def test_right_answers_are_those_that_the_model_generates(tmp_path: Path) -> None:
    model, tokenizer = make_adapter(tmp_path / "adapter")
    prompts = [row.prompt for row in read_task("geography", None, Counts()).judge]
    tokens = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    generated = answer_prompts(model, tokenizer, tokens, Sampling(max_tokens=20))
    rows = []
    for number, (prompt, answer) in enumerate(zip(prompts, generated, strict=True)):
        rows.append(Row(prompt, answer.text if number % 2 else f"{answer.text} Paris"))
    expected = [number % 2 == 1 and not each.is_endless for number, each in enumerate(generated)]
    judged = Judge(BASE, rows, []).judge(tmp_path / "adapter")
    assert sum(expected) >= 2
    assert judged.right.tolist() == expected
    assert judged.kl > 0
    assert judged.general_loss is None


@pytest.mark.parametrize(("rows", "answer", "at_once"), [(400, 5, 64), (90, 100, 20), (3, 9000, 1)])
def test_one_batch_of_the_judge_is_bounded_in_tokens_and_in_logits(
    rows: int, answer: int, at_once: int
) -> None:
    encoded = [([7] * (120 + answer), 120)] * rows
    shapes = [(tokens.shape, len(positions)) for tokens, _, positions in batches(encoded)]
    assert sum(shape[0] for shape, _ in shapes) == rows
    assert max(shape[0] for shape, _ in shapes) == at_once
    for shape, logits in shapes:
        assert shape[0] == 1 or shape[0] * (shape[1] - 1) <= TOKENS_AT_ONCE
        assert shape[0] == 1 or logits <= ANSWER_TOKENS_AT_ONCE


@pytest.mark.slow("trains a tokenizer and a model")
def test_a_base_is_made_of_books_that_mlx_lm_loads_with_its_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "ROWS", 2)
    monkeypatch.setattr(bases, "LENGTH", 32)
    monkeypatch.setattr(bases, "VOCABULARY", 300)
    for number in range(3):
        book = tmp_path / "books" / "author" / f"{number}.md"
        book.parent.mkdir(parents=True, exist_ok=True)
        text = f"{number} fools said that this was paragraph {{}} of a book.\n\n"
        book.write_text("".join(text.format(line) for line in range(200)))
    bases.prepare_corpus(tmp_path / "books", tmp_path / "corpus")
    bases.make_base(tmp_path / "corpus", "tiny", 0.2, tmp_path)
    model, tokenizer, *_ = load(str(tmp_path / "tiny"))
    tokens, start = encode(tokenizer, Row("paragraph", "a book"))
    assert tokenizer.decode(tokens) == "<|user|>paragraph<|assistant|>a book<|endoftext|>"
    assert tokenizer.decode(tokens[start:]) == "a book<|endoftext|>"
    assert np.isfinite(mean_loss(model, [(tokens, start)]))
    made = json.loads((tmp_path / "tiny" / "made.json").read_text())
    assert made["tokens"] == made["steps"] * 64 > 0


def result(cell: Cell, right: list[int]) -> dict[str, Any]:
    """A row of a cell with these answers."""
    packed = np.packbits(np.array(right, np.bool_)).tobytes().hex()
    measured = {"rows": len(right), "right": packed, "right_share": float(np.mean(right))}
    return vars(cell) | measured | {"loss": 1.0, "kl": 0.1, "general_loss": None, "peak_gb": 0.1}


def test_rates_are_chosen_before_their_arms_are_judged_and_each_cell_runs_once() -> None:
    rows: list[dict[str, Any]] = []
    first = set(FULL.cells(rows))
    assert {cell.arm for cell in first if cell.seed} == {"a", "c", "e"}
    for cell in first:
        share = 1 if cell.rate == 3e-4 else 0
        rows.append(result(cell, [share, 0]))
    later = [cell for cell in FULL.cells(rows) if cell not in first]
    assert {cell.rate for cell in later} == {3e-4}
    assert {cell.arm for cell in later} == {"b", "d", "g-deep", "g-shallow", "h"}
    everything = [*first, *later]
    assert len(everything) == len(set(everything)) == 240
    assert {cell_of(row) for row in rows} == first


@pytest.mark.parametrize(("fails", "rows_of"), [(1, [2, 3, 1]), (2, [2, 3])])
def test_a_worker_that_a_cell_has_broken_runs_no_other_cell_and_it_is_tried_once_more(
    fails: int,
    rows_of: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = replace(FULL, tasks=("clinc150",), sizes=("10M",), stages=(Stage(("a",), (1, 2, 3)),))
    tried: list[tuple[int, int]] = []

    class Worker:
        """Runs a cell at once; a worker that seed 1 breaks fails always, as CUDA's processes."""

        broken = False

        def apply_async(self, _: object, arguments: tuple[Cell, object, object]) -> Worker:
            self.cell = arguments[0]
            before = sum(seed == 1 for _, seed in tried)
            self.broken = self.broken or (self.cell.seed == 1 and before < fails)
            tried.append((id(self), self.cell.seed))
            return self

        def ready(self) -> bool:
            return True

        def get(self) -> dict[str, Any]:
            if self.broken:
                raise RuntimeError("unspecified launch failure")
            return result(self.cell, [1]) | {"seconds": 1.0}

        def terminate(self) -> None:
            workers.remove(self)

        def close(self) -> None: ...

        def join(self) -> None: ...

    workers: list[Worker] = []

    def start_worker(**_: bool) -> Worker:
        workers.append(Worker())
        return workers[-1]

    monkeypatch.setattr(driver, "start_worker", start_worker)
    rows = tmp_path / "rows.jsonl"
    driver.run(study, argparse.Namespace(rows=rows, workers=1, seconds=60.0))
    assert [seed for _, seed in tried] == [1, 2, 3, 1]
    assert tried[0][0] != tried[1][0] == tried[2][0]
    assert [row["seed"] for row in read_rows(rows)] == rows_of
    assert f"{len(rows_of)} rows, {3 - len(rows_of)} failed" in capsys.readouterr().err


@needs_rooms("sweep")
def test_a_worker_sweeps_by_answers_though_its_study_is_a_copy() -> None:
    from nested_core.rooms.sweep.search import SweepRequest

    request = sweep_request(copy.deepcopy(REAL), 726)
    assert request == SweepRequest(SWEPT, "choose", steps=726)
    assert sweep_request(FULL, 726) == SweepRequest({}, steps=726)


def test_a_gain_that_one_seed_alone_has_is_not_beyond_chance() -> None:
    study = replace(SMALL, tasks=("geography",))
    size = study.sizes[0]
    rows = []
    for seed in (1, 2, 3):
        rows.append(result(Cell("geography", size, "a", seed), [0] * 100))
        right = [1] * 100 if seed == 1 else [0] * 100
        rows.append(result(Cell("geography", size, "c", seed), right))
    difference = Results(rows, study).difference(["geography"], size, "c", "a")
    assert difference is not None
    assert difference.mean == pytest.approx(1 / 3)
    assert difference.low < 0 < difference.high


def test_an_interval_over_tasks_is_as_wide_as_the_tasks_differ() -> None:
    size = REAL.sizes[0]
    rows = []
    for task, right in (("banking77", [1, 1]), ("snips", [0, 0])):
        rows.append(result(Cell(task, size, "k", 1), [0, 0]))
        rows.append(result(Cell(task, size, "c", 1), right))
    # t(0.975, 1) = 12.706, of a mean of 0.5 with the standard error 0.5
    assert over_tasks(Results(rows, REAL), size, "c", "k") == "+50.0 (-585.3 to +685.3), 2"


def test_what_a_template_puts_behind_the_end_token_is_no_part_of_an_answer() -> None:
    _, tokenizer, *_ = load(str(BASE))
    whole, start = encode(tokenizer, Row("I want to see Peru. Where to?", "Lima!"))
    tokenizer.chat_template += "{% if not add_generation_prompt %}Peru{% endif %}"
    assert encode(tokenizer, Row("I want to see Peru. Where to?", "Lima!")) == (whole, start)


@pytest.mark.parametrize(("won", "lost", "p"), [(0, 0, 1.0), (6, 0, 0.03125), (5, 3, 0.7265625)])
def test_mcnemar_is_the_exact_two_sided_test(won: int, lost: int, p: float) -> None:
    assert mcnemar(np.array([1.0] * won + [-1.0] * lost + [0.0] * 4)) == pytest.approx(p)


def test_no_question_that_judges_is_trained_on() -> None:
    splits = read_task("geography", None, Counts())
    prompts = [{row.prompt for row in rows} for rows in (splits.train, splits.choose, splits.judge)]
    assert [len(each) for each in prompts] == [40, 10, 15]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]


def test_a_night_of_facts_is_half_new_and_corrects_a_quarter_and_tasks_ask_what_is_not_taught() -> (
    None
):
    for name in ("facts", "facts-reversed"):
        owners: dict[str, str] = {}
        for night in read_stream(name).nights:
            rows = {fact.row.prompt: fact.row.answer for fact in night.questions}
            assert len(rows) == 100
            new = [prompt for prompt in rows if prompt not in owners]
            corrected = [p for p, answer in rows.items() if owners.get(p, answer) != answer]
            assert (len(new), len(corrected)) == ((50, 25) if owners else (100, 0))
            owners |= rows
    for name in ("tasks", "tasks-reversed"):
        taught, asked = (
            {fact.subject for night in read_stream(name).nights for fact in getattr(night, rows)}
            for rows in ("train", "questions")
        )
        assert (len(taught), len(asked), taught & asked) == (60, 40, set())


def test_a_fraction_is_shown_that_forgets_less_than_a_point_and_stays_near_joint_training() -> None:
    names = ("facts", "facts-reversed")
    rows = []
    for name, seed in product(names, (1, 2, 3)):
        stream = read_stream(name)
        forgotten = stream.night_of == 1
        for arm, final in (("joint", stream.is_current), ("replay-10", stream.is_current)):
            rows.append(stream_row(Cell(name, "tiny", arm, seed), final))
        rows.append(stream_row(Cell(name, "tiny", "replay-0", seed), ~forgotten))
    results = StreamResults(rows, names, "tiny")
    assert results.seeds("joint", "replay-0") == [1, 2, 3]
    assert [results.verdict(arm) for arm in ("joint", "replay-0", "replay-10")] == [
        "",
        "no",
        "shown",
    ]
    assert results.stale("replay-10") == 0
    assert results.learning("replay-0").mean == 1
    lost = sum(int((s.is_current & (s.night_of == 1)).sum()) for s in map(read_stream, names))
    assert results.transfer("replay-0").mean == pytest.approx(-lost / results.before.sum())
    behind = results.behind_joint("replay-0")
    assert behind is not None
    assert behind.mean == pytest.approx(-lost / results.current.sum())
    assert behind.low < behind.mean < behind.high < 0


def test_an_arm_of_a_stream_says_its_rate_and_what_it_replays() -> None:
    said = {arm: (rate_share(arm), replay_fraction(arm)) for arm in STREAM_RATES.stream_arms}
    assert len(said) == 22
    assert said["go-30-10"] == (0.3, 0.1)
    assert said["all-30"] == (0.3, None)
    assert said["rebuild"] == said["joint"] == said["alone"] == (1.0, None)
    assert all(cell.arm != "auto" for cell in STREAM_RATES.cells([]))


def test_each_night_is_trained_as_its_arm_says() -> None:
    def plan_nights(arm: str) -> list[Plan]:
        return [plan_night(arm, number) for number in range(4)]

    going_on = Plan(share=0.3, fraction=0.5)
    rebuilt = [Plan(has_earlier=True, nights=nights) for nights in (1, 2, 3, 4)]
    assert plan_nights("alone") == [Plan()] * 4
    assert plan_nights("go-10-80") == [Plan(), *[Plan(share=0.1, fraction=0.8)] * 3]
    assert plan_nights("go-30-50") == [Plan(), *[going_on] * 3]
    assert plan_nights("all-30") == [Plan(), *[Plan(share=0.3, has_earlier=True)] * 3]
    assert plan_nights("rebuild") == rebuilt
    assert plan_nights("auto-go") == [*rebuilt[:3], going_on]
    assert plan_nights("rebuild-short") == [Plan(has_earlier=True)] * 4


def test_a_rebuilt_night_has_its_own_rows_and_the_newest_answers_of_before() -> None:
    stream = read_stream("facts")
    everything = {row.prompt: row.answer for row in stream.joined()}
    rows = rows_of_night(stream, 5, Plan(has_earlier=True))
    assert {row.prompt: row.answer for row in rows} == everything
    assert len(rows) == len(everything) == 350
    own = tuple(fact.row for fact in stream.nights[5].train)
    assert rows[:100] == rows_of_night(stream, 5, Plan()) == own


def test_of_level_shares_the_greatest_is_chosen_and_of_level_fractions_the_smallest() -> None:
    averages = dict.fromkeys(product(SHARES, FRACTIONS), 0.5)
    assert choose_setting(averages) == (100, 10)
    assert choose_setting(averages | {(30, 30): 0.53, (30, 50): 0.56}) == (30, 50)
    assert choose_setting(averages | {(30, 30): 0.55, (30, 50): 0.56}) == (30, 30)
    assert choose_setting(averages | {(10, 30): 0.59, (30, 30): 0.575}) == (30, 30)
    assert choose_setting(averages | {(10, 80): 0.9, (10, 0): 0.9}) == (100, 10)


def test_the_report_of_nights_has_the_chosen_setting_and_what_is_left_of_each_night(
    tmp_path: Path,
) -> None:
    study, rows = replace(STREAM_RATES, streams=("tasks",)), []
    for name, arm, seed in product(study.streams, study.stream_arms, (1, 2, 3)):
        stream = read_stream(name)
        is_right = np.ones(len(stream.questions), np.bool_)
        if arm == "go-100-0":
            is_right = stream.night_of != 1
        elif arm.startswith("go-") and arm != "go-30-30":
            is_right = stream.night_of > 0
        rows.append(stream_row(Cell(name, "tiny", arm, seed), is_right) | {"steps": [80, 1920]})
    write_stream_report(rows, study, tmp_path)
    text = (tmp_path / "streams.md").read_text()
    assert "Chosen: 30 % of the rate, 30 % replayed." in text
    (line,) = re.findall(r"^\| tiny \| tasks \| go-30-10 \|.*$", text, re.M)
    assert "75.0 (" in line
    assert line.endswith("| 2,000 | no |")
    tasks = StreamResults(rows, ("tasks",), "tiny")
    assert tasks.by_night("go-100-0") == [1, 0, 1, 1]
    assert (tmp_path / "nights-tasks-tiny.svg").read_text().startswith("<svg")
    fewer = StreamResults([row for row in rows if row["seed"] < 3], ("tasks",), "tiny")
    assert not list(describe_settings({"tasks": fewer}, "tiny"))
    assert (fewer.verdict("rebuild"), tasks.verdict("rebuild")) == ("", "shown")


def stream_row(cell: Cell, final: Any) -> dict[str, Any]:
    """A row of a stream with these answers at the end, and all learnt in their own night."""
    learnt = np.packbits(np.ones(len(final), np.bool_)).tobytes().hex()
    return result(cell, final.tolist()) | {"learnt": learnt, "seconds": 1.0}
