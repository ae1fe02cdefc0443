"""The check of the answers to `gate.tasks`, of base, parent, champion and candidate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nested_core.config.schema import FineTuneConfig
from nested_core.gate.checks.file_checks import CHANGE, EFFECT
from nested_core.gate.checks.judged import Check, CheckedRun, GateWork, RunToJudge
from nested_core.gate.checks.losses import LOSSES, WITHOUT_MODEL
from nested_core.gate.evidence.champion_adapter import Champion
from nested_core.measure.answers.answer_bounds import judge_answers
from nested_core.measure.answers.answer_cache import (
    AnsweringModelDigests,
    answer_cache,
    fetch_answers,
    store_answers,
)
from nested_core.measure.answers.questions_in_training import lines_that_chose
from nested_core.measure.answers.suite_answers import (
    EncodedSuite,
    Suite,
    encode_suites,
    read_suites,
    record_or_compare_suites,
)
from nested_core.measure.answers.suites import expected_label, fold_prompt, question_label
from nested_core.measure.losses.chosen_candidate import read_candidates
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.models.base_model import (
    describe_computation,
    fingerprint_base_model,
    fingerprint_tokenizer,
)
from nested_core.models.generation import BATCH_SIZE, Answer, OnAnswered
from nested_core.records.answers import AnsweringRole, AnswerRecord
from nested_core.records.verdict import Reason, TaskResult
from nested_core.storage.adapter import Adapter
from nested_core.storage.run_directory import RunDirectory


@dataclass(frozen=True, eq=False)
class AskedModel:
    """A model to ask: a base with an adapter; `adapter` is None for the base alone.

    is_asked_anew: whether to ignore cached answers; new answers are cached either way.
    on_answered: called with the number of questions of the suite that are answered so far.
    """

    role: AnsweringRole
    base: LoadedBase
    adapter: Adapter | None
    is_asked_anew: bool = False
    on_answered: OnAnswered | None = None

    def cached_or_new_answers(self, suite: EncodedSuite) -> Sequence[Answer]:
        """Return the model's answers to a suite, from the cache unless `is_asked_anew`."""
        if not self.is_asked_anew:
            return fetch_answers(
                answer_cache(), self._content_for_cache(), suite, lambda: self._answer_now(suite)
            )
        answers = self._answer_now(suite)
        store_answers(answer_cache(), self._content_for_cache(), suite, answers)
        return answers

    def _answer_now(self, suite: EncodedSuite) -> Sequence[Answer]:
        """Generate the answers with the adapter's tensors in the base model."""
        with self.base.computing_with(self.adapter):
            return suite.answer(self.base.model, self.base.tokenizer, self.on_answered)

    def _content_for_cache(self) -> AnsweringModelDigests:
        """Return the digests that the answers depend on, which are the key of the cache."""
        config = self.base.config
        return AnsweringModelDigests(
            base=fingerprint_base_model(self.base.folder),
            tokenizer=fingerprint_tokenizer(self.base.folder),
            adapter=None if self.adapter is None else self.adapter.digest(),
            computation=f"{describe_computation(config)} {config.fine_tune_type}",
        )


def answer_tasks(judged: CheckedRun, suites: Sequence[Suite]) -> tuple[AnswerRecord, ...]:
    """Ask base, parent (unless the initial adapter is fresh), champion and candidate every suite.

    Records the suites in the run, and returns the scored answers that count for the verdict. Raises
    ConfigError or DatasetError if a suite changed since the run began or does not fit the model, or
    if its scorer fails.
    """
    base, run, evidence = judged.base, judged.run, judged.evidence
    record_or_compare_suites(run, suites)
    encoded = encode_suites(suites, base.tokenizer, base.folder, evidence.dataset.prompt_format)
    # Cached answers are good enough for all but the candidate
    models = [AskedModel("base", base, None)]
    if not base.is_unchanged_by(evidence.before.to_mlx()):
        models.append(AskedModel("parent", base, evidence.before))
    if isinstance(judged.champion, Champion):
        models.append(AskedModel("champion", judged.champion.base, judged.champion.adapter))
    models.append(AskedModel("candidate", base, evidence.after, is_asked_anew=True))
    records = [record for asked in models for record in ask_model(asked, encoded)]
    return tuple(_select_judging_answers(records, [one.suite for one in encoded], base.config, run))


