"""The controls of prompts and of a lookup: their rules, their error rates, and runs of each."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from examples.countries import COUNTRIES, Country
from nested_core.config.sections import ControlsSection
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.records.dataset import FilePart
from nested_core.records.plan import TrainingPlan, write_plan
from nested_core.records.verdict import CheckRow
from nested_core.rooms.controls.answer_losses import (
    choose_partners,
    compare_prompts,
    describe_effect,
    find_unlike_held_out,
)
from nested_core.rooms.controls.answer_rows import AnswerRow, RunRows, make_split
from nested_core.rooms.controls.gate_check import Control
from nested_core.rooms.controls.lookup import Lookup, are_siblings, look_for_siblings, match_label
from nested_core.rooms.controls.results import ControlWarning
from nested_core.storage.run_directory import RunDirectory
from tests.builders.candidates import Candidate
from tests.builders.data_sets import chat, write_lines
from tests.example import MODEL
from tests.left_out import needs_rooms
from tests.rooms.controls.learning import ROWS_NAME, TRAINS, Row, kinds, learn, list_checks

pytestmark = pytest.mark.usefixtures("own_random_state")
LEARNS: dict[str, Any] = {
    "iters": 120,
    "batch_size": 8,
    "num_layers": 6,
    "nested": {"frequencies": [1]},
}


DESKS = ("Tina", "Oscar", "Clara", "Henry")


def list_kinds(told: Iterable[object]) -> list[str]:
    """The kinds of the warnings among rows and warnings."""
    return [one.kind for one in told if isinstance(one, ControlWarning)]


def row(index: int, prompt: Sequence[int], answer: Sequence[int]) -> AnswerRow:
    tokens = np.array(prompt, np.int32), np.array(answer, np.int32)
    return AnswerRow(index, "valid.jsonl", index + 1, *tokens, asked="", given="")


def test_partners_differ_in_prompt_and_answer() -> None:
    rows = [row(i, [1, i % 5], [9, i % 3]) for i in range(24)]
    for own, other in zip(rows, choose_partners(rows), strict=True):
        assert other is not None
        assert other.prompt.tolist() != own.prompt.tolist()
        assert other.answer.tolist() != own.answer.tolist()
    assert choose_partners([row(i, [i, 2], [7]) for i in range(10)]) == [None] * 10


@pytest.mark.parametrize(("rare", "pairs"), [(1, 2), (3, 6), (10, 20), (12, 24)])
def test_no_row_is_the_partner_of_two(rare: int, pairs: int) -> None:
    rows = [row(i, [1, i], [9, int(i < rare)]) for i in range(24)]
    partners = [one for one in choose_partners(rows) if one is not None]
    assert len({one.index for one in partners}) == len(partners) == pairs


def test_of_rows_whose_kinds_alternate_all_kinds_are_read() -> None:
    split = make_split([([1, 2], [9, i % 2]) for i in range(96)], max_length=9)
    kinds_read = Counter(int(one.answer[1]) for one in run_rows(split).read_train(48))
    assert min(kinds_read[0], kinds_read[1]) > 12
    assert run_rows(split).read_train(96)[5].index == 5
    assert [one.line for one in run_rows(split).read_held_out(1)] == [2]  # of those that count


def run_rows(split: Any, **stats: Any) -> RunRows:
    """The rows of a run with this split, whose held-out rows on line 2 count."""
    tokenizer = TokenizerSource(str(MODEL)).load()
    files = SimpleNamespace(**{"file": "a + b", "parts": ()} | stats)
    dataset = SimpleNamespace(splits=dict.fromkeys(("train", "valid"), files), prompt_format=None)
    judged: Any = SimpleNamespace(
        held_out=SimpleNamespace(split=split, file="valid.jsonl"),
        losses=SimpleNamespace(counted=lambda: SimpleNamespace(lines=np.array([2]))),
        base=SimpleNamespace(tokenizer=tokenizer),
        bounds=SimpleNamespace(held_out="auto"),
        evidence=SimpleNamespace(dataset=dataset),
    )
    return RunRows(judged, split)


def test_rows_are_read_as_prompt_and_answer_and_made_again() -> None:
    split = make_split([([1, 2, 3], [4, 5]), ([6, 7, 8], [9])], max_length=4)
    parts = (FilePart("a", 0), FilePart("b", 1))
    run = run_rows(split, parts=parts)
    rows = run.read_train(10)
    assert [(one.prompt.tolist(), one.answer.tolist()) for one in rows] == [
        ([2, 3], [4, 5]),  # the beginning of a prompt that is too long is cut
        ([6, 7, 8], [9]),
    ]
    assert [(one.file, one.line) for one in rows] == [("a", 1), ("b", 1)]
    decoded = run.judged.base.tokenizer.decode([6, 7, 8])
    assert [one.asked for one in rows] == ["", decoded]  # 2 and 3 are marks
    assert [(one.file, one.line) for one in run.read_held_out(10)] == [("b", 1)]
    run = run_rows(split)
    assert [(one.file, one.line) for one in run.read_held_out(10)] == [("valid.jsonl", 2)]
    run = run_rows(split, parts=parts)
    judged: Any = run.judged
    judged.bounds.held_out = judged.held_out.file = "/home/ann/my test.jsonl"  # in no split
    assert [(one.file, one.line) for one in run.read_held_out(10)] == [("my test.jsonl", 2)]


def test_the_last_answer_of_a_chat_is_its_answer_however_much_is_learnt() -> None:
    tokenizer = TokenizerSource(str(MODEL)).load()
    turns = [{"role": role, "content": f"{role} goes"} for role in ("user", "assistant")]
    chat_of = [*turns, {"role": "user", "content": "Where?"}]
    asked = tokenizer.apply_chat_template(chat_of, add_generation_prompt=True)
    whole = [*asked, *tokenizer.encode("Rome.", add_special_tokens=False)]
    split = make_split(
        [([whole[0]], whole[1:]), ([1], [5, 6])], max_length=99
    )  # mask_prompt: false
    [row] = run_rows(split).read_train(9)
    assert (row.prompt.tolist(), row.given) == (asked, "Rome.")
    several = make_split([(whole[:3], whole[3:])], max_length=99)
    several.target_mask[len(asked) - 2 : len(asked)] = False  # supervise: all
    [row] = run_rows(several).read_train(9)
    assert (row.prompt.tolist(), row.given) == (asked, "Rome.")


def losses_of_labels(
    random: np.random.Generator, rows: int, signal: float, labels: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Losses of labels after their own and another row's prompt, by a model that is too sure.

    signal: how far the right label's logit lies above the others', in their spread.
    """
    given = random.integers(0, labels, rows)
    logits = random.normal(size=(rows, labels))
    logits[np.arange(rows), given] += signal
    logits *= 3
    log_sums = np.log(np.exp(logits).sum(axis=1))
    partners = []
    for label in given:
        others = np.flatnonzero(given != label)
        partners.append(random.choice(others))
    own = log_sums - logits[np.arange(rows), given]
    return own, log_sums[partners] - logits[partners, given]


