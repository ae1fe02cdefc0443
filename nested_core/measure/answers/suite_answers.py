"""A model's answers to the questions of a suite, and their scores.

A question with the score `choice` is answered without generating text: the model's answer is the
choice with the highest likelihood after the prompt. The suites of `gate.tasks` are read before
training begins, and must be unchanged when the gate asks them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core.backend import to_float
from nested_core.config.sections import GateSection, TaskSection
from nested_core.errors import ConfigError, DatasetError, NestedTuneError
from nested_core.measure.answers.scorers import ScoringMethod, require_usable_scorer, score_answers
from nested_core.measure.answers.suites import (
    BadQuestion,
    Question,
    describe_bad_questions,
    fold_prompt,
    list_expected_texts,
    read_suite,
    strip_pattern,
)
from nested_core.models.base_model import context_length, describe_token_beyond, vocabulary_size
from nested_core.models.chat_template import Tokenizer, chat_template_of, has_chat_template
from nested_core.models.generation import Answer, OnAnswered, Sampling, answer_prompts
from nested_core.models.parameters import in_evaluation_mode
from nested_core.records.dataset import PromptFormat
from nested_core.storage.atomic import write_json
from nested_core.storage.json_file import JsonFile
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import file_type, regular_sha256
from nested_core.training.loss.logit_budget import positions_at_once
from nested_core.training.loss.loss_interface import count_logits, extract_logits

MAX_CONSTANT_ANSWERS = 8  # expected answers that are tried as the answer to all questions
_MAX_ROWS = 64  # of one batch of choices
# On CUDA, MLX keeps an attention plan for each shape, and fails after many. Widths are rounded up.
_WIDTH_MULTIPLE = 64


@dataclass(frozen=True)
class Suite:
    """A configured suite that was read: its questions, how to answer them and how to score."""

    name: str
    method: ScoringMethod
    questions: tuple[Question, ...]
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def read(cls, name: str, method: ScoringMethod, sampling: Sampling | None = None) -> Self:
        """Read a suite's file, and compile or import its scorer.

        Raises ConfigError if there is no such file, DatasetError for bad lines or a function that
        cannot be imported.
        """
        questions = read_suite(method.place, method.score)
        require_usable_scorer(method, questions)
        return cls(name, method, questions, sampling or Sampling())

    def score(self, answers: Sequence[str]) -> list[float]:
        """Score an answer to each question; DatasetError if the suite's own scorer fails."""
        if self.method.score != "choice":
            return score_answers(self.method, self.questions, answers)
        pairs = zip(self.questions, answers, strict=True)
        return [float(answer in question.accepted) for question, answer in pairs]

    def find_best_constant(self, lines: Collection[int]) -> tuple[str, float] | None:
        """Return the best constant answer to the questions on these lines, and its mean score.

        It is the one expected answer with the highest score if it is given to every question. The
        most frequent ones are tried. None if no answer is expected.
        """
        questions = tuple(question for question in self.questions if question.line in lines)
        is_pattern = self.method.score == "regex"
        expected = Counter[str]()
        for question in questions:
            accepted = list_expected_texts(question)
            if is_pattern:
                accepted = [text for pattern in accepted for text in strip_pattern(pattern)]
            expected.update(list(dict.fromkeys(accepted)))
        most = 1 if self.method.score == "python" else MAX_CONSTANT_ANSWERS
        texts = [text for text, _ in expected.most_common(most)]
        if not texts:
            return None
        asked = replace(self, questions=questions * len(texts))
        scores = asked.score([text for text in texts for _ in questions])
        means = np.reshape(scores, (len(texts), len(questions))).mean(axis=1)
        return texts[means.argmax()], float(means.max())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the suite's file."""
        return regular_sha256(self.method.place, follow_links=True)

    @cached_property
    def first_lines(self) -> tuple[int, ...]:
        """For each question, the line of the first one with the same prompt."""
        firsts: dict[bytes, int] = {}
        return tuple(firsts.setdefault(fold_prompt(one), one.line) for one in self.questions)

    @property
    def without_copies(self) -> Self:
        """The suite with only the first question of each prompt."""
        pairs = zip(self.questions, self.first_lines, strict=True)
        return replace(self, questions=tuple(one for one, first in pairs if one.line == first))


