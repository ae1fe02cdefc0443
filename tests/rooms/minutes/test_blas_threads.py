"""The number of OpenBLAS's threads is chosen once a run, and a run keeps it to its end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from nested_core import backend
from nested_core.models.session import Session
from nested_core.pipeline.run_in_progress import RunInProgress
from nested_core.records.plan import write_plan
from nested_core.rooms.minutes import forecast, timed_training
from nested_core.rooms.minutes.blas_threads import (
    THREADS_VARIABLE,
    _open_library,
    choose_blas_threads,
)
from nested_core.rooms.minutes.forecast import TrialRun, try_steps
from nested_core.storage.run_directory import open_run
from tests.example import prepare
from tests.rooms.minutes.test_timed_training import FIXED, Listening, config_of, training_plan

pytestmark = pytest.mark.skipif(
    backend.find_openblas() is None, reason="about OpenBLAS on a Linux CPU"
)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """OpenBLAS with two threads, as on a machine of two cores."""
    monkeypatch.delenv(THREADS_VARIABLE, raising=False)
    library = _open_library()
    threads = library.openblas_get_num_threads()
    library.openblas_set_num_threads(2)
    yield library
    library.openblas_set_num_threads(threads)


def model_that_takes(seconds: dict[int, float], library: Any) -> Callable[[mx.array], mx.array]:
    """A model whose pass takes so long with so many threads."""

    def answer(tokens: mx.array) -> mx.array:
        time.sleep(seconds[library.openblas_get_num_threads()])
        return tokens

    return answer


@pytest.mark.parametrize(("seconds", "chosen"), [({1: 0.0, 2: 0.05}, 1), ({1: 0.05, 2: 0.0}, 2)])
def test_the_quicker_number_is_chosen(seconds: dict[int, float], chosen: int, library: Any) -> None:
    assert choose_blas_threads(model_that_takes(seconds, library)) == chosen
    assert library.openblas_get_num_threads() == 2


def test_a_number_that_the_environment_gives_stays(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, "2")
    assert choose_blas_threads(model_that_takes({1: 0.0, 2: 0.05}, library)) == 2


@pytest.mark.slow("measures the speed of steps")
def test_explain_measures_a_run_of_minutes_with_the_threads_that_it_will_have(
    tmp_path: Path, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def noting_threads(*arguments: Any) -> TrialRun:
        threads.append(library.openblas_get_num_threads())
        return try_steps(*arguments)

    monkeypatch.setattr(forecast, "choose_blas_threads_of_run", lambda *_: 1)
    monkeypatch.setattr(forecast, "try_steps", noting_threads)
    monkeypatch.setattr(forecast, "TRIED_SECONDS", 0.1)
    for minutes in (5, None):
        config = config_of(minutes)
        run = prepare(config, tmp_path / f"{minutes}")
        with run.locked(), Session() as session:
            forecast.measure_run(config, run, session, None)
    assert threads == [1, 2]


def test_a_run_that_goes_on_has_the_threads_of_its_plan_until_it_ends(
    library: Any, tmp_path: Path
) -> None:
    run = open_run(tmp_path / "run")
    run.path.mkdir()
    write_plan(run.plan, training_plan(replace(FIXED, began=time.time(), blas_threads=1)))
    with timed_training.TimedTraining(RunInProgress(config_of(5), run, Listening())):
        assert (library.openblas_get_num_threads(), os.environ[THREADS_VARIABLE]) == (1, "1")
    assert library.openblas_get_num_threads() == 2
    assert THREADS_VARIABLE not in os.environ