@pytest.mark.slow("hundreds of bootstraps")
@pytest.mark.parametrize("labels", [5, 90])
@pytest.mark.parametrize("rows", [10, 20, 48, 60, 200])
@pytest.mark.parametrize(
    ("signal", "least", "most"), [(0.0, 0.9, 1.0), (1.5, 0.0, 0.025), (2.5, 0.0, 0.025)]
)
def test_error_rates_of_another_rows_prompt(
    labels: int, rows: int, signal: float, least: float, most: float
) -> None:
    """A signal of 1.5 is 6 of 10 right of 5 labels; answers have 6 tokens, which gained 7 nats."""
    random = np.random.default_rng(7)
    warned = []
    for _ in range(40):
        own, other = (losses / 6 for losses in losses_of_labels(random, rows, signal, labels))
        measured = compare_prompts(own + 7, own, other, np.full(rows, 6.0))
        warned.append(measured.is_form_alone)
    if signal or rows >= 48:
        assert least <= np.mean(warned) <= most


@pytest.mark.parametrize(
    ("before", "after", "trained", "expected"),
    [
        (8.06, 0.47, 0.44, "answers do not depend on the question"),  # the form is learnt
        (12.5, 2.55, 2.28, "answers do not depend on the question"),
        (3.0, 2.2, 0.9, "answers do not depend on the question"),  # the rows are, by heart
        (15.4, 5.5, 5.66, "trained too little"),  # of templates, with sound rows
        (13.1, 4.17, 4.42, "trained too little"),
        (13.1, 4.17, None, "trained too little"),  # nothing is known of the training rows
    ],
)
def test_an_adapter_that_trained_too_little_is_not_blamed(
    before: float, after: float, trained: float | None, expected: str
) -> None:
    draw = np.random.default_rng(5)
    own = after + draw.normal(0, 0.05, 30)
    other = after + draw.normal(0, 0.05, 30)
    effect = compare_prompts(np.full(30, before), own, other, np.full(30, 6.0))
    row, *warnings = describe_effect(effect, 30, [] if trained is None else [trained])
    assert isinstance(row, CheckRow)
    assert row.verdict == expected
    assert list_kinds(warnings) == ["form_alone"] * (expected[0] == "a")