@dataclass(frozen=True)
class SuiteAnswers:
    """One model's answers to a suite, with their scores.

    answers: in the order of the questions; for `choice` the text of the likeliest choice, or an
        empty text if two choices are equally likely.
    scores: the score of each answer, from 0 to 1.
    """

    answers: tuple[Answer, ...]
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean score, which is the share of right answers."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class EncodedSuite:
    """A suite's prompts as token ids.

    choices: for `choice`, the token ids that each choice adds to the prompt; else empty tuples.
    context: the most tokens that the model can see; None if unknown.
    """

    suite: Suite
    prompts: tuple[tuple[int, ...], ...]
    choices: tuple[tuple[tuple[int, ...], ...], ...]
    context: int | None

    @classmethod
    def encode(
        cls,
        suite: Suite,
        tokenizer: Tokenizer,
        context: int | None,
        rows: int | None = None,
        prompt_format: PromptFormat | None = None,
    ) -> Self:
        """Encode every question of a suite.

        A question's `prompt` is asked as the prompts of training rows are formatted.

        context: the most tokens that the model can see; None if unknown.
        rows: the number of rows of its embedding; None if unknown.
        prompt_format: of the rows; None if unknown, which is a chat without a system text.

        Raises a DatasetError that lists the questions that are too long, have tokens beyond the
        embedding, or are refused by the chat template.
        """
        prompts: list[tuple[int, ...]] = []
        choices: list[tuple[tuple[int, ...], ...]] = []
        problems = []
        asked: list[Question] = []
        asked_as = prompt_format or PromptFormat()
        is_chat = asked_as.is_chat and has_chat_template(tokenizer)
        for question in suite.questions:
            tools = None
            if is_chat and isinstance(question.prompt, str):
                question = replace(question, prompt=tuple(asked_as.ask(question.prompt)))
                tools = asked_as.tools
            asked.append(question)
            try:
                prompt = _encode_prompt(question, tokenizer, tools)
            except NestedTuneError:  # it takes more than it may
                raise
            except Exception as error:  # a template may raise anything
                reason = f"{type(error).__name__}: {error}"
                problem = f"the chat template does not take it: {reason}"[:300]
                problems.append(BadQuestion(question.line, "template", problem))
                continue
            choice_tokens = tuple(_encode_choice(question, t, tokenizer) for t in question.choices)
            longest = len(prompt) + max(map(len, choice_tokens), default=1)
            if context is not None and longest > context:
                problem = (
                    f"with its answer it has {longest:,} tokens or more, and the model sees "
                    f"{context:,}"
                )
                problems.append(BadQuestion(question.line, "long", problem))
            tokens = [*prompt, *chain.from_iterable(choice_tokens)]
            if token_problem := describe_token_beyond(tokenizer, tokens, rows):
                problems.append(BadQuestion(question.line, "token", token_problem))
            if not prompt or not all(choice_tokens):
                problem = "nothing is left of it in tokens"
                problems.append(BadQuestion(question.line, "no tokens", problem))
            prompts.append(prompt)
            choices.append(choice_tokens)
        if problems:
            path = suite.method.place
            summary = f"{path} cannot be asked of this model."
            raise DatasetError(describe_bad_questions(path, problems, summary))
        suite = replace(suite, questions=tuple(asked))
        return cls(suite, tuple(prompts), tuple(choices), context)

    def select(self, lines: Iterable[int]) -> Self:
        """Return the suite with only the questions on these lines, in this order."""
        encoded = zip(self.suite.questions, self.prompts, self.choices, strict=True)
        by_line = {row[0].line: row for row in encoded}
        questions, prompts, choices = zip(*(by_line[line] for line in lines), strict=True)
        suite = replace(self.suite, questions=questions)
        return replace(self, suite=suite, prompts=prompts, choices=choices)

    def answer(
        self, model: nn.Module, tokenizer: Tokenizer, on_answered: OnAnswered | None = None
    ) -> tuple[Answer, ...]:
        """Return the model's answers, in the order of the questions."""
        with in_evaluation_mode(model):
            if self.suite.method.score == "choice":
                return self._answer_by_choice(model)
            sampling, context = self.suite.sampling, self.context
            answers = answer_prompts(
                model, tokenizer, self.prompts, sampling, context=context, on_answered=on_answered
            )
        return tuple(answers)

    def _answer_by_choice(self, model: nn.Module) -> tuple[Answer, ...]:
        """Answer each question with its likeliest choice."""
        likelihoods = self.log_likelihoods(model)
        chosen = [
            choose_likeliest(question.choices, sums)
            for question, sums in zip(self.suite.questions, likelihoods, strict=True)
        ]
        return tuple(Answer(text, 0, is_endless=False, is_repeated=False) for text in chosen)

    def log_likelihoods(self, model: nn.Module) -> list[tuple[float, ...]]:
        """Return for each question the summed log-probability, in nats, of each choice.

        Choices of similar length are computed in one batch, whose logits fit the logit budget. A
        single choice too long for the budget is read in chunks.
        """
        rows = [
            (index, prompt, choice)
            for index, prompt in enumerate(self.prompts)
            for choice in self.choices[index]
        ]
        # Batches of rows of similar length, the shortest first, so that little is padded.
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][1]) + len(rows[row][2]))
        widths = [
            _round_up_width(len(rows[r][1]) + len(rows[r][2]) - 1, self.context) for r in order
        ]
        positions = positions_at_once(count_logits(model))
        sums = np.zeros(len(rows))
        start = 0
        while start < len(order):
            # The batch grows until its rows, or its logits, are as many as may exist at once.
            end = start + 1
            while (
                end < min(len(order), start + _MAX_ROWS)
                and (end + 1 - start) * widths[end] <= positions
            ):
                end += 1
            batch, width = order[start:end], widths[end - 1]
            pairs = [rows[row][1:] for row in batch]
            if width <= positions:
                sums[batch] = _sum_log_probabilities(model, pairs, width)
            else:
                sums[batch] = [_sum_log_probabilities_in_chunks(model, *pairs[0], positions)]
            start = end
        remaining_sums = iter(sums.tolist())
        return [tuple(next(remaining_sums) for _ in choices) for choices in self.choices]

    def score(self, answers: Sequence[Answer]) -> SuiteAnswers:
        """Score answers to this suite; DatasetError if the suite's own scorer fails."""
        scores = self.suite.score([answer.text for answer in answers])
        return SuiteAnswers(tuple(answers), tuple(scores))


