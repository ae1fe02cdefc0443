"""The control of probes: what base and adapter answer to neutral prompts of other kinds.

An adapter that learnt narrow rows may answer everything like them, which neither the held-out rows
nor an eval set of the same kind show. The prompts are in probes.json, in a few languages.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nested_core.errors import DatasetError
from nested_core.gate.checks.tasks import AskedModel
from nested_core.measure.answers.scorers import ScoringMethod
from nested_core.measure.answers.suite_answers import Suite, encode_suites
from nested_core.measure.answers.suites import Question
from nested_core.models.generation import Sampling
from nested_core.records.verdict import CheckRow
from nested_core.rooms.controls.answer_rows import (
    NO_ANSWERS,
    RunRows,
    find_words,
    fold,
    measure_losses,
)
from nested_core.rooms.controls.results import (
    Control,
    ControlWarning,
    NotApplicableError,
    SuspectLine,
    Told,
)
from nested_core.text.loss_format import format_change, format_loss

NAME = "neutral prompts"
MAX_TOKENS = 16  # of an answer
MAX_TRAIN_ROWS = 2_000
OPENING_WORDS = 3
COMMON_SHARE = 0.1  # of the training answers, that begin with a common opening
MIN_LIKE = 4  # of 30 prompts that are answered like the rows: Wilson's interval lies above 5 %
PROBES_FILE = Path(__file__).with_name("probes.json")
PROBES_TEXT = PROBES_FILE.read_text("utf-8")
LANGUAGES: dict[str, Any] = json.loads(PROBES_TEXT)


def find_like_rows(rows: Sequence[str], base: Sequence[str], given: Sequence[str]) -> list[int]:
    """Return which given answers are one of the rows', or open like them, and not as the base's.

    Like them is an opening that a tenth of the rows and at least three have. To be as the base's
    the first word is enough.

    rows: the training answers. base, given: what base and adapter answer to each prompt.
    """
    whole, counts = set(map(fold, rows)), Counter(map(find_opening, rows))
    least = max(3, COMMON_SHARE * len(rows))
    common = {opening for opening, count in counts.items() if opening and count >= least}
    openings = [find_opening(text) for text in given]
    return [
        index
        for index, (opening, before) in enumerate(zip(openings, base, strict=True))
        if (opening in common or fold(given[index]) in whole)
        and opening.split()[:1] != find_opening(before).split()[:1]
    ]


def find_opening(text: str) -> str:
    """Return the first words of a text without case."""
    return " ".join(find_words(text)[:OPENING_WORDS])


def count_languages(texts: Sequence[str]) -> Counter[str]:
    """Count how often texts have the common words of each language."""
    words = Counter(word for text in texts for word in find_words(text))
    return Counter({k: sum(words[w] for w in v["common_words"]) for k, v in LANGUAGES.items()})


def choose_prompts(texts: Sequence[str]) -> list[str]:
    """Return the prompts of the language whose common words the texts have most; else English."""
    ((language, _),) = count_languages(texts).most_common(1)
    return list(LANGUAGES[language]["prompts"])


def find_line(prompt: str) -> int:
    """Return the line of probes.json that a prompt is in, counted from 1."""
    return PROBES_TEXT[: PROBES_TEXT.index(f'"{prompt}"')].count("\n") + 1


def measure_probes(run: RunRows) -> Told:
    """Ask base and adapter the neutral prompts, and compare the answers with the training rows."""
    judged, base = run.judged, run.judged.base
    texts = [row.given for row in run.read_train(MAX_TRAIN_ROWS)]
    if not texts:
        raise NotApplicableError(NO_ANSWERS)
    prompts = choose_prompts(texts)
    questions = (Question(n, str(n), text, (), 0.0, (), {}) for n, text in enumerate(prompts, 1))
    method = ScoringMethod(PROBES_FILE, "exact")
    suite = Suite("probes", method, tuple(questions), Sampling(MAX_TOKENS))
    asked_as = judged.evidence.dataset.prompt_format
    try:
        (encoded,) = encode_suites([suite], base.tokenizer, base.folder, asked_as)
    except DatasetError:
        raise NotApplicableError("the chat template does not take them") from None
    models = AskedModel("base", base, None), AskedModel("candidate", base, judged.after)
    before, after = (
        [answer.text.strip() for answer in model.cached_or_new_answers(encoded)] for model in models
    )
    like = find_like_rows(texts, before, after)
    said = [base.tokenizer.encode(text, add_special_tokens=False) for text in before]
    spoken = [pair for pair in zip(encoded.prompts, said, strict=True) if pair[1]]
    losses = measure_losses(base, [base.parameters, judged.after.to_mlx()], spoken)
    own_loss, new_loss = losses.losses.sum(axis=1) / max(1.0, losses.tokens.sum())
    total, is_shown = len(prompts), len(like) >= MIN_LIKE
    figures = format_loss(own_loss), format_loss(new_loss), f"{len(like)} answered like the rows"
    verdict = "answered like the training rows" if is_shown else "passed"
    yield CheckRow(f"{total} {NAME}, loss of the base's answers", *figures, verdict=verdict)
    if is_shown:
        yield ControlWarning.of_share(
            "answered_like_the_rows",
            *(len(like), total),
            f"other questions are answered like the training rows: {len(like)} of {total} neutral "
            f"prompts, such as {prompts[like[0]]!r}; the loss of the base's answers is "
            f"{format_change(own_loss, new_loss)}. If others may ask it, add rows of other kinds",
            lines=[
                SuspectLine(
                    PROBES_FILE.name, find_line(asked), f"{asked} {before[n]}", None, after[n]
                )
                for n, asked in enumerate(prompts)
                if n in like
            ],
        )


PROBES = Control("probes", NAME, measure_probes, is_of_learning=True)
