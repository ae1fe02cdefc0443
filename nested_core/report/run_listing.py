"""The runs of a folder, a row each; one that is damaged says so in its row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.config.resume import read_run_config
from nested_core.errors import ConfigError, NestedTuneError
from nested_core.report.run_status import (
    count_steps,
    describe_outcome,
    measure_minutes,
    read_start_time,
    read_status,
)
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.loss_conclusion import describe_passed
from nested_core.text.loss_format import format_loss


@dataclass(frozen=True)
class ListedRun:
    """A run as the list shows it; losses are None until there is one, in nats a token.

    train_loss, val_loss: the last ones; `not_finite` names those of them that are not finite.
    offered_step, offered_val_loss, gate_loss: of the adapter that the run offers (RunFigures).
    state: as in `status`, or "damaged"; then `problem` says what is wrong.
    started: ISO 8601, UTC.
    answers_broken: whether training broke the answers to the sample prompts.
    conclusion: the gate's word for the held-out loss: better, no_worse, inconclusive or worse.
    quality_measured: whether the gate had held-out losses or answers to a suite.
    adapter: the name that it registers under, None without a registry.
    outcome: what became of it, in a word; `describe_outcome`.
    minutes: from its beginning to the last that training or gate wrote.
    """

    path: str
    state: str
    step: int | None
    steps: int | None
    train_loss: float | None
    val_loss: float | None
    verdict: str | None
    started: str
    offered_step: int | None = None
    offered_val_loss: float | None = None
    gate_loss: float | None = None
    not_finite: tuple[str, ...] = ()
    problem: str | None = None
    conclusion: str | None = None
    answers_broken: bool = False
    quality_measured: bool = False
    adapter: str | None = None
    outcome: str | None = None
    minutes: float | None = None

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return Path(self.path).resolve().name

    def describe_verdict(self) -> str | None:
        """What is wrong with a damaged run, else what the gate said: `passed, inconclusive`."""
        if self.verdict == "passed":
            return describe_passed(
                self.conclusion, is_measured=self.quality_measured, is_broken=self.answers_broken
            )
        return self.problem or self.verdict

    def describe_outcome(self) -> str:
        """What became of it, with the words of a verdict that passed: `promoted: passed, better`.

        Of a run that is being worked on its state, of a damaged one what is wrong with it.
        """
        if self.outcome is None:
            return f"damaged: {self.problem}"
        if self.verdict != "passed" or self.state == "running":
            return self.outcome
        return f"{self.outcome}: {self.describe_verdict()}"

    def describe_step(self) -> str | None:
        """The offered step of all: `33 of 36`; before one is offered `- (at 4 of 36)`."""
        of_all = "" if self.steps is None else f" of {self.steps:,}"
        if self.offered_step is not None:
            return f"{self.offered_step:,}{of_all}"
        return None if self.step is None else f"- (at {self.step:,}{of_all})"

    def describe_val_loss(self) -> str | None:
        """The offered adapter's validation loss; before one is offered the last, which it says."""
        if self.offered_step is not None:
            return None if self.offered_val_loss is None else format_loss(self.offered_val_loss)
        if self.val_loss is None and "val_loss" not in self.not_finite:
            return None
        return f"{format_loss(self.val_loss)} (last)"

    def describe_minutes(self) -> str | None:
        """How long it took: `0.4`, `12`."""
        if self.minutes is None:
            return None
        return f"{self.minutes:.1f}" if self.minutes < 10 else f"{self.minutes:.0f}"


def list_runs(folder: Path) -> list[ListedRun]:
    """The runs in a folder, and the folder itself where it is one, newest first.

    Folders that no run has begun in are passed over. ConfigError where there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder.absolute()} is not a folder. Give the one that holds your runs; without "
            f"--run-dir they go to runs/ in the folder that the command is given in."
        )
    candidates = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    runs = [RunDirectory(path) for path in candidates]
    rows = [_read_listed_run(run) for run in runs if run.has_run_files()]
    return sorted(rows, key=lambda row: row.started, reverse=True)


def _read_listed_run(run: RunDirectory) -> ListedRun:
    started = read_start_time(run).isoformat(timespec="seconds")
    try:
        config = read_run_config(run)
        status: dict[str, Any] = read_status(run)
    except (NestedTuneError, OSError) as error:
        nothing = (None,) * 5
        return ListedRun(str(run.path), "damaged", *nothing, started, problem=str(error))
    return ListedRun(
        path=str(run.path),
        state=status["state"],
        step=status["step"],
        steps=count_steps(run, config),
        train_loss=status["current_train_loss"],
        val_loss=status["current_val_loss"],
        verdict=status["verdict"],
        started=started,
        offered_step=status["offered_step"],
        offered_val_loss=status["offered_val_loss"],
        gate_loss=status["gate_loss"],
        not_finite=tuple(name.removeprefix("current_") for name in status["not_finite"]),
        conclusion=status["conclusion"],
        answers_broken=status["answers_broken"],
        quality_measured=status["quality_measured"],
        adapter=config.registry.name,
        outcome=describe_outcome(run, config, status),
        minutes=measure_minutes(run),
    )