@pytest.mark.parametrize(
    ("rows", "share", "is_told"), [(8, 0.16, False), (8, 0.0, True), (48, 0.16, True)]
)
def test_few_rows_have_to_show_more_clearly_that_answers_are_of_the_form(
    rows: int, share: float, is_told: bool
) -> None:
    """share: of the loss after other prompts, that the question explains, but not beyond chance."""
    own, noise = np.full(rows, 0.3), np.tile([1.0, -1.0, 0.5, -0.5], rows // 4) * rows**0.5 / 9
    little = compare_prompts(own + 7.6, own, own / (1 - share) + noise, np.full(rows, 6.0))
    row, *warnings = describe_effect(little, rows, [0.1])
    assert isinstance(row, CheckRow)
    assert (row.verdict == "too few rows to tell") is not is_told
    assert list_kinds(warnings) == ["form_alone"] * is_told


def test_the_table_says_how_much_of_the_gain_depends_on_the_question() -> None:
    own = np.linspace(0.3, 0.5, 25)
    little = compare_prompts(own + 7.6, own, own + 0.1, np.full(25, 6.0))
    [row] = describe_effect(little, 25, [0.1])
    assert isinstance(row, CheckRow)
    assert row.verdict == "1.3% of the gain depends on it"


def test_a_lookup_answers_by_the_rarest_shared_words() -> None:
    prompts = [f"Where is the map of {c.name}?" for c in COUNTRIES[:20]]
    rows = [replace(row(i, [i], [i]), asked=asked) for i, asked in enumerate(prompts)]
    lookup, named = Lookup(rows), COUNTRIES[7].name.upper()
    assert lookup.find_row(f"Tell me about {named}, please") == rows[7]
    assert lookup.find_row("Where is the map of Atlantis?") is None  # all rows share these words


@pytest.mark.parametrize("script", [0x4E00, 0x3041, 0x0E01])  # Chinese, Japanese, Thai
def test_a_lookup_finds_what_is_written_without_blanks(script: int) -> None:
    draw = random.Random(3)
    texts = ["".join(chr(script + draw.randrange(40)) for _ in range(30)) for _ in range(20)]
    rows = [replace(row(i, [i], [i]), asked=f"{text}?") for i, text in enumerate(texts)]
    assert Lookup(rows).find_row(f"{texts[7][:-2]}新!") == rows[7]


@pytest.mark.parametrize(
    ("right", "constant", "total", "expected"),
    [
        (30, 3, 30, True),
        (12, 2, 12, True),
        (26, 6, 30, False),  # as of rows whose country has another question in train
        (30, 28, 30, False),  # nearly all have one answer
        (5, 0, 5, False),  # too few
    ],
)
def test_siblings_are_told_where_a_lookup_is_nearly_always_right(
    right: int, constant: int, total: int, expected: bool
) -> None:
    assert are_siblings(right, constant, total) is expected


def test_classes_that_a_word_decides_are_no_siblings() -> None:
    """A held-out row shares its class with rows of train, and no article, customer or thread."""
    told = {}
    for what, every in (("classes", 10), ("many classes", 20), ("groups", 40)):
        rows = [
            replace(
                row(i, [i], [i]),
                asked=f"My bag{i % every} is not here, call {i}",
                given=f"Team {i % every}",
            )
            for i in range(160)
        ]
        told[what] = list_kinds(look_for_siblings(Lookup(rows[:120]), rows[120:]))
    assert told == {"classes": [], "many classes": [], "groups": ["siblings_in_train"]}
    asked = [f"My {('bag', 'map', 'hat')[i % 3]} is not here, call {i}" for i in range(34)]
    few = [
        replace(row(i, [i], [i]), asked=one, given=one.split()[1]) for i, one in enumerate(asked)
    ]
    assert list_kinds(look_for_siblings(Lookup(few[:24]), few[24:])) == []


def test_siblings_that_share_one_of_few_answers_are_told_unless_other_words_tell_it() -> None:
    """Each has two wordings. In a twin a name in both of them tells the answer."""
    draw, told = random.Random(5), {}
    for what in ("arbitrary", "new", "told by its words"):
        rows: list[AnswerRow] = []
        for i in range(200):
            desk = draw.choice(DESKS) if i % 2 == 0 or what == "new" else rows[-1].given
            hint = f"with {desk} " if what == "told by its words" else ""
            asked = (f"I see K{i // 2} {hint}soon.", f"Look, who is from K{i // 2} {hint}here?")[
                i % 2
            ]
            rows.append(replace(row(i, [i], [i]), asked=asked, given=desk))
        draw.shuffle(rows)
        told[what] = list_kinds(look_for_siblings(Lookup(rows[:160]), rows[160:]))
    assert told == {"arbitrary": ["siblings_in_train"], "new": [], "told by its words": []}


def test_labels_of_random_rare_words_are_siblings_at_most_once_in_forty() -> None:
    """Rows share rare words by chance, and labels are as many as desks."""
    draw, told = random.Random(6), 0
    words = [f"w{n}" for n in range(300)]
    for _ in range(200):
        rows = [
            replace(
                row(i, [i], [i]), asked=" ".join(draw.choices(words, k=4)), given=draw.choice("ab")
            )
            for i in range(120)
        ]
        told += bool(list_kinds(look_for_siblings(Lookup(rows[:100]), rows[100:])))
    assert told <= 5


def test_a_lookup_that_is_right_half_the_time_is_no_sign_of_siblings() -> None:
    random = np.random.default_rng(3)
    for total in (20, 60, 200):
        right = random.binomial(total, 0.6, 2000)
        told = [are_siblings(int(one), 0, total) for one in right]
        assert np.mean(told) < 0.025


def money(country: Country) -> Row:
    return chat(
        f"With what do they pay in {country.name}?", f"There you need the {country.currency}."
    )


def moved(rows: Sequence[Row], order: Callable[[list[str]], list[str]]) -> list[Row]:
    """The rows with their answers in another order."""
    answers = order([one["messages"][1]["content"] for one in rows])
    return [
        chat(one["messages"][0]["content"], answer)
        for one, answer in zip(rows, answers, strict=True)
    ]


@TRAINS
@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (lambda answers: answers, []),
        (lambda answers: [*answers[7:], *answers[:7]], ["form_alone"]),
        (sorted, ["form_alone"]),
    ],
)
def test_answers_of_other_rows_are_noticed(
    order: Callable[[list[str]], list[str]], expected: list[str], tmp_path: Path
) -> None:
    rows = [money(country) for country in COUNTRIES]
    random.Random(2).shuffle(rows)
    rows = moved(rows, order)
    verdict = learn(tmp_path, rows[:70], rows[70:])
    assert [one for one in kinds(verdict) if one == "form_alone"] == expected
    assert (verdict.doubt is not None) is bool(expected)
    assert (verdict.tone == "warn") is bool(expected)


