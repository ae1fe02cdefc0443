"""An eval set for `gate.tasks`, drawn from held-out chats, with the score that fits their answers.

Beside it stands how many of its questions one and the same answer would be right for: a model that
is no better has learnt nothing of the question.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nested_core.config.sections import Score
from nested_core.data.lines.example_parsing import FieldNames
from nested_core.data.lines.json_decoding import LineProblem, decode_json_text
from nested_core.errors import shorten
from nested_core.measure.answers.scorers import ScoringMethod
from nested_core.measure.answers.suite_answers import Suite
from nested_core.records.loss_conclusion import MIN_EXAMPLES
from nested_core.rooms.tables.dataset_split import SPLIT_SEED, RowTexts, TooManyQuestions
from nested_core.rooms.tables.labels import describe_share, find_labels
from nested_core.text.value_format import format_count

USUAL_ANSWER_TOKENS = 256  # questions with longer answers are drawn where there are too few others
LABEL_QUESTIONS = 50  # at most, of an eval set that nobody asked for
EXTRA_TOKENS = 16  # of an answer beyond the longest that is expected, which may be told at length
EXTRA_TOKENS_OF_A_LABEL = 2  # which is right alone
# No zeros in front: those of a number such as 00123 are part of an identifier. Nor more digits than
# Python writes.
_NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3}){1,99}|0|[1-9]\d{0,999})(?:\.\d{1,999})?")


@dataclass(frozen=True)
class EvalSet:
    """Questions, and what to set in `gate.tasks` for them.

    lines: the questions, a line of JSON each.
    score: how answers are scored.
    max_tokens: the most tokens of an answer: more than the longest expected one has.
    fixed: the one answer that is right for most of the questions, and the number of these.
    left_out: a part of a sentence on held-out rows that are not asked, and why.
    """

    lines: tuple[bytes, ...]
    score: Score
    max_tokens: int
    fixed: tuple[str, int]
    left_out: str = ""

    @property
    def least_share(self) -> float:
        """The smallest share of right answers that no fixed answer reaches; at most 1."""
        millionths = (self.fixed[1] + 1) * 10**6 // len(self.lines)  # of 100,000 questions at most
        return min(1.0, millionths / 10**6)

    def describe(self) -> str:
        """Return how many questions there are, how they are scored, and the baseline."""
        count = f"{format_count(len(self.lines), 'held-out question')} (--suite N, 0 for none)"
        score = f"score {self.score}, answers of at most {self.max_tokens} tokens"
        return f"eval set: {count}; {score}; {self.describe_baseline()}{self.left_out}"

    def describe_baseline(self) -> str:
        """Return a part of a sentence: how many questions the best fixed answer would get right."""
        answer, right = self.fixed
        share = describe_share(right, len(self.lines))
        return f"one answer to all, {shorten(answer, 60)!r}, would be right for {share}"


@dataclass
class _Question:
    """The turns before an answer, and the answers that held-out chats give to them."""

    turns: list[dict[str, Any]]
    answers: list[str] = field(default_factory=list)

    def write(self, score: Score) -> bytes:
        """Return the question as a line of an eval set; an object of JSON has one right answer."""
        parsers: dict[str, Callable[[str], Any]] = {"json": json.loads, "number": _as_number}
        answers = self.answers[:1] if score == "json" else dict.fromkeys(self.answers)
        values = [parsers.get(score, str)(answer) for answer in answers]
        expected = values[0] if len(values) == 1 else values
        question = {"messages": self.turns, "expected": expected}
        return json.dumps(question, ensure_ascii=False).encode(errors="surrogatepass")


def draw_eval_set(
    train: Iterable[bytes],
    held_out: Iterable[bytes],
    count: int | None,
    count_answer: Callable[[Sequence[Any], str], int | None],
    known: Set[bytes] = frozenset(),
) -> EvalSet | None:
    """Draw different questions that train does not ask from the held-out chats, by a fixed seed.

    Args:
        train, held_out: chats, a line of JSON each.
        count: the number of questions. None draws up to LABEL_QUESTIONS if the answers are labels;
            it returns None for other answers, for too few questions, and for a set that a fixed
            answer to all would pass unless all have to be right.
        count_answer: returns the number of tokens of an answer to some turns; None if the model
            cannot see them all. Such a question is not drawn.
        known: the questions of the champion's data, which are not drawn either.

    Raises TooManyQuestions if there are fewer such questions than `count`.
    """
    texts = [RowTexts.of(line, FieldNames()) for line in train]
    trained = {question for one in texts for question in one.asked}
    questions = _gather_questions(held_out)
    held = {key for key, _ in questions}
    known = (known - trained) & held
    asked = trained | known
    new = [question for (key, _), question in questions.items() if key not in asked]
    answers = Counter([one.answer for one in texts])
    answers += Counter(answer for question in new for answer in question.answers)
    is_asked_for = count is not None
    if not (is_asked_for or find_labels(answers)):
        return None
    longest: dict[int, int] = {}  # tokens of the longest answer, by the index of its question
    for number, question in enumerate(new):
        counts = [count_answer(question.turns, answer) for answer in question.answers]
        if None not in counts:
            longest[number] = max(filter(None, counts), default=0)
    if count is None:
        count = min(LABEL_QUESTIONS, len(longest))
        if count < MIN_EXAMPLES:
            return None
    if not 0 < count <= len(longest):
        others = "neither train nor the champion's data asks" if known else "train does not ask"
        rows = f"the held-out rows have {len(new):,} different ones that {others}"
        if len(longest) < len(new):
            rows += f", and {len(new) - len(longest):,} of them do not fit the model"
        raise TooManyQuestions(count, len(longest), rows)
    short = [number for number, tokens in longest.items() if tokens <= USUAL_ANSWER_TOKENS]
    pool = short if len(short) >= count else [*longest]
    drawn = random.Random(SPLIT_SEED).sample(pool, count)
    score = choose_score(answers)
    lines = tuple(new[number].write(score) for number in drawn)
    left_out = {
        "that train asks too": len(trained & held),
        "that the champion's data asks": len(known),
        "that are too long for the model with their answer": len(new) - len(longest),
        f"with an answer of more than {USUAL_ANSWER_TOKENS} tokens": len(longest) - len(pool),
    }
    extra = EXTRA_TOKENS_OF_A_LABEL if score == "exact" and find_labels(answers) else EXTRA_TOKENS
    eval_set = EvalSet(
        lines,
        score,
        max(longest[number] for number in drawn) + extra,
        _find_fixed_answer(lines, score),
        "".join(f"; not asked: {n:,} {reason}" for reason, n in left_out.items() if n),
    )
    return eval_set if is_asked_for or eval_set.least_share < 1 else None


def _gather_questions(chats: Iterable[bytes]) -> dict[tuple[bytes, str], _Question]:
    """Return the questions by their key, in which no system text counts, and their system turns.

    Under another system text the same words ask for another answer.
    """
    questions: dict[tuple[bytes, str], _Question] = {}
    for line in chats:
        turns = json.loads(line)["messages"]
        if _is_askable(line, turns):
            system = json.dumps([turn for turn in turns if turn["role"] == "system"])
            key = RowTexts.of(line, FieldNames()).question, system
            questions.setdefault(key, _Question(turns[:-1])).answers.append(turns[-1]["content"])
    return questions


def _find_fixed_answer(lines: Sequence[bytes], score: Score) -> tuple[str, int]:
    """Find the answer that is right for the most questions, and for how many, by their score."""
    with TemporaryDirectory(prefix="nested-tune-") as folder:
        file = Path(folder, "suite.jsonl")
        file.write_bytes(b"\n".join(lines))
        suite = Suite.read("suite", ScoringMethod(file, score))
        answer, share = suite.find_best_constant(range(1, len(lines) + 1)) or ("", 0.0)
    return answer, round(share * len(lines))


def choose_score(answers: Iterable[str]) -> Score:
    """Return the score for these expected answers: json, number or exact.

    Labels are compared exactly, even if they are numbers. `contains` is not chosen, since it finds
    `no` in `I know nothing`, and 12 in 120.
    """
    counts = Counter(answers)
    if all(map(_as_object, counts)):
        return "json"
    if not find_labels(counts) and None not in map(_as_number, counts):
        return "number"
    return "exact"


def _is_askable(line: bytes, turns: list[dict[str, Any]]) -> bool:
    """Tell if an eval set can hold the question: text alone, no tools, a user's turn at its end."""
    is_plain = all(set(turn) == {"role", "content"} for turn in turns)
    roles = [turn["role"] for turn in turns[-2:]]
    return "tools" not in json.loads(line) and is_plain and roles == ["user", "assistant"]


def _as_object(answer: str) -> Any:
    """Return the JSON object in an answer; None for any other text, and for an empty object."""
    try:
        value = decode_json_text(answer)
    except (ValueError, RecursionError, LineProblem):
        return None
    return value if isinstance(value, dict) and value else None


def _as_number(answer: str) -> int | float | None:
    """Read an answer as a number; None for any other text, and for too many digits."""
    if _NUMBER.fullmatch(text := answer.strip()) is None:
        return None
    exact = Decimal(text.replace(",", "").replace("\u2212", "-"))
    value = float(exact) if "." in text else int(exact)
    return value if Decimal(repr(value)) == exact else None
