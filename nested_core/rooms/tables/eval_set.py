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
# No zeros in front: those of a number such as 00123 are part of an identifier.
_NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|0|[1-9]\d*)(?:\.\d+)?")


@dataclass(frozen=True)
class EvalSet:
    """Questions, and what to set in `gate.tasks` for them.

    lines: a question of JSON each.
    max_tokens: of an answer: more than the longest expected one has.
    fixed: the answer that is right for most of the questions, and for how many.
    left_out: which held-out rows were not asked, and why.
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
        told = f"{format_count(len(self.lines), 'held-out question')} (--suite N, 0 for none)"
        score = f"score {self.score}, answers of at most {self.max_tokens} tokens"
        return f"eval set: {told}; {score}; {self.describe_baseline()}{self.left_out}"

    def describe_baseline(self) -> str:
        """Describe the best score of one fixed answer to every question."""
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
        read: dict[str, Callable[[str], Any]] = {"json": json.loads, "number": _as_number}
        answers = self.answers[:1] if score == "json" else dict.fromkeys(self.answers)
        values = [read.get(score, str)(answer) for answer in answers]
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
    """Draw questions that train does not ask, each another one, with a fixed seed.

    Args:
        train, held_out: chats, a line of JSON each.
        known: the questions of the champion's data, which are not drawn either.
        count: how many questions. None draws LABEL_QUESTIONS at most where answers are labels, and
            returns None for other answers, and for questions of which only all right would tell.
        count_answer: the tokens of an answer to some turns; None if the model cannot see them
            all, so that the question is not asked.

    Raises TooManyQuestions where the held-out rows have fewer than `count`.
    """
    texts = [RowTexts.of(line, FieldNames()) for line in train]
    trained = {question for one in texts for question in one.asked}
    questions: dict[bytes, _Question] = {}
    for line in held_out:
        turns = json.loads(line)["messages"]
        if _is_askable(line, turns):
            key = RowTexts.of(line, FieldNames()).question
            questions.setdefault(key, _Question(turns[:-1])).answers.append(turns[-1]["content"])
    known = (known - trained) & questions.keys()
    new = [asked for key, asked in questions.items() if key not in trained | known]
    every = Counter([one.answer for one in texts])
    every += Counter(answer for asked in new for answer in asked.answers)
    is_asked_for = count is not None
    if not (is_asked_for or find_labels(every)):
        return None
    longest: dict[int, int] = {}  # answer, by the number of its question in new
    for number, asked in enumerate(new):
        counts = [count_answer(asked.turns, answer) for answer in asked.answers]
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
    score = choose_score(every)
    lines = tuple(new[number].write(score) for number in drawn)
    told = {
        "that train asks too": len(trained & questions.keys()),
        "that the champion's data asks": len(known),
        "that are too long for the model with their answer": len(new) - len(longest),
        f"with an answer of more than {USUAL_ANSWER_TOKENS} tokens": len(longest) - len(pool),
    }
    extra = EXTRA_TOKENS_OF_A_LABEL if score == "exact" and find_labels(every) else EXTRA_TOKENS
    eval_set = EvalSet(
        lines,
        score,
        max(longest[number] for number in drawn) + extra,
        _find_fixed_answer(lines, score),
        "".join(f"; not asked: {n:,} {what}" for what, n in told.items() if n),
    )
    return eval_set if is_asked_for or eval_set.least_share < 1 else None


def _find_fixed_answer(lines: Sequence[bytes], score: Score) -> tuple[str, int]:
    """Find the answer that is right for the most questions, and for how many, by their score."""
    with TemporaryDirectory(prefix="nested-tune-") as folder:
        file = Path(folder, "suite.jsonl")
        file.write_bytes(b"\n".join(lines))
        suite = Suite.read("suite", ScoringMethod(file, score))
        answer, share = suite.find_best_constant(range(1, len(lines) + 1)) or ("", 0.0)
    return answer, round(share * len(lines))


def choose_score(answers: Iterable[str]) -> Score:
    """Return the score that tells all these answers from wrong ones: json, number or exact.

    Labels are compared exactly, although they be numbers. `contains` is none of them: it finds `no`
    in `I know nothing`, and 12 in 120.
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
        value = json.loads(answer)
    except ValueError:
        return None
    return value if isinstance(value, dict) and value else None


def _as_number(answer: str) -> int | float | None:
    """Read an answer as a number; None for any other text, and for too many digits."""
    if _NUMBER.fullmatch(text := answer.strip()) is None:
        return None
    exact = Decimal(text.replace(",", "").replace("\u2212", "-"))
    value = float(exact) if "." in text else int(exact)
    return value if Decimal(repr(value)) == exact else None