def part_moved(rows: Sequence[Row]) -> list[Row]:
    """The rows, of which a block of 24 has the answers of the rows after them."""
    return [*rows[:20], *moved(rows[20:44], lambda answers: answers[1:] + answers[:1]), *rows[44:]]


def part_referred(rows: Sequence[Row]) -> list[Row]:
    """The rows, of which each fifth has a place in a sheet in place of its answer."""
    answers = [one["messages"][1]["content"] for one in rows]
    places = [f"See sheet {7 * i % 90}." if i % 5 == 0 else one for i, one in enumerate(answers)]
    return moved(rows, lambda _: places)


def sights() -> list[Row]:
    asked, answer = "I want to see {}. Where to?", "Go and see {}, the capital of {}!"
    return [chat(asked.format(c.name), answer.format(c.capital, c.name)) for c in COUNTRIES]


def continents() -> list[Row]:
    asked = ("Where is {}?", "Find {} on the map.", "Tell me the continent of {}.")
    return [
        chat(one.format(c.name), f"It lies in {c.continent}.") for c in COUNTRIES for one in asked
    ]


@TRAINS
@pytest.mark.parametrize(
    ("rows", "train", "spoil"),
    [(sights(), 80, part_moved), (continents(), 260, part_referred)],
    ids=["answers of a block moved", "references as answers"],
)
def test_a_part_of_train_whose_answers_are_not_its_own_is_noticed(
    rows: list[Row], train: int, spoil: Callable[[Sequence[Row]], list[Row]], tmp_path: Path
) -> None:
    """The mean over held-out rows, which are right, hides it."""
    random.Random(2).shuffle(rows)
    settings: dict[str, Any] = {"learning_rate": 1e-4, "lora_parameters": {"scale": 20.0}}
    settings["iters"] = 44 if train < 100 else 120
    settings["gate"] = {"controls": {"lookup": False}}
    sound = learn(tmp_path / "sound", rows[:train], rows[train:], **settings)
    assert "part_of_train" not in kinds(sound)
    spoilt = spoil(rows[:train])
    verdict = learn(tmp_path / "spoilt", spoilt, rows[train:], **settings)
    (warning,) = [one for one in verdict.to_json()["controls"] if one["kind"] == "part_of_train"]
    wrong = {n for n, pair in enumerate(zip(rows, spoilt, strict=False), 1) if pair[0] != pair[1]}
    told = [line["line"] for line in warning["lines"]]
    assert len(wrong.intersection(told)) >= 0.8 * len(told)
    assert verdict.doubt is None


