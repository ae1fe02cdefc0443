"""Each reason of the gate injected into a live flow: it fails with it and promotes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
from prefect.client.schemas.objects import State

from flows.finetune import FinetuneParameters, finetune
from flows.flow_runs import prefect_hooks
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DamagedError, GateRejected
from nested_core.records.verdict import Code
from nested_core.storage.run_directory import RunDirectory
from tests.core.gate.adversaries import CASES, DAMAGED, Case, Scene, suite_bounds
from tests.example import example_settings, train_example
from tests.left_out import slow_except

pytestmark = pytest.mark.usefixtures("prefect_server")
SETTINGS = {"save_every": 4, "steps_per_report": 1}
# No run of the table harms a few examples alone: tests/core/gate/test_conclusions.py has those.
# Broken answers are a reason only where gate.samples asks for it: test_sample_answers.py.
NOT_IN_THE_TABLE = {"examples_harmed", "answers_broken"}
# One of each kind: the first of the table that is rejected for this reason before any other.
INJECTED = {
    code: next(c for c in CASES if c.expected[:1] == (code,))
    for code in get_args(Code)
    if code not in NOT_IN_THE_TABLE
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, RunDirectory]:
    """Two finished runs; the first is what each flow finds trained."""
    folder = tmp_path_factory.mktemp("trained")
    first, second = (
        train_example(folder / str(seed), seed=seed, **SETTINGS).run for seed in (0, 1)
    )
    return first, second


class Saboteur:
    """In place of the task that trains: an honest training's files, and then a case of the table.

    The gate and all that comes after it are the flow's own.
    """

    def __init__(self, case: Case, trained: tuple[RunDirectory, RunDirectory]) -> None:
        self._case, self._trained = case, trained

    def __call__(self, config: FineTuneConfig, run_dir: Path, *_: object) -> None:
        run, (honest, other) = RunDirectory(run_dir), self._trained
        for name in ("checkpoints", "adapter"):
            shutil.copytree(honest.path / name, run.path / name)
        for name in ("metrics.jsonl", "validation-losses.jsonl", "result.json"):
            shutil.copyfile(honest.path / name, run.path / name)
        self._case.build(Scene(config, run, other))


@pytest.fixture
def sabotaged(request, tmp_path, trained) -> Iterator[tuple[Path, State[Any]]]:
    """A flow whose training was spoilt, and how it ended."""
    case: Case = request.param
    target = {"path": str(tmp_path / "registry"), "name": "capitals", "promote": "always"}
    settings = SETTINGS | {"registry": target, "gate": bounds(case, tmp_path)}
    values = example_settings(**settings) | {"run_dir": str(tmp_path / "run")}
    given = FinetuneParameters.model_validate(values)
    with patch.object(prefect_hooks, "train", Saboteur(case, trained)):
        yield tmp_path, finetune(given, return_state=True)


def bounds(case: Case, folder: Path) -> dict[str, Any]:
    """The gate's section, where a case is about a bound."""
    code = case.expected[0] if case.expected else None
    if code in ("task_below", "task_regressed"):
        return suite_bounds(folder, code)
    if code == "drift":
        return {"max_kl": 0.001}
    if code != "forgetting":
        return {}
    general = folder / "general.jsonl"
    general.write_text('{"text": "The capital of France is Paris."}\n')
    return {"general_data": str(general), "max_general_loss_increase": 0.0}


@pytest.mark.parametrize(
    "sabotaged",
    slow_except(INJECTED.values(), INJECTED["unchanged"], reason="a flow run for each reason"),
    ids=INJECTED,
    indirect=True,
)
def test_the_flow_fails_with_the_reason_and_promotes_nothing(sabotaged, request) -> None:
    folder, state = sabotaged
    code = request.node.callspec.id
    assert state.is_failed()
    told = "all 84 tensors" if code == "unchanged" else code  # the state's name says it
    assert str(state.message).startswith(f"{state.name} ({told}")
    with pytest.raises(GateRejected, match=code):
        state.result()
    document = json.loads((folder / "run" / "gate.json").read_bytes())
    assert document["verdict"] == "failed"
    assert document["reasons"][0]["code"] == code
    assert not (folder / "registry").exists()


HARMED = [case for case in CASES if case.expected == (DAMAGED,)][:2]


@pytest.mark.slow("a flow run for each kind of tampering")
@pytest.mark.parametrize("sabotaged", HARMED, ids=lambda case: case.name, indirect=True)
def test_a_flow_whose_run_was_tampered_with_fails_without_a_verdict(sabotaged) -> None:
    folder, state = sabotaged
    assert state.is_failed()
    with pytest.raises(DamagedError):
        state.result()
    assert not (folder / "run" / "gate.json").exists()
    assert not (folder / "registry").exists()
