"""Runs of the example that several tests look at."""

from __future__ import annotations

from typing import Any

import pytest

from tests.example import Finished, train_example

EVERY_STEP = {"save_every": 1, "steps_per_report": 1, "training": {"keep_checkpoints": 99}}


@pytest.fixture(scope="session")
def every_step(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Nine steps of tiers [1, 2, 4], with a checkpoint and a report at each."""
    return train_example(tmp_path_factory.mktemp("every") / "run", iters=9, **EVERY_STEP)


@pytest.fixture(scope="session")
def accumulated(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same where slow tiers gather their gradients; the last chunks are flushed."""
    nested: dict[str, Any] = {"frequencies": [1, 2, 4], "slow_gradients": "accumulate"}
    path = tmp_path_factory.mktemp("accumulated") / "run"
    return train_example(path, iters=9, nested=nested, **EVERY_STEP)