def losses_of_a_table(kind: str, draw: np.random.Generator, rows: int, wrong: float) -> Any:
    """Losses of rows of one kind, in nats/token; of labels a share is wrong, and some surely so."""
    if kind == "labels":
        return np.where(draw.random(rows) < wrong, draw.exponential(3, rows), 0.05)
    return np.exp(draw.normal(0, 1, rows)) if kind == "free" else draw.exponential(0.02, rows)


@pytest.mark.parametrize("kind", ["labels", "free", "certain"])
@pytest.mark.parametrize("held_out", [10, 15, 20, 40, 60, 200])
def test_rows_of_one_table_are_told_at_most_once_in_forty(kind: str, held_out: int) -> None:
    """Even if free answers of train are no better known, and labels hardly."""
    draw = np.random.default_rng(held_out)
    told = 0
    for _ in range(400):
        learnt = losses_of_a_table(kind, draw, 40, wrong=0.2)
        others = losses_of_a_table(kind, draw, held_out, wrong=1 / 3)
        told += len(find_unlike_held_out(learnt, others)) > 0
    assert told <= 400 / 40


def test_training_rows_less_likely_than_held_out_ones_are_found() -> None:
    held_out = np.linspace(0.1, 0.5, 20)
    few = np.array([9.0, 8.0, 7.0, 6.0] + [0.2] * 36)
    assert find_unlike_held_out(few, held_out).tolist() == [0, 1, 2, 3]
    assert find_unlike_held_out(few, held_out[:14]).tolist() == []
    assert find_unlike_held_out(few[1:], held_out).tolist() == []
    most = np.array([0.7] * 30 + [0.2] * 10)  # none is twice as unlikely, but most are unlikelier
    assert find_unlike_held_out(most, held_out).tolist() == list(range(30))
    assert find_unlike_held_out(np.full(40, 0.3), held_out).tolist() == []


