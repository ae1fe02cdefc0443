"""What a run remembers: its best evaluation, how long nothing got better, and all of it as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core.errors import DamagedError
from nested_core.training.training_state import EVIDENCE_KEYS, TrainingState, require_whole_state


def evaluated(losses: list[float], *, min_delta: float = 0.0) -> TrainingState:
    """The state after an evaluation a step; the first is of the untrained start."""
    state = TrainingState()
    for step, loss in enumerate(losses):
        state.step = step
        state.record_evaluation(loss, is_candidate=step > 0)
        state.count_without_improvement(min_delta=min_delta)
    return state


def test_the_best_is_the_first_candidate_with_the_lowest_loss() -> None:
    state = evaluated([1.0, 3.0, 2.0, 2.0, 2.5])
    assert (state.best_step, state.best_val_loss) == (2, 2.0)
    assert (state.val_loss, state.evaluated_step) == (2.5, 4)


def test_the_untrained_start_is_never_the_best() -> None:
    state = evaluated([1.0])
    assert (state.best_step, state.best_val_loss, state.lowest_val_loss) == (None, None, None)
    assert state.evaluations_without_improvement == 0


def test_only_a_new_best_among_the_candidates_is_told_as_one() -> None:
    state = TrainingState()
    answers = [
        state.record_evaluation(loss, is_candidate=is_candidate)
        for loss, is_candidate in [(1.0, False), (3.0, True), (3.0, True), (2.0, True)]
    ]
    assert answers == [False, True, False, True]


def test_a_flush_at_the_step_of_the_best_brings_back_the_best_before_it() -> None:
    state = evaluated([4.0, 3.0, 2.0, 2.5, 1.0])
    assert state.steps_to_keep(may_flush=True) == [4, 2]
    assert state.steps_to_keep(may_flush=False) == [4]
    state.record_gradient_flush()
    assert (state.best_step, state.best_val_loss) == (2, 2.0)
    assert (state.lowest_val_loss, state.evaluations_without_improvement) == (2.0, 1)
    worse, better = replace(state), replace(state)
    assert not worse.record_evaluation(2.1, is_candidate=True)
    assert (worse.best_step, worse.steps_to_keep(may_flush=True)) == (2, [2])
    assert better.record_evaluation(1.5, is_candidate=True)
    assert (better.best_step, better.best_val_loss) == (4, 1.5)


def test_a_best_that_is_behind_needs_no_other_checkpoint() -> None:
    assert evaluated([4.0, 3.0, 2.0, 2.5]).steps_to_keep(may_flush=True) == [2]
    assert evaluated([4.0, 3.0]).steps_to_keep(may_flush=True) == [1]
    assert evaluated([4.0]).steps_to_keep(may_flush=True) == []


def test_patience_counts_evaluations_that_are_not_better_by_min_delta() -> None:
    assert evaluated([4.0, 3.0, 3.0, 3.0]).evaluations_without_improvement == 2
    assert evaluated([4.0, 3.0, 3.0, 2.95]).evaluations_without_improvement == 0
    assert evaluated([4.0, 3.0, 3.0, 2.95], min_delta=0.1).evaluations_without_improvement == 2
    assert evaluated([4.0, 3.0, 2.95, 2.85], min_delta=0.1).evaluations_without_improvement == 0


def test_steps_too_small_for_min_delta_add_up() -> None:
    state = evaluated([9.0, 4.0, 3.96, 3.92, 3.88], min_delta=0.1)
    assert (state.lowest_val_loss, state.evaluations_without_improvement) == (3.88, 0)


@pytest.mark.parametrize(("flushes", "counted"), [(False, 1), (True, 3)])
def test_patience_counts_where_training_could_end_with_an_adapter_to_offer(
    flushes, counted
) -> None:
    state = TrainingState()
    for step, loss in enumerate([1.0, 2.0, 2.0, 2.0, 2.0]):  # tier 1 is first updated at step 3
        state.step = step
        state.record_evaluation(loss, is_candidate=step >= 3)
        state.count_without_improvement(min_delta=0.0, flushes=flushes)
    assert state.evaluations_without_improvement == counted


def test_where_answers_select_the_step_patience_goes_by_answers() -> None:
    state = TrainingState()
    counts = []
    for step, (loss, wrong) in enumerate([(1.0, 0.8), (1.1, 0.6), (0.9, 0.7), (1.0, 0.6)], 1):
        state.step = step
        state.record_evaluation(loss, is_candidate=True, wrong=wrong)
        state.count_without_improvement(min_delta=0.2)
        counts.append(state.evaluations_without_improvement)
    assert counts == [0, 0, 1, 2]  # as many wrong: the loss fell by less than min_delta


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_no_best_and_nothing_is_measured_against_it(broken) -> None:
    state = evaluated([broken, broken, 3.0, broken, 2.0])
    assert (state.best_step, state.best_val_loss, state.lowest_val_loss) == (4, 2.0, 2.0)
    assert state.evaluations_without_improvement == 0
    state = evaluated([5.0, 4.0, broken, broken])
    assert (state.best_step, state.lowest_val_loss) == (1, 4.0)
    assert state.evaluations_without_improvement == 2


@given(
    step=st.integers(0, 2**40),
    loss=st.floats(allow_nan=False, allow_infinity=False),
    flags=st.lists(st.text()),
    best=st.none() | st.integers(0, 2**40),
)
def test_it_survives_json_to_the_bit(step, loss, flags, best) -> None:
    state = replace(TrainingState(), step=step, val_loss=loss, red_flags=flags, best_step=best)
    written = json.dumps(state.to_json() | {"another": "key"})
    assert asdict(TrainingState.from_json(json.loads(written))) == asdict(state)


def test_a_state_that_lacks_a_value_is_damage_and_names_it() -> None:
    whole = TrainingState(step=3).to_json() | dict.fromkeys(EVIDENCE_KEYS, 0)
    require_whole_state(whole, Path("step-3"))
    for key in whole:
        rest = {name: value for name, value in whole.items() if name != key}
        with pytest.raises(DamagedError, match=rf"state.json has no {key}:"):
            require_whole_state(rest, Path("step-3"))
