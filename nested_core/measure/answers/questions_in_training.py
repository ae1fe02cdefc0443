"""A small part of some suites of `gate.tasks`, asked while an adapter is trained.

Which questions follows from the suite and the length of the run alone, so that a resumed run and
every setting of a sweep ask the same ones, and the gate knows which they were: those that chose a
step do not judge it where the suite has others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core.config.schema import FineTuneConfig
from nested_core.measure.answers.suite_answers import (
    EncodedSuite,
    Suite,
    encode_suites,
    read_suites,
)
from nested_core.models.generation import BATCH_SIZE
from nested_core.models.parameters import ParameterRefs, assign_parameters, restoring_parameters
from nested_core.text.stages import stages

MOST_QUESTIONS = BATCH_SIZE  # of a suite: they are answered in one batch
LEAST_QUESTIONS = 4
LARGEST_SHARE = 4  # one question of so many is asked, where that leaves enough of both
STEPS_FOR_ALL = 300  # a shorter run asks fewer, so that asking stays a small part of it


def choose_questions(suite: Suite, steps: int) -> tuple[int, ...]:
    """The places of the questions that a run of so many steps asks, in their order.

    A quarter of the suite and one batch at most; all of a suite that has too few for that. A run of
    fewer than STEPS_FOR_ALL steps asks as many fewer. `suite` has each prompt once.
    """
    count = len(suite.questions)
    most = count // LARGEST_SHARE if count >= LARGEST_SHARE * 2 * LEAST_QUESTIONS else count
    short = max(LEAST_QUESTIONS, MOST_QUESTIONS * steps // STEPS_FOR_ALL)
    order = list(range(count))
    Random(suite.name).shuffle(order)  # a longer run asks these and more
    return tuple(order[: min(most, MOST_QUESTIONS, short)])


def lines_that_chose(suite: Suite) -> frozenset[int]:
    """The lines of questions that may have chosen the step, and do not judge it.

    Those of a long run, among which are a short one's. Empty where the suite has too few others.
    `suite` has each prompt once.
    """
    places = choose_questions(suite, STEPS_FOR_ALL)
    if len(places) > len(suite.questions) // 2:
        return frozenset()
    return frozenset(suite.questions[place].line for place in places)


@dataclass(frozen=True)
class QuestionsInTraining:
    """The questions of `training.evaluate_tasks`, encoded; `ask` answers them with an adapter."""

    suites: tuple[EncodedSuite, ...]
    tokenizer: Any

    @classmethod
    def from_config(
        cls, config: FineTuneConfig, tokenizer: Any, base: Path, steps: int
    ) -> QuestionsInTraining:
        """Those of a run of so many steps, which it says where they are few."""
        named = config.training.evaluate_tasks
        chosen = []
        for suite in (whole.without_copies for whole in read_suites(config.gate)):
            if suite.name in named:
                places = choose_questions(suite, steps)
                questions = tuple(suite.questions[place] for place in places)
                chosen.append(replace(suite, questions=questions))
        if chosen:
            asked = ", ".join(f"{len(own.questions)} of {own.name}" for own in chosen)
            few = f" (few, for the run has {steps} steps)" if steps < STEPS_FOR_ALL else ""
            stages.info("questions while it trains: %s%s", asked, few)
        return cls(encode_suites(chosen, tokenizer, base), tokenizer)

    def ask(
        self,
        model: nn.Module,
        refs: ParameterRefs,
        values: Mapping[str, mx.array],
        check_stop: Callable[[], None],
        share: float = 1.0,
    ) -> dict[str, Any]:
        """What a record of metrics.jsonl holds of the answers with these parameters.

        `share` of the questions are asked. `tasks`: the share of right answers and the number of
        questions of each suite; `task_seconds`: what all of them took. `check_stop` may raise,
        before and between answers.
        """
        if not self.suites:
            return {}
        started = time.perf_counter()
        tasks = {}
        with restoring_parameters(refs):
            assign_parameters(refs, values)
            for whole in self.suites:
                check_stop()
                suite = _take_share(whole, share)
                answers = suite.answer(model, self.tokenizer, lambda _: check_stop())
                right = suite.score(answers).mean
                tasks[suite.suite.name] = {"right": right, "questions": len(answers)}
        return {"tasks": tasks, "task_seconds": time.perf_counter() - started}


def _take_share(whole: EncodedSuite, share: float) -> EncodedSuite:
    """The first questions of a suite, one at least."""
    count = max(1, int(share * len(whole.prompts)))
    suite = replace(whole.suite, questions=whole.suite.questions[:count])
    return replace(whole, suite=suite, prompts=whole.prompts[:count], choices=whole.choices[:count])
