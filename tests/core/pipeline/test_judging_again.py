"""The newcomer's loop: a weak champion, a better run from before it, and `--resume` to judge it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import GateRejected
from nested_core.models.session import Session
from nested_core.pipeline import publishing
from nested_core.pipeline.finetune import FinetuneResult, finetune
from nested_core.pipeline.hooks import Steps
from nested_core.records.judged_run import read_judged_run
from nested_core.records.verdict import Verdict
from nested_core.registry import history, read_champion
from nested_core.seams import is_there
from nested_core.storage.run_directory import RunDirectory, open_run
from nested_core.text.stages import stages
from tests.builders.registering import promote
from tests.example import example_config
from tests.registry_care import audit

NAME = "capitals"


class Messages(Steps):
    """Keeps what a person is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_message(self, message: str) -> None:
        self.told.append(message)


def configure(registry: Path, policy: str, iters: int = 12, **changes: Any) -> FineTuneConfig:
    target = {"path": str(registry), "name": NAME, "promote": policy}
    return example_config(iters=iters, registry=target, **changes)


def resumed(
    registry: Path, policy: str, run: Path, hooks: Steps | None = None, **changes: Any
) -> FinetuneResult:
    config = configure(registry, policy, **changes)
    return finetune(config, open_run(run, resume=True), hooks, resume=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weak champion in `registry`, and a better run that was registered before that."""
    folder = tmp_path_factory.mktemp("loop")
    versions = {}
    for name, iters in (("weak", 4), ("better", 12)):
        config = configure(folder / "registry", "never", iters)
        versions[name] = finetune(config, open_run(folder / name)).version
    promote(folder / "registry", NAME, str(versions["weak"]), by="ann")
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


@pytest.mark.slow("trains and judges three runs")
def test_a_better_run_that_was_registered_earlier_is_judged_again_and_promoted(copy: Path) -> None:
    registry = copy / "registry"
    weak = read_champion(registry, NAME)
    result = resumed(registry, "better", copy / "better")
    assert result.promotion == "promoted"
    assert read_champion(registry, NAME) == result.version
    line = history(registry, NAME)[-1]
    assert line["previous"] == weak
    assert (registry / NAME / "judgements" / str(result.version)).is_dir()
    assert line["judgement"] is not None
    assert audit(registry, NAME).is_sound
    judged = result.run.gate.read_bytes()
    for policy in ("never", "better", "always", *(["approve"] if is_there("approval") else [])):
        again = resumed(registry, policy, copy / "better")
        assert again.promotion == "already_champion"
        assert result.run.gate.read_bytes() == judged  # against the champion that it replaced
    assert len(history(registry, NAME)) == 2


@pytest.mark.slow("trains the same run twice")
def test_a_run_reproduced_byte_for_byte_says_so(copy: Path, tmp_path: Path) -> None:
    registry, hooks = copy / "registry", Messages()
    result = finetune(configure(registry, "never"), open_run(tmp_path / "same"), hooks)
    told = [message for message in hooks.told if "the same adapter, byte for byte, as" in message]
    assert len(told) == 1
    assert str(result.version)[:12] in told[0]
    assert "/better, which was registered" in told[0]
    own = Messages()
    resumed(registry, "never", tmp_path / "same", own)
    assert any("byte for byte" in message for message in own.told)
    own = Messages()
    resumed(registry, "never", copy / "better", own)
    assert not any(f"as {copy / 'better'}" in message for message in own.told)


@pytest.mark.slow("trains a run and judges it three times")
@pytest.mark.parametrize("is_rejected", [False, True])
def test_a_champion_that_moves_while_the_gate_works_is_judged_against_once_more(
    is_rejected: bool, copy: Path
) -> None:
    registry = copy / "registry"
    other = finetune(configure(registry, "never", 5), open_run(copy / "other")).version

    class Meanwhile(Messages):
        def judge(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> Verdict:
            verdict = super().judge(config, run, session)
            if read_champion(registry, NAME) != other:
                promote(registry, NAME, str(other), by="bob")
                if is_rejected:
                    raise GateRejected("worse than that champion", run=run, verdict=verdict)
            return verdict

    hooks = Meanwhile()
    result = resumed(registry, "better", copy / "better", hooks)
    assert result.promotion == "promoted"
    assert [m for m in hooks.told if "running it once more" in m] != []
    assert history(registry, NAME)[-1]["previous"] == other


@pytest.mark.slow("trains and judges two runs")
def test_a_version_that_is_judged_again_as_not_better_has_that_verdict(copy, monkeypatch) -> None:
    registry = copy / "registry"
    champion = read_champion(registry, NAME)
    monkeypatch.setattr(publishing, "find_kept_champion", lambda *_: champion)
    config, judged = configure(registry, "better"), read_judged_run(copy / "better")
    assert publishing.register_run(config, judged, champion).is_registered
    assert "tried" not in [line["action"] for line in history(registry, NAME)]


@pytest.mark.slow("trains and judges several runs")
def test_a_verdict_that_rejects_what_is_registered_counts(copy, caplog) -> None:
    registry = copy / "registry"
    caplog.set_level("INFO", logger=stages.name)
    with pytest.raises(GateRejected):
        resumed(registry, "always", copy / "better", gate={"min_relative_change": 1.5})
    told = f"{copy / 'better'} is trained already: nothing is trained, the gate runs again"
    assert caplog.messages[0] == told
    version = next(p.name for p in (registry / NAME / "judgements").iterdir())
    with pytest.raises(GateRejected, match="rejected this adapter"):
        promote(registry, NAME, version, by="ann")
