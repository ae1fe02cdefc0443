"""Where a run stands, as `status` tells it, from its first file to its verdict and beyond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nested_core.config.sections import GateSection
from nested_core.errors import GateRejected, TrainingStopped
from nested_core.pipeline import steps
from nested_core.records import verdict_file
from nested_core.records.run_status import Run
from nested_core.records.verdict import JudgedAdapter, Verdict
from nested_core.records.verdict_file import write_verdict
from nested_core.storage import untrusted_files
from nested_core.storage.run_directory import RunDirectory
from tests.example import Finished, example_config, prepare, stop_after, train

pytestmark = pytest.mark.slow("looks at a run in each of its stages")

JUDGED = JudgedAdapter("adapter", "0" * 64)
PASSED = Verdict((), 8, JUDGED, JUDGED, ())


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Finished]:
    """The state after each stage of one run of 8 steps."""
    config = example_config(val_batches=0)
    run = RunDirectory(tmp_path_factory.mktemp("status") / "run")
    seen: dict[str, str] = {}

    def look(stage: str) -> None:
        seen[stage] = Run(run).state

    prepare(config, run.path)
    look("loaded")
    with run.locked():
        look("locked")
    with pytest.raises(TrainingStopped):
        train(config, run, on_start=stop_after(3))
    look("stopped")
    done = train(config, run)
    look("trained")
    strict = config.model_copy(update={"gate": GateSection(min_relative_change=1e6)})
    with pytest.raises(GateRejected):
        steps.judge(strict, run)
    look("rejected")
    steps.judge(config, run)
    look("verified")
    return seen, done


def test_each_stage_of_a_run_has_its_state(states: tuple[dict[str, str], Finished]) -> None:
    assert states[0] == {
        "loaded": "never began",
        "locked": "running",
        "stopped": "resumable",
        "trained": "trained",
        "rejected": "rejected",
        "verified": "verified",
    }


def test_a_verdict_that_a_resumed_run_takes_away_meanwhile_is_none(tmp_path, monkeypatch) -> None:
    run = prepare(example_config(), tmp_path / "run")
    write_verdict(run.path, PASSED, {})
    read = untrusted_files.read_regular

    def after(path: Path, limit: int | None) -> Any:
        run.manifest.unlink()
        run.gate.unlink()
        return read(path, limit)

    monkeypatch.setattr(verdict_file, "read_regular", after)
    taken_away = Run(run)
    assert (taken_away.verdict, taken_away.state, taken_away.problems) == (None, "never began", [])


def test_a_verdict_without_its_manifest_is_none_and_an_edited_one_is_damage(tmp_path) -> None:
    run = prepare(example_config(), tmp_path / "run")
    write_verdict(run.path, PASSED, {})
    assert Run(run).state == "verified"
    run.gate.write_bytes(run.gate.read_bytes().replace(b"adapter", b"another"))
    edited = Run(run)
    assert (edited.verdict, edited.state) == (None, "damaged")
    assert "gate.json has changed since the verdict was given" in edited.problems[0]
    run.manifest.unlink()
    assert (Run(run).verdict, Run(run).problems) == (None, [])


def test_a_verified_run_that_was_made_longer_and_stopped_is_resumable(states, tmp_path) -> None:
    longer, run = example_config(val_batches=0, iters=16), states[1].run
    steps.write_run_config(longer, run, resume=True)
    with pytest.raises(TrainingStopped):
        train(longer, run, on_start=stop_after(12))
    assert Run(run).state == "resumable"


def test_the_checkpoint_that_a_killed_run_goes_on_from_is_named(tmp_path: Path) -> None:
    config = example_config(val_batches=0, save_every=2, steps_per_report=1)
    run = RunDirectory(tmp_path / "run")
    prepare(config, run.path)
    with pytest.raises(TrainingStopped):
        train(config, run, on_start=stop_after(5))
    assert (Run(run).state, Run(run).find_checkpoint()) == ("resumable", "step-0000005")
    weights = run.checkpoints / "step-0000005" / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert Run(run).find_checkpoint() == "step-0000004"
