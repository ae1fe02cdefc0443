"""The check that training did not break the answers to a few sample prompts.

The prompts are those of `samples` and of the held-out data. A loss can fall while every answer is
one word again and again: teacher forcing never lets the model read its own words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nested_core.config.schema import FineTuneConfig
from nested_core.data.data_settings import DataSettings
from nested_core.data.held_out_rows import read_held_out_prompts
from nested_core.errors import NestedTuneError
from nested_core.gate.checks.judged import Check, CheckedRun, GateWork, RunToJudge
from nested_core.gate.checks.losses import WITHOUT_MODEL
from nested_core.gate.evidence.run_evidence import RunEvidence
from nested_core.measure.answers.answer_bounds import (
    MIN_PROMPTS,
    MIN_REPEATED_TOKENS,
    is_sound,
    judge_samples,
)
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.models.chat_template import Tokenizer
from nested_core.models.generation import (
    Answer,
    Sampling,
    answer_prompts,
    encode_messages,
    encode_prompt,
)
from nested_core.records.answers import BrokenHow, SampleAnswers, render_sample_answers
from nested_core.records.dataset import PromptFormat
from nested_core.records.verdict import Reason, SampleVerdict
from nested_core.storage.adapter import Adapter
from nested_core.text.stages import stages

MAX_HELD_OUT_PROMPTS = 9  # asked until MIN_PROMPTS of the base's answers are sound
LENGTH_FACTOR = 4  # an answer is too long, or too short, by this factor to the expected answer
MIN_SAME_ANSWERS = 3  # the different prompts needed to call equal answers broken


@dataclass(frozen=True)
class _SamplePrompt:
    """A prompt, as text and as token ids.

    expected: the data set's answer; None for a prompt of `samples`.
    place: where it comes from, such as "test.jsonl:3" or "samples".
    """

    tokens: list[int]
    text: str
    expected: str | None
    place: str


def ask_samples(base: LoadedBase, evidence: RunEvidence) -> list[SampleAnswers]:
    """Answer the sample prompts with the base, the parent adapter (if any) and the candidate.

    Decoding is greedy, with at most `training.sample_tokens` tokens an answer. If some of the
    base's answers are broken (empty or repeated, say), more held-out prompts are asked, up to
    MAX_HELD_OUT_PROMPTS, to get MIN_PROMPTS sound answers to compare with. Returns a row for each
    prompt that was asked; empty without prompts.
    """
    config = base.config
    remaining = list(_list_prompts(config, base.tokenizer, evidence.dataset.prompt_format))
    asked: list[_SamplePrompt] = []
    base_answers: list[Answer] = []
    base_damage: list[BrokenHow | None] = []
    count = max(MIN_PROMPTS, len(config.samples))
    while remaining and sum(map(is_sound, base_damage)) < MIN_PROMPTS:
        # The first batch has `count` prompts; a second, if it is needed, has all others.
        batch, remaining = (remaining, []) if asked else (remaining[:count], remaining[count:])
        for prompt, answer in zip(batch, _ask(base, None, batch), strict=True):
            if len(asked) >= count and sum(map(is_sound, base_damage)) >= MIN_PROMPTS:
                break
            asked.append(prompt)
            base_answers.append(answer)
            base_damage.append(find_damage(answer, prompt.expected, base.tokenizer))
    if not asked:
        return []
    has_parent = not base.is_unchanged_by(evidence.before.to_mlx())
    parent_texts: list[str | None] = [None] * len(asked)
    if has_parent:
        parent_texts = [answer.text.strip() for answer in _ask(base, evidence.before, asked)]
    candidate_answers = _ask(base, evidence.after, asked)
    rows = [
        SampleAnswers(
            prompt=prompt.text,
            expected=prompt.expected,
            base=before.text.strip(),
            parent=parent,
            adapter=after.text.strip(),
            place=prompt.place,
            base_broken=damage,
            adapter_broken=find_damage(after, prompt.expected, base.tokenizer),
        )
        for prompt, before, damage, parent, after in zip(
            asked, base_answers, base_damage, parent_texts, candidate_answers, strict=True
        )
    ]
    return mark_same_answers(rows, candidate_answers)


def _list_prompts(
    config: FineTuneConfig, tokenizer: Tokenizer, rows: PromptFormat | None
) -> Iterator[_SamplePrompt]:
    """Yield the prompts of `samples`, then up to MAX_HELD_OUT_PROMPTS from the held-out data.

    rows: how the training rows begin, as which `samples` are asked.
    """
    for text in config.samples:
        yield _SamplePrompt(encode_prompt(tokenizer, text, rows), text, None, "samples")
    settings = DataSettings.from_config(config)
    held_out = config.gate.held_out
    for prompt in read_held_out_prompts(settings, MAX_HELD_OUT_PROMPTS, held_out):
        place = f"{prompt.file}:{prompt.line}"
        tokens = encode_messages(tokenizer, prompt.messages)
        yield _SamplePrompt(tokens, prompt.text, prompt.expected, place)


def _ask(base: LoadedBase, adapter: Adapter | None, asked: Sequence[_SamplePrompt]) -> list[Answer]:
    """Answer the prompts with the base and an adapter; None asks the base alone."""
    sampling = Sampling(base.config.training.sample_tokens)
    with base.computing_with(adapter):
        return answer_prompts(base.model, base.tokenizer, [p.tokens for p in asked], sampling)


def find_damage(answer: Answer, expected: str | None, tokenizer: Tokenizer) -> BrokenHow | None:
    """Return how a single answer is broken, or None if it is sound or too short to judge.

    "empty": no text. "no_words": a single character, or punctuation alone. "repeated": one token or
    pair of tokens makes up half of it. "endless": it was cut off although the expected answer has
    at most a quarter of its tokens. An answer that equals the expected one is never broken.
    `mark_same_answers` then compares the answers with each other.
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
    """Whether `training.sample_tokens` cut the answer off before its words can be judged."""
    return answer.is_endless and answer.tokens < MIN_REPEATED_TOKENS