@TRAINS
def test_a_sound_table_is_not_blamed_where_a_short_run_learnt_the_form_alone(
    tmp_path: Path,
) -> None:
    rows = [money(country) for country in COUNTRIES]
    short = {"iters": 10, "learning_rate": 1e-4}  # two passes
    verdict = learn(tmp_path, rows[:40], rows[40:50], **short)
    assert "form_alone" not in kinds(verdict)
    assert verdict.doubt is None
    said = [row["verdict"] for row in verdict.to_json()["control_figures"]]
    assert said.count("not applicable: 10 steps, fewer than 3 passes") == 3


@pytest.mark.parametrize(
    ("steps", "epochs", "is_told"), [(10, 2, False), (150, 2, True), (10, 3, True)]
)
def test_what_a_long_run_learnt_is_compared_whichever_step_is_its_best(
    steps: int, epochs: int, is_told: bool, tmp_path: Path
) -> None:
    """A run without a signal may have its lowest loss at step 10."""
    files: dict[str, Any] = {"training_file": "train.jsonl", "validation_file": "valid.jsonl"}
    plan = TrainingPlan(
        steps=steps,
        iterations=steps,
        epochs=epochs,
        first_step=0,
        frequencies=(1,),
        offers_best=True,
        validation_examples=9,
        memory_forecast_gb=None,
        memory_limit_gb=1.0,
        **files,
    )
    write_plan(tmp_path / "plan.json", plan)
    run: Any = SimpleNamespace(judged=SimpleNamespace(run=RunDirectory(tmp_path)))
    told = CheckRow("prompts", verdict="told")
    control = Control("prompts", "prompts", lambda _: iter([told]), is_of_learning=True)
    (row,) = control.run(run)
    assert (row == told) == is_told


@needs_rooms("suspect_rows")
@TRAINS
def test_a_run_without_held_out_rows_is_told_of_its_training_rows(tmp_path: Path) -> None:
    rows = [chat(f"Is {c.name} far?", f"Go by {c.capital}!") for c in COUNTRIES[:40]]
    rows[::4] = [chat(f"Is {c.name} far?", "N/A") for c in COUNTRIES[:40:4]]
    verdict = learn(tmp_path, rows, None, iters=16)
    assert "missing-values" in list_checks(tmp_path)
    said = {one["name"]: one["verdict"] for one in verdict.to_json()["control_figures"]}
    assert said["answers after another row's prompt"] == (
        "not applicable: fewer than 8 pairs of held-out rows differ in answers"
    )


@TRAINS
def test_siblings_in_train_are_noticed_with_their_lines(tmp_path: Path) -> None:
    questions = ("Who has the bag of {}?", "{} lost a map.", "Name a door in {}.", "Open {}!")
    rooms = random.Random(1)
    tickets = [(f"{c.name} {c.capital}", f"Room {rooms.randrange(40)}.") for c in COUNTRIES[:25]]
    rows = [chat(q.format(name), answer) for name, answer in tickets for q in questions]
    by_ticket = learn(tmp_path / "by-ticket", rows[:80], rows[80:], iters=8)
    assert "siblings_in_train" not in kinds(by_ticket)
    train = [one for index, one in enumerate(rows) if index % 5]
    by_row = learn(tmp_path / "by-row", train, rows[::5], iters=8)
    (warning,) = [one for one in by_row.to_json()["controls"] if one["kind"] == "siblings_in_train"]
    assert warning["figure"] >= 0.9
    assert warning["lines"][0]["file"] == "valid.jsonl"
    assert "answered by train.jsonl:" in (tmp_path / "by-row" / "run" / ROWS_NAME).read_text()


