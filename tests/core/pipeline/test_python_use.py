"""A fine-tune from Python: what it shows, whom it tells, how it prints, what it answers."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nested_core import ConfigError, DamagedError, FineTuneConfig, champion, promote, read_report
from nested_core.pipeline import finetune as finetune_module
from nested_core.pipeline.finetune import FinetuneResult, finetune
from nested_core.pipeline.hooks import ShownProgress, Steps
from nested_core.pipeline.publishing import register_run
from nested_core.records.judged_run import read_judged_run
from nested_core.records.outcome_names import Outcome
from nested_core.records.run_status import read_run
from nested_core.records.skip import Skip
from nested_core.records.verdict_file import read_verdict
from nested_core.registry import history
from nested_core.registry.policy import set_policy
from nested_core.storage.run_directory import open_run
from tests.example import MODEL, example_config, generate_answers
from tests.left_out import needs_rooms


class Recorder(ShownProgress):
    """Keeps what it is told, and shows it too."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, int]] = []
        self.reports: list[Mapping[str, Any]] = []

    def on_step(self, step: int, steps: int) -> None:
        self.steps.append((step, steps))
        super().on_step(step, steps)

    def on_report(self, figures: Mapping[str, Any]) -> None:
        self.reports.append(figures)
        super().on_report(figures)


@dataclass
class Session:
    result: FinetuneResult
    hooks: Recorder = field(default_factory=Recorder)
    shown: str = ""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    run = open_run(tmp_path_factory.mktemp("python") / "run")
    hooks = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        shown = io.StringIO()
        patch.setattr(sys, "stderr", shown)
        config = example_config(iters=8, batch_size=8, steps_per_report=4, steps_per_eval=4)
        result = finetune(config, run, hooks)
        return Session(result, hooks, shown.getvalue())


def test_each_step_and_each_report_is_told(session: Session) -> None:
    assert session.hooks.steps == [(step, 8) for step in range(1, 9)]
    training = [r for r in session.hooks.reports if "train_loss" in r]
    assert [report["step"] for report in training] == [4, 8]
    evaluated = [r["iteration"] for r in session.hooks.reports if "val_loss" in r]
    assert evaluated == [0, 4, 8]


def test_progress_is_one_line_that_is_rewritten_and_ends_with_the_verdict(session: Session) -> None:
    assert session.result.verdict is not None
    lines = session.shown.split("\n")
    assert len(lines) == 2  # all that came before was written over
    shown = [part.strip() for part in lines[0].split("\r")]
    assert shown[-1] == session.result.verdict.summary()
    (last_step,) = [part for part in shown if part.startswith("train 100%, step 8 of 8, ")]
    assert "training loss " in last_step
    assert "validation loss " in last_step


@pytest.mark.parametrize(
    ("is_shown", "progress", "expected"),
    [(True, True, ShownProgress), (True, False, Steps), (False, True, Steps)],
)
def test_one_argument_turns_it_off_and_without_a_terminal_there_is_none(
    tmp_path, monkeypatch, is_shown, progress, expected
) -> None:
    used: list[Steps] = []

    @contextmanager
    def keep(_: object, run: Any, hooks: Steps, **__: object) -> Iterator[Any]:
        used.append(hooks)
        yield SimpleNamespace(validate=lambda: Skip(Outcome.SKIPPED_UNCHANGED, "as before"))

    monkeypatch.setattr(finetune_module, "working_on", keep)
    monkeypatch.setattr(finetune_module, "can_show_progress", lambda: is_shown)
    finetune(example_config(), open_run(tmp_path / "run"), progress=progress)
    assert [type(hooks) for hooks in used] == [expected]


def test_everything_prints_as_one_line(session: Session) -> None:
    run = session.result.run
    for value in (session.result, session.result.verdict, read_report(run.path), read_run(run)):
        text = repr(value)
        assert "\n" not in text
        assert len(text) < 400
        assert type(value).__name__ in text


@needs_rooms("chat")
def test_the_result_answers_as_plain_mlx_lm_does(session: Session) -> None:
    prompt = "I want to see Slovakia. Where to?"
    (expected,) = generate_answers(str(MODEL), [prompt], adapter=session.result.run.adapter)
    assert session.result.ask(prompt, max_tokens=32) == expected


@needs_rooms("chat")
def test_a_result_is_promoted_and_the_champion_answers_as_plain_mlx_lm_does(
    session: Session, tmp_path: Path
) -> None:
    registry, prompt = tmp_path / "registry", "I want to see Slovakia. Where to?"
    promoted = promote(session.result, "capitals", registry=registry, by="ann")
    found = champion(registry / "capitals")
    assert found == promoted == champion("capitals", registry=registry)
    (expected,) = generate_answers(str(MODEL), [prompt], adapter=found.folder)
    assert found.ask(prompt, max_tokens=32) == expected
    assert found.verdict == read_verdict(session.result.run.gate)
    assert repr(found).startswith(f"RegisteredAdapter({registry}/capitals, version ")
    (line,) = [line for line in history(registry, "capitals") if line["action"] == "promote"]
    assert (line["by"], line["version"]) == ("ann", found.version)
    assert champion(f"{registry}/capitals@{found.version[:8]}") == found


def test_a_champion_whose_files_changed_is_not_asked(session: Session, tmp_path: Path) -> None:
    found = promote(session.result.run.path, "capitals", registry=tmp_path)
    place = found.folder / "gate.json"
    place.chmod(0o644)
    place.write_bytes(place.read_bytes() + b" ")
    with pytest.raises(DamagedError, match="gate.json"):
        found.ask("Anybody?")


def test_a_promotion_against_the_policy_is_warned_of(session: Session, tmp_path: Path) -> None:
    config = example_config(registry={"path": str(tmp_path), "name": "capitals"})
    register_run(config, read_judged_run(session.result.run.path), None)
    set_policy(tmp_path, "capitals", by="ann", changes={"promote": "never"})
    with pytest.warns(RuntimeWarning, match="capitals: .*never"):
        promote(session.result, "capitals", registry=tmp_path)
    assert history(tmp_path, "capitals")[-1]["action"] == "promote"


@pytest.mark.parametrize("name", ["../capitals", "a/b", ""])
def test_what_is_no_name_cannot_be_promoted(session: Session, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        promote(session.result, name, registry=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_is_no_champion(session: Session) -> None:
    with pytest.raises(ConfigError, match="is no name in a registry"):
        champion(session.result.run.path)


def test_a_result_without_an_adapter_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no adapter to ask"):
        FinetuneResult(open_run(tmp_path / "run")).ask("Anybody?")


def test_a_wrong_configuration_is_told_as_on_the_command_line() -> None:
    with pytest.raises(ConfigError) as error:
        FineTuneConfig(learning_rte=1, iters=0, nested={"frequences": [1]})  # type: ignore[call-arg, arg-type]
    text = str(error.value)
    assert text.startswith("The configuration in FineTuneConfig(...) cannot be used:")
    assert "learning_rte: unknown key; did you mean learning_rate?" in text
    assert "iters: Input should be greater than 0; found 0" in text
    assert "nested.frequences: unknown key; did you mean frequencies?" in text
    assert "pydantic" not in text
