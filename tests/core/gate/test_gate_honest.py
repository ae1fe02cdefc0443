"""What must pass: honest runs of every kind; and the original trainer's failed runs, rebuilt."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from nested_core.errors import GateRejected, SilentUpdateWarning
from nested_core.gate.judge import run_gate_checks, verify_adapters
from nested_core.optim.named_updates import apply_flat_updates_to_nested, flatten
from nested_core.pipeline import steps
from nested_core.storage.adapter import WEIGHTS_NAME
from nested_core.training import trainer
from tests.core.gate.pairs import codes
from tests.example import Finished, example_config, prepare, train, train_example
from tests.left_out import slow_except

RULES = [{"match": "self_attn", "tier": 0}, {"match": "mlp", "tier": 1}]
ONE_TIER = {"frequencies": [1]}
STEPS = 14  # of a run that never changes
TOO_HIGH_AFTER_10 = {"name": "step_decay", "arguments": [2e-3, 1000, 10]}
HONEST: dict[str, dict[str, Any]] = {
    "one tier": {"nested": ONE_TIER},
    "a rate of 1e-6": {"learning_rate": 1e-6},
    "rank 1": {"lora_parameters": {"rank": 1}},
    "tiers by hand": {
        "nested": {"frequencies": [1, 3], "strategy": "manual", "assignments": RULES}
    },
    "gathered gradients and a flush": {"iters": 7, "nested": {"slow_gradients": "accumulate"}},
    "AdamW": {"optimizer": "adamw"},
    "SGD": {"optimizer": "sgd", "learning_rate": 0.05, "nested": ONE_TIER},
    "an earlier step that was the best": {
        "iters": 14,
        "lr_schedule": TOO_HIGH_AFTER_10,
        "steps_per_eval": 2,
    },
}


@pytest.mark.slow("trains and judges a run of its own")
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_run_passes(tmp_path: Path, name: str) -> None:
    done = train_example(tmp_path / "run", **HONEST[name])
    verdict = run_gate_checks(done.config, done.run).verdict
    assert codes(verdict) == []
    assert verdict.has_passed
    assert verdict.proof is not None
    assert (verdict.adapter_step == done.result.step) is ("earlier" not in name)


@pytest.mark.slow("trains and judges two runs of its own")
def test_a_run_that_goes_on_from_a_trained_adapter_passes(tmp_path: Path) -> None:
    first = train_example(tmp_path / "first")
    source = str(first.run.adapter / WEIGHTS_NAME)
    second = train_example(tmp_path / "second", resume_adapter_file=source, seed=1)
    assert run_gate_checks(second.config, second.run).verdict.has_passed
    assert verify_adapters(first.run.adapter, second.run.adapter).has_passed
    assert codes(verify_adapters(first.run.adapter, second.run.initial)) == ["unchanged"]


Apply = Callable[[Any, dict[str, Any]], None]


def joined_path(model: Any, updates: dict[str, Any]) -> None:
    """Names with a dot between all characters, which match nothing: the original's fault."""
    known = dict(flatten(model.trainable_parameters()))
    model.update({name: known[name] for name in known if ".".join(name) in updates})


def on_a_copy(model: Any, updates: dict[str, Any]) -> None:
    """The original's repair: a deep copy of the parameters is changed, and thrown away."""
    parameters = copy.deepcopy(dict(flatten(model.trainable_parameters())))
    parameters.update(updates)


def run_losing(tmp_path: Path, apply: Apply, **changes: Any) -> Finished:
    """A run whose updates are computed and then written by a function of the original's kind."""
    config = example_config(**changes)
    run = prepare(config, tmp_path / "run")
    with (
        patch.object(trainer, "apply_flat_updates_to_nested", apply),
        pytest.warns(SilentUpdateWarning),
    ):
        return train(config, run)


@pytest.mark.claim("A run that changed nothing does not pass")
@pytest.mark.parametrize(
    "apply",
    slow_except([joined_path, on_a_copy], joined_path, reason="trains many steps, judged at each"),
)
def test_a_run_that_reports_a_loss_at_every_step_and_never_changes_is_rejected(
    tmp_path: Path, apply: Apply
) -> None:
    done = run_losing(tmp_path, apply, iters=STEPS, steps_per_report=1, steps_per_eval=1)
    records = done.metrics()
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    assert len(losses) == STEPS
    assert len(set(losses)) > 10  # the batches differ, so the loss seems to move
    assert len([r for r in records if "val_loss" in r]) == STEPS + 1
    assert len({r["val_loss"] for r in records if "val_loss" in r}) == 1
    with pytest.raises(GateRejected, match=r"Rejected: unchanged \(all 42"):
        steps.judge(done.config, done.run)
    verdict = json.loads(done.run.gate.read_bytes())
    assert verdict["adapter_step"] == 4  # the first that every tier had an update by
    assert [tier["applied_updates"] for tier in verdict["tiers"]] == [4, 2, 1]
    assert [tier["changed"] for tier in verdict["tiers"]] == [0, 0, 0]


def test_a_run_that_loses_the_updates_of_one_tier_is_rejected_for_that_tier(tmp_path) -> None:
    def shallow_only(model: Any, updates: dict[str, Any]) -> None:
        kept = {n: v for n, v in updates.items() if ".layers.3." in n}
        apply_flat_updates_to_nested(model, kept)

    done = run_losing(tmp_path, shallow_only)
    verdict = run_gate_checks(done.config, done.run).verdict
    assert set(codes(verdict)) == {"no_effect", "tier_unchanged"}
    assert [tier.changed for tier in verdict.tiers] == [14, 0, 0]