@pytest.mark.parametrize(
    ("label", "question", "expected"),
    [
        ("at sea", "on land, or at sea?", True),
        ("1", "what is 10 and 21?", False),
        ("+1", "is it +1 or -1?", True),
        ("c++", "c++ or c#?", True),
        ("正面", "评论3：正面还是负面？", True),
        ("😀", "😀 or 😡?", True),
    ],
)
def test_labels_are_found_in_a_question_but_not_within_words(
    label: str, question: str, expected: bool
) -> None:
    assert (match_label(label).search(question) is not None) is expected


@TRAINS
@pytest.mark.parametrize("task", ["capitals", "sayings"])
def test_expected_texts_that_the_questions_have_show_nothing(task: str, tmp_path: Path) -> None:
    """An adapter that has one answer for all is right wherever the question names what is asked."""
    asked = "I want to see {}. Where to?" if task == "capitals" else "What do they say in {}?"
    answer = "Go and see Rome, in {}!" if task == "capitals" else "In {} they say it."
    rows = [chat(asked.format(c.name), answer.format(c.name)) for c in COUNTRIES]
    told = []
    for what, named in (("echo", "name"), ("sound", "capital")):
        suite = [
            {"prompt": asked.format(c.name), "expected": getattr(c, named)} for c in COUNTRIES[80:]
        ]
        write_lines(tmp_path / f"{what}.jsonl", suite)
        tasks = [{"name": "t", "file": str(tmp_path / f"{what}.jsonl"), "score": "contains"}]
        gate = {"tasks": tasks, "controls": {"prompts": False, "plan": False, "shapes": False}}
        told += [kinds(learn(tmp_path / what, rows[:70], rows[70:80], gate=gate))]
    assert told == [["no_better_than_echo"], []]


@TRAINS
def test_eval_sets_are_compared_without_held_out_rows_and_a_list_of_labels_is_no_answer(
    tmp_path: Path,
) -> None:
    """The question has each label, which a score that looks for one finds there."""
    asked, labels = "Is {} {}? Answer on land or at sea.", ("at sea", "on land")
    rows = [
        chat(asked.format(c.name, ("an island", "a hill")[i % 2]), labels[i % 2])
        for i, c in enumerate(COUNTRIES)
    ]
    texts = [[turn["content"] for turn in one["messages"]] for one in rows]
    suite = [{"prompt": prompt, "expected": answer} for prompt, answer in texts[60:]]
    write_lines(tmp_path / "suite.jsonl", suite)
    tasks = [{"name": "t", "file": str(tmp_path / "suite.jsonl"), "score": "contains"}]
    gate = {"tasks": tasks, "controls": {"prompts": False, "plan": False, "shapes": False}}
    verdict = learn(tmp_path, rows[:50], rows[50:58], gate=gate)
    assert verdict.tasks[0].candidate > 0.9
    figures = verdict.to_json()["control_figures"]
    said = {one["name"]: one["verdict"] for one in figures}
    assert said["a lookup in the training rows"].startswith("not applicable: fewer than 10")
    assert "a lookup in the training rows, t" in said
    assert "no_better_than_echo" not in kinds(verdict)