def _has_no_words(text: str, expected: str | None) -> bool:
    """Whether an answer is punctuation alone although words are expected, or a single character.

    A single letter or digit may be the name of a choice ("B"). It counts as no words only if the
    expected answer has at least LENGTH_FACTOR characters.
    """
    if not any(character.isalnum() for character in text):
        return expected is None or any(character.isalnum() for character in expected)
    return len(text) == 1 and expected is not None and len(expected.strip()) >= LENGTH_FACTOR


def mark_same_answers(
    rows: Sequence[SampleAnswers], candidate_answers: Sequence[Answer]
) -> list[SampleAnswers]:
    """Return the rows, marked as broken ("same") if the adapter answers every prompt alike.

    Nothing is marked with fewer than MIN_SAME_ANSWERS different prompts, or if every answer was cut
    off so early that it is only begun. One answer may also be right for all prompts. So nothing is
    marked if all prompts should get the same answer, or if the adapter's answer is the expected
    one for some prompt. What a prompt should get is the expected answer of its example; for a
    configured prompt, which has none, it is the base's answer.

    rows: a row for each prompt, with the adapter's answer as text.
    candidate_answers: the same answers, with what is known of how each ended.
    """
    adapter_texts = {row.adapter for row in rows}
    if len({row.prompt for row in rows}) < MIN_SAME_ANSWERS or len(adapter_texts) > 1:
        return list(rows)
    if all(map(_is_only_begun, candidate_answers)):
        return list(rows)
    # Cut-off answers only show the beginning of what they would say: compare as much of the others.
    are_cut_off = any(answer.is_endless for answer in candidate_answers)
    end = len(rows[0].adapter) if are_cut_off else None
    expected = {row.expected.strip()[:end] for row in rows if row.expected is not None}
    right_answers = expected | {row.base[:end] for row in rows if row.expected is None}
    if len(right_answers) == 1 or adapter_texts <= expected:
        return list(rows)
    # A row that is broken in another way keeps that mark.
    return [replace(row, adapter_broken=row.adapter_broken or "same") for row in rows]


def _find_broken_answers(judged: CheckedRun) -> Iterator[Reason]:
    """Ask base and adapter the sample prompts; give a reason for too many broken answers.

    An answer is broken if it is empty, never ends or repeats itself, say. Stores the result in the
    verdict, and the answers as a file to write.

    Only `gate.samples: fail` rejects. Under `warn` the answers are recorded, and an error while
    asking is logged and recorded instead of raised.
    """
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


def _plan_samples(run: RunToJudge) -> GateWork:
    """The work of base, parent and candidate, of which the last two answer as long as expected.

    The base is asked as many prompts as there may be, since some of its answers may be broken.
    """
    config, tokenizer = run.config, run.tokenizer
    prompts = list(_list_prompts(config, tokenizer, PromptFormat.read(run.run.dataset)))
    if not prompts:
        return GateWork()
    most = config.training.sample_tokens
    texts = [prompt.expected for prompt in prompts if prompt.expected is not None]
    expected = [len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts]
    trained = most if config.samples or not expected else min(most, max(expected))
    return run.ask([prompt.tokens for prompt in prompts], [most, *([trained] * (1 + run.goes_on))])


SAMPLES = Check(
    "sample answers",
    _find_broken_answers,
    stopped_by=WITHOUT_MODEL,
    bounds=("samples",),
    stage="answers of base and adapter to sample prompts",
    plan_work=_plan_samples,
)
