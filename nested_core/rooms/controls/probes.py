"""The control of probes: what base and adapter answer to neutral prompts of other kinds.

An adapter that learnt narrow rows may answer everything like them, which neither the held-out rows
nor an eval set of the same kind show. The prompts are in probes.json, in a few languages.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from nested_core.errors import DatasetError
from nested_core.gate.checks.tasks import AskedModel
from nested_core.measure.answers.scorers import ScoringMethod
from nested_core.measure.answers.suite_answers import Suite, encode_suites
from nested_core.measure.answers.suites import Question
from nested_core.models.generation import Sampling
from nested_core.records.verdict import CheckRow
from nested_core.rooms.controls.answer_rows import RunRows
from nested_core.rooms.controls.results import ControlWarning, NotApplicableError, SuspectLine, Told
from nested_core.text.loss_format import format_change, format_loss
from nested_core.text.words import count_languages, find_words, fold

NAME = "neutral prompts"
PROBES_FILE = Path(__file__).with_name("probes.json")
PROBES_TEXT = PROBES_FILE.read_text("utf-8")
MAX_TOKENS = 16  # of an answer
MAX_TRAIN_ROWS = 2_000
OPENING_WORDS = 3
COMMON_SHARE = 0.1  # of the training answers, that begin with a common opening
MIN_LIKE = 4  # of 30 prompts that are answered like the rows: Wilson's interval lies above 5 %


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


def measure_probes(run: RunRows) -> Told:
    """Ask base and adapter the neutral prompts, and compare the answers with the training rows."""
    judged, base = run.judged, run.judged.base
    texts = [row.given for row in run.read_train(MAX_TRAIN_ROWS)]
    prompts = list_probes(texts)
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
    losses = run.measure(spoken, with_base=True)
    own_loss, new_loss = losses.losses.sum(axis=1) / max(1.0, losses.tokens.sum())
    total, is_shown = len(prompts), len(like) >= MIN_LIKE
    figures = format_loss(own_loss), format_loss(new_loss), f"{len(like)} answered like the rows"
    verdict = "answered like the training rows" if is_shown else "passed"
    yield CheckRow(f"{total} {NAME}, loss of the base's answers", *figures, verdict=verdict)
    if is_shown:
        lines = [tell_probe(prompts[n], before[n], after[n]) for n in like]
        named = {"change": format_change(own_loss, new_loss), "example": prompts[like[0]]}
        yield ControlWarning.of_share("answered_like_the_rows", len(like), total, lines, **named)


def list_probes(texts: Iterable[str]) -> list[str]:
    """Return the probes of the language whose common words the texts have most; else English."""
    ((language, _),) = count_languages(texts).most_common(1)
    return list(json.loads(PROBES_TEXT)[language])


def tell_probe(prompt: str, said: str, given: str) -> SuspectLine:
    """Return a probe, by its line of probes.json, with what the base said and the adapter gave."""
    line = PROBES_TEXT[: PROBES_TEXT.index(f'"{prompt}"')].count("\n") + 1
    return SuspectLine(PROBES_FILE.name, line, f"{prompt} {said}", given=given)