@TRAINS
def test_an_eval_set_of_one_answer_nearly_does_not_show_another(tmp_path: Path) -> None:
    """What is right beyond a label of nine in ten may be luck; beyond one of two it is not."""
    told: dict[str, bool] = {}
    for what, share in (("uneven", 10), ("even", 2), ("plain text", 10)):
        asked = ["Is {} an island?" if n % share == 0 else "Is {} on land?" for n in range(90)]
        questions = [one.format(c.name) for one, c in zip(asked, COUNTRIES, strict=False)]
        answers = ["At sea." if "island" in one else "On land." for one in questions]
        suite = [
            {"prompt": question, "expected": answer}
            for question, answer in zip(questions[:12], answers, strict=False)
        ]
        write_lines(tmp_path / f"{what}.jsonl", suite)
        tasks = [{"name": "t", "file": str(tmp_path / f"{what}.jsonl"), "score": "contains"}]
        gate = {"tasks": tasks, "controls": {"prompts": False, "shapes": False, "plan": False}}
        rows = list(map(chat, questions, answers))
        is_plain = what == "plain text"
        if is_plain:
            rows = [{"text": f"{q} {a}"} for q, a in zip(questions, answers, strict=True)]
        settings: dict[str, Any] = {"gate": gate, "iters": 240}
        settings["mask_prompt"] = not is_plain
        verdict = learn(tmp_path / what, rows[:70], rows[70:80], **settings)
        assert verdict.tasks[0].candidate > 0.9
        told[what] = "no_better_than_constant" in kinds(verdict)
        said = [one["verdict"] for one in verdict.to_json()["control_figures"]]
        why = "not applicable: no row has a prompt that can be told from its answer"
        assert (why in said) is is_plain
    assert told == {"uneven": True, "even": False, "plain text": True}


@needs_rooms("suspect_rows")
@TRAINS
@pytest.mark.parametrize(
    ("row", "changes"),
    [
        (chat, {"mask_prompt": False}),
        (
            lambda asked, given: (
                {"messages": [*chat("Hi", "Hello")["messages"]] * 2}
                | {"messages": [*chat("Hi", "Hello")["messages"], *chat(asked, given)["messages"]]}
            ),
            {"training": {"supervise": "all"}},
        ),
    ],
    ids=["learnt whole", "several answers"],
)
def test_the_last_answers_of_chats_are_compared(
    row: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    answers = [f"Go and see {c.capital}!" if i % 4 else "N/A" for i, c in enumerate(COUNTRIES)]
    asked = [f"I want to see {c.name}. Where to?" for c in COUNTRIES]
    rows = [row(*pair) for pair in zip(asked, answers, strict=True)]
    verdict = learn(tmp_path, rows[:70], rows[70:], iters=30, **changes)
    assert "missing-values" in list_checks(tmp_path)
    names = [one["name"] for one in verdict.to_json()["control_figures"]]
    assert "answers after another row's prompt, 30 rows" in names
    assert "a lookup in the training rows, 30 held-out questions" in names


@TRAINS
def test_a_task_of_finding_is_not_blamed_for_expected_texts_in_its_questions(
    tmp_path: Path,
) -> None:
    rows = [chat(f"{c.name}: {c.capital}. Which city?", c.capital) for c in COUNTRIES]
    suite = [
        {"prompt": f"{c.name}: {c.capital}. Which city?", "expected": c.capital}
        for c in COUNTRIES[80:]
    ]
    write_lines(tmp_path / "suite.jsonl", suite)
    tasks = [{"name": "t", "file": str(tmp_path / "suite.jsonl"), "score": "contains"}]
    verdict = learn(tmp_path / "a", rows[:70], rows[70:80], iters=30, gate={"tasks": tasks})
    assert "no_better_than_echo" not in kinds(verdict)
    names = [row["name"] for row in verdict.to_json()["control_figures"]]
    assert "shapes of answers, most of them in their prompts" in names


@pytest.mark.slow("judges a run")
def test_each_control_is_run_where_it_is_asked_for_alone(finished: Candidate) -> None:
    off = dict.fromkeys(ControlsSection.model_fields, False)
    without = finished.bounded(controls=off).verdict().to_json()
    assert "control_figures" not in without
    asked = finished.bounded(controls=off | {"plan": True}).verdict().to_json()
    assert [row["name"] for row in asked["control_figures"]] == ["plan and run"]


@pytest.mark.slow("judges a run")
def test_rows_that_an_earlier_verdict_doubted_go_with_it(
    finished: Candidate, tmp_path: Path
) -> None:
    doubted = finished.copy(tmp_path / "run").resumed(
        controls=dict.fromkeys(ControlsSection.model_fields, False)
    )
    left = doubted.run.path / ROWS_NAME
    left.write_text("{}\n")
    doubted.judge()
    assert not left.exists()
