"""The control of probes: what base and adapter answer to neutral prompts of other kinds.

An adapter that learnt narrow rows may answer everything like them, which neither the held-out rows
nor an eval set of the same kind show. The prompts are in probes.json, in a few languages.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.errors import DatasetError, shorten
from nested_core.gate.checks.judged import CheckedRun
from nested_core.gate.checks.tasks import AskedModel
from nested_core.measure.answers.scorers import ScoringMethod
from nested_core.measure.answers.suite_answers import Suite, encode_suites
from nested_core.measure.answers.suites import Question
from nested_core.models.generation import Sampling
from nested_core.rooms.controls.answer_rows import decode, fold, make_split, read_answer_rows
from nested_core.rooms.controls.results import (
    ControlFigure,
    ControlResult,
    ControlWarning,
    not_applicable,
    share_interval,
)
from nested_core.text.loss_format import format_change

CONTROL = "probes"
NAME = "neutral prompts"
MAX_TOKENS = 16  # of an answer
MAX_TRAIN_ROWS = 2_000
OPENING_WORDS = 3
COMMON_SHARE = 0.1  # of the training answers, that begin with a common opening
MIN_SHARE = 0.05  # of the prompts that are answered like the rows: the interval lies above it
PROBES_FILE = Path(__file__).with_name("probes.json")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class TrainingAnswers:
    """The answers of training rows, as texts."""

    texts: Sequence[str]

    @cached_property
    def whole(self) -> frozenset[str]:
        """Each answer, without case and white space around words."""
        return frozenset(map(fold, self.texts))

    @cached_property
    def common_openings(self) -> frozenset[str]:
        """The first words that a tenth of the answers and at least three begin with."""
        counts = Counter(map(find_opening, self.texts))
        least = max(3, COMMON_SHARE * len(self.texts))
        return frozenset(opening for opening, count in counts.items() if opening and count >= least)

    def is_like(self, answer: str, base: str) -> bool:
        """Return whether an answer is one of the rows', or opens like them, and not as the base's.

        base: what the base answers. Its first word is enough to be as the base's.
        """
        opening = find_opening(answer)
        if opening.split()[:1] == find_opening(base).split()[:1]:
            return False
        return opening in self.common_openings or fold(answer) in self.whole


def find_opening(text: str) -> str:
    """Return the first words of a text without case."""
    return " ".join(word[0] for word in islice(_WORD.finditer(text.casefold()), OPENING_WORDS))


def choose_prompts(texts: Sequence[str]) -> list[str]:
    """Return the prompts of the language whose common words the texts have most; else English."""
    words = Counter(word for text in texts for word in _WORD.findall(text.casefold()))
    languages: dict[str, Any] = json.loads(PROBES_FILE.read_text("utf-8"))
    chosen = max(
        languages.values(), key=lambda language: sum(words[w] for w in language["common_words"])
    )
    return list(chosen["prompts"])


def measure_probes(judged: CheckedRun, train: TokenizedSplit) -> ControlResult:
    """Ask base and adapter the neutral prompts, and compare the answers with the training rows."""
    base = judged.base
    rows = read_answer_rows(train, MAX_TRAIN_ROWS)
    if not rows:
        return not_applicable(CONTROL, NAME, "rows have no prompt with one learnt answer")
    answers = TrainingAnswers(decode(base.tokenizer, (row.answer for row in rows)))
    prompts = choose_prompts(answers.texts)
    questions = tuple(
        Question(
            line=line,
            name=str(line),
            prompt=text,
            accepted=(),
            tolerance=0.0,
            choices=(),
            fields={},
        )
        for line, text in enumerate(prompts, 1)
    )
    suite = Suite("probes", ScoringMethod(PROBES_FILE, "exact"), questions, Sampling(MAX_TOKENS))
    asked_as = judged.evidence.dataset.prompt_format
    try:
        (encoded,) = encode_suites([suite], base.tokenizer, base.folder, asked_as)
    except DatasetError:
        return not_applicable(CONTROL, NAME, "the chat template does not take them")
    before = [
        one.text.strip() for one in AskedModel("base", base, None).cached_or_new_answers(encoded)
    ]
    trained = AskedModel("candidate", base, judged.after)
    after = [one.text.strip() for one in trained.cached_or_new_answers(encoded)]
    like = [
        index
        for index, (own, given) in enumerate(zip(before, after, strict=True))
        if answers.is_like(given, own)
    ]
    spoken = [
        (prompt, base.tokenizer.encode(text, add_special_tokens=False))
        for prompt, text in zip(encoded.prompts, before, strict=True)
        if text
    ]
    losses = base.compare_predictions(
        [base.parameters, judged.after.to_mlx()],
        make_split(spoken, base.config.max_seq_length),
    )
    own_loss, new_loss = losses.losses.sum(axis=1) / max(1.0, losses.tokens.sum())
    total = len(prompts)
    interval = share_interval(len(like), total)
    is_shown = interval[0] > MIN_SHARE
    row = ControlFigure(
        control=CONTROL,
        name=f"{total} {NAME}, loss of the base's answers",
        before=f"{own_loss:.4g}",
        after=f"{new_loss:.4g}",
        difference=f"{len(like)} answered like the training rows",
        result="answered like the training rows" if is_shown else "passed",
    )
    if not is_shown:
        return ControlResult(figures=(row,))
    first = like[0]
    warning = ControlWarning(
        control=CONTROL,
        kind="answered_like_the_rows",
        figure=len(like) / total,
        interval=interval,
        words=(
            f"other questions are answered like the training rows: {len(like)} of {total} neutral "
            f"prompts, such as {prompts[first]!r}: {shorten(after[first], 80)!r} (the base: "
            f"{shorten(before[first], 80)!r}); the loss of the base's answers is "
            f"{format_change(own_loss, new_loss)}. Where others may ask it, add rows of other kinds"
        ),
    )
    return ControlResult(figures=(row,), warnings=(warning,))