def _select_judging_answers(
    records: Sequence[AnswerRecord],
    suites: Sequence[Suite],
    config: FineTuneConfig,
    run: RunDirectory,
) -> Iterator[AnswerRecord]:
    """Yield the answers that count for the verdict.

    `training.select_by` may name a suite. Some of its questions were then asked during training, to
    select the step with the most right answers. These questions, and others with the same prompt in
    any suite, do not count. A suite that has no further questions counts them all, and
    `chosen_among` of the candidate's answers is the number of steps that they selected from, by
    which the confidence interval is corrected.
    """
    selecting = next((s for s in suites if s.name == config.training.select_by), None)
    if selecting is None:
        yield from records
        return
    lines = lines_that_chose(selecting.without_copies)  # empty for a small suite
    asked = {fold_prompt(q) for q in selecting.questions if q.line in lines or not lines}
    steps = read_candidates(run.validation_losses).count
    chose = {(s.name, q.line) for s in suites for q in s.questions if fold_prompt(q) in asked}
    all_chose = {s.name for s in suites if all((s.name, q.line) in chose for q in s.questions)}
    for record in records:
        if record.task in all_chose:
            yield replace(record, chosen_among=steps if record.model == "candidate" else 1)
        elif (record.task, record.line) not in chose:
            yield record


def ask_model(asked: AskedModel, encoded: Sequence[EncodedSuite]) -> list[AnswerRecord]:
    """Ask a model every suite and return its scored answers, in order of suites and questions."""
    records = []
    for suite in encoded:
        start = time.monotonic()
        answers = asked.cached_or_new_answers(suite)
        seconds = time.monotonic() - start
        records += score_answers(suite, asked.role, answers, seconds / len(answers))
    return records


def score_answers(
    encoded: EncodedSuite, role: AnsweringRole, answers: Sequence[Answer], seconds: float
) -> list[AnswerRecord]:
    """Score a model's answers to a suite; return a record for each question.

    A question whose prompt was asked earlier in the suite names the line of the first one in
    `same_prompt_as`: the two answers are not independent.

    encoded: the suite's questions, in token ids. role: which model answered.
    seconds: the mean time of an answer.
    """
    scored = encoded.score(answers)
    suite = encoded.suite
    return [
        AnswerRecord(
            task=suite.name,
            model=role,
            line=question.line,
            question=question_label(question),
            answer=answer.text,
            score=score,
            tokens=answer.tokens,
            empty=answer.is_empty,
            endless=answer.is_endless,
            repeated=answer.is_repeated,
            seconds=seconds,
            same_prompt_as=None if first == question.line else first,
            expected=expected_label(question),
        )
        for question, first, answer, score in zip(
            suite.questions, suite.first_lines, answers, scored.scores, strict=True
        )
    ]


def _add_constants(
    results: Sequence[TaskResult], suites: Sequence[Suite], answers: Sequence[AnswerRecord]
) -> Iterator[TaskResult]:
    """Yield each suite's result with the score of the best constant answer to its questions.

    answers: those that count for the verdict, to the same questions.
    """
    for result, suite in zip(results, suites, strict=True):
        lines = {answer.line for answer in answers if answer.task == suite.name}
        best = suite.find_best_constant(lines)
        yield replace(result, constant=best and best[1])


def _find_worse_answers(judged: CheckedRun) -> list[Reason]:
    """Ask the suites, and return a reason for each on which the candidate is worse than allowed.

    Under `gate.samples: fail` the same answer to every question of a suite is a reason too.
    """
    suites = read_suites(judged.base.config.gate)
    answers = answer_tasks(judged, suites)
    results, reasons = judge_answers(judged.bounds, answers)
    judged.answers = answers
    judged.verdict = replace(judged.verdict, tasks=tuple(_add_constants(results, suites, answers)))
    if judged.bounds.samples == "fail":
        reasons += [
            Reason("answers_broken", f"{result.describe()}, all of them the same")
            for result in results
            if result.same_answer is not None
        ]
    return reasons


def _plan_tasks(run: RunToJudge) -> GateWork:
    """The work of all suites, each answer as long as it may be; choices are read alone."""
    models = 2 + run.goes_on + (run.rivals[0] is not None)
    suites = [EncodedSuite.encode(one, run.tokenizer, None) for one in read_suites(run.config.gate)]
    read = tokens = most = 0
    for suite in suites:
        for prompt, choices in zip(suite.prompts, suite.choices, strict=True):
            read += len(prompt) * max(1, len(choices))
        if not any(suite.choices):
            tokens += -(-len(suite.prompts) // BATCH_SIZE) * suite.suite.sampling.max_tokens
            most = max(most, min(len(suite.prompts), BATCH_SIZE))
    return GateWork(prompt_tokens=models * read, tokens=models * tokens, answers=most)


TASKS = Check(
    "answers",
    _find_worse_answers,
    stopped_by=(*WITHOUT_MODEL, *CHANGE, EFFECT, LOSSES),
    is_asked=lambda bounds: bool(bounds.tasks),
    bounds=("tasks",),
    stage="answers to gate.tasks",
    plan_work=_plan_tasks,
)
