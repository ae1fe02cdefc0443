"""The check that training did not break the answers to a few sample prompts.

The prompts are those of `samples` and of the held-out data. A loss can fall while every answer is
one word again and again: teacher forcing never lets the model read its own words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.data.data_settings import DataSettings
from nested_core.data.held_out_rows import read_held_out_prompts
from nested_core.errors import NestedTuneError
from nested_core.gate.checks.base import WITHOUT_MODEL
from nested_core.gate.checks.judged import Check, CheckedRun
from nested_core.gate.evidence.run_evidence import RunEvidence
from nested_core.measure.answers.answer_bounds import MIN_PROMPTS, is_sound, judge_samples
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.models.generation import Answer, Sampling, answer_prompts, encode_messages
from nested_core.models.lora_attachment import load_adapter_tensors
from nested_core.models.parameters import in_evaluation_mode
from nested_core.records.answers import BrokenHow, SampleAnswers, render_sample_answers
from nested_core.records.verdict import Reason, SampleVerdict
from nested_core.storage.adapter import Adapter
from nested_core.text.stages import stages

MAX_HELD_OUT_PROMPTS = 9  # looked for until MIN_PROMPTS of the base's answers are sound
MIN_REPEATED_TOKENS = 6  # an answer cut off before so many is only begun: its words tell nothing
LENGTH_FACTOR = 4  # an answer is far too long, or too short, by this factor to the expected one
MIN_SAME_ANSWERS = 3  # to as many different prompts


@dataclass(frozen=True)
class _SamplePrompt:
    """A prompt, its turns for a chat template, and the data's own answer where it has one."""

    messages: Sequence[Mapping[str, Any]]
    text: str
    expected: str | None
    place: str


def ask_samples(base: LoadedBase, evidence: RunEvidence) -> list[SampleAnswers]:
    """Ask the base, the parent where there is one, and the candidate; empty without prompts.

    Greedy, at most `training.sample_tokens` tokens an answer. Where the base's own answers are
    broken, more held-out prompts are asked, up to MAX_HELD_OUT_PROMPTS.
    """
    config = base.config
    remaining = list(_list_prompts(config))
    asked: list[_SamplePrompt] = []
    of_base: list[Answer] = []
    broken: list[BrokenHow | None] = []
    count = max(MIN_PROMPTS, len(config.samples))
    while remaining and sum(map(is_sound, broken)) < MIN_PROMPTS:
        # First as many as are needed; where some are broken all others at once, in one batch.
        chunk, remaining = (remaining, []) if asked else (remaining[:count], remaining[count:])
        for prompt, answer in zip(chunk, _ask(base, None, chunk), strict=True):
            if len(asked) >= count and sum(map(is_sound, broken)) >= MIN_PROMPTS:
                break
            asked.append(prompt)
            of_base.append(answer)
            broken.append(find_damage(answer, prompt.expected, base.tokenizer))
    if not asked:
        return []
    has_parent = not base.is_unchanged_by(evidence.before)
    of_parent: list[str | None] = [None] * len(asked)
    if has_parent:
        of_parent = [answer.text.strip() for answer in _ask(base, evidence.before, asked)]
    of_candidate = _ask(base, evidence.after, asked)
    rows = [
        SampleAnswers(
            prompt=prompt.text,
            expected=prompt.expected,
            base=before.text.strip(),
            parent=parent,
            adapter=after.text.strip(),
            place=prompt.place,
            base_broken=was_broken,
            adapter_broken=find_damage(after, prompt.expected, base.tokenizer),
        )
        for prompt, before, was_broken, parent, after in zip(
            asked, of_base, broken, of_parent, of_candidate, strict=True
        )
    ]
    return mark_same_answers(rows, of_candidate)


def _list_prompts(config: FineTuneConfig) -> Iterator[_SamplePrompt]:
    for text in config.samples:
        yield _SamplePrompt([{"role": "user", "content": text}], text, None, "samples")
    settings = DataSettings.from_config(config)
    held_out = config.gate.held_out
    for prompt in read_held_out_prompts(settings, MAX_HELD_OUT_PROMPTS, held_out):
        place = f"{prompt.file}:{prompt.line}"
        yield _SamplePrompt(prompt.messages, prompt.text, prompt.expected, place)


