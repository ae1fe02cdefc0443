"""`init --split`: a random split of a data set that has only train."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from examples.countries import COUNTRIES
from nested_core import ConfigError, DatasetError
from nested_core.config.loading import load_config
from nested_core.data.lines.example_parsing import FieldNames
from nested_core.data.room_checks import NearDuplicates
from nested_core.rooms.tables.chats import Columns
from nested_core.rooms.tables.data_set import DataSet, Request, are_alike, make_data_set
from nested_core.rooms.tables.dataset_split import (
    RowTexts,
    SplitRequest,
    TooManyQuestions,
    draw_splits,
    read_share,
)
from nested_core.rooms.tables.eval_set import EvalSet, choose_score, draw_eval_set
from nested_core.rooms.tables.source import FileFacts, Source
from nested_core.seams import load_all
from tests.builders.data_sets import chat, write_lines
from tests.example import MODEL
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


def count_answer(turns: Sequence[dict], answer: str) -> int | None:
    """Count characters, of a model that sees no question of more than 1,000."""
    return len(answer) if len(turns[-1]["content"]) <= 1_000 else None


def split_dataset(data: str, share: float, target: Path) -> dict[str, int]:
    """Split rows as they are, as `init --split` does."""
    return dict(
        make(data, Request(False, None, None, True, SplitRequest(share), count_answer), target).rows
    )


def make(data: str, request: Request, target: Path) -> DataSet:
    with TemporaryDirectory() as spool:
        source = Source.find(data, Path(spool))
        source.require_rows()
        return make_data_set(source, request, target)


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


def write_articles(folder: Path) -> Path:
    """A table of 24 articles with five questions each, in a random order; `kind` is two labels."""
    rows = [(f"KB-{n // 5}", n % 2, f"{WORDS[n // 5]} {n}?", f"{n // 5}.") for n in range(120)]
    random.Random(1).shuffle(rows)
    lines = ["day,article,kind,number,ask,say"]
    lines += [f"{n % 30},{a},{kind},{n},{ask},{say}" for n, (a, kind, ask, say) in enumerate(rows)]
    folder.mkdir(exist_ok=True)
    (folder / "faq.csv").write_text("\n".join(lines) + "\n")
    return folder / "faq.csv"


def write_threads(folder: Path) -> Path:
    """Chats of 24 threads, three of each, in one file."""
    rows = [chat(f"{WORDS[n // 3]}, {n}?", f"{n}.") | {"thread": n // 3} for n in range(72)]
    random.Random(1).shuffle(rows)
    return write_lines(folder / "chats.jsonl", rows)


@pytest.mark.parametrize(
    ("write", "field", "columns"),
    [(write_articles, "article", Columns("{ask}", ("say",))), (write_threads, "thread", None)],
)
def test_rows_that_belong_together_are_offered_and_go_to_one_split(
    write: Callable[[Path], Path], field: str, columns: Columns | None, tmp_path: Path
) -> None:
    data = str(write(tmp_path))
    split = SplitRequest(0.1, 0)
    request = Request(columns is not None, columns, None, True, split, count_answer)
    by_rows = make(data, request, tmp_path / "rows")
    (offer,) = [one for one in by_rows.messages if "--group" in one]
    assert f"held-out rows share their {field} with rows of train" in offer
    assert f"give `--group {field}`" in offer
    by_group = make(data, replace(request, group=field), tmp_path / "groups")
    of_split = {
        name: {json.loads(row)[field] for row in read_split(tmp_path / "groups", name)}
        for name in by_group.rows
    }
    assert sum(map(len, of_split.values())) == 24
    assert not [one for one in by_group.messages if "warning" in one]
    assert f"each {field} is in one split" in " ".join(by_group.messages)


def test_columns_that_are_nearly_unique_or_of_a_few_values_are_no_groups() -> None:
    facts = FileFacts("t.csv", 100)
    facts.columns = {
        "id": [str(n) for n in range(100)],
        "kind": [str(n % 5) for n in range(100)],
        "always": ["x"] * 100,
        "sometimes": [str(n) for n in range(20)] * 4,  # empty in 20 rows
    }
    assert facts.find_groups(()) == []
    facts.columns["customer"] = [str(n % 30) for n in range(100)]
    facts.columns["day"] = [str(n % 40) for n in range(100)]
    assert facts.find_groups(()) == ["day", "customer"]
    assert facts.find_groups(("customer",)) == ["day"]
    assert FileFacts("empty.csv").find_groups(()) == []


@pytest.mark.parametrize("values", [15, 30])
def test_columns_that_say_nothing_of_their_rows_are_offered_at_most_once_in_forty(
    values: int,
) -> None:
    draw = random.Random(values)
    told = 0
    for _ in range(80):
        rows = [" ".join(draw.choices(WORDS, k=9)) + f" {n}" for n in range(150)]
        told += are_alike({row.encode(): str(draw.randrange(values)) for row in rows}, FieldNames())
    assert told <= 2
    alike = {
        f"{WORDS[n % values]} {draw.choice(WORDS)} {n}".encode(): f"K{n % values}"
        for n in range(150)
    }
    assert are_alike(alike, FieldNames())


def test_a_value_that_questions_name_is_offered_where_it_decides_the_answer() -> None:
    """Two questions about one country have no other word in common."""
    draw = random.Random(3)
    asks = ("I want to see {}. Who is it?", "Look, where do the people of {} go?")
    told = {}
    for what in ("decides", "says nothing", "is a label's code"):
        values: dict[bytes, str] = {}
        for country in COUNTRIES[:60]:
            for asked in asks:
                if asked == asks[0] or what == "says nothing":
                    desk = draw.choice(("Tina", "Oscar", "Clara"))
                named = country.name if what != "is a label's code" else "them"
                row = json.dumps(chat(asked.format(named) + f" {len(values)}", f"Ask {desk}."))
                values[row.encode()] = country.name
        told[what] = are_alike(values, FieldNames())
    assert told == {"decides": True, "says nothing": False, "is a label's code": False}


def test_a_group_that_no_row_has_is_refused_and_one_is_in_the_configuration(tmp_path: Path) -> None:
    write_articles(tmp_path)
    names = ("--prompt-feature", "ask", "--completion-feature", "say", "-o", "lora.yaml")
    init = ("init", "--data", "faq.csv", "--model", MODEL, *names)
    refused = called(*init, "--group", "Article", cwd=tmp_path)
    assert refused.code == 2
    assert "no row of faq.csv has a field 'Article'" in refused.stderr
    assert not (tmp_path / "faq-split").exists()
    assert called(*init, "--group", "article", cwd=tmp_path).code == 0
    config = load_config(tmp_path / "lora.yaml")
    assert config.data_policy.group == "article"


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
    (near,) = load_all(NearDuplicates)
    paired = {*map(frozenset, near.pair(texts))}
    assert paired >= {frozenset({row, row + 1}) for row in range(99)}
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
    ("umask", "above", "of_folder", "of_files"),
    [(0o022, 0o755, 0o700, 0o600), (0o002, 0o2775, 0o770, 0o660)],
)
def test_rows_are_written_for_whoever_may_read_a_run_alone(
    tmp_path: Path, umask: int, above: int, of_folder: int, of_files: int
) -> None:
    data = write_train(tmp_path / "data", 40)
    tmp_path.chmod(above)
    before = os.umask(umask)
    try:
        split = SplitRequest(0.1, 3)
        request = Request(True, None, "Be brief.", True, split, count_answer)
        made = make(str(data), request, tmp_path / "split")
    finally:
        os.umask(before)
    assert made.eval_set is not None
    written = [*(tmp_path / "split").glob("*.jsonl")]
    assert len(written) == 4
    assert {path.stat().st_mode & 0o777 for path in written} == {of_files}
    assert (tmp_path / "split").stat().st_mode & 0o777 == of_folder


@pytest.mark.parametrize(
    ("rows", "files", "share", "said"),
    [
        (40, ("valid.jsonl",), 0.1, "has valid.jsonl already"),
        (2, (), 0.1, "has 2 rows, too few to take any out"),
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
    data = write_train(tmp_path / "data", 3, file="test.jsonl")
    with pytest.raises(ConfigError, match=r"test\.jsonl would be held out by the name, and"):
        split_dataset(str(data), 0.1, tmp_path / "split")


def test_a_share_of_a_half_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"above 0 and below 0\.5"):
        read_share("0.5")


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


def test_labels_are_spread_by_rows_where_some_rows_ask_one_question() -> None:
    def write(questions: int, copies: int, label: str) -> list[bytes]:
        asked = (f"What of {label} {copies} {n}?" for n in range(questions) for _ in range(copies))
        return [json.dumps(chat(question, label)).encode() for question in asked]

    rows = [*write(30, 1, "billing"), *write(10, 3, "billing"), *write(60, 1, "technical")]
    for seed in range(20):
        shuffled = random.Random(seed).sample(rows, len(rows))
        drawn = draw_splits(shuffled, SplitRequest(0.2))
        assert drawn is not None
        for split in ("valid", "test"):
            billing = sum(b'"billing"' in line for line in drawn.lines[split])
            assert abs(billing - len(drawn.lines[split]) / 2) <= 2


def draw(answers: Sequence[str], count: int | None = 5, train: int = 20) -> EvalSet:
    lines = [json.dumps(chat(f"{n}?", answer)).encode() for n, answer in enumerate(answers)]
    drawn = draw_eval_set(lines[:train], lines[train:], count, count_answer)
    assert drawn is not None
    return drawn


def test_labels_have_an_eval_set_of_the_held_out_rows_by_themselves() -> None:
    labels = ["yes" if n % 3 else "no" for n in range(90)]
    assert len(draw(labels, None, train=78).lines) == 12
    assert len(draw(labels, None).lines) == 50


@pytest.mark.parametrize(
    "answers",
    [
        [f"In town {n}." for n in range(30)],
        ["yes" if n % 3 else "no" for n in range(24)],  # too few are held out
        ["no"] * 5 + ["yes"] * 25,  # one answer is right for all that are held out
    ],
)
def test_answers_that_tell_nothing_have_no_eval_set_unless_it_is_asked_for(
    answers: list[str],
) -> None:
    lines = [json.dumps(chat(f"{n}?", answer)).encode() for n, answer in enumerate(answers)]
    assert draw_eval_set(lines[:20], lines[20:], None, count_answer) is None
    assert draw_eval_set(lines[:20], lines[20:], 4, count_answer) is not None


def test_the_longest_answer_says_how_many_tokens_one_may_have() -> None:
    drawn = draw(["yes" if n % 3 else "perhaps" for n in range(30)])
    assert (drawn.score, drawn.max_tokens) == ("exact", len("perhaps") + 2)
    drawn = draw([f"In town {n}." for n in range(30)])
    assert (drawn.score, drawn.max_tokens) == ("exact", len("In town 22.") + 16)
    long = ["w" * (300 if n % 2 else 30) for n in range(30)]
    assert draw(long).max_tokens == 30 + 16
    assert draw(long).left_out == "; not asked: 5 with an answer of more than 256 tokens"
    assert draw(long, 6).max_tokens == 300 + 16  # too few others


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        ([str(n) for n in range(9)], "number"),
        (["0", "-1.5", "1,200", "\u22124"], "number"),
        (["01", "02", "03"], "exact"),
        (["12 km", "7 km"], "exact"),
        (["3,50", "4,25"], "exact"),
        (["1", "2"] * 4, "exact"),
        (["no", "no idea", "1"], "exact"),
        (['{"a": 1}', '{"a": 2}'], "json"),
        (["{}", '{"a": 2}'], "exact"),
        (['{"a": NaN}', '{"a": 1e999}'], "exact"),
        (['{"a": ' + "[" * 9000 + "]" * 9000 + "}", '{"a": 2}'], "exact"),
        (["1" * 5000, "2"], "exact"),
    ],
)
def test_the_score_tells_right_answers_from_wrong_ones(answers: list[str], score: str) -> None:
    assert choose_score(answers) == score


@pytest.mark.parametrize(
    ("answers", "least"),
    [
        ([f"Town {n}" for n in range(30)], 2 / 5),
        (["yes"] * 25 + ["no", "yes", "no", "no", "yes"], 4 / 5),
        ([str(7 if n > 27 else n) for n in range(30)], 3 / 5),
        ([json.dumps({"a": n % 2}) for n in range(30)], 4 / 5),
        (["yes"] * 25 + ["no"] * 5, 1),
    ],
)
def test_min_is_above_what_one_answer_to_all_questions_gets(
    answers: list[str], least: float
) -> None:
    drawn = draw(answers, train=25)
    assert drawn.least_share == pytest.approx(least)


@pytest.mark.parametrize(("questions", "right"), [(20_000, 10_000), (60_000, 1), (100_000, 33_333)])
def test_min_is_above_one_answer_of_very_many_questions(questions: int, right: int) -> None:
    drawn = EvalSet((b"{}",) * questions, "exact", 4, ("yes", right))
    assert right / questions < drawn.least_share <= (right + 1) / questions


def test_a_question_of_train_is_not_asked_and_each_right_answer_counts() -> None:
    lines = [json.dumps(chat(*pair)).encode() for pair in (("a?", "1 b"), ("c?", "2 d"))]
    more = [json.dumps(chat(*pair)).encode() for pair in (("A ?", "3 e"), ("f?", "g"), ("f?", "h"))]
    drawn = draw_eval_set(lines, more, 1, count_answer)
    assert drawn is not None
    (question,) = map(json.loads, drawn.lines)
    assert (question["messages"][0]["content"], question["expected"]) == ("f?", ["g", "h"])
    assert drawn.left_out == "; not asked: 1 that train asks too"
    with pytest.raises(TooManyQuestions, match="from 1 to 1 questions"):
        draw_eval_set(lines, more, 2, count_answer)


def test_what_another_system_text_asks_for_is_no_answer_to_the_same_question() -> None:
    told = {"Name the capital.": "Oslo", "Name the continent.": "Europe"}
    rows = [chat("Tell me of Norway.", answer) for answer in told.values()]
    for row, system in zip(rows, told, strict=True):
        row["messages"].insert(0, {"role": "system", "content": system})
    train = [json.dumps(chat("a?", "b")).encode()]
    drawn = draw_eval_set(train, [json.dumps(row).encode() for row in rows], 2, count_answer)
    assert drawn is not None
    questions = [*map(json.loads, drawn.lines)]
    asked = {one["messages"][0]["content"]: one["expected"] for one in questions}
    assert asked == told


def test_questions_of_the_champions_data_are_not_said_to_be_of_train() -> None:
    rows = [json.dumps(chat(f"{n}?", f"{n} is it.")).encode() for n in range(6)]
    known = {RowTexts.of(row, ANY).question for row in rows[:4]} | {b"another"}
    drawn = draw_eval_set(rows[:1], rows, 2, count_answer, known)
    assert drawn is not None
    told = "; not asked: 1 that train asks too; not asked: 3 that the champion's data asks"
    assert drawn.left_out == told
    others = "have 2 different ones that neither train nor the champion's data asks"
    with pytest.raises(TooManyQuestions, match=f"from 1 to 2 questions, for the .* {others}"):
        draw_eval_set(rows[:1], rows, 3, count_answer, known)
    with pytest.raises(TooManyQuestions, match="none can be drawn, for the held-out rows have 0"):
        draw_eval_set(rows, rows, 3, count_answer)


def test_near_duplicates_are_no_warning_where_nothing_is_held_out() -> None:
    rows = [json.dumps(chat(f"Where is the {n}?", "It is here.")).encode() for n in range(20)]
    known = {RowTexts.of(row, ANY).question for row in rows}
    drawn = draw_splits(rows, SplitRequest(0.1, trained=known))
    assert drawn is not None
    assert drawn.describe() == ["asked in the champion's data too: 20 rows, all in train"]


def test_a_question_that_the_model_cannot_see_whole_is_not_asked() -> None:
    more = [
        json.dumps(chat(f"{n}?" * (501 if n % 2 else 1), f"{n} is it.")).encode() for n in range(8)
    ]
    drawn = draw_eval_set([], more, 4, count_answer)
    assert drawn is not None
    asked = [json.loads(line)["messages"][-1]["content"] for line in drawn.lines]
    assert sorted(asked) == ["0?", "2?", "4?", "6?"]
    assert "; not asked: 4 that are too long for the model with their answer" in drawn.describe()
    with pytest.raises(TooManyQuestions, match="and 4 of them do not fit the model"):
        draw_eval_set([], more, 5, count_answer)


def questions_of(lines: Iterable[bytes]) -> set[bytes]:
    return {question for line in lines for question in RowTexts.of(line, ANY).asked}


ANY = FieldNames()


def turns(*texts: str) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": t} for n, t in enumerate(texts)]}


@pytest.mark.parametrize(
    "rows",
    {
        "several answers": [
            {"prompt": f"What is {n % 20}?", "completion": f"{n}."} for n in range(60)
        ],
        "pairs": [
            {"prompt": f"What of {n % 20}?", "chosen": f"{n} yes", "rejected": f"{n} no"}
            for n in range(60)
        ],
        "other system texts": [
            {
                "messages": [
                    {"role": "system", "content": f"Day {n}"},
                    *chat(f"{n % 20}?", f"{n}")["messages"],
                ]
            }
            for n in range(60)
        ],
        "asked on the way of a chat": [
            turns(f"Who is {n % 20}?", f"{n}", *(("And then?", f"No {n}") if n < 20 else ()))
            for n in range(60)
        ],
        "upper case": [
            {
                "prompt": f"Is it {n % 20}?".swapcase() if n > 30 else f"Is it {n % 20}?",
                "completion": str(n),
            }
            for n in range(60)
        ],
    }.values(),
)
def test_no_question_of_a_held_out_row_is_trained_on(rows: list[dict[str, object]]) -> None:
    lines = [json.dumps(row).encode() for row in rows]
    random.Random(0).shuffle(lines)
    drawn = draw_splits(lines, SplitRequest(0.1))
    assert drawn is not None
    trained = questions_of(drawn.lines["train"])
    for split in ("valid", "test"):
        assert drawn.lines[split]
        own = {RowTexts.of(line, ANY).question for line in drawn.lines[split]}
        assert not own & trained


def test_rows_that_ask_what_is_known_are_all_trained_on() -> None:
    rows = [json.dumps(chat(f"Where is {n}?", f"In {n}.")).encode() for n in range(40)]
    known = {RowTexts.of(row, ANY).question for row in rows[:30]}
    drawn = draw_splits(rows, SplitRequest(0.1, trained=known))
    assert drawn is not None
    assert drawn.known == 30
    assert {*rows[:30]} <= {*drawn.lines["train"]}


@pytest.mark.parametrize(("new", "held_out"), [(0, 0), (1, 0), (2, 0), (3, 1), (10, 1), (20, 2)])
def test_sizes_are_shares_of_the_new_rows_and_some_of_those_are_trained_on(
    new: int, held_out: int
) -> None:
    rows = [json.dumps(chat(f"Where is {n}?", f"In {n}.")).encode() for n in range(30 + new)]
    known = {RowTexts.of(row, ANY).question for row in rows[:30]}
    drawn = draw_splits(rows, SplitRequest(0.1, trained=known))
    assert drawn is not None
    sizes = {name: len(lines) for name, lines in drawn.lines.items()}
    some = {"valid": held_out, "test": held_out} if held_out else {}
    assert sizes == {"train": 30 + new - 2 * held_out, **some}
    told = f"for 30% of {new} questions" if new else "none can be drawn, for no question is new"
    with pytest.raises(TooManyQuestions, match=told):
        draw_splits(rows, SplitRequest(0.1, questions=7, trained=known))


def test_rows_of_own_splits_that_ask_what_is_known_are_told(tmp_path: Path) -> None:
    data = write_train(tmp_path / "data", 4)
    for name, numbers in (("valid", range(5)), ("test", range(2, 9))):
        rows = [chat(f"what  is {n}?", f"Now {n}.") for n in numbers]
        write_lines(data / f"{name}.jsonl", rows)
    asked = [json.dumps(chat(f"What is {n}?", "-")).encode() for n in (1, 2, 3)]
    known = {RowTexts.of(row, ANY).question for row in asked}
    split = SplitRequest(trained=known)
    made = make(
        str(data), Request(False, None, None, False, split, count_answer), tmp_path / "made"
    )
    assert made.rows == {"train": 4, "valid": 5, "test": 7}
    told = "asked in the champion's data too: {} of your {} split, not trained on"
    assert [told.format("3 rows", "valid"), told.format("2 rows", "test")] == list(made.messages)


@needs_rooms("near_duplicates")
@pytest.mark.parametrize("parted", [True, False])
def test_rows_that_large_groups_part_from_nearly_equal_ones_are_told(parted: bool) -> None:
    dice = random.Random(0)
    values: dict[bytes, str] = {}
    for number, size in enumerate((200, 200, 20, 20)):
        texts = [
            " ".join("".join(dice.choices("aeilnst", k=5)) for _ in range(40)) for _ in range(size)
        ]
        if number == 0:
            first = texts
        for text in first[:size] if parted and number == 2 else texts:
            row = chat(f"{text} of {number}", f"{len(values)}.")
            values[json.dumps(row).encode()] = f"k{number}"
    drawn = draw_splits([*values], SplitRequest(values=values))
    assert drawn is not None
    assert {name: len(lines) for name, lines in drawn.lines.items()} == {
        "train": 400,
        "valid": 20,
        "test": 20,
    }
    assert drawn.has_near_duplicates is parted
