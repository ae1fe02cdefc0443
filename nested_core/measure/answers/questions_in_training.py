"""Ask a small part of some suites of `gate.tasks` while an adapter is trained.

The questions are chosen by the suite and the length of the run alone. So a resumed run and every
setting of a sweep ask the same questions, and the gate knows which ones were asked: questions that
selected a step do not count in its verdict if the suite has enough others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import mlx.core as mx
import mlx.nn as nn

from nested_core.config.schema import FineTuneConfig
from nested_core.measure.answers.suite_answers import EncodedSuite, Suite, read_suites
from nested_core.models.chat_template import Tokenizer
from nested_core.models.generation import BATCH_SIZE
from nested_core.models.parameters import ParameterRefs, assign_parameters, restoring_parameters
from nested_core.text.stages import stages

EncodeSuites = Callable[[Sequence[Suite]], tuple[EncodedSuite, ...]]
MOST_QUESTIONS = BATCH_SIZE  # of each suite, so that one batch answers them
LEAST_QUESTIONS = 4
LARGEST_SHARE = 4  # at most one in four questions is asked, if the suite has enough questions
STEPS_FOR_ALL = 300  # a shorter run asks fewer, so that asking takes a small part of its time


def choose_questions(suite: Suite, steps: int) -> tuple[int, ...]:
    """Return the lines of the questions that a run of `steps` optimizer steps asks.

    At most a quarter of the suite and at most one batch; a suite with too few questions for that is
    asked whole. A run of fewer than STEPS_FOR_ALL steps asks proportionally fewer. `suite` must
    have each prompt once.
    """
    count = len(suite.questions)
    share_limit = count // LARGEST_SHARE if count >= LARGEST_SHARE * 2 * LEAST_QUESTIONS else count
    step_limit = max(LEAST_QUESTIONS, MOST_QUESTIONS * steps // STEPS_FOR_ALL)
    lines = [question.line for question in suite.questions]
    Random(suite.name).shuffle(lines)  # the same order for every run: a longer one asks more of it
    return tuple(lines[: min(share_limit, MOST_QUESTIONS, step_limit)])


def lines_that_chose(suite: Suite) -> frozenset[int]:
    """Return the lines of questions that may have selected a step, and so do not count in the gate.

    These are the questions of a run of STEPS_FOR_ALL steps, which include those of any shorter run.
    Empty if they are more than half of the suite. `suite` must have each prompt once.
    """
    lines = choose_questions(suite, STEPS_FOR_ALL)
    return frozenset(lines if len(lines) <= len(suite.questions) // 2 else ())


@dataclass(frozen=True)
class QuestionsInTraining:
    """The questions of `training.evaluate_tasks`, encoded; `ask` answers them with an adapter."""

    suites: tuple[EncodedSuite, ...]
    tokenizer: Tokenizer

    @classmethod
    def from_config(
        cls, config: FineTuneConfig, tokenizer: Tokenizer, encode: EncodeSuites, steps: int
    ) -> QuestionsInTraining:
        """Choose and encode the questions for a run of `steps` optimizer steps, and log how many.

        encode: `encode_suites` with the tokenizer, the base model and the rows' prompt format.
        """
        named = config.training.evaluate_tasks
        suites = encode([suite for suite in read_suites(config.gate) if suite.name in named])
        chosen = tuple(
            one.select(choose_questions(one.suite.without_copies, steps)) for one in suites
        )
        if chosen:
            asked = ", ".join(f"{len(one.prompts)} of {one.suite.name}" for one in chosen)
            few = f" (few, for the run has {steps} steps)" if steps < STEPS_FOR_ALL else ""
            stages.info("questions while it trains: %s%s", asked, few)
        return cls(chosen, tokenizer)

    def ask(
        self,
        model: nn.Module,
        refs: ParameterRefs,
        values: Mapping[str, mx.array],
        check_stop: Callable[[], None],
        share: float = 1.0,
    ) -> dict[str, object]:
        """Answer the questions with these parameter values, and return fields for metrics.jsonl.

        `tasks` has the share of right answers and the number of questions of each suite,
        `task_seconds` the time for all of them. Only the first `share` of the questions is asked.
        `check_stop` is called before and between answers, and may raise to end them.
        """
        if not self.suites:
            return {}
        started = time.perf_counter()
        tasks = {}
        with restoring_parameters(refs):
            assign_parameters(refs, values)
            for full in self.suites:
                check_stop()
                count = max(1, int(share * len(full.prompts)))
                suite = full.select(question.line for question in full.suite.questions[:count])
                answers = suite.answer(model, self.tokenizer, lambda _: check_stop())
                right = suite.score(answers).mean
                tasks[suite.suite.name] = {"right": right, "questions": len(answers)}
        return {"tasks": tasks, "task_seconds": time.perf_counter() - started}