def _ask(
    base: LoadedBase, adapter: Adapter | None, prompts: Sequence[_SamplePrompt]
) -> list[Answer]:
    """The answers with an adapter; None is the base alone."""
    tensors = base.parameters
    if adapter is not None:
        tensors = adapter.to_mlx()
    load_adapter_tensors(base.model, tensors)
    encoded = [encode_messages(base.tokenizer, prompt.messages) for prompt in prompts]
    with in_evaluation_mode(base.model):
        sampling = Sampling(base.config.training.sample_tokens)
        return answer_prompts(base.model, base.tokenizer, encoded, sampling)


def find_damage(answer: Answer, expected: str | None, tokenizer: Any) -> BrokenHow | None:
    """How an answer is broken by itself, or None; `mark_same_answers` compares it with the others.

    It is empty; a single character or punctuation alone; one token or pair for half of it, whatever
    ends it; or without an end where the expected answer has at most a quarter of its tokens. What
    the data itself expects is never broken.
    """
    if expected is not None and answer.text.strip() == expected.strip():
        return None
    if answer.is_empty:
        return "empty"
    if not _is_only_begun(answer) and _has_no_words(answer.text.strip(), expected):
        return "no_words"
    if answer.repeated_tokens >= max(MIN_REPEATED_TOKENS, answer.tokens / 2):
        return "repeated"
    if answer.is_endless and expected is not None:
        tokens = len(tokenizer.encode(expected, add_special_tokens=False))
        if tokens * LENGTH_FACTOR <= answer.tokens:
            return "endless"
    return None


def _is_only_begun(answer: Answer) -> bool:
    """Whether `training.sample_tokens` cut it off before its words can be judged."""
    return answer.is_endless and answer.tokens < MIN_REPEATED_TOKENS


def _has_no_words(text: str, expected: str | None) -> bool:
    """Whether it is punctuation alone where words are expected, or a single letter or digit.

    A single one may be the name of a choice, unless a far longer answer is expected.
    """
    if not any(character.isalnum() for character in text):
        return expected is None or any(character.isalnum() for character in expected)
    return len(text) == 1 and expected is not None and len(expected.strip()) >= LENGTH_FACTOR


def mark_same_answers(
    rows: Sequence[SampleAnswers], of_candidate: Sequence[Answer]
) -> list[SampleAnswers]:
    """The rows, those of an adapter that says the same to every prompt marked as broken so.

    Answers that are only begun are not compared. There have to be MIN_SAME_ANSWERS different
    prompts. One answer may be right for all: what is expected, or where the data has no answer what
    the base said, has to differ between them, of answers that were cut off as far as these go; and
    what the data expects of one is an answer.
    """
    answers = {row.adapter for row in rows}
    if len({row.prompt for row in rows}) < MIN_SAME_ANSWERS or len(answers) > 1:
        return list(rows)
    if all(map(_is_only_begun, of_candidate)):
        return list(rows)
    are_cut_off = any(answer.is_endless for answer in of_candidate)
    end = len(rows[0].adapter) if are_cut_off else None
    expected = {row.expected.strip()[:end] for row in rows if row.expected is not None}
    references = expected | {row.base[:end] for row in rows if row.expected is None}
    if len(references) == 1 or answers <= expected:
        return list(rows)
    return [replace(row, adapter_broken=row.adapter_broken or "same") for row in rows]


def _find_broken_answers(judged: CheckedRun) -> Iterator[Reason]:
    """Ask base and adapter; one that cannot be asked is no verdict under `gate.samples: warn`."""
    must_pass = judged.bounds.samples == "fail"
    try:
        rows = ask_samples(judged.base, judged.evidence)
    except (NestedTuneError, OSError, MemoryError, RuntimeError, ValueError) as error:
        if must_pass:
            raise
        reason = f"{type(error).__name__}: {error}"
        stages.warning("samples: not answered, which is no verdict: %s", reason)
        samples = SampleVerdict(asked=0, not_asked=reason[:300])
    else:
        samples = judge_samples(rows)
        if rows:
            judged.written_files[judged.run.sample_answers.name] = render_sample_answers(rows)
    judged.verdict = replace(judged.verdict, samples=samples)
    if samples.are_broken and must_pass:
        yield Reason("answers_broken", f"{samples.describe()}; gate.samples is fail")


SAMPLES = Check(
    "sample answers",
    _find_broken_answers,
    stopped_by=WITHOUT_MODEL,
    bounds=("samples",),
    stage="answers of base and adapter to sample prompts",
)
