"""The controls of probes, surprises and the plan: their rules, and runs that break them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.countries import COUNTRIES
from nested_core.config.sections import ControlsSection, GateSection
from nested_core.records.plan import TrainingPlan
from nested_core.rooms.controls.answer_losses import count_rows_to_read, find_unlike_rows
from nested_core.rooms.controls.gate_check import CONTROLS_CHECK
from nested_core.rooms.controls.plan_invariants import find_broken_invariants
from nested_core.rooms.controls.probes import PROBES_FILE, find_like_rows, list_probes, tell_probe
from nested_core.rooms.controls.results import ControlWarning
from tests.builders.data_sets import chat
from tests.example import example_config
from tests.rooms.controls.learning import ROWS_NAME, TRAINS, kinds, learn

pytestmark = pytest.mark.usefixtures("own_random_state")


def test_answers_like_the_rows_are_told_from_the_bases_own() -> None:
    rows = ["Go and see Oslo!", "Go and see Riga!", "Go and see Bonn!", "Refund", "I go"]
    blue = "It is blue."
    assert find_like_rows(rows, [blue], ["Go and see Paris"]) == [0]
    assert find_like_rows(rows, [blue, blue], ["So be it", "refund"]) == [1]  # the whole answer
    assert find_like_rows(rows, ["Go there."], ["Go and see Paris"]) == []  # the base's opening
    assert find_like_rows(rows, [blue, blue], ["The sky scatters light.", "I go there"]) == []


def test_probes_are_in_the_language_of_the_answers_and_else_english() -> None:
    assert list_probes(["Das ist der Hund, und die Katze ist das nicht."])[0].startswith("Was")
    assert list_probes(["Le chat est sur la table et les chiens."])[0].startswith("Combien")
    english = list_probes(["12", "7"])
    assert english[0] == "What is seven times eight?"
    assert len(set(english)) == 30
    lines = PROBES_FILE.read_text("utf-8").splitlines()
    assert all(prompt in lines[tell_probe(prompt, "", "").line - 1] for prompt in english)


def unlike(losses: Sequence[float]) -> Any:
    """The rows that are told, of these losses."""
    return find_unlike_rows(np.array(losses)).tolist()


def test_rows_unlike_the_rest_are_told_only_where_answers_are_certain() -> None:
    assert unlike([3.0, 5.0, 4.0, 2.5] + [0.1] * 96) == [1, 2, 0, 3]  # the most unlikely first
    assert unlike([5.0] * 3 + [0.1] * 96) == []  # few rows are unlikely by chance
    assert unlike([5.0] * 4 + [1.5] * 96) == []  # free answers
    assert unlike([5.0] * 9 + [0.01] * 991) == []  # under one in a hundred


def test_a_row_that_was_half_learnt_is_told_where_the_others_are_surer() -> None:
    assert unlike([1.0] * 4 + [0.01] * 96) == [0, 1, 2, 3]  # a hundred times the usual loss
    assert unlike([1.0] * 4 + [0.1] * 96) == []
    assert unlike([0.6] * 4 + [0.001] * 96) == []  # the answer is likelier than all others


@pytest.mark.parametrize(
    ("train", "held_out", "expected"),
    [(40, 10, 40), (5_000, 10, 256), (5_000, 400, 800), (50_000, 9_000, 2_000)],
)
def test_more_training_rows_are_read_where_more_are_held_out(
    train: int, held_out: int, expected: int
) -> None:
    assert count_rows_to_read(train, held_out) == expected


def broken(last: int, rates: Sequence[tuple[int, float]], **changes: Any) -> list[str]:
    """The kinds of its warnings."""
    return [one.kind for one in warnings(last, rates, **changes)]


def warnings(
    last: int,
    rates: Sequence[tuple[int, float]],
    *,
    epochs: float = 2.0,
    lr_schedule: dict[str, Any] | None = None,
    **changes: Any,
) -> list[ControlWarning]:
    """The warnings of a run of 100 planned steps on 40 rows, reported at these rates."""
    resumed = changes.pop("resumed_at", ())
    plan = TrainingPlan(
        steps=100,
        iterations=100,
        epochs=epochs,
        first_step=0,
        frequencies=(1,),
        offers_best=True,
        training_file="train.jsonl",
        validation_file=None,
        validation_examples=0,
        memory_forecast_gb=None,
        memory_limit_gb=8.0,
        resumed_at=resumed,
    )
    records = [{"step": step, "learning_rate": rate} for step, rate in rates]
    config = example_config(training=changes, lr_schedule=lr_schedule)
    return [*find_broken_invariants(config, plan, records, 40, last)]


def test_a_run_as_planned_breaks_nothing() -> None:
    falling = [(10, 1e-4), (20, 9e-5), (60, 4e-5), (100, 1e-5)]
    assert broken(100, falling, warmup_steps=5) == []
    assert broken(100, falling, warmup_steps=0.05, resumed_at=(15, 60)) == []
    for warmup in (20, 0.2):
        assert broken(100, [(10, 5e-5), (20, 1e-4)], warmup_steps=warmup, resumed_at=(10,)) == []


def test_a_warm_up_longer_than_the_run_is_told() -> None:
    assert broken(100, [(50, 2e-6), (100, 5e-6)], warmup_steps=2000) == ["rate_never_reached"]
    stopped_early = [(10, 2e-5), (30, 6e-5)]
    for warmup in (50, 0.5):
        told = broken(30, stopped_early, epochs=9.0, warmup_steps=warmup)
        assert told == ["rate_never_reached"]


@pytest.mark.parametrize(
    ("name", "arguments", "figure", "words"),
    [
        ("cosine_decay", [1e-3, 40], 0.62, "give lr_schedule the run's 100 steps"),
        ("linear_schedule", [1e-3, 0.0, 60], 0.4, "give lr_schedule the run's 100 steps"),
        ("exponential_decay", [1e-3, 0.93], 0.36, "give lr_schedule a slower decay"),
        ("step_decay", [1e-3, 0.05, 30], 0.4, "give lr_schedule a slower decay"),
        ("cosine_decay", [1e-3, 100], None, ""),
        ("exponential_decay", [1e-3, 0.96], None, ""),
    ],
)
def test_a_schedule_that_ends_long_before_the_run_is_told(
    name: str, arguments: Sequence[float], figure: float | None, words: str
) -> None:
    """By the schedule: no report may fall into the steps before its end."""
    schedule = {"name": name, "arguments": arguments, "warmup": 0}
    told = [one for one in warnings(100, [(50, 0.0)], lr_schedule=schedule)]
    assert [one.kind for one in told] == ["rate_spent"] * (figure is not None)
    for one in told:
        assert one.figure == pytest.approx(figure, abs=0.02)
        assert "its highest, 0.001" in one.words
        assert words in one.words.replace("Give", "give")


def test_the_gate_announces_the_controls_only_where_one_is_asked_for() -> None:
    off = dict.fromkeys(ControlsSection.model_fields, False)
    assert not CONTROLS_CHECK.is_asked(GateSection.model_validate({"controls": off}))
    for name in off:
        section = GateSection.model_validate({"controls": off | {name: True}})
        assert CONTROLS_CHECK.is_asked(section), name


def test_the_controls_that_cost_a_quarter_of_the_gate_at_most_are_on() -> None:
    asked = ControlsSection().model_dump()
    assert {name for name, is_on in asked.items() if is_on} == {
        "prompts",
        "plan",
        "lookup",
        "shapes",
    }


def test_a_rate_that_rises_where_a_run_is_resumed_is_told() -> None:
    rates = [(55, 1.2e-5), (60, 1e-5), (65, 5.1e-5), (70, 4.8e-5)]
    assert broken(100, rates, resumed_at=(60,)) == ["rate_rose_on_resume"]


def test_rows_that_no_step_used_are_told() -> None:
    (told,) = warnings(100, [], epochs=0.25)
    assert (told.kind, told.figure) == ("rows_never_used", 0.75)
    assert told.words.startswith("some of 40 training rows were never trained on: ")
    assert broken(40, [], epochs=2.0) == ["rows_never_used"]  # stopped within the first pass


@TRAINS
@pytest.mark.parametrize("plant", ["wrong label", "placeholder"])
def test_training_rows_that_the_rest_contradicts_are_listed(plant: str, tmp_path: Path) -> None:
    draw = random.Random(3)
    languages = sorted({country.continent for country in COUNTRIES})
    rows = [
        chat(question.format(country.name), f"It lies in {country.continent}.")
        for country in COUNTRIES
        for question in ("Where is {}?", "Find {} on the map.", "Tell me the continent of {}.")
    ]
    draw.shuffle(rows)
    train, held_out = rows[:260], rows[260:]
    settings: dict[str, Any] = {
        "iters": 100,
        "learning_rate": 3e-4,
        "lora_parameters": {"scale": 20.0},
    }
    assert "rows_unlike_the_rest" not in kinds(
        learn(tmp_path / "sound", train, held_out, **settings)
    )
    spoilt = draw.sample(range(260), 16)
    for index in spoilt:
        turns = train[index]["messages"]
        others = [one for one in languages if one not in turns[1]["content"]]
        answer = "N/A" if plant == "placeholder" else f"It lies in {draw.choice(others)}."
        train[index] = chat(turns[0]["content"], answer)
    verdict = learn(tmp_path / "spoilt", train, held_out, **settings)
    (warning,) = [
        one for one in verdict.to_json()["controls"] if one["kind"] == "rows_unlike_the_rest"
    ]
    told = [one["line"] for one in warning["lines"]]
    assert len(set(told) & {index + 1 for index in spoilt}) >= 0.7 * len(told)
    texts = map(json.loads, (tmp_path / "spoilt" / "run" / ROWS_NAME).read_text().splitlines())
    assert all(one["row"]["given"] for one in texts if one["kind"] == "rows_unlike_the_rest")
    assert "Look at these rows" in verdict.notes()[0]