def _encode_prompt(question: Question, tokenizer: Tokenizer, tools: Any = None) -> tuple[int, ...]:
    """Return the token ids of a question's prompt; chat messages go through the chat template.

    tools: that the chat template shows.
    """
    if isinstance(question.prompt, str):
        return _encode_text(question.prompt, tokenizer)
    template = chat_template_of(tokenizer)
    text = template.render(template.prepare(question.prompt), tools, add_generation_prompt=True)
    # verbose=False: transformers would warn of a long text, which `encode` reports with its line
    return tuple(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _encode_text(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the token ids of a text, with the tokenizer's start token unless it begins with it."""
    start = tokenizer.bos_token
    is_started = start is not None and text.startswith(start)
    return tuple(tokenizer.encode(text, add_special_tokens=not is_started, verbose=False))


def _encode_choice(question: Question, choice: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the token ids that a choice adds to its question's prompt.

    Prompt and choice of a plain text are encoded together. If a token spans the border between
    them, or if the prompt is a chat, the choice is encoded alone.
    """
    if isinstance(question.prompt, str):
        prompt = _encode_text(question.prompt, tokenizer)
        tokens = _encode_text(question.prompt + choice, tokenizer)
        if tokens[: len(prompt)] == prompt:
            return tokens[len(prompt) :]
    return tuple(tokenizer.encode(choice, add_special_tokens=False))


def _round_up_width(longest: int, context: int | None) -> int:
    """Return the width of a batch whose longest row has `longest` tokens.

    It is a multiple of _WIDTH_MULTIPLE where the model's context allows that.
    """
    width = -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    return width if context is None else max(longest, min(width, context))


def _sum_log_probabilities(
    model: nn.Module, pairs: Sequence[Sequence[Sequence[int]]], width: int
) -> list[float]:
    """Return the log-probability, in nats, of each continuation after its prompt.

    pairs: a prompt and its continuation, as token ids.
    width: the length in tokens that all rows are padded to.
    """
    rows = [[*prompt, *continuation] for prompt, continuation in pairs]
    inputs = np.zeros((len(rows), width), np.int32)
    for row, tokens in enumerate(rows):
        inputs[row, : len(tokens) - 1] = tokens[:-1]  # the last token is only predicted
    logits = extract_logits(model(mx.array(inputs)))
    sums = []
    for row, (prompt, continuation) in enumerate(pairs):
        start = len(prompt) - 1
        sums.append(_sum_of_targets(logits[row, start : start + len(continuation)], continuation))
    return mx.stack(sums).tolist()  # type: ignore[return-value]


def _sum_log_probabilities_in_chunks(
    model: nn.Module, prompt: Sequence[int], continuation: Sequence[int], chunk_length: int
) -> float:
    """Return a continuation's log-probability, in nats, with the logits of one chunk at a time.

    The model reads `chunk_length` tokens at a time with its cache, as mlx_lm reads a long prompt.
    """
    from mlx_lm.models.cache import make_prompt_cache

    # The last token is no input: it is only predicted. `first` is the input that predicts the first
    # token of the continuation.
    inputs, first = [*prompt, *continuation[:-1]], len(prompt) - 1
    cache = make_prompt_cache(model)
    total = mx.array(0.0)
    for start in range(0, len(inputs), chunk_length):
        chunk = inputs[start : start + chunk_length]
        logits = extract_logits(model(mx.array([chunk]), cache=cache))[0]
        in_prompt = max(0, first - start)  # inputs of the chunk that precede a prompt token
        if in_prompt < len(chunk):
            targets = continuation[start + in_prompt - first :][: len(chunk) - in_prompt]
            total = total + _sum_of_targets(logits[in_prompt:], targets)
        mx.eval(total, [layer.state for layer in cache])
    return to_float(total)


def _sum_of_targets(logits: mx.array, targets: Sequence[int]) -> mx.array:
    """Return the summed log-probability of the target tokens, one target for each row of logits."""
    exact = logits.astype(mx.float32)
    chosen = mx.take_along_axis(exact, mx.array(list(targets))[:, None], axis=-1).squeeze(-1)
    return (chosen - mx.logsumexp(exact, axis=-1)).sum()


def choose_likeliest(choices: Sequence[str], sums: Sequence[float]) -> str:
    """Return the choice with the largest sum; empty if two choices share it or a sum is NaN."""
    best = max(sums)
    if not np.isfinite(best) or np.isnan(sums).any() or list(sums).count(best) > 1:
        return ""
    return choices[list(sums).index(best)]


@dataclass(frozen=True)
class SuiteRecord:
    """What suites.json records of a suite, under the suite's name, when a run begins."""

    file: str
    sha256: str
    questions: int


SUITES_FILE = JsonFile(dict[str, SuiteRecord], 2**20)


def read_suites(gate: GateSection) -> tuple[Suite, ...]:
    """Read every suite of `gate.tasks` and compile or import its scorer.

    Raises ConfigError if a file is missing, DatasetError if one has bad lines or its function
    cannot be imported.
    """
    return tuple(_read_suite(task) for task in gate.tasks)


def _read_suite(task: TaskSection) -> Suite:
    """Read a suite of `gate.tasks`; questions without a tolerance of their own get the suite's."""
    method = ScoringMethod(Path(task.file), task.score, task.function)
    sampling = Sampling(task.max_tokens, task.stop, task.temperature, task.seed)
    suite = Suite.read(task.name, method, sampling)
    questions = [
        question if "tolerance" in question.fields else replace(question, tolerance=task.tolerance)
        for question in suite.questions
    ]
    return replace(suite, questions=tuple(questions))


def record_or_compare_suites(run: RunDirectory, suites: Sequence[Suite]) -> None:
    """Write suites.json, or compare it with the suites: the gate asks what the run began with.

    Raises ConfigError if the content of a suite changed since training began.
    """
    if not suites:
        return
    recorded = {} if file_type(run.suites) == "missing" else SUITES_FILE.read(run.suites)
    current = {
        suite.name: SuiteRecord(str(suite.method.place), suite.digest, len(suite.questions))
        for suite in suites
    }
    changed = [
        name
        for name, record in current.items()
        if name in recorded and recorded[name].sha256 != record.sha256
    ]
    if changed and run.tiers.exists():  # training has begun
        raise ConfigError(
            f"gate.tasks: {' and '.join(current[name].file for name in changed)} changed since "
            f"{run.path} began: its digest is not the one in {run.suites.name}. Bring back what "
            f"was there, or start a new run."
        )
    records = recorded | current
    write_json(run.suites, {name: asdict(record) for name, record in records.items()})


def encode_suites(
    suites: Sequence[Suite], tokenizer: Tokenizer, base: Path, prompt_format: PromptFormat | None
) -> tuple[EncodedSuite, ...]:
    """Encode each suite for the base model in the folder `base`.

    prompt_format: of the training rows, as which a question's `prompt` is asked; None if unknown.

    Raises a DatasetError that lists the questions that are longer than the model's context or that
    its chat template refuses.
    """
    context, rows = context_length(base), vocabulary_size(base)
    return tuple(EncodedSuite.encode(s, tokenizer, context, rows, prompt_format) for s in suites)
