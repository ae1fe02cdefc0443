"""Red flags: raised once each, for what should have moved and did not, and for nothing else."""

from __future__ import annotations

import math
import random
import warnings

import pytest

from nested_core import SilentUpdateWarning, UpdateReport
from nested_core.training.training_checks import warn_of_flat_loss, warn_of_lost_updates, warn_once
from nested_core.training.training_state import TrainingState

NAMES = ("layers.0.lora_a", "layers.0.lora_b")


def flagged(losses: list[float], window: int = 10) -> bool:
    """Whether these reports raise the flag of a flat loss."""
    state = TrainingState()
    try:
        warn_of_flat_loss(state, losses, window)
    except SilentUpdateWarning:  # an error here, as every warning is
        return True
    return False


def noisy(count: int, start: float, fall: float, noise: float, seed: int) -> list[float]:
    """Losses that fall by `fall` a report, with normal noise around them."""
    source = random.Random(seed)
    return [start - fall * index + source.gauss(0, noise) for index in range(count)]


class TestFlatLoss:
    def test_a_loss_that_stays_exactly_where_it_is(self) -> None:
        state = TrainingState()
        with pytest.warns(SilentUpdateWarning) as caught:
            warn_of_flat_loss(state, [2.5] * 10, 10)
        message = "loss_flat: the training loss has not changed significantly over 10 reports "
        halves = "(means of their first and second half: 2.5 -> 2.5)."
        assert str(caught[0].message) == message + halves
        assert state.red_flags == [str(caught[0].message)]

    @pytest.mark.parametrize("window", [2, 3, 10])
    def test_fewer_reports_than_the_window_say_nothing(self, window: int) -> None:
        assert not flagged([2.5] * (window - 1), window)
        assert flagged([2.5] * window, window)

    def test_noise_alone_is_flat(self) -> None:
        assert sum(flagged(noisy(10, 3.0, 0.0, 0.1, seed)) for seed in range(100)) > 80

    def test_a_loss_that_falls_through_its_noise_is_not(self) -> None:
        assert not any(flagged(noisy(10, 3.0, 0.1, 0.05, seed)) for seed in range(100))

    def test_a_loss_that_fell_by_a_fifth_is_not_flat_however_noisy_it_is(self) -> None:
        noise = [0.0, 2.5, -2.5, 2.5, -2.5, 2.5, -2.5, 2.5, -2.5, 0.0]
        fall = [14.84 - index * (14.84 - 11.91) / 9 for index in range(10)]
        losses = [loss + offset for loss, offset in zip(fall, noise, strict=True)]
        assert (losses[0], losses[-1]) == (14.84, 11.91)
        assert not flagged(losses)
        assert flagged([13.0 + offset for offset in noise])

    def test_a_loss_that_rises_is_not_flat(self) -> None:
        assert not flagged([1.0 + 0.1 * index for index in range(10)])

    def test_a_run_that_has_learned_and_converged_is_not_stuck(self) -> None:
        falling = [4.0, 3.0, 2.0, 1.0, 0.5]
        assert not any(flagged(falling + noisy(30, 0.4, 0.0, 0.02, seed)) for seed in range(20))

    def test_reports_without_a_loss_are_passed_over_as_they_are_on_resume(self) -> None:
        falling = [math.nan, 4.0, 3.0, 2.0, 1.0, 0.5]
        converged = noisy(10, 0.4, 0.0, 0.02, seed=0)
        assert not flagged(falling + converged)
        assert flagged([2.5] * 9 + [math.inf, 2.5])

    def test_only_the_last_reports_count(self) -> None:
        assert flagged([2.5, 2.4, 2.6, 2.5] + [2.5] * 10)


def test_a_warning_is_printed_with_its_step_and_no_line_of_code() -> None:
    with pytest.warns(SilentUpdateWarning) as caught:
        warn_once(TrainingState(step=40), "loss_flat", "why")
    (warning,) = caught
    printed = warnings.formatwarning(
        warning.message, warning.category, warning.filename, warning.lineno
    )
    assert printed == "training step:40: SilentUpdateWarning: loss_flat: why\n"


class TestUpdates:
    def test_updates_that_are_not_in_the_model(self) -> None:
        state = TrainingState(step=12)
        with pytest.warns(SilentUpdateWarning) as caught:
            warn_of_lost_updates(state, UpdateReport(2, NAMES, NAMES), [])
        assert [str(warning.message) for warning in caught] == [
            "updates_not_applied: at step 12 2 of 2 computed updates are not in the model, "
            "layers.0.lora_a among them. It is not being trained."
        ]

    def test_due_parameters_that_an_update_left_as_they_were(self) -> None:
        state = TrainingState(step=12)
        with pytest.warns(SilentUpdateWarning) as caught:
            warn_of_lost_updates(state, UpdateReport(2, (), NAMES[1:]), [])
        assert [str(warning.message) for warning in caught] == [
            "parameters_unchanged: the update of step 12 left 1 of 2 parameters as they were, "
            "layers.0.lora_b among them: is the learning rate too small?"
        ]

    def test_parameters_without_a_gradient_yet_may_stay(self) -> None:
        state = TrainingState(step=1)
        warn_of_lost_updates(state, UpdateReport(2, (), NAMES[:1]), NAMES[:1])
        assert state.red_flags == []

    def test_updates_that_took_effect_raise_nothing(self) -> None:
        state = TrainingState(step=1)
        warn_of_lost_updates(state, UpdateReport(2, (), ()), [])
        assert state.red_flags == []


def test_each_kind_of_trouble_is_told_once_a_run() -> None:
    state = TrainingState()
    kinds = [("loss", "first"), ("loss", "second"), ("loss_flat", "another kind")]
    with warnings.catch_warnings(record=True, action="always") as caught:
        for kind, message in kinds:
            warn_once(state, kind, message)
    assert {warning.category for warning in caught} == {SilentUpdateWarning}
    messages = ["loss: first", "loss_flat: another kind"]
    assert [str(warning.message) for warning in caught] == messages == state.red_flags


def test_flags_of_an_earlier_process_are_not_told_again() -> None:
    before = TrainingState(red_flags=["loss_flat: before"])
    resumed = TrainingState.from_json(before.to_json())
    warn_of_flat_loss(resumed, [2.5] * 10, 10)
    assert resumed.red_flags == ["loss_flat: before"]
