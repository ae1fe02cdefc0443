"""What models answer and predict, beside each other: figures, plain rows, a page and a terminal's.

evaluating.py asks and measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from nested_core.config.sections import Score
from nested_core.records.loss_conclusion import Conclusion
from nested_core.records.verdict import Validation
from nested_core.report.page_blocks import show_answers
from nested_core.text.document import Block, Cell, Details, Document, Section, Table, Text
from nested_core.text.loss_format import format_difference, format_interval, format_loss

MAX_MODELS = len(ascii_uppercase)  # each has a letter in tables
SHOWN_QUESTIONS = 3
MAX_LISTED_QUESTIONS = 1_000  # of a suite on a page
COMPARED = ("difference", "95 % interval", "verdict")


@dataclass(frozen=True)
class SuiteScore:
    """How one model answered one suite; the difference is from the model compared with.

    scored_by: how an answer is compared with the expected one.
    score: the share of right answers, from 0 to 1.
    difference, interval, conclusion: None for the model compared with.
    minimum: the least share that was asked for; None without such a bound.
    constant: the score of the best constant answer; None if no answer is expected.
    """

    suite: str
    scored_by: Score
    questions: int
    score: float
    difference: float | None = None
    interval: tuple[float, float] | None = None
    conclusion: Conclusion | None = None
    minimum: float | None = None
    constant: float | None = None

    @property
    def is_below_minimum(self) -> bool:
        """Whether fewer answers are right than were asked for."""
        return self.minimum is not None and self.score < self.minimum

    @property
    def is_guessing(self) -> bool:
        """Whether one constant answer would be right for as many questions."""
        return self.constant is not None and self.score <= self.constant


@dataclass(frozen=True)
class EvaluatedModel:
    """One model's figures.

    loss: on the held-out file, `loss_before` being that of the model compared with and `loss_after`
        its own; None without a file, or with another tokenizer.
    """

    name: str
    suites: tuple[SuiteScore, ...]
    loss: Validation | None

    @property
    def is_worse(self) -> bool:
        """Whether a loss or a suite is significantly worse, or below its minimum."""
        has_worse_loss = self.loss is not None and self.loss.conclusion == "worse"
        return has_worse_loss or any(
            suite.conclusion == "worse" or suite.is_below_minimum for suite in self.suites
        )

    @property
    def is_better(self) -> bool:
        """Whether its loss and every suite are significantly better, and none below a minimum."""
        loss = [] if self.loss is None else [self.loss.conclusion]
        words = {*loss, *(suite.conclusion for suite in self.suites)}
        return words == {"better"} and not self.is_worse


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with what is expected, and each model's answer and score by the model's name."""

    suite: str
    line: int
    question: str
    expected: str | None
    answers: dict[str, str]
    scores: dict[str, float]


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What `evaluate` returns; in a notebook it shows itself.

    against: the name of the model that the others are compared with; it is the first of `models`.
    models: the figures of each model.
    answers: each question with the expected answer and that of each model.
    data: the held-out file, None without one.
    unknown: the models whose training rows are unknown.
    notes: what to know of the losses.
    """

    against: str
    models: tuple[EvaluatedModel, ...]
    answers: tuple[AnsweredQuestion, ...]
    data: str | None = None
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_worse(self) -> bool:
        """Whether any model is significantly worse than `against`, or below a minimum."""
        return any(model.is_worse for model in self.models)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as `evaluate --json` prints them."""
        return {
            "against": self.against,
            "data": self.data,
            "unknown": list(self.unknown),
            "notes": list(self.notes),
            "models": [asdict(model) | {"is_worse": model.is_worse} for model in self.models],
            "answers": [asdict(question) for question in self.answers],
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return a flat row a model and suite or loss, with equal keys, as a data frame takes it.

        `value` is a share of right answers or a loss, `examples` of how many;
        `low` and `high` are the ends of the difference's 95 % interval.
        """
        return [row for model in self.models for row in self._rows_of(model)]

    def _rows_of(self, model: EvaluatedModel) -> Iterator[dict[str, Any]]:
        for suite in model.suites:
            values = {"value": suite.score, "examples": suite.questions, "minimum": suite.minimum}
            named = {"model": model.name, "measured": suite.suite, "kind": "answers"}
            yield named | values | _compared_values(suite)
        if (loss := model.loss) is not None:
            values = {"value": loss.loss_after, "examples": loss.examples, "minimum": None}
            named = {"model": model.name, "measured": str(self.data), "kind": "loss"}
            yield named | values | _compared_values(loss)

    def __repr__(self) -> str:
        word = "worse" if self.is_worse else "none worse"
        models = ", ".join(model.name for model in self.models[1:])
        compared = f"{models} against {self.against}: {word}"
        return f"Evaluation({compared if models else self.against})"

    def describe(self, shown: int = SHOWN_QUESTIONS) -> Document:
        """Return the page: a table for each suite, with answers, and one of losses.

        shown: the number of questions of each suite that are shown because a model was wrong.
        """
        models = [(letter, name) for name, letter in self._letters.items()]
        suites = [suite.suite for suite in self.models[0].suites]
        blocks: list[Block] = [
            self._conclude(),
            Table("Models", ("", "name"), models),
            *(self._describe_suite(number, shown) for number in range(len(suites))),
        ]
        if self.data is not None:
            blocks.append(self._describe_losses())
        return Document("Models evaluated", blocks)

    def to_html(self) -> str:
        """Return the whole page."""
        return self.describe().to_html()

    def _repr_html_(self) -> str:
        return self.describe().to_fragment()

    @property
    def _letters(self) -> dict[str, str]:
        return dict(zip((model.name for model in self.models), ascii_uppercase, strict=False))

    @property
    def _compared_with(self) -> str:
        return f", compared with {self._letters[self.against]}" if len(self.models) > 1 else ""

    def _conclude(self) -> Text:
        """Return the headline: which models are worse or better than the reference."""
        worse = [model.name for model in self.models if model.is_worse]
        if len(self.models) == 1:
            text = "below a minimum" if worse else "nothing is compared: --against names a model"
            return Text(text, "bad" if worse else "", is_headline=True)
        if worse:
            text = f"worse than {self.against}, or below a minimum: {', '.join(worse)}"
            return Text(text, "bad", is_headline=True)
        others = [model for model in self.models if model.name != self.against]
        better = [model.name for model in others if model.is_better]
        text = f"none worse than {self.against}"
        if better:
            text = f"better than {self.against}: {', '.join(better)}"
            if len(better) < len(others):
                text = f"none worse than {self.against}, better: {', '.join(better)}"
        if guessing := [one.name for one in others if any(s.is_guessing for s in one.suites)]:
            text += f"; no better than one fixed answer: {', '.join(guessing)}"
        return Text(text, "warn" if guessing else "good", is_headline=True)

    def _describe_suite(self, number: int, shown: int) -> Section:
        """Return the section of a suite: scores, the first wrong answers, and all answers."""
        first = self.models[0].suites[number]
        name, letter = first.suite, self._letters[self.against]
        rows = []
        for model in self.models:
            suite = model.suites[number]
            verdict = (suite.conclusion or "").replace("_", " ")
            if suite.conclusion in ("better", "no_worse") and suite.is_guessing:
                verdict += f" than {letter}, no better than one fixed answer"
            if suite.is_below_minimum:
                verdict = f"{verdict}, below {suite.minimum:g}".removeprefix(", ")
            right = f"{suite.score * suite.questions:.4g} of {suite.questions}"
            compared = _compared(suite.difference, suite.interval)
            rows.append((self._letters[model.name], right, *compared, verdict))
        questions = [question for question in self.answers if question.suite == name]
        judged = [one.name for one in self.models if one.name != self.against] or [self.against]
        wrong = [one for one in questions if min(one.scores[n] for n in judged) < 1][:shown]
        constant = "" if first.constant is None else f"; one fixed answer: {first.constant:.2g}"
        caption = f"Right answers (score: {first.scored_by}){self._compared_with}{constant}"
        blocks: list[Block] = [Table(caption, ("", "right", *COMPARED), rows)]
        answers = [
            (self._letters[model.name], q.expected, q.answers[model.name], q.scores[model.name])
            for model in self.models
            for q in questions
        ]
        blocks += show_answers(name, answers) if answers else []
        if wrong:
            letters = " or ".join(self._letters[name] for name in judged)
            caption = f"The first {len(wrong)} that {letters} answered wrong"
            blocks.append(self._list_answers(caption, wrong))
        caption = f"All {len(questions):,} questions"
        if len(questions) > MAX_LISTED_QUESTIONS:
            caption = f"The first {MAX_LISTED_QUESTIONS:,} of {len(questions):,} questions"
        every = self._list_answers(caption, questions[:MAX_LISTED_QUESTIONS])
        return Section(name, [*blocks, Details(caption, [every])], f"suite-{number}")

    def _list_answers(self, caption: str, questions: Sequence[AnsweredQuestion]) -> Table:
        """Return a table of questions, with the expected answer and that of each model."""
        rows = [
            (
                question.question,
                question.expected or "",
                *(_judged(one, question.scores[name]) for name, one in question.answers.items()),
            )
            for question in questions
        ]
        return Table(caption, ("question", "expected", *self._letters.values()), rows)

    def _describe_losses(self) -> Section:
        """Return the section of losses: each model's beside the reference's."""
        rows = []
        for model in self.models:
            loss, letter = model.loss, self._letters[model.name]
            if loss is None:
                rows.append((letter, "another tokenizer", "", "", ""))
            elif not loss.examples:
                rows.append((letter, "no example left", "", "", ""))
            elif model.name == self.against:
                rows.append((letter, format_loss(loss.loss_after), "", "", ""))
            else:
                compared = _compared(loss.difference, loss.interval)
                verdict = (loss.conclusion or "").replace("_", " ")
                rows.append((letter, format_loss(loss.loss_after), *compared, verdict))
        losses = [model.loss for model in self.models if model.loss is not None]
        examples = " or ".join(sorted({f"{loss.examples:,}" for loss in losses}))
        caption = f"Losses in {losses[0].unit}{self._compared_with}"
        blocks: list[Block] = [Table(caption, ("", "loss", *COMPARED), rows)]
        if left_out := max(loss.left_out or 0 for loss in losses):
            blocks.append(Text(f"{left_out:,} examples left out that a model was trained on"))
        if self.unknown:
            text = "what these were trained on is not recorded, and not left out: "
            blocks.append(Text(text + ", ".join(self.unknown), "note"))
        blocks += [Text(note, "note") for note in self.notes]
        return Section(f"{Path(str(self.data)).name}, {examples} examples", blocks, "losses")


def _compared_values(figures: SuiteScore | Validation) -> dict[str, Any]:
    low, high = figures.interval or (None, None)
    values = {"difference": figures.difference, "low": low, "high": high}
    return values | {"conclusion": figures.conclusion}


def _judged(answer: str, score: float) -> Cell:
    """Return an answer with a word of how right it is."""
    if score == 1:
        return Cell(answer, "good", "right:")
    return Cell(answer, "bad", f"{score:.2g}:" if score else "wrong:")


def _compared(difference: float | None, interval: tuple[float, float] | None) -> tuple[str, str]:
    return (
        "" if difference is None else format_difference(difference),
        "" if interval is None else format_interval(interval),
    )
